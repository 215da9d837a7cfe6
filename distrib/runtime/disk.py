"""Atomic writes, and reads that are tried again after a temporary failure of the disk."""

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

# Errors of network file systems while a server is unreachable or a file handle is stale.
PASSING = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EINTR}
PAUSES = (0.1, 0.5, 2.0)  # seconds between two tries
# Errors of file systems that cannot sync a folder, such as CIFS, FUSE and some Lustre.
NO_FOLDER_SYNC = {errno.EINVAL, errno.EIO, errno.ENOTSUP}


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that, after a kill at any time, it has its old or its new content."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def to_disk(path: Path) -> None:
    """Sync a file to the disk, or the entries of a folder, where the file system can do that. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if not (path.is_dir() and error.errno in NO_FOLDER_SYNC):
            raise
    finally:
        os.close(handle)


def try_again(read: Callable[[], T]) -> T:
    """The result of `read`; after a temporary error it is called again, after each of PAUSES. Raises OSError."""
    for pause in PAUSES:
        try:
            return read()
        except OSError as error:
            if error.errno not in PASSING:
                raise
        time.sleep(pause)
    return read()
