"""Arguments that several commands take."""

from __future__ import annotations

import argparse
from pathlib import Path


def whole_number(text: str) -> int:
    """
    A number that is not negative.

    Raises:
        argparse.ArgumentTypeError: if it is none.
    """
    if not (text.isascii() and text.isdecimal() and len(text) < 19):
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 on.")
    return int(text)


def add_output(parser: argparse.ArgumentParser, what: str) -> None:
    """Declare `-o` and `--force`."""
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help=what)
    add_force(parser)


def add_force(parser: argparse.ArgumentParser) -> None:
    """Declare `--force`."""
    parser.add_argument("--force", action="store_true", help="write over what is there")
