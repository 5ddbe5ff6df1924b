"""
Run what has to hold on every supported release of TRL (contract.txt) on each of them, and write it down.

    python -m tests.matrix                              # the last release of every minor version, the newest first
    python -m tests.matrix --releases 1.8.0 1.14.2      # these
    python -m tests.matrix --write                      # takes outcomes and signatures into docs/compatibility.md

One environment serves all: each TRL lies in a folder of its own, before which nothing else is looked for. The oldest
comes with the oldest transformers, and those before 1.8 with the last that parse tool calls as they do. The hooks are
compared with the signatures of every release, patches included.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
CONTRACT = HERE / "contract.txt"
SIGNATURES = HERE / "signatures.json"
OUTCOMES = HERE / "outcomes.json"
PAGE = ROOT / "docs" / "compatibility.md"
OLDEST = Version("1.0.0")
_HTTP = ("httpx", "httpcore", "h11", "anyio")  # which older releases of the hub use
# With the oldest TRL, its oldest transformers and what they need.
FLOOR = ("transformers==4.56.2", "huggingface_hub==0.36.2", "tokenizers==0.22.2", "datasets==5.0.1", *_HTTP)
# Before TRL 1.8, the last that parse tool calls as TRL does.
OLDER = ("transformers==5.12.0", "huggingface_hub==1.33.0", "tokenizers==0.22.2", *_HTTP)


@dataclass
class Outcome:
    """What one release has made of the contract."""

    release: str
    transformers: str = ""
    passed: int = 0
    failed: list[str] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    error: str = ""

    @property
    def is_good(self) -> bool:
        return not self.failed and not self.error and self.passed > 0

    def cells(self) -> list[str]:
        reasons = "; ".join(f"{reason} ({count})" for reason, count in sorted(self.skipped.items()))
        bad = f"**{len(self.failed)} failed**" if self.failed else self.error
        return [self.release, self.transformers, str(self.passed), bad or "-", reasons or "-"]


def published() -> list[Version]:
    """All supported releases that can be installed, oldest first."""
    command = [sys.executable, "-m", "pip", "index", "versions", "trl", "--disable-pip-version-check"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (line,) = [line for line in told.splitlines() if line.startswith("Available versions:")]
    versions = map(Version, line.removeprefix("Available versions:").replace(" ", "").split(","))
    return sorted(version for version in versions if version >= OLDEST)


def last_of_each_minor(releases: list[Version]) -> list[Version]:
    """The oldest release, and the last one of every minor version; the newest first."""
    last = {release.release[:2]: release for release in releases}
    return sorted({OLDEST, *last.values()}, reverse=True)


def installed(release: Version, folder: Path) -> Path:
    """The folder that has a release of TRL, with the transformers of its time where it needs them."""
    place = folder / str(release)
    if not (place / "trl").exists():
        of_its_time = FLOOR if release == OLDEST else OLDER if release < Version("1.8") else ()
        wanted = [f"trl=={release}", *of_its_time]
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, "--target", str(place), *wanted], check=True)
    if release == OLDEST:
        # TRL imports trackio where it is found, and that of today needs a newer hub than this one.
        (place / "sitecustomize.py").write_text('import sys\n\nsys.modules["trackio"] = None\n')
    return place


def environment_of(place: Path) -> dict[str, str]:
    paths = [str(place), str(ROOT / "src"), str(ROOT)]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def signatures_of(place: Path) -> dict[str, list[str] | None]:
    """Parameters of the methods that replay wraps, by name."""
    command = [sys.executable, "-m", "tests.matrix.signatures"]
    told = subprocess.run(command, env=environment_of(place), cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(told.stdout.splitlines()[-1])


def run_contract(release: Version, place: Path, timeout: int) -> Outcome:
    """Run the contract on a release, in a process of its own."""
    outcome = Outcome(str(release))
    environment = environment_of(place)
    about = "import transformers, trl; print(transformers.__version__, trl.__version__)"
    told = subprocess.run([sys.executable, "-c", about], env=environment, capture_output=True, text=True)
    outcome.transformers, found = told.stdout.split()[-2:] if told.returncode == 0 else ("", "")
    if found != str(release):
        outcome.error = f"**{found or told.stderr.strip().splitlines()[-1]} in place of TRL {release}**"
        return outcome
    report = place / "contract.xml"
    report.unlink(missing_ok=True)
    names = [line for line in CONTRACT.read_text().splitlines() if line and not line.startswith("#")]
    files = sorted({str(ROOT / "tests" / "end_to_end" / name.partition("::")[0]) for name in names})
    command = [sys.executable, "-m", "pytest", "--contract", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
    try:
        told = subprocess.run(
            [*command, *files], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        outcome.error = f"**not done after {timeout} s**"
        return outcome
    if not report.exists():
        outcome.error = "**did not start**: " + (told.stdout + told.stderr).strip()[-300:].replace("\n", " ")
        return outcome
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        skipped = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            outcome.failed.append(f"{case.get('classname')}::{case.get('name')}")
        elif skipped is not None:
            outcome.skipped[reason_of(skipped)] += 1
        else:
            outcome.passed += 1
        outcome.seconds += float(case.get("time", 0))
    if told.returncode not in (0, 1):
        outcome.error = f"**pytest ended with {told.returncode}**"
    return outcome


def reason_of(skipped: ElementTree.Element) -> str:
    """Why a test was skipped; where a whole file was, its text has the reason at its end."""
    message = skipped.get("message", "")
    told = (skipped.text or "") if message == "collection skipped" else message
    return told.rpartition("Skipped: ")[2].strip(" '\")\n")


def table(outcomes: list[Outcome]) -> list[str]:
    """The outcomes as a table in Markdown."""
    header = ["TRL", "transformers", "passed", "failed", "skipped, and why"]
    rows = [header, ["---"] * len(header), *(outcome.cells() for outcome in outcomes)]
    return [f"| {' | '.join(row)} |" for row in rows]


def changes(signatures: dict[str, dict[str, list[str] | None]]) -> list[str]:
    """What each release changed in the parameters of the methods that replay wraps."""
    lines = []
    releases = sorted(signatures, key=Version)
    for before, after in itertools.pairwise(releases):
        told = []
        for method in signatures[after]:
            old, new = signatures[before].get(method), signatures[after][method]
            if old == new:
                continue
            if old is None or new is None:
                told.append(f"`{method}` {'is new' if old is None else 'is gone'}")
                continue
            gone, added = [p for p in old if p not in new], [p for p in new if p not in old]
            parts = [
                f"{what} {', '.join(f'`{p}`' for p in of)}" for what, of in (("adds", added), ("drops", gone)) if of
            ]
            told.append(f"`{method}` {' and '.join(parts) or 'changes the order of its parameters'}")
        if told:
            lines.append(f"- **{after}**: {'; '.join(told)}")
    return lines


def write_between(page: Path, name: str, lines: list[str]) -> None:
    """Put lines between the two marks of that name."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    text = page.read_text()
    before, _, rest = text.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"{page} has no place {begin} ... {end}")
    page.write_text("\n".join([before + begin, "", *lines, "", end + after]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--releases", nargs="*", type=Version, help="releases of TRL; by default the last of each minor"
    )
    parser.add_argument("--folder", type=Path, default=ROOT / ".venv" / "releases", help="where they are installed")
    parser.add_argument("--jobs", type=int, default=2, help="releases at a time")
    parser.add_argument("--timeout", type=int, default=1200, help="seconds for a release")
    parser.add_argument("--write", action="store_true", help="write docs/compatibility.md and signatures.json")
    arguments = parser.parse_args()
    every = published() if arguments.write or not arguments.releases else arguments.releases
    releases = arguments.releases or last_of_each_minor(every)
    places = {release: installed(release, arguments.folder) for release in releases}

    outcomes = []
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for outcome in pool.map(lambda release: run_contract(release, places[release], arguments.timeout), releases):
            outcomes.append(outcome)
            print(f"{' | '.join(outcome.cells())} | {outcome.seconds:.0f} s", flush=True)
            for name in outcome.failed:
                print(f"    FAILED {name}", flush=True)
    if arguments.write:
        made = (
            {outcome["release"]: outcome for outcome in json.loads(OUTCOMES.read_text())} if OUTCOMES.exists() else {}
        )
        made |= {outcome.release: vars(outcome) for outcome in outcomes}
        newest_first = [made[release] for release in sorted(made, key=Version, reverse=True)]
        OUTCOMES.write_text(json.dumps(newest_first, indent=1) + "\n")
        outcomes = [Outcome(**outcome | {"skipped": Counter(outcome["skipped"])}) for outcome in newest_first]
        signatures = {str(release): signatures_of(installed(release, arguments.folder)) for release in every}
        SIGNATURES.write_text(json.dumps(signatures, indent=1).replace("\n   ", " ").replace("\n  ]", "]") + "\n")
        write_between(PAGE, "matrix", table(outcomes))
        write_between(PAGE, "signatures", changes(signatures))
        print(f"Written to {PAGE} and {SIGNATURES}")
    return 0 if all(outcome.is_good for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
