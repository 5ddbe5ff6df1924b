from pages import ROOT

# The documentation is tested in a checkout: a source distribution is without its pictures, and without the Makefile.
collect_ignore_glob = [] if (ROOT / "Makefile").exists() else ["test_*.py"]
