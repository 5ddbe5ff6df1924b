"""
What rollouts of several turns and images cost: 10,000 rollouts with images, saved and loaded.

    python -m benchmarks.images --output benchmarks/results/images.json
    python -m benchmarks.images --short

Beside it, what pyarrow alone takes for the same columns, in turn with it, and what it takes to record a rollout of
4,000 tokens and 8 turns, to store it and to read it back. Loading and reading have processes of their own, as a resume
is one. What pyarrow reads are tables, and a `bytes` object of every image; what the tables alone take is told beside
it. Ratios are those of neighbours in time: a machine is not always as fast.

Checksums are taken in a second thread, and a load reads tables in a third: where no core is free for these, a save and
a load take longer, by half a second at most.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.fresh_process import in_a_fresh_process
from benchmarks.images.measure import (
    IN_TURN,
    LONG_TOKENS,
    TURNS,
    saved,
    seconds_of_checksums,
    seconds_to_load,
    seconds_to_read,
    seconds_to_read_tables,
)
from benchmarks.report import Target, middle, show, show_targets, write

ROLLOUTS = 10_000
IN_FRESH_PROCESSES = {
    "load_seconds": seconds_to_load,
    "parquet_read_seconds": seconds_to_read,
    "checksum_seconds": seconds_of_checksums,
    "table_read_seconds": seconds_to_read_tables,
}
COLUMNS = ["rollouts", "MB", "save, s", "pyarrow, s", "load, s", "pyarrow, s", "long rollout, ms"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="once, with 1,000 rollouts")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/images.json"))
    arguments = parser.parse_args()
    num_rollouts, repetitions = (1000, 1) if arguments.short else (ROLLOUTS, arguments.repetitions)
    results = []
    for _ in range(repetitions):
        with tempfile.TemporaryDirectory() as folder:
            result = in_a_fresh_process(saved, num_rollouts, folder)
            for _ in range(IN_TURN):
                for name, measure in IN_FRESH_PROCESSES.items():
                    result.setdefault(name, []).append(in_a_fresh_process(measure, folder))
            results.append(result)
    show(f"{num_rollouts:,} rollouts with images", COLUMNS, [row_of(result) for result in results])
    targets = targets_of(results)
    show_targets(targets)
    settings = {"short": arguments.short, "repetitions": repetitions, "rollouts": num_rollouts}
    write(arguments.output, settings=settings, results=results, targets=targets)


def row_of(result: dict[str, Any]) -> list[str]:
    """Row of the table."""
    numbers = ("save_seconds", "parquet_write_seconds", "load_seconds", "parquet_read_seconds")
    return [
        f"{result['rollouts']:,}",
        f"{result['bytes_on_disk'] / 1e6:.0f}",
        *(middle(result[name]) for name in numbers),
        middle(result["long_rollout_milliseconds"], 3),
    ]


def targets_of(results: list[dict[str, Any]]) -> list[Target]:
    """What was aimed at."""

    def of(name: str) -> np.ndarray:
        """Seconds of all turns of all repetitions."""
        return np.concatenate([result[f"{name}_seconds"] for result in results])

    targets = []
    megabytes = results[0]["bytes_on_disk"] / 1e6
    # Their fastest reading: as they are kept, it takes as long as the system takes to find memory for them.
    of_tables = middle(of("load") / np.repeat([min(result["table_read_seconds"]) for result in results], IN_TURN))
    for what, alone, with_what, besides in (
        ("save", "write", "", ""),
        ("load", "read", ", with images as `bytes`", f" ({of_tables} times the fastest reading of its tables alone)"),
    ):
        seconds, of_pyarrow = of(what), of(f"parquet_{alone}")
        ratio = seconds / of_pyarrow
        targets.append(
            Target(
                f"{what} of {results[0]['rollouts']:,} rollouts with images",
                f"at the speed of Parquet: at most 2 times pyarrow alone{with_what}",
                f"{middle(seconds)} s, {middle(ratio)} times{besides}",
                bool(np.median(ratio) <= 2),
                f"{megabytes:.0f} MB, which pyarrow {alone}s in {middle(of_pyarrow)} s; their checksums take "
                f"{middle(of('checksum'))} s, in a second thread",
            )
        )
    times = [time for result in results for time in result["long_rollout_milliseconds"]]
    targets.append(
        Target(
            f"record a rollout of {LONG_TOKENS:,} tokens and {TURNS} turns, store it and read it back",
            "at most 1 ms",
            f"{middle(times, 3)} ms",
            bool(np.median(times) <= 1),
            "JSON of the messages",
        )
    )
    return targets


if __name__ == "__main__":
    main()
