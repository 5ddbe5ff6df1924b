"""`exgrpo-trl why`: which stored completions a training step replayed, and why these."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..inspection.readable import readable

if TYPE_CHECKING:
    import pyarrow as pa

HELP = "which stored completions a step replayed, and why"
_SCORES = ("entropy", "negative_log_likelihood", "mean_log_ratio", "drift")
_COMPETITORS = "competitor_"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument("path", type=Path, help="directory of a run, or of a checkpoint in it")
    parser.add_argument(
        "--step", type=int, help="step of training, as in the log lines; by default the last one with replays"
    )
    parser.add_argument("--question", metavar="ID", help="only this question")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> None:
    """Print what a step replayed."""
    found = explain(arguments.path, arguments.step, arguments.question)
    if arguments.json:
        json.dump(found, sys.stdout, indent=2)
        sys.stdout.write("\n")
    else:
        _print(found, Console())


def explain(path: Path, step: int | None = None, question_id: str | None = None) -> dict[str, Any]:
    """
    What `exgrpo-trl why` reports, as plain JSON.

    Raises:
        ExperienceBufferError: if there is no log, or it cannot be read.
    """
    import pyarrow.compute as pc  # not for `--help`

    from ..replay_log import find_replay_log, read_replay_log

    folder, log = find_replay_log(path), read_replay_log(path)
    if question_id is not None:
        known = question_id.encode(errors="replace").decode()  # no id has half a character
        log = log.filter(pc.equal(log.column("question_id"), known))
    first = log.column("step")
    if step is None:
        step = pc.max(first).as_py()
    wanted = min(max(step or 0, 0), 2**63 - 1)
    is_trained = pc.and_(pc.less_equal(first, wanted), pc.greater_equal(log.column("last_step"), wanted))
    rows = log.filter(is_trained)
    return {
        "path": str(folder),
        "step": step,
        "question_id": question_id,
        "replays": [_replay(row) for row in rows.to_pylist()],
        "nearest_steps": [] if len(rows) else _nearest(first, wanted),
    }


def _nearest(steps: pa.ChunkedArray, step: int) -> list[int]:
    """The last step with replays before that one, and the first after it, as far as there are any."""
    known = np.unique(steps.to_numpy())
    at = int(np.searchsorted(known, step))
    return [int(of_one) for of_one in (*known[max(0, at - 1) : at], *known[at : at + 1])]


def _replay(row: Mapping[str, Any]) -> dict[str, Any]:
    replay = {name: value for name, value in row.items() if not name.startswith(_COMPETITORS)}
    ratio = row["mean_log_ratio"]
    with np.errstate(over="ignore"):
        known = {"importance_ratio": None if ratio is None else _finite(float(np.exp(ratio)))}
    replay |= {name: _finite(row[name]) for name in ("reward", *_SCORES)} | known
    columns = [row[f"{_COMPETITORS}{name}"] for name in ("ages", "entropies", "negative_log_likelihoods")]
    competitors = [
        {"age": age, "entropy": _finite(entropy), "negative_log_likelihood": _finite(likelihood)}
        for age, entropy, likelihood in zip(*columns, strict=False)
    ]
    return replay | {"group": row["row"] // max(row["group_size"], 1), "competitors": competitors}


def _finite(value: float | None) -> float | None:
    """What JSON can say."""
    return value if value is not None and math.isfinite(value) else None


# In words


def _print(found: Mapping[str, Any], console: Console) -> None:
    def say(text: str, style: str = "") -> None:
        console.print(Text(readable(text).replace("\n", "\\n"), style=style), soft_wrap=True)

    of_question = "" if found["question_id"] is None else f" of question {found['question_id']}"
    replays = found["replays"]
    if not replays:
        if found["step"] is None:
            say(f"Nothing was replayed{of_question}, says {found['path']}.")
            return
        say(f"Step {found['step']} replayed nothing{of_question}, says {found['path']}.")
        say(f"The nearest steps that did: {' and '.join(map(str, found['nearest_steps'])) or 'there are none'}.")
        return
    say(f"Step {found['step']} replayed {_count(len(replays), 'stored completion')}{of_question}", "bold")
    for replay in replays:
        say("")
        for line, style in _described(replay):
            say(line, style)
        if replay["competitors"]:
            console.print(_competitor_table(replay))


def _described(replay: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Lines that tell of one replay, with their style."""
    bucket = "unknown" if replay["bucket"] is None else f"{replay['bucket']}/{replay['group_size']}"
    yield f"Question {replay['question_id']}", "bold"
    steps = (
        f"step {replay['step']}"
        if replay["step"] == replay["last_step"]
        else f"steps {replay['step']} to {replay['last_step']}"
    )
    yield f"bucket {bucket}, group {replay['group']}, row {replay['row']} of a batch for {steps}", ""
    before = "an unknown number of times" if replay["num_replays"] is None else _count(replay["num_replays"], "time")
    yield (
        (
            f"{_count(replay['age'], 'step')} old, {_count(replay['num_tokens'], 'token')}, reward "
            f"{_number(replay['reward'])}, replayed {before} before"
        ),
        "",
    )
    if replay["mean_log_ratio"] is None and replay["importance_ratio"] is None:
        yield "importance ratio unknown: not trained before the batch was collected", ""
    else:
        ratio, drift = _number(replay["importance_ratio"]), _number(replay["drift"])
        yield f"importance ratio {ratio} (geometric mean over its tokens; mean absolute log ratio {drift})", ""
    if replay["is_fill"]:
        yield "took the place of a failure in a group that failed as a whole", ""
    if replay["evicted"] is not None:
        yield f"left the buffer afterwards: {replay['evicted'].replace('_', ' ')}", ""
    yield _chosen_from(replay), ""


def _chosen_from(replay: Mapping[str, Any]) -> str:
    if not replay["competitors"]:
        return "there was nothing to choose from"
    total = len(replay["competitors"]) + 1
    if replay["scored_at"] is None:
        return f"chosen out of {total}, without scores:"
    when = replay["policy_version"] - replay["scored_at"]
    scores = "scores of now" if when <= 0 else f"last known scores, its own {_count(when, 'step')} old"
    return f"chosen out of {total}, by {scores}:"


def _competitor_table(replay: Mapping[str, Any]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    is_scored = replay["scored_at"] is not None
    for name in ("age", *(("entropy", "neg. log-likelihood") if is_scored else ())):
        table.add_column(name, justify="right")
    for mark, of_one in (("chosen", replay), *(("", other) for other in replay["competitors"])):
        scores: Iterable[str] = (_number(of_one[name], ".3f") for name in ("entropy", "negative_log_likelihood"))
        table.add_row(mark, str(of_one["age"]), *(scores if is_scored else ()), style="bold" if mark else "")
    return table


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _number(value: float | None, form: str = ".4g") -> str:
    return "unknown" if value is None else format(value, form)
