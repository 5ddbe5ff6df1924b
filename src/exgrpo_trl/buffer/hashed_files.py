"""Sizes and SHA-256 of files: of those that are there, and of those that are being written."""

from __future__ import annotations

import hashlib
import io
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

# Of what was written and waits for its checksum: a row group of images, and the one before it.
_MOST_WAITING = 2


def digests(directory: Path, names: Iterable[str]) -> Iterator[tuple[str, int, str]]:
    """Name, size in bytes and SHA-256 of data files."""
    # Large, as a thread waits for others with every block; NumPy's memory costs what is used of it.
    block = np.empty(2**25, np.uint8).data
    for name in names:
        digest, size = hashlib.sha256(), 0
        with open(directory / name, "rb", buffering=0) as file:
            while num_bytes := file.readinto(block):
                digest.update(block[:num_bytes])
                size += num_bytes
        yield name, size, digest.hexdigest()


class HashedFile(io.BufferedWriter):
    """
    A file that is written from start to end, while its SHA-256 is taken of the same bytes in a thread.

    So it is not read again: a tenth of a second for each 300 MB, and not every mount gives back what is being written.

    Args:
        path (`Path`):
            File to write.
        executor (`ThreadPoolExecutor`):
            Takes the checksums, in order: it has one thread.
    """

    def __init__(self, path: Path, executor: ThreadPoolExecutor) -> None:
        super().__init__(io.FileIO(path, "wb"))
        self._executor = executor
        self._digest = hashlib.sha256()
        self._num_bytes = 0
        self._waiting: deque[Future[None]] = deque()

    def write(self, content: Any, /) -> int:
        """Write what holds bytes."""
        content = bytes(content)  # no copy of what is `bytes` already, as all that comes from Arrow
        num_bytes = super().write(content)
        self._num_bytes += num_bytes
        self._waiting.append(self._executor.submit(self._digest.update, content))
        while len(self._waiting) > _MOST_WAITING:
            self._waiting.popleft().result()
        return num_bytes

    def described(self) -> dict[str, Any]:
        """Size and SHA-256 of what was written, as the metadata has them."""
        while self._waiting:
            self._waiting.popleft().result()
        return {"bytes": self._num_bytes, "sha256": self._digest.hexdigest()}
