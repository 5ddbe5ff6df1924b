"""What commands write: JSON that any reader takes, and files and buffers that are there as a whole or not at all."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..buffer import ExperienceBuffer
from ..buffer.disk import sync
from ..buffer.locations import hidden_names, resolved
from ..images import ImageReference, StoredImage
from ..records import ExperienceBufferError
from ..values import plain


def write_json(value: Any) -> None:
    """Print JSON, in ASCII."""
    json.dump(jsonable(value), sys.stdout, indent=2)
    sys.stdout.write("\n")


def jsonable(value: Any) -> Any:
    """What any reader of JSON takes: null for NaN and infinities, the digest of an image, text for other objects."""
    if isinstance(value, StoredImage | ImageReference):
        return {"image": value.digest}
    value = plain(value)
    if isinstance(value, dict):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [jsonable(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else str(value)


def refuse_existing(path: Path, *, force: bool) -> None:
    """
    Refuse to write over what is there.

    Raises:
        ExperienceBufferError: if something is, and it is not asked for.
    """
    if not force and (path.exists() or path.is_symlink() or hidden_names(resolved(path))[1].exists()):
        raise ExperienceBufferError(f"{path} exists. Choose another path for -o, or write over it with --force.")


def save(buffer: ExperienceBuffer, path: Path) -> None:
    """
    Save a buffer, see [`ExperienceBuffer.save`].

    Raises:
        ExperienceBufferError: if that is not possible.
    """
    try:
        buffer.save(path)
    except TypeError as error:
        raise ExperienceBufferError(f"The experience buffer cannot be saved to {path}: {error}") from error


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of the other one if all goes well."""
    path = resolved(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.saving")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
