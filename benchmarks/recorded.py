"""Files of results, whatever their kind."""

import json
from pathlib import Path
from typing import Any

from benchmarks.agents import records as agents
from benchmarks.agents.summary import summarized as summarized_agents
from benchmarks.learning.records import read
from benchmarks.learning.saving import saving_rows
from benchmarks.learning.stages import reported_runs, saving_runs, tuning_runs
from benchmarks.learning.summary import summarized
from benchmarks.report import Target, together


def files_of(folder: Path) -> list[Path]:
    """The files of results in a folder."""
    return sorted([*folder.glob("*.json"), *folder.glob("*.parquet")])


def content_in(file: Path) -> dict[str, Any]:
    """What a file of results holds, or what is computed from the runs in it."""
    if file.suffix == ".json":
        return json.loads(file.read_text())
    if file.name == agents.RECORDED.name:
        of_agents = agents.read(file)
        return summarized_agents(list(of_agents), of_agents)
    made = read(file)
    content = summarized(reported_runs(made), tuning_runs(), made)
    ways = saving_runs(made)
    timed = file.parent / "learning_seconds.json"
    seconds = json.loads(timed.read_text())["results"][0]["seconds"] if timed.exists() else {}
    content["results"]["saved"] = saving_rows(made, reported_runs(made) + ways, seconds)
    content["results"]["machines"]["saved"] = together(made[run]["machine"] for run in ways if run in made)
    return content


def targets_in(file: Path) -> list[Target]:
    """Targets of a file of results; none where nothing was aimed at."""
    return [Target(**target) for target in content_in(file).get("targets", [])]
