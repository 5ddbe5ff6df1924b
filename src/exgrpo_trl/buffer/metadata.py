"""`metadata.json` of a saved buffer: what it was, and checksums that tell whether it still is."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from ..errors import ExperienceBufferError
from .hashed_files import digests
from .metadata_checks import check_metadata, parsed
from .settings import GROUP

if TYPE_CHECKING:
    from .buffer import ExperienceBuffer

# 1: completions do not know the tokens of their prompt.
# 2: neither rollouts of several turns nor images.
# 3: neither how completions were used nor whole groups.
# 4: nor whether a completion was scored by a policy that did not generate it.
SCHEMA_VERSION = 5
METADATA_FILE = "metadata.json"
QUESTIONS_FILE = "questions.parquet"
COMPLETIONS_FILE = "completions.parquet"
RETIRED_FILE = "retired.parquet"
IMAGES_FILE = "images.parquet"
DATA_FILES = (QUESTIONS_FILE, COMPLETIONS_FILE, RETIRED_FILE, IMAGES_FILE)

_MOST_CHARACTERS = 1200
_NO_CHECKSUM = '"checksum": ""'
RESUME_HINT = "Resume from an earlier checkpoint, or put an empty buffer in its place: ExperienceBuffer().save(PATH)."


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """
    The checked content of a saved buffer's `metadata.json`.

    Raises:
        ExperienceBufferError: if it is missing or damaged, says what cannot be, or was written by a newer version.
    """
    directory = Path(path)
    file = directory / METADATA_FILE
    if not file.is_file():
        fail(directory, f"has no {METADATA_FILE}. {RESUME_HINT}")
    try:
        text = file.read_bytes().decode("ascii")
        metadata = parsed(text)
        schema_version, checksum = (metadata.get(name) for name in ("schema_version", "checksum"))
        if type(schema_version) is not int or schema_version < 1 or not isinstance(checksum, str):
            raise ValueError("it has no schema version or no checksum")
        # The checksum covers every byte of the file but its own digits.
        is_intact = _sha256(text.replace(f'"checksum": "{checksum}"', _NO_CHECKSUM, 1)) == checksum
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        fail(directory, f"has a damaged {METADATA_FILE} ({type(error).__name__}: {error}). {RESUME_HINT}", error)
    if schema_version > SCHEMA_VERSION:
        fail(
            directory,
            f"has schema version {schema_version} ({METADATA_FILE}), this version of exgrpo-trl reads up to "
            f"{SCHEMA_VERSION}. Upgrade exgrpo-trl: pip install --upgrade exgrpo-trl.",
        )
    if not is_intact:
        fail(directory, f"has a damaged {METADATA_FILE}: its checksum does not match. {RESUME_HINT}")
    try:
        check_metadata(metadata, data_files(schema_version))
    except ValueError as error:
        fail(directory, f"has a malformed {METADATA_FILE}: {error}. {RESUME_HINT}", error)
    return metadata


def described(buffer: ExperienceBuffer) -> dict[str, Any]:
    """What the metadata says of a buffer."""
    if not isinstance(buffer.rng.bit_generator, np.random.PCG64):
        raise TypeError(
            f"`rng` of an experience buffer must use PCG64 to be saved, got {type(buffer.rng.bit_generator).__name__}."
        )
    return {
        "counts": {
            "questions": buffer.num_questions,
            "completions": buffer.num_completions,
            "tokens": buffer.num_tokens,
            "retired": len(buffer.retired),
            "evicted": buffer.num_evicted,
            "duplicates": buffer.num_duplicates,
        },
        "settings": {
            "group_size": buffer.group_size,
            "capacity": buffer.capacity,
            "max_completions_per_question": buffer.max_completions_per_question,
            "retire_solved": buffer.retire_solved,
            # Subclasses may not know of it.
            **({"unit": buffer.unit} if buffer.unit == GROUP else {}),
        },
        "rng": buffer.rng.bit_generator.state,
        "provenance": buffer.provenance,
        "replay_state": buffer.replay_state,
    }


def metadata_text(of_buffer: Mapping[str, Any], of_files: Mapping[str, Mapping[str, Any]]) -> str:
    """
    Text of the metadata: what is said of the buffer, and sizes and checksums of its data files.

    Raises:
        TypeError: if it holds what could not be loaded.
    """
    metadata = {
        "checksum": "",
        "schema_version": SCHEMA_VERSION,
        "package_version": _package_version(),
        "files": {name: of_files[name] for name in DATA_FILES},
        **of_buffer,
    }
    text = json.dumps(metadata, indent=2)
    try:
        parsed(text)
    except ValueError as error:
        raise TypeError(
            f"`provenance` or `replay_state` of the experience buffer cannot be saved: {error}."
        ) from error
    return text.replace(_NO_CHECKSUM, f'"checksum": "{_sha256(text)}"', 1)


def data_files(schema_version: int) -> tuple[str, ...]:
    """The data files of a buffer of that version."""
    return DATA_FILES if schema_version >= 3 else DATA_FILES[:-1]


def check_file(directory: Path, name: str, metadata: Mapping[str, Any]) -> None:
    """
    Compare a data file with what the metadata says of it.

    Raises:
        ExperienceBufferError: if it has another size or checksum.
    """
    [(_, size, digest)] = digests(directory, [name])
    expected = metadata["files"][name]
    if size != expected["bytes"]:
        fail(directory, f"is damaged: {name} has {size} bytes instead of {expected['bytes']}. {RESUME_HINT}")
    if digest != expected["sha256"]:
        fail(directory, f"is damaged: the checksum of {name} does not match. {RESUME_HINT}")


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _package_version() -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("exgrpo-trl")
    except PackageNotFoundError:
        return None


def fail(path: Path, what: str, cause: BaseException | None = None) -> NoReturn:
    """Say of the buffer at a path what is wrong, in so many words."""
    if len(what) > _MOST_CHARACTERS:  # it quotes what it found
        what = f"{what[: _MOST_CHARACTERS - 300]} [...] {what[-300:]}"
    raise ExperienceBufferError(f"The experience buffer at {path} {what}") from cause
