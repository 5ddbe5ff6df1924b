"""The README's example runs."""

from pathlib import Path

import pytest
from readme import run_example

import exgrpo_trl

pytest.importorskip("math_verify", reason="the README's example needs the extra `math`, which `make test` installs")


def test_the_example_of_the_readme_runs(tmp_path: Path) -> None:
    output = run_example(tmp_path)
    assert Path(output.splitlines()[-1]) == Path(exgrpo_trl.__file__)
    assert (tmp_path / "outputs").is_dir()
