"""Where what a stranger wrote comes in: whatever is wrong with it ends in one error, which says where and why."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa

from ..errors import ExperienceBufferError
from .metadata import METADATA_FILE, RESUME_HINT, fail

# What is checked raises ValueError. The others are of parsers: where they raise is not ours to say.
MALFORMED = (
    ArithmeticError,
    LookupError,
    MemoryError,
    OSError,
    RecursionError,
    TypeError,
    ValueError,
    pa.ArrowException,
)
_MOST_CHARACTERS = 400


@contextmanager
def reading(directory: Path, name: str) -> Iterator[None]:
    """Turn what goes wrong with a file of a buffer into the one error."""
    try:
        yield
    except ExperienceBufferError:
        raise
    except MALFORMED as error:
        fail(directory, f"cannot be read: {name} is malformed: {reason_of(error)}. {RESUME_HINT}", error)


@contextmanager
def reading_dataset() -> Iterator[None]:
    """Turn what goes wrong with a dataset of stored completions into the one error."""
    try:
        yield
    except MALFORMED as error:
        raise ExperienceBufferError(
            f"No experience buffer can be made of this dataset: {reason_of(error)}. ExperienceBuffer.to_dataset() "
            "shows what is expected."
        ) from error


@contextmanager
def reading_state(source: str) -> Iterator[None]:
    """Turn what goes wrong with the state of a trainer in a buffer into the one error."""
    try:
        yield
    except ExperienceBufferError:
        raise
    except (*MALFORMED, AttributeError) as error:  # strategies read theirs as they like
        raise ExperienceBufferError(
            f"The experience buffer {source} holds a state of replay that cannot be restored "
            f"({METADATA_FILE}, `replay_state`): {reason_of(error)}. {RESUME_HINT}"
        ) from error


def reason_of(error: BaseException) -> str:
    """What an error says, as the end of a sentence of bounded length."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, MemoryError):
        return "it asks for more memory than there is"
    text = " ".join(str(error).split()).rstrip(".")
    text = text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}..."
    is_said = isinstance(error, ValueError) and not isinstance(error, pa.ArrowException | UnicodeError) and text
    return text if is_said else f"{type(error).__name__}: {text}"
