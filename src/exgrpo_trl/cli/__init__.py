"""The command `exgrpo-trl`, a module for each of its commands. No torch is imported, unless `train` runs."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence

from rich.console import Console

from .. import __version__
from ..inspection.readable import readable
from ..records import ExperienceBufferError
from . import diff, export, merge, prune, report, show, train, why

# Each has `HELP`, `add_arguments(parser)` and `run(arguments)`, which raises ExperienceBufferError.
COMMANDS = {
    "train": train,
    "show": show,
    "report": report,
    "why": why,
    "diff": diff,
    "export": export,
    "merge": merge,
    "prune": prune,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the command `exgrpo-trl`."""
    parser = argparse.ArgumentParser(
        prog="exgrpo-trl", description="Train with experience replay, look at what runs have stored, and work with it."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parsers = parser.add_subparsers(dest="command", required=True)
    for name, command in COMMANDS.items():
        command.add_arguments(parsers.add_parser(name, help=command.HELP, description=command.__doc__))
    arguments = parser.parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # stored text may hold what the encoding of the terminal lacks
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        COMMANDS[arguments.command].run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # by `head` and the like; Python flushes once more when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ExperienceBufferError, OSError) as error:
        Console(stderr=True, soft_wrap=True).print(readable(f"error: {error}"), markup=False, highlight=False)
        return 1
    return 0
