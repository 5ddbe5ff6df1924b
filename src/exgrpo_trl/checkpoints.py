"""Which checkpoint of a run is complete: a process may die while it writes one."""

import json
import re
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


def begin_checkpoint(folder: str | Path) -> None:
    """
    Mark a checkpoint as incomplete that is about to be written over.

    Args:
        folder (`str` or `Path`):
            Folder of the checkpoint; need not exist.
    """
    (Path(folder) / TRAINER_STATE_NAME).unlink(missing_ok=True)


def is_complete(folder: str | Path) -> bool:
    """
    Whether everything in a checkpoint has been written: the state of the trainer comes last.

    Args:
        folder (`str` or `Path`):
            Folder of the checkpoint.
    """
    try:
        return isinstance(json.loads((Path(folder) / TRAINER_STATE_NAME).read_text(encoding="utf-8")), dict)
    except (OSError, ValueError):
        return False


def newest_complete_checkpoint(output_dir: str | Path) -> str | None:
    """
    Checkpoint to resume from after a run has died.

    Args:
        output_dir (`str` or `Path`):
            Output directory of the run.

    Returns:
        `str` or `None`:
            Folder of the newest complete checkpoint; `None` if there is no checkpoint at all.

    Raises:
        `ValueError`:
            When there are checkpoints, but no complete one.
    """
    steps = sorted(
        int(match[1])
        for folder in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if folder.is_dir() and (match := re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", folder.name))
    )
    for step in reversed(steps):
        folder = Path(output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        if is_complete(folder):
            return str(folder)
    if steps:
        raise ValueError(
            f"None of the checkpoints {steps} in {output_dir} is complete: the run died while it wrote them. Start "
            "without resume_from_checkpoint."
        )
    return None
