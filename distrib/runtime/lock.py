"""One training job at a time in a run folder: rank 0 locks the file `lock` until its process ends."""

import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from distrib.errors import UserError

PATIENCE = 10.0  # seconds to wait for another job to exit: one that was just stopped may still save


@contextmanager
def run_lock(run_dir: Path) -> Iterator[None]:
    """Lock the folder until this context or its process ends. Raises UserError if another job keeps the lock."""
    with (run_dir / "lock").open("a+") as lock:
        give_up = time.monotonic() + PATIENCE
        while not try_lock(lock):
            if time.monotonic() > give_up:
                lock.seek(0)
                holder = lock.read().strip() or "another process"
                raise UserError(f"run_dir {run_dir} is in use by {holder}: stop that, or give another run_dir")
            time.sleep(0.1)
        lock.truncate(0)
        job = os.environ.get("SLURM_JOB_ID")
        lock.write(f"process {os.getpid()} on {socket.gethostname()}{f', job {job}' if job else ''}\n")
        lock.flush()
        yield


def try_lock(lock: IO[str]) -> bool:
    """Try to lock a file; returns False if another living process has locked it."""
    try:
        # A record lock: the kernel releases it when this process ends in any way, and loader workers do not inherit it.
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB, 1)
        return True
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise  # this file system does not support locks
        return False


def show_life(run_dir: Path) -> None:
    """Touch the lock file, to record that this attempt is alive."""
    with suppress(OSError):
        os.utime(run_dir / "lock")
