"""`exgrpo-trl show`: what a saved experience buffer holds: a summary, its questions, or one of them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..buffer import ExperienceBuffer
from ..buffer.image_pool import stored_images_in
from ..buffer.locations import find_buffer
from ..buffer.metadata import read_metadata
from ..buffer.settings import GROUP
from ..images import StoredImage
from ..inspection.opened import opened, rows_of
from ..inspection.output import write_json
from ..inspection.readable import one_line, readable
from ..inspection.text import find_decoder
from ..records import ExperienceBufferError
from .arguments import whole_number
from .filters import add_filters, decoder_for, facts_of, matching
from .listing import SORT_FIELDS, print_questions, questions_of
from .question import describe_question, find_question, print_question

HELP = "summary of a saved experience buffer, its questions, or one of them with its completions"
BAR_WIDTH = 40
_LIMIT = 20
_LARGEST_GROUP = 256


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument("path", type=Path, help="directory of a buffer, of a checkpoint or of a run")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--question",
        metavar="ID",
        help="this question with its completions side by side; a beginning of the id will do",
    )
    parser.add_argument("--list", action="store_true", help="list questions; so do --sort, --filter and --limit")
    parser.add_argument("--sort", choices=SORT_FIELDS, help="order of the questions, lowest first")
    parser.add_argument("--reverse", action="store_true", help="the other way round")
    parser.add_argument(
        "--limit",
        type=whole_number,
        metavar="N",
        help=f"questions listed at most, 0 for all; by default {_LIMIT}, in JSON all",
    )
    add_filters(parser, "questions with completions such as this, and these completions alone")


def run(arguments: argparse.Namespace) -> None:
    """Print what was asked for."""
    lists = arguments.list or arguments.sort or arguments.reverse or arguments.limit is not None or arguments.filters
    if arguments.question is not None:
        _show_question(arguments)
    elif lists:
        _show_questions(arguments)
    elif arguments.json:
        write_json(summarize(arguments.path))
    else:
        _print(summarize(arguments.path), Console())


def _show_question(arguments: argparse.Namespace) -> None:
    found = opened(arguments.path)
    question_id = find_question(found, arguments.question)
    decoder, note = find_decoder(found, arguments.tokenizer)
    rows = [row for row in rows_of(found.buffer) if row.question.question_id == question_id]
    rows = matching(rows, arguments.filters, facts_of(found, decoder))
    if not rows:
        raise ExperienceBufferError(
            f"No completion of question {question_id!r} in the experience buffer at {found.directory} fulfils all "
            "conditions of --filter. Leave one out."
        )
    if arguments.json:
        write_json(describe_question(found, rows, decoder))
    else:
        print_question(found, rows, decoder, note, Console(highlight=False))


def _show_questions(arguments: argparse.Namespace) -> None:
    found = opened(arguments.path)
    decoder = decoder_for(found, arguments.tokenizer, arguments.filters)
    rows = matching(rows_of(found.buffer), arguments.filters, facts_of(found, decoder))
    questions = questions_of(found, rows, arguments.sort, reverse=arguments.reverse)
    if arguments.json:
        write_json(questions[: arguments.limit or None])
    else:
        print_questions(found, questions, _LIMIT if arguments.limit is None else arguments.limit, Console())


def summarize(path: Path) -> dict[str, Any]:
    """What `exgrpo-trl show` reports, as plain JSON."""
    directory = find_buffer(path)
    buffer = ExperienceBuffer.load(directory)
    metadata = read_metadata(directory)
    versions = [experience.policy_version for _, _, experience in buffer.items()]
    rollouts = [experience for _, _, experience in buffer.items() if experience.details is not None]
    sizes = {image.digest: len(image.content) for image in _images_of(buffer)}
    replays = [buffer.reuse(experience).num_replays for _, _, experience in buffer.items()]
    counts = {
        **metadata["counts"],
        **({"groups": _num_groups(buffer)} if buffer.unit == GROUP else {}),
        "scored": sum(experience.is_scored for _, _, experience in buffer.items()),
        "several_turns": sum(experience.num_model_tokens < experience.num_tokens for experience in rollouts),
        "images": len(sizes),
        "image_bytes": sum(sizes.values()),
    }
    return {
        "path": str(directory),
        **{name: metadata[name] for name in ("schema_version", "package_version")},
        "counts": counts,
        "buckets": {str(bucket): len(question_ids) for bucket, question_ids in buffer.buckets().items()},
        "policy_versions": {"oldest": min(versions), "newest": max(versions)} if versions else None,
        "replays": {"mean": sum(replays) / len(replays), "highest": max(replays)} if replays else None,
        **{name: metadata[name] for name in ("settings", "provenance", "replay_state")},
    }


def _num_groups(buffer: ExperienceBuffer) -> int:
    return sum(len(buffer.groups(question_id)) for ids in buffer.buckets().values() for question_id in ids)


def _images_of(buffer: ExperienceBuffer) -> Iterator[StoredImage]:
    for question_ids in buffer.buckets().values():
        for question_id in question_ids:
            yield from stored_images_in(buffer.question(question_id).example)
            for experience in buffer.completions(question_id):
                yield from experience.details.images if experience.details is not None else ()


def _print(summary: dict[str, Any], console: Console) -> None:
    versions = summary["policy_versions"]
    replays = summary["replays"]
    counts = dict(summary["counts"])
    of_some = {
        "scored, not generated": f"{counts.pop('scored'):,}",
        "completions of several turns": f"{counts.pop('several_turns'):,}",
        "images": f"{counts.pop('images'):,} ({counts.pop('image_bytes') / 1e6:.1f} MB)",
    }
    values = {
        **{name: f"{count:,}" for name, count in counts.items()},
        **{name: text for name, text in of_some.items() if not text.startswith("0")},
        "policy versions": f"{versions['oldest']} to {versions['newest']}" if versions else "none",
        "replays of a completion": f"{replays['mean']:.2f} on average, at most {replays['highest']:,}"
        if replays
        else "none",
        **summary["settings"],
    }
    console.print(Text(readable(f"Experience buffer {summary['path']}"), style="bold"), soft_wrap=True)
    console.print(_two_columns(values))
    if summary["buckets"]:
        console.print(_bucket_table(summary["buckets"], summary["settings"]["group_size"]))
    if summary["provenance"]:
        console.print(Text("Provenance", style="bold"))
        console.print(_two_columns(summary["provenance"]))


def _two_columns(values: dict[str, Any]) -> Table:
    table = Table(box=None, show_header=False)
    for name, value in values.items():
        text = value if isinstance(value, str) else "none" if value is None else json.dumps(value)
        table.add_row(Text(one_line(name).replace("_", " ")), Text(one_line(text), overflow="fold"))
    return table


def _bucket_table(sizes: dict[str, int], group_size: int) -> Table:
    table = Table(box=box.SIMPLE, title="Questions by correct completions of the latest group", title_justify="left")
    table.add_column("correct", justify="right")
    table.add_column("questions", justify="right")
    table.add_column("")
    largest = max(sizes.values())
    # Of groups that nobody generates, the empty ones would go on for pages.
    empty = range(1, group_size) if group_size <= _LARGEST_GROUP else ()
    for bucket in sorted({*map(int, sizes), *empty}):
        size = sizes.get(str(bucket), 0)
        # A bucket that is not empty must not look empty.
        bar = "#" * max(round(BAR_WIDTH * size / largest), size > 0)
        table.add_row(f"{bucket}/{group_size}", f"{size:,}", bar)
    return table
