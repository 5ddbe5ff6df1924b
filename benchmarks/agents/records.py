"""The runs that have been made: single files as they are finished, and one Parquet file of those that are kept."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.agents.run import LOGGED, SHORT_STEPS, Run
from benchmarks.report import PACKAGES, RESULTS, ROOT

Made = dict[Run, dict[str, Any]]  # what a run has left, with the keys "run", "machine", "curve" and "logs"

SINGLE_RUNS = ROOT / "outputs" / "benchmarks" / "agents"
RECORDED = RESULTS / "agents.parquet"

TEXT, COUNT, NUMBER = pa.string(), pa.int64(), pa.float64()
RUN = {"method": TEXT, "learning_rate": NUMBER, "seed": COUNT, "steps": COUNT}
MACHINE = {"processor": TEXT, "cores": COUNT, "threads": COUNT, "platform": TEXT, "python": TEXT}
POINT = {"step": COUNT, "seconds": NUMBER, "environment_steps": COUNT, "success": NUMBER}
SCHEMA = pa.schema(
    RUN
    | {
        "machine": pa.struct(list((MACHINE | dict.fromkeys(PACKAGES, TEXT)).items())),
        "curve": pa.list_(pa.struct(list(POINT.items()))),
        "logs": pa.list_(pa.struct([(name, NUMBER) for name in ("step", *LOGGED)])),
    }
)


def read(file: Path = RECORDED) -> Made:
    """The runs of a Parquet file; none if it is not there."""
    rows = pq.read_table(file).to_pylist() if file.exists() else []
    return _by_run(
        {
            "run": {name: row[name] for name in RUN},
            "machine": _present(row["machine"]),
            "curve": row["curve"],
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


def merge(folder: Path = SINGLE_RUNS, file: Path = RECORDED) -> int:
    """Take single runs into a Parquet file, but not those of the short form; returns how many there were."""
    finished = {run: result for run, result in single_runs(folder).items() if run.steps != SHORT_STEPS}
    if finished:
        results = sorted((read(file) | finished).values(), key=lambda result: tuple(result["run"].values()))
        rows = [result["run"] | {name: result[name] for name in ("machine", "curve", "logs")} for result in results]
        unfinished = file.with_suffix(".unfinished")
        unfinished.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows, SCHEMA), unfinished, compression="zstd", use_dictionary=False)
        unfinished.rename(file)
    return len(finished)


def _by_run(results: Iterable[dict[str, Any]]) -> Made:
    return {Run(**result["run"]): result for result in results}


def _present(values: dict[str, Any]) -> dict[str, Any]:
    """Without what was not measured."""
    return {name: value for name, value in values.items() if value is not None}
