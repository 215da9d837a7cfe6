"""Checkpoints are written by a background thread, while training goes on."""

import errno
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distrib.config import Config
from distrib.errors import DiskError, RunError, one_line
from distrib.runtime.checkpoint import Snapshot, write
from distrib.runtime.disk import to_disk


class Saver:
    """Writes checkpoints in a background thread, one at a time. At its exit, this context waits for the last one.

    `saved(snapshot)` is called when a checkpoint is on the disk.
    """

    def __init__(self, config: Config, about: dict[str, Any], saved: Callable[[Snapshot], None]) -> None:
        self.run_dir, self.keep, self.about, self.saved = Path(config.run_dir), config.keep, about, saved
        self.thread: threading.Thread | None = None
        self.last: Snapshot | None = None  # the next snapshot reuses its memory
        self.failure: RunError | None = None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, *error: object) -> None:
        self.wait()

    def save(self, snapshot: Snapshot) -> None:
        """Start to write a snapshot. Call `wait` first."""
        self.last, self.failure = snapshot, None
        self.thread = threading.Thread(target=self._write, args=(snapshot,), name=f"save step {snapshot.step}")
        self.thread.start()

    def wait(self) -> RunError | None:
        """Wait for the running save; returns the error of the last save, or None."""
        if self.thread:
            self.thread.join()
            self.thread = None
        return self.failure

    def _write(self, snapshot: Snapshot) -> None:
        try:
            write(snapshot, self.run_dir, self.about, self.keep)
            self.saved(snapshot)
        except Exception as error:  # training continues, and `wait` reports this
            kind = DiskError if isinstance(error, OSError) else RunError
            why = f"{type(error).__name__}: {one_line(error)}"
            self.failure = kind(f"the checkpoint of step {snapshot.step} was not saved: {why}")


def try_save(run_dir: Path, size: int) -> None:
    """Do what a save of `size` bytes does, without writing them, so that a disk that cannot be saved to is noticed at once.

    Raises DiskError.
    """
    folder = run_dir / "checkpoints"
    partial, whole = folder / "trial.partial", folder / "trial"
    try:
        for left in (partial, whole):
            shutil.rmtree(left, ignore_errors=True)
        partial.mkdir(parents=True)
        with (partial / "file").open("wb") as file:
            allocate(file.fileno(), size)
        for path in (partial / "file", partial):
            to_disk(path)
        os.rename(partial, whole)
        to_disk(folder)
    except OSError as error:
        raise DiskError(f"a checkpoint of {size / 1e6:,.1f} MB cannot be saved in {run_dir}: {error.strerror}") from None
    finally:
        for left in (partial, whole):
            shutil.rmtree(left, ignore_errors=True)


def allocate(file: int, size: int) -> None:
    """Reserve `size` bytes for an open file, where the file system can do that. Raises OSError if there is no room."""
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file, 0, max(1, size))
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise
