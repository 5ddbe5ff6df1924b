"""
What was aimed at, and what was measured: the targets of all results in a folder.

    python -m benchmarks.targets                      # those of `make bench`
    python -m benchmarks.targets benchmarks/results   # those that docs/benchmarks.md shows
"""

import argparse
import json
from pathlib import Path

from benchmarks.report import ROOT, show


def target_rows(folder: Path) -> list[list[str]]:
    """A row per target, in the order of the files."""
    contents = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    return [
        [target["name"], target["aim"], target["measured"], "yes" if target["is_met"] else "MISSED", target["cause"]]
        for content in contents
        for target in content.get("targets", [])
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / "outputs" / "benchmarks")
    arguments = parser.parse_args()
    rows = target_rows(arguments.folder)
    if not rows:
        raise SystemExit(f"{arguments.folder} holds no results. `make bench` makes them.")
    show("Targets", ["what", "aim", "measured", "met", "cause"], rows)
    missed = sum(row[3] == "MISSED" for row in rows)
    print(f"{len(rows) - missed} of {len(rows)} targets met")


if __name__ == "__main__":
    main()
