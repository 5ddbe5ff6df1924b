"""`exgrpo-trl show`: summary of a saved experience buffer."""

from __future__ import annotations

import argparse
import json
import sys
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
from .readable import readable

HELP = "summary of a saved experience buffer"
BAR_WIDTH = 40


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument("path", type=Path, help="directory of a buffer, of a checkpoint or of a run")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> None:
    """Print the summary of a buffer."""
    summary = summarize(arguments.path)
    if arguments.json:
        json.dump(summary, sys.stdout, indent=2)
        sys.stdout.write("\n")
    else:
        _print(summary, Console())


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
    of_rollouts = {
        "completions of several turns": f"{counts.pop('several_turns'):,}",
        "images": f"{counts.pop('images'):,} ({counts.pop('image_bytes') / 1e6:.1f} MB)",
    }
    values = {
        **{name: f"{count:,}" for name, count in counts.items()},
        **{name: text for name, text in of_rollouts.items() if not text.startswith("0")},
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
        # In one line: a stored line break would look like a row of ours.
        text = readable(text).replace("\n", "\\n")
        table.add_row(Text(readable(name).replace("_", " ").replace("\n", "\\n")), Text(text, overflow="fold"))
    return table


def _bucket_table(sizes: dict[str, int], group_size: int) -> Table:
    table = Table(box=box.SIMPLE, title="Questions by correct completions of the latest group", title_justify="left")
    table.add_column("correct", justify="right")
    table.add_column("questions", justify="right")
    table.add_column("")
    largest = max(sizes.values())
    for bucket in sorted({*map(int, sizes), *range(1, group_size)}):
        size = sizes.get(str(bucket), 0)
        # A bucket that is not empty must not look empty.
        bar = "#" * max(round(BAR_WIDTH * size / largest), size > 0)
        table.add_row(f"{bucket}/{group_size}", f"{size:,}", bar)
    return table
