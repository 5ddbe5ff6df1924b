"""`exgrpo-trl train`: `trl grpo` with experience replay. Imports torch when it runs, and only then."""

from __future__ import annotations

import argparse
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from subprocess import CalledProcessError
from typing import Any

HELP = "train a model with experience replay: trl grpo with the arguments of ExGRPOConfig"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare that everything that follows is left to TRL's parser, `--help` included."""
    parser.prefix_chars = "\0"  # with flags of argparse, it would look for them here
    parser.add_argument("arguments", nargs=argparse.REMAINDER)


def run(arguments: argparse.Namespace) -> None:
    """Launch the script through accelerate, and end as it ends."""
    from accelerate.commands.launch import launch_command, launch_command_parser

    from ..grpo_script import MODULE, read_arguments

    for_launcher = read_arguments(arguments.arguments)[1]
    command = launch_command_parser().parse_args([*for_launcher, "--module", MODULE, *arguments.arguments])
    try:
        with _passing_signals_on():
            launch_command(command)
    except CalledProcessError as error:  # it has told what was wrong
        raise SystemExit(error.returncode if error.returncode >= 0 else 128 - error.returncode) from None


@contextmanager
def _passing_signals_on() -> Iterator[None]:
    """What is launched gets the signals that stop this process, and decides."""
    import psutil

    def pass_on(number: int, frame: Any) -> None:
        children = psutil.Process().children()
        for child in children:
            child.send_signal(number)
        if not children:
            raise SystemExit(128 + number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
