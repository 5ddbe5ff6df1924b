"""`exgrpo-trl diff`: what came, went, moved and retired between two saved experience buffers."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..buffer import ExperienceBuffer
from ..buffer.merging import is_same_provenance
from ..buffer.settings import GROUP
from ..inspection.opened import Opened, opened
from ..inspection.output import write_json
from ..inspection.readable import one_line
from ..records import ExperienceBufferError
from .arguments import whole_number

HELP = "what came, went, moved and retired between two saved buffers"
_LIMIT = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument("before", type=Path, help="directory of a buffer, of a checkpoint or of a run")
    parser.add_argument("after", type=Path, help="the same of a later one")
    parser.add_argument(
        "--limit",
        type=whole_number,
        default=None,
        metavar="N",
        help=f"questions named at most, 0 for all; by default {_LIMIT}, in JSON all",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> None:
    """Print how two buffers differ."""
    found = difference(opened(arguments.before), opened(arguments.after))
    limit = _LIMIT if arguments.limit is None and not arguments.json else arguments.limit
    num_changed = len(found["questions"])
    if limit:
        found["questions"] = found["questions"][:limit]
    if arguments.json:
        write_json(found)
    else:
        _print(found, num_changed, Console())


def difference(before: Opened, after: Opened) -> dict[str, Any]:
    """
    How two buffers differ: counts, and a record of every question that is not the same in both.

    Raises:
        ExperienceBufferError: if one keeps single completions and the other one whole groups.
    """
    if before.buffer.unit != after.buffer.unit:
        raise ExperienceBufferError(
            f"The experience buffers at {before.directory} and {after.directory} cannot be compared: they have "
            f"unit={before.buffer.unit!r} and unit={after.buffer.unit!r}. Compare two of one unit."
        )
    ids = dict.fromkeys([*_ids(before.buffer), *_ids(after.buffer), *before.buffer.retired, *after.buffer.retired])
    questions = [_changes(question_id, before.buffer, after.buffer) for question_id in ids]
    changed = [of for of in questions if of["changes"] or of["completions_came"] or of["completions_went"]]
    of_both = before.buffer.provenance, after.buffer.provenance
    differing = [
        name
        for name in of_both[0].keys() | of_both[1].keys()
        if not is_same_provenance(*(of.get(name) for of in of_both))
    ]
    return {
        "before": {"path": str(before.directory), "version": before.now, **_sizes(before.buffer)},
        "after": {"path": str(after.directory), "version": after.now, **_sizes(after.buffer)},
        "counts": {
            **{
                f"questions_{name}": sum(name in of["changes"] for of in changed)
                for name in ("came", "went", "moved", "retired", "unretired")
            },
            **{name: sum(of[name] for of in changed) for name in ("completions_came", "completions_went")},
        },
        "provenance_differs": sorted(differing),
        "questions": changed,
    }


def _changes(question_id: str, before: ExperienceBuffer, after: ExperienceBuffer) -> dict[str, Any]:
    buckets = [_bucket(buffer, question_id) for buffer in (before, after)]
    was_retired, is_retired = (question_id in buffer.retired for buffer in (before, after))
    old, new = (_parts(buffer, question_id) for buffer in (before, after))
    changes = {
        "came": buckets[0] is None and buckets[1] is not None,
        "went": buckets[0] is not None and buckets[1] is None,
        "moved": None not in buckets and buckets[0] != buckets[1],
        "retired": is_retired and not was_retired,
        "unretired": was_retired and not is_retired,
    }
    return {
        "question": question_id,
        "changes": [name for name, is_so in changes.items() if is_so],
        "bucket_before": buckets[0],
        "bucket_after": buckets[1],
        "completions_came": sum(map(len, new - old)),
        "completions_went": sum(map(len, old - new)),
    }


def _ids(buffer: ExperienceBuffer) -> list[str]:
    return [question_id for ids in buffer.buckets().values() for question_id in ids]


def _sizes(buffer: ExperienceBuffer) -> dict[str, int]:
    return {"questions": buffer.num_questions, "completions": buffer.num_completions, "retired": len(buffer.retired)}


def _bucket(buffer: ExperienceBuffer, question_id: str) -> int | None:
    if question_id not in buffer:
        return None
    return next(bucket for bucket, ids in buffer.buckets().items() if question_id in ids)


def _parts(buffer: ExperienceBuffer, question_id: str) -> set[tuple[bytes, ...]]:
    """What comes and goes together: the tokens of single completions, or of groups."""
    if question_id not in buffer:
        return set()
    if buffer.unit == GROUP:
        return {tuple(one.token_bytes for one in group) for group in buffer.groups(question_id)}
    return {(one.token_bytes,) for one in buffer.completions(question_id)}


def _print(found: dict[str, Any], num_changed: int, console: Console) -> None:
    before, after, counts = (found[name] for name in ("before", "after", "counts"))
    for name, of in (("before", before), ("after", after)):
        console.print(Text(one_line(f"{name}: {of['path']} (step {of['version']:,})"), style="bold"), soft_wrap=True)
    table = Table(box=None, show_header=False)
    for name in ("questions", "completions", "retired"):
        table.add_row(name, f"{before[name]:,} to {after[name]:,}")
    for name, count in counts.items():
        table.add_row(name.replace("_", " that "), f"{count:,}")
    console.print(table)
    if found["provenance_differs"]:
        names = ", ".join(map(one_line, found["provenance_differs"]))
        console.print(Text(f"They were collected with another: {names}"), soft_wrap=True)
    for of in found["questions"]:
        sys.stdout.write(f"{_line(of)}\n")
    if len(found["questions"]) < num_changed:
        sys.stdout.write(f"{num_changed - len(found['questions']):,} more; --limit 0 shows all.\n")


def _line(of: dict[str, Any]) -> str:
    before, after = ("none" if of[f"bucket_{name}"] is None else of[f"bucket_{name}"] for name in ("before", "after"))
    words = [*of["changes"], *([] if before == after else [f"bucket {before} to {after}"])]
    words.append(f"+{of['completions_came']} -{of['completions_went']}")
    return f"{one_line(of['question'])}: {', '.join(words)}"
