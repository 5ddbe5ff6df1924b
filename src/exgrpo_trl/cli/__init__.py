"""The command `exgrpo-trl`, a module for each of its commands; never imports torch."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from rich.console import Console

from .. import __version__
from ..records import ExperienceBufferError
from . import show, why
from .readable import readable

# Each has `HELP`, `add_arguments(parser)` and `run(arguments)`, which raises ExperienceBufferError.
COMMANDS = {"show": show, "why": why}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the command `exgrpo-trl`."""
    parser = argparse.ArgumentParser(prog="exgrpo-trl", description="Look at what a run stored and replayed.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parsers = parser.add_subparsers(dest="command", required=True)
    for name, command in COMMANDS.items():
        command.add_arguments(parsers.add_parser(name, help=command.HELP, description=command.__doc__))
    arguments = parser.parse_args(argv)
    try:
        COMMANDS[arguments.command].run(arguments)
    except ExperienceBufferError as error:
        Console(stderr=True, soft_wrap=True).print(readable(f"error: {error}"), markup=False, highlight=False)
        return 1
    return 0
