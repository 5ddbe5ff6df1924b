"""`exgrpo-trl prune`: put completions of a saved experience buffer aside, and bring them back."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..buffer import ExperienceBuffer
from ..buffer.locations import hidden_names, resolved
from ..inspection.opened import Opened, opened
from ..inspection.output import refuse_existing, save
from ..inspection.readable import readable
from ..records import ExperienceBufferError
from .arguments import add_force
from .filters import Facts, add_filters, decoder_for, facts_of, take_matching

HELP = "put completions of a saved buffer aside, and bring them back"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument("path", type=Path, help="directory of a buffer, of a checkpoint or of a run")
    add_filters(parser, "put aside completions such as this (with --restore: bring them back)")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("-o", "--output", type=Path, metavar="OUT", help="directory of the buffer that is left")
    target.add_argument("--in-place", action="store_true", help="write it over the one at PATH, in one step")
    add_force(parser)
    parser.add_argument(
        "--quarantine",
        type=Path,
        metavar="DIRECTORY",
        help="buffer of what was put aside, to which it is added; by default OUT.quarantine, with --in-place or "
        "--restore BUFFER.quarantine beside the buffer at PATH",
    )
    parser.add_argument(
        "--restore", action="store_true", help="bring back what is in quarantine, all of it without --filter"
    )


def run(arguments: argparse.Namespace) -> None:
    """Write the buffer that is left and what was put aside, and say what they hold."""
    from ..buffer.files import refuse_foreign

    if not arguments.filters and not arguments.restore:
        raise ExperienceBufferError(
            f"Nothing says which completions of {arguments.path} to put aside. Add --filter, for example "
            "--filter 'age>500'; exgrpo-trl show with the same --filter lists them."
        )
    found = opened(arguments.path)
    place = _place_of(found.directory)
    target = place if arguments.in_place else arguments.output
    if not arguments.in_place:
        if resolved(target) == resolved(place):
            raise ExperienceBufferError(f"{target} is the experience buffer itself. Change it with --in-place.")
        refuse_existing(target, force=arguments.force)
    refuse_foreign(resolved(target))  # before anything is written to quarantine
    beside = place if arguments.restore else target
    quarantine = arguments.quarantine or beside.with_name(f"{resolved(beside).name}.quarantine")
    if resolved(quarantine) in (resolved(target), resolved(place)):
        raise ExperienceBufferError(f"--quarantine must not be {quarantine}, which holds the rest.")
    if arguments.restore:
        result, lines = _restored(found, quarantine, arguments), []
    else:
        lines = _put_aside(found, quarantine, arguments)
        result = found.buffer
    save(result, target)
    lines.append(f"Wrote {target}: {result.num_completions:,} completions of {result.num_questions:,} questions")
    sys.stdout.write(readable("".join(f"{line}\n" for line in lines)))


def _put_aside(found: Opened, quarantine: Path, arguments: argparse.Namespace) -> list[str]:
    """Move completions from the buffer into quarantine, which is written before the rest is."""
    decoder = decoder_for(found, arguments.tokenizer, arguments.filters)
    aside = take_matching(found.buffer, arguments.filters, facts_of(found, decoder))
    if not aside.num_completions:
        return [f"No completion in {found.directory} fulfils all conditions."]
    line = f"{aside.num_completions:,} completions of {aside.num_questions:,} questions"
    if _exists(quarantine):
        known = opened(quarantine)
        aside = ExperienceBuffer.merge([aside, known.buffer], names=[str(found.directory), str(known.directory)])
    save(aside, quarantine)
    return [f"Put aside in {quarantine}: {line}"]


def _restored(found: Opened, quarantine: Path, arguments: argparse.Namespace) -> ExperienceBuffer:
    """The buffer with what is in quarantine, or a part of it; it goes on as the one without would have."""
    kept, base = opened(quarantine), found.buffer
    decoder = decoder_for(found, arguments.tokenizer, arguments.filters)
    chosen = take_matching(kept.buffer, arguments.filters, Facts(found.now, decoder, str(kept.directory)))
    result = ExperienceBuffer.merge([base, chosen], names=[str(found.directory), str(kept.directory)])
    result.replay_state = base.replay_state
    result.num_evicted += base.num_evicted
    result.num_duplicates = base.num_duplicates
    return result


def _place_of(directory: Path) -> Path:
    """Where a buffer belongs that a save moved out of its place before it died."""
    name = directory.name
    place = directory.with_name(name.removeprefix(".").removesuffix(".replaced"))
    return place if hidden_names(resolved(place))[1].name == name else directory


def _exists(directory: Path) -> bool:
    return directory.exists() or hidden_names(resolved(directory))[1].exists()
