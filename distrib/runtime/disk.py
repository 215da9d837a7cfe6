"""Files that are there whole or not at all, and reads that are tried again when a disk fails for a moment."""

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

# What network file systems answer while a server is away or a handle has grown old.
PASSING = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EINTR}
PAUSES = (0.1, 0.5, 2.0)  # seconds between two tries


def write_atomically(path: Path, text: str) -> None:
    """Write a file that has its old content or the new one, whenever this is killed."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def to_disk(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def try_again(read: Callable[[], T]) -> T:
    """What `read` gives, tried again after each of PAUSES if the disk fails in a way that passes. Raises OSError."""
    for pause in PAUSES:
        try:
            return read()
        except OSError as error:
            if error.errno not in PASSING:
                raise
        time.sleep(pause)
    return read()
