"""From a run to a file."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path

from ..inspection.output import refuse_existing, whole_file
from ..records import ExperienceBufferError
from .charts import charts_of
from .drawing import check_matplotlib
from .page import GENERATOR, page
from .questions import MOST_BYTES, NOTHING, stored_questions
from .run import read_run
from .savings import savings_of
from .signs import signs_of
from .words import sentences

_BEGINNING = 2_000


def write_report(
    run: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str] | None = None,
    force: bool = False,
) -> Path:
    """
    Write a report of a run: one HTML file that any browser opens without a network.

    Args:
        run (`str` or `os.PathLike`):
            Directory of a run, also of one that goes on, of a checkpoint, or of a buffer.
        output (`str` or `os.PathLike`):
            The file. An earlier report there is replaced; it is there as a whole or not at all.
        tokenizer (`str` or `os.PathLike`, *optional*):
            A `tokenizer.json`, or a directory with one. By default that of the checkpoint. Without one,
            completions are shown as token ids.
        force (`bool`, *optional*, defaults to `False`):
            Whether to write over a file that is no report.

    Returns:
        `Path`: the file.

    Raises:
        ExperienceBufferError: if there is nothing to report, it is damaged, the file is something else, or matplotlib
            is missing.
        OSError: if the file cannot be written.
    """
    return written(Path(run), Path(output), None if tokenizer is None else Path(tokenizer), force=force)[0]


def written(run_path: Path, output: Path, tokenizer: Path | None, *, force: bool) -> tuple[Path, list[str]]:
    """Write a report; its path, and the sentences at its top."""
    check_matplotlib()
    if output.is_dir():
        raise ExperienceBufferError(f"{output} is a directory. Name a file, for example {output / 'report.html'}.")
    refuse_existing(output, force=force or _is_report(output))
    run = read_run(run_path, tokenizer)
    savings, signs = savings_of(run), signs_of(run)
    said = sentences(run, savings, signs)
    stored = NOTHING if run.buffer is None else stored_questions(run.buffer, run.decoder, MOST_BYTES)
    when = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    text = page(run, said, signs, charts_of(run, savings), stored, when)
    with whole_file(output) as file:
        file.write_text(text, encoding="utf-8")
    return output, said


def _is_report(path: Path) -> bool:
    try:
        with path.open(encoding="utf-8") as file:
            return GENERATOR in file.read(_BEGINNING)
    except (OSError, ValueError):
        return False
