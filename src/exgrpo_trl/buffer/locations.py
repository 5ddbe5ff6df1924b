"""Where saved buffers are: in a directory, in a checkpoint, in the newest complete checkpoint of a run."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from .metadata import DATA_FILES, METADATA_FILE, fail

BUFFER_FOLDER = "experience_buffer"
# As transformers names them, which this module must not import.
TRAINER_STATE_FILE = "trainer_state.json"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def find_buffer(path: str | os.PathLike[str]) -> Path:
    """
    Directory of the buffer at a path, in a checkpoint, or in the newest complete checkpoint of a run.

    Raises:
        ExperienceBufferError: if there is none.
    """
    path = Path(path)
    here = _buffer_at(path)
    if here is not None and any((here / name).exists() for name in (*DATA_FILES, METADATA_FILE)):
        return here
    if not path.exists():
        fail(path, "does not exist. Check the path; a checkpoint that was written without replay has none.")
    if not path.is_dir():
        fail(path, "is a file. Give the directory of a buffer, a checkpoint or a run.")
    nested = _buffer_at(path / BUFFER_FOLDER)
    if nested is not None:
        return nested
    checkpoints = checkpoints_of(path)
    for checkpoint in reversed(checkpoints.values()):
        found = _buffer_at(checkpoint / BUFFER_FOLDER)
        if found is not None and is_complete(checkpoint):
            return found
    if any(_buffer_at(checkpoint / BUFFER_FOLDER) for checkpoint in checkpoints.values()):
        fail(
            path,
            f"is in no complete checkpoint: {TRAINER_STATE_FILE} is missing from {_names(checkpoints)}, or damaged. "
            f"Name the one to read, for example {checkpoints[max(checkpoints)]}.",
        )
    if is_complete(path):
        fail(
            path,
            f"is missing: the checkpoint has no {path / BUFFER_FOLDER}. It was written without replay, or the folder "
            "was not copied.",
        )
    looked_at = [path / METADATA_FILE, path / BUFFER_FOLDER]
    looked_at += [checkpoint / BUFFER_FOLDER for checkpoint in checkpoints.values()]
    fail(
        path,
        f"is not there: it has none of {', '.join(map(str, looked_at))}. Give the directory of a buffer, a checkpoint "
        "or a run.",
    )


def checkpoints_of(run: str | os.PathLike[str]) -> dict[int, Path]:
    """Checkpoints of a run by their step, ascending, complete or not."""
    found = {
        int(match[1]): folder
        for folder in Path(run).glob("checkpoint-*")
        if folder.is_dir() and (match := _CHECKPOINT.fullmatch(folder.name))
    }
    return dict(sorted(found.items()))


def is_complete(checkpoint: str | os.PathLike[str]) -> bool:
    """Whether everything in a checkpoint has been written: the state of the trainer comes last."""
    try:
        return isinstance(json.loads((Path(checkpoint) / TRAINER_STATE_FILE).read_text(encoding="utf-8")), dict)
    except (OSError, ValueError, RecursionError, MemoryError):
        return False


def resolved(path: str | os.PathLike[str]) -> Path:
    """The path without symbolic links: what is renamed must lie beside its target."""
    return Path(os.path.realpath(path))


def hidden_names(target: Path) -> tuple[Path, Path]:
    """Where a buffer is written, and where the one that it replaces waits."""
    return target.with_name(f".{target.name}.saving"), target.with_name(f".{target.name}.replaced")


def _buffer_at(target: Path) -> Path | None:
    """A directory, or the buffer that a save moved out of its place before it died."""
    if target.is_dir():
        return target
    replaced = hidden_names(resolved(target))[1]
    return replaced if replaced.is_dir() and not target.exists() else None


def _names(checkpoints: dict[int, Path]) -> str:
    return ", ".join(folder.name for folder in checkpoints.values())
