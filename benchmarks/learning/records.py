"""The runs that have been made: single files as they are finished, and one Parquet file of those that are kept."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.learning.run import LOGGED, SHORT_STEPS, Run
from benchmarks.report import PACKAGES, RESULTS, ROOT

Made = dict[Run, dict[str, Any]]  # what a run has left, with the keys "run", "machine", "curve" and "logs"

SINGLE_RUNS = ROOT / "outputs" / "benchmarks" / "learning"
RECORDED = RESULTS / "learning.parquet"


def _struct(**fields: pa.DataType) -> pa.DataType:
    return pa.struct(list(fields.items()))


TEXT, COUNT, NUMBER = pa.string(), pa.int64(), pa.float64()
RUN = {"setting": TEXT, "method": TEXT, "learning_rate": NUMBER, "seed": COUNT, "warm_up": COUNT, "steps": COUNT}
MACHINE = {"processor": TEXT, "cores": COUNT, "threads": COUNT, "platform": TEXT, "python": TEXT}
POINT = {"step": COUNT, "seconds": NUMBER, "pass_at_1": NUMBER, "pass_at_8": NUMBER}
SCHEMA = pa.schema(
    RUN
    | {
        "machine": _struct(**MACHINE, **dict.fromkeys(PACKAGES, TEXT)),
        "curve": pa.list_(_struct(**POINT)),
        "logs": pa.list_(_struct(**dict.fromkeys(("step", *LOGGED), NUMBER))),
    }
)


def read(file: Path) -> Made:
    """The runs of a Parquet file; none if it is not there."""
    rows = pq.read_table(file).to_pylist() if file.exists() else []
    return _by_run(
        {
            "run": {name: row[name] for name in RUN},
            "machine": _present(row["machine"]),
            "curve": [_present(point) for point in row["curve"]],
            "logs": [_present(line) for line in row["logs"]],
        }
        for row in rows
    )


def single_runs(folder: Path = SINGLE_RUNS) -> Made:
    """The runs that are files of their own."""
    return _by_run(json.loads(file.read_text()) for file in sorted(folder.glob("*.json")))


def made(folder: Path = SINGLE_RUNS, file: Path = RECORDED) -> Made:
    """All runs that have been made; a file of its own is the newer one."""
    return read(file) | single_runs(folder)


def write(runs: Made, file: Path) -> None:
    """
    Write a Parquet file of runs, in the order of their names.

    Raises:
        ValueError: if a run has something for which the file has no column.
    """
    results = [runs[run] for run in sorted(runs, key=lambda run: run.file(Path()))]
    rows = [result["run"] | {name: result[name] for name in ("machine", "curve", "logs")} for result in results]
    unfinished = file.with_suffix(".unfinished")
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    options = {"compression": "zstd", "compression_level": 19, "use_dictionary": False}  # numbers seldom repeat
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), unfinished, **options)
    # Arrow passes over fields that the schema does not know.
    if json.dumps(list(read(unfinished).values()), sort_keys=True) != json.dumps(results, sort_keys=True):
        unfinished.unlink()
        raise ValueError(f"{file.name} would not hold everything: a run has values that are not in its schema.")
    unfinished.rename(file)


def merge(folder: Path = SINGLE_RUNS, file: Path = RECORDED) -> int:
    """Take single runs into a Parquet file, but not those of the short form; returns how many there were."""
    finished = {run: result for run, result in single_runs(folder).items() if run.steps != SHORT_STEPS}
    if finished:
        write(read(file) | finished, file)
    return len(finished)


def _by_run(results: Iterable[dict[str, Any]]) -> Made:
    return {Run(**result["run"]): result for result in results}


def _present(values: dict[str, Any]) -> dict[str, Any]:
    """Without what was not measured."""
    return {name: value for name, value in values.items() if value is not None}
