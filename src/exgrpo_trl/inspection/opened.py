"""A buffer that a command looks into, with what is known of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ..buffer import ExperienceBuffer
from ..buffer.locations import TRAINER_STATE_FILE, find_buffer
from ..records import Experience, Question


class Opened(NamedTuple):
    """
    A loaded buffer.

    Attributes:
        directory (`Path`):
            Where it was found.
        buffer ([`ExperienceBuffer`]):
            The buffer.
        now (`int`):
            Policy version that ages count from: that of its checkpoint, else of its newest completion.
    """

    directory: Path
    buffer: ExperienceBuffer
    now: int


class Row(NamedTuple):
    """A stored completion with its question, its bucket, and how often it was replayed."""

    question: Question
    bucket: int
    experience: Experience
    num_replays: int


def opened(path: Path) -> Opened:
    """
    The buffer at a path, in a checkpoint, or in the newest complete checkpoint of a run.

    Raises:
        ExperienceBufferError: if there is none, or it cannot be read.
    """
    directory = find_buffer(path)
    buffer = ExperienceBuffer.load(directory)
    newest = max((experience.policy_version for _, _, experience in buffer.items()), default=0)
    return Opened(directory, buffer, max(newest, _version_of_checkpoint(directory, buffer)))


def rows_of(buffer: ExperienceBuffer) -> Iterator[Row]:
    """Every stored completion; by bucket, question and age."""
    for question, bucket, experience in buffer.items():
        yield Row(question, bucket, experience, buffer.reuse(experience).num_replays)


def _version_of_checkpoint(directory: Path, buffer: ExperienceBuffer) -> int:
    """Policy version of the checkpoint around a buffer; 0 if there is none or it does not tell."""
    try:
        state = json.loads((directory.parent / TRAINER_STATE_FILE).read_text(encoding="utf-8"))
        # Versions go on from those of a buffer that a run began with.
        step, offset = state["global_step"], buffer.replay_state["replayer"]["version_offset"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError, MemoryError):
        return 0
    return step + offset if type(step) is type(offset) is int else 0
