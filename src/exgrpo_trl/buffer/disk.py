"""What a save asks of the file system, as far as it can."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

# What file systems say that have no such operation: mounted buckets and network shares, mostly for directories.
# Nothing that was written is lost with it, unlike after ENOSPC, EDQUOT or EIO.
_CANNOT_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF}
# Opening one is an error on Windows, on AIX, and where a directory may be written but not listed.
_CANNOT_SYNC_DIRECTORY = _CANNOT_SYNC | {errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTTY}
_CANNOT_RENAME_DIRECTORY = {errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EXDEV}


def rename(source: Path, target: Path) -> None:
    """Rename a directory, or copy it where the file system cannot."""
    try:
        os.rename(source, target)
    except OSError as error:
        if error.errno not in _CANNOT_RENAME_DIRECTORY:
            raise
        shutil.copytree(source, target)
        shutil.rmtree(source)


def sync(path: Path) -> None:
    """Make what was written durable, as far as the file system can."""
    is_directory = path.is_dir()
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        if is_directory and error.errno in _CANNOT_SYNC_DIRECTORY:
            return
        raise
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (_CANNOT_SYNC_DIRECTORY if is_directory else _CANNOT_SYNC):
            raise
    finally:
        os.close(descriptor)
