"""`exgrpo-trl merge`: several saved experience buffers as a new one."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..buffer import ExperienceBuffer
from ..inspection.opened import opened
from ..inspection.output import refuse_existing, save
from ..inspection.readable import readable
from ..records import ExperienceBufferError
from .arguments import add_output, whole_number

HELP = "several saved buffers as a new one"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument(
        "paths",
        type=Path,
        nargs="+",
        metavar="PATH",
        help="directory of a buffer, of a checkpoint or of a run; the first one decides settings, rows and buckets",
    )
    add_output(parser, "directory of the new buffer")
    for name in ("capacity", "max-completions-per-question"):
        parser.add_argument(
            f"--{name}", type=whole_number, metavar="N", help="this limit, 0 for none; by default that of the first"
        )


def run(arguments: argparse.Namespace) -> None:
    """Write the new buffer, and say what became of the others."""
    refuse_existing(arguments.output, force=arguments.force)
    found = [opened(path) for path in arguments.paths]
    buffers, names = [of.buffer for of in found], [str(of.directory) for of in found]
    given = {
        name: getattr(arguments, name) or None
        for name in ("capacity", "max_completions_per_question")
        if getattr(arguments, name) is not None
    }
    try:
        result = ExperienceBuffer.merge(buffers, names=names, **given)
    except ExperienceBufferError:
        raise
    except ValueError as error:
        raise ExperienceBufferError(f"The experience buffers {', '.join(names)} cannot be merged: {error}") from error
    save(result, arguments.output)
    sys.stdout.write(readable("".join(f"{line}\n" for line in _lines(result, buffers, names, arguments.output))))


def _lines(result: ExperienceBuffer, buffers: list[ExperienceBuffer], names: list[str], output: Path) -> list[str]:
    lines = [
        f"{name}: {buffer.num_completions:,} completions of {buffer.num_questions:,} questions, "
        f"{len(buffer.retired):,} retired"
        for name, buffer in zip(names, buffers, strict=True)
    ]
    retired = [
        len(buffer.completions(question_id))
        for buffer in buffers
        for question_ids in buffer.buckets().values()
        for question_id in question_ids
        if question_id in result.retired
    ]
    left_out = {
        "there twice": result.num_duplicates,
        "of questions that retired in another": sum(retired),
        "beyond the limits": result.num_evicted,
    }
    lines += [f"Left out: {count:,} completions {why}" for why, count in left_out.items() if count]
    lines.append(
        f"Wrote {output}: {result.num_completions:,} completions of {result.num_questions:,} questions, "
        f"{len(result.retired):,} retired"
    )
    return lines
