"""
What was aimed at, and what was measured: the targets of all results in a folder.

    python -m benchmarks.targets                      # those of `make bench`
    python -m benchmarks.targets benchmarks/results   # those that docs/benchmarks.md shows
"""

import argparse
from pathlib import Path

from benchmarks.recorded import files_of, targets_in
from benchmarks.report import ROOT, show_targets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / "outputs" / "benchmarks")
    arguments = parser.parse_args()
    targets = [target for file in files_of(arguments.folder) for target in targets_in(file)]
    if not targets:
        raise SystemExit(f"{arguments.folder} holds no results. `make bench` makes them.")
    show_targets(targets)
    print(f"{sum(target.is_met for target in targets)} of {len(targets)} targets met")


if __name__ == "__main__":
    main()
