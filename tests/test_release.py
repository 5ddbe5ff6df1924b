"""What is published: metadata, the page on PyPI, the content of the source distribution."""

import re
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string
from email.message import Message
from pathlib import Path

import pytest
import yaml

import exgrpo_trl

ROOT = Path(__file__).parents[1]
ADDRESS = "https://example.org/someone/exgrpo-trl"
LINK = re.compile(r"(!?)\[[^\]]*\]\(([^)]*)\)")

if (ROOT / "PKG-INFO").exists():
    pytest.skip("this is an unpacked source distribution: its metadata are settled", allow_module_level=True)


@pytest.fixture(scope="module", params=["", f"{ADDRESS}/"], ids=["no address", "address"])
def published(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The address, and a folder with what was built."""
    for needed in ("build", "hatchling", "hatch_fancy_pypi_readme", "twine"):
        pytest.importorskip(needed, reason="builds the package: needs the extra `release`, as `make test` installs it")
    folder = tmp_path_factory.mktemp("dist")
    # Without isolation nothing is fetched. The wheel is made from the source distribution, as by an installer.
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, env={"REPOSITORY": request.param, "PATH": ""}, capture_output=True)
    return request.param.rstrip("/"), folder


def metadata_of(folder: Path) -> Message:
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return message_from_string(archive.read(name).decode())


def files_of(folder: Path) -> set[str]:
    (source,) = folder.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        return {member.name.split("/", 1)[1] for member in archive.getmembers()}


def test_twine_has_no_objection(published: tuple[str, Path]) -> None:
    command = [sys.executable, "-m", "twine", "check", "--strict", *map(str, published[1].iterdir())]
    checked = subprocess.run(command, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
    assert checked.stdout.count("PASSED") == 2


def test_every_link_on_pypi_leads_somewhere(published: tuple[str, Path]) -> None:
    address, folder = published
    page = str(metadata_of(folder).get_payload())
    readme = (ROOT / "README.md").read_text()
    relative = [(mark, url) for mark, url in LINK.findall(readme) if "://" not in url]
    assert {mark for mark, _ in relative} == {"", "!"}
    links = LINK.findall(page)
    assert all(url.startswith("https://") for _, url in links)
    if address:
        version = exgrpo_trl.__version__
        ours = [(mark, url) for mark, url in links if url.startswith(address)]
        assert ours == [(m, f"{address}/{'raw' if m else 'blob'}/v{version}/{url}") for m, url in relative]
        for _, url in relative:
            assert (ROOT / url.partition("#")[0]).exists(), url
        assert LINK.sub("", page) == LINK.sub("", readme)
    else:
        assert [url for _, url in links] == [url for _, url in LINK.findall(readme) if "://" in url]
        assert "Changelog · Contributing" in page
        assert "Pass rates and replay of the run above" not in page
    assert "REPOSITORY" not in page


def test_urls_name_what_exists(published: tuple[str, Path]) -> None:
    address, folder = published
    urls = dict(line.split(", ") for line in metadata_of(folder).get_all("Project-URL", []))
    assert urls.pop("Paper") == "https://arxiv.org/abs/2510.02245"
    expected = {
        "Repository": address,
        "Issues": f"{address}/issues",
        "Changelog": f"{address}/blob/v{exgrpo_trl.__version__}/CHANGELOG.md",
    }
    assert urls == (expected if address else {})


def test_the_source_distribution_has_what_its_tests_need_and_no_results(published: tuple[str, Path]) -> None:
    files = files_of(published[1])
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout: cannot tell which files are the project's")
    tracked = {name for name in listed.stdout.splitlines() if (ROOT / name).exists()}
    for part in ("src/", "tests/", "examples/"):
        assert {name for name in tracked if name.startswith(part)} <= files
    assert {"LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "hatch_build.py", "pyproject.toml"} <= files
    assert not [name for name in files if name.startswith(("benchmarks/results", "docs/images", ".git/", ".github"))]


def test_a_wheel_from_the_source_distribution_keeps_the_address(published: tuple[str, Path], tmp_path: Path) -> None:
    (source,) = published[1].glob("*.tar.gz")
    with tarfile.open(source) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.iterdir()
    command = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", str(tmp_path), str(unpacked)]
    subprocess.run(command, check=True, env={"PATH": ""}, capture_output=True)
    assert str(metadata_of(tmp_path)) == str(metadata_of(published[1]))


def test_the_wheel_has_the_package_and_nothing_else(published: tuple[str, Path]) -> None:
    (wheel,) = published[1].glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    package = {path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src").rglob("*.py")}
    package |= {f"exgrpo_trl/report/{name}" for name in ("template.html", "style.css", "page.js")}
    assert {f"src/{name}" for name in package} <= files_of(published[1])
    metadata = {name for name in names if ".dist-info/" in name}
    assert names - metadata == package | {"exgrpo_trl/py.typed"}


def test_citation_and_changelog_know_the_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == exgrpo_trl.__version__
    assert citation["license"] == "Apache-2.0"
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert headings[0] == "[Unreleased]"
    assert re.fullmatch(rf"\[{re.escape(exgrpo_trl.__version__)}\] - (not published|\d{{4}}-\d\d-\d\d)", headings[1])


@pytest.mark.parametrize(
    "form", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda path: path.stem
)
def test_issue_forms_are_forms(form: Path) -> None:
    content = yaml.safe_load(form.read_text())
    if form.stem == "config":
        assert content == {"blank_issues_enabled": False}
        return
    assert content["name"]
    assert content["description"]
    fields = content["body"]
    ids = [field["id"] for field in fields]
    assert len(ids) == len(set(ids))
    for field in fields:
        assert field["type"] in ("textarea", "dropdown")
        assert field["attributes"]["label"]
    assert any(field.get("validations", {}).get("required") for field in fields)
