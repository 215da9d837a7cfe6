"""Atomic writes, and reads that are tried again after a temporary failure of the disk."""

import errno
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from distrib.errors import DiskError

T = TypeVar("T")

# Errors of network file systems while a server is unreachable or a file handle is stale, and of a machine at its limits.
NAMES = "EIO ESTALE ETIMEDOUT EAGAIN EINTR ENOTCONN ESHUTDOWN EHOSTDOWN EHOSTUNREACH EREMOTEIO ENOMEM ENFILE EMFILE"
TEMPORARY = {getattr(errno, name, None) for name in NAMES.split()} - {None}
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 10.0  # seconds between two tries
# Errors of file systems that cannot sync a folder, such as CIFS, FUSE and some Lustre.
NO_FOLDER_SYNC = {errno.EINVAL, errno.EIO, errno.ENOTSUP}


def report_on_stderr(text: str) -> None:
    print(f"distrib: warning: {text}", file=sys.stderr, flush=True)


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


@dataclass
class Retries:
    """How long this process tries to read again after a temporary error, and how it reports that, once."""

    limit: float = 240.0  # seconds; limits.read
    report: Callable[[str], None] = report_on_stderr
    reported: bool = False


retries = Retries()


def try_again(read: Callable[[], T]) -> T:
    """The result of `read`. After a temporary error it is called again, with growing pauses. Raises OSError."""
    started, pause = time.monotonic(), FIRST_PAUSE
    while True:
        try:
            return read()
        except OSError as error:
            if not is_temporary(error) or time.monotonic() + pause - started > retries.limit:
                raise
            if not retries.reported:
                retries.reported = True
                words = f"{error.filename or 'a file'} cannot be read now ({error.strerror})"
                retries.report(f"{words}: this and later reads are tried again for up to {retries.limit:g} s (limits.read)")
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)


def is_temporary(error: Exception) -> bool:
    """Whether a read that failed with this error may succeed later."""
    return isinstance(error, OSError) and error.errno in TEMPORARY


def read_from(path: str | Path, read: Callable[[], T]) -> T:
    """The result of `read`, which is tried again as in `try_again`. Raises DiskError after the last try, and other OSErrors."""
    try:
        return try_again(read)
    except OSError as error:
        if not is_temporary(error):
            raise
        why = f"{error.strerror or error}, after {retries.limit:g} s of tries (limits.read)"
        raise DiskError(f"{path} cannot be read: {why}") from None
