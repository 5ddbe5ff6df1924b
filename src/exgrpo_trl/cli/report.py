"""`exgrpo-trl report`: one HTML file about a run, with plots, warning signs, and all stored questions."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..inspection.readable import readable
from .arguments import add_output

HELP = "one HTML file about a run: plots, warning signs, and all stored questions"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument("path", type=Path, help="directory of a run, of a checkpoint or of a buffer")
    add_output(parser, "file to write, for example report.html; an earlier report there is replaced")
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="PATH",
        help="tokenizer.json, or a directory with one; by default that of the checkpoint",
    )


def run(arguments: argparse.Namespace) -> None:
    """Write the file, and say what stands at its top."""
    from ..report.writing import written  # pyarrow comes with it, which --help can do without

    output, said = written(arguments.path, arguments.output, arguments.tokenizer, force=arguments.force)
    lines = [f"Wrote {output} ({output.stat().st_size / 1e6:.1f} MB)", *said]
    sys.stdout.write(readable("".join(f"{line}\n" for line in lines)))
