"""Files of results, whatever their kind."""

import json
from pathlib import Path
from typing import Any

from benchmarks.agents import records as agents
from benchmarks.agents.summary import summarized as summarized_agents
from benchmarks.learning.records import read
from benchmarks.learning.stages import reported_runs, tuning_runs
from benchmarks.learning.summary import summarized
from benchmarks.report import Target


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
    return summarized(reported_runs(made), tuning_runs(), made)


def targets_in(file: Path) -> list[Target]:
    """Targets of a file of results; none where nothing was aimed at."""
    return [Target(**target) for target in content_in(file).get("targets", [])]
