"""One trainer at a time in a run folder: each of its ranks locks one byte of the file `lock`, and loses it when it dies."""

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

PATIENCE = 10.0  # seconds that another trainer has to leave: one that was just stopped may be saving


@contextmanager
def run_lock(run_dir: Path, rank: int) -> Iterator[IO[str]]:
    """Keep other trainers out until this process leaves the folder or dies. Raises UserError if another one stays in."""
    with (run_dir / "lock").open("a+") as lock:
        give_up = time.monotonic() + PATIENCE
        while not try_lock(lock, rank, fcntl.LOCK_EX):
            if time.monotonic() > give_up:
                lock.seek(0)
                holder = lock.read().strip() or "another trainer"
                raise UserError(f"run_dir {run_dir} is in use by {holder}: stop that, or give another run_dir")
            time.sleep(0.1)
        if rank == 0:
            lock.truncate(0)
            job = os.environ.get("SLURM_JOB_ID")
            lock.write(f"process {os.getpid()} on {socket.gethostname()}{f', job {job}' if job else ''}\n")
            lock.flush()
        yield lock


def try_lock(lock: IO[str], rank: int, kind: int = fcntl.LOCK_SH) -> bool:
    """Lock the byte of a rank; returns False if a living process has it.

    Several may look who is there, since a LOCK_SH keeps out only the LOCK_EX of a rank that begins.
    """
    try:
        # A record lock: the kernel drops it when this process ends, however it does, and no loader worker inherits it.
        fcntl.lockf(lock, kind | fcntl.LOCK_NB, 1, rank)
        return True
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise  # a file system that knows no locks
        return False


def show_life(run_dir: Path) -> None:
    """Touch the lock: a sign of life that outlives this process."""
    with suppress(OSError):
        os.utime(run_dir / "lock")
