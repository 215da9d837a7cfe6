"""One training job at a time in a run folder: the lease on it.

Rank 0 of a job locks the file `lock`, and writes into it each second who it is. Some file systems have no locks; on some, locks
do not reach other machines, or outlive a dead one. There the text decides: a job that has not written for SILENCE seconds has
ended.
"""

import errno
import fcntl
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from distrib.errors import DiskError, RunError, UserError

FILE = "lock"
PATIENCE = 10.0  # seconds to wait for another job that is alive: one that was just stopped may still save
SILENCE = 10.0  # seconds without a sign of life after which a job has ended
SETTLE = 2.5  # seconds in which two jobs that start at once without locks notice each other
SIZE = 512  # bytes of the file: a text that always has the same size can be written to a full disk
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EINVAL}


class Lease:
    """The right to train in a run folder, from entering this context to its exit. `renew` must be called each second.

    `seconds()` is the time of this run so far, which the file remembers. Raises UserError if another job has the lease.
    """

    def __init__(self, run_dir: Path, seconds: Callable[[], float], limit: float) -> None:
        self.run_dir, self.seconds, self.limit = run_dir, seconds, limit
        self.token, self.writing = secrets.token_hex(8), threading.Lock()
        self.file, self.over = os.open(run_dir / FILE, os.O_RDWR | os.O_CREAT, 0o666), False
        self.earlier = 0.0  # seconds of the run up to the last sign of life of the previous attempt
        self.warnings: list[str] = []

    def __enter__(self) -> "Lease":
        try:
            holder, locked = self._wait()
            self.earlier = float(holder.get("seconds", 0.0))
            self._write()
            if not locked:
                words = f"the file system of {self.run_dir} has no locks"
                self.warnings = [f"{words}: what each job writes each second into its file {FILE} takes their place"]
                time.sleep(SETTLE)
                self._refuse_takeover()
        except BaseException:
            os.close(self.file)
            raise
        return self

    def __exit__(self, *error: object) -> None:
        with self.writing, suppress(OSError, RunError):
            self.over = True
            self._refuse_takeover()
            self._write()
        os.close(self.file)

    def renew(self) -> None:
        """Give a sign of life. Raises RunError if another job has taken over the folder."""
        with self.writing, suppress(OSError):
            if not self.over:
                self._refuse_takeover()
                self._write()

    def _wait(self) -> tuple[dict[str, Any], bool]:
        """Wait until no other job trains in the folder; returns what the last one wrote, and whether the folder is locked."""
        began = changed = time.monotonic()
        holder, alive, told = self._read(), False, False
        while True:
            locked, there = self._try_lock(), self._read()
            if there != holder:
                holder, alive, changed = there, True, time.monotonic()
            silent = time.monotonic() - changed
            if locked is not False and (not holder or has_ended(holder) or silent > SILENCE):
                return holder, bool(locked)
            who, waited = describe(holder), time.monotonic() - began
            if alive and silent < SILENCE and waited > PATIENCE:
                raise UserError(f"run_dir {self.run_dir} is in use by {who}: stop that, or give another run_dir")
            if waited > self.limit:
                raise DiskError(f"run_dir {self.run_dir} is still locked by {who}, which has not written for {silent:.0f} s")
            if not told and silent > SILENCE / 2:
                told = True
                words = f"run_dir {self.run_dir} was not left by {who}, which has not written for {silent:.0f} s"
                print(f"distrib: {words}: waiting for at most {self.limit:.0f} s", file=sys.stderr, flush=True)
            time.sleep(0.1)

    def _try_lock(self) -> bool | None:
        """Whether the file could be locked now; None if this file system has no locks."""
        try:
            # A record lock: the kernel releases it when this process ends in any way, and loader workers do not inherit it.
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1)
            return True
        except OSError as error:
            if error.errno in NO_LOCKS:
                return None
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            return False

    def _refuse_takeover(self) -> None:
        holder = self._read()
        if holder.get("token", self.token) != self.token:
            raise RunError(f"run_dir {self.run_dir} was taken over by {describe(holder)}")

    def _read(self) -> dict[str, Any]:
        """What is in the file; empty if nothing is, or the text of an earlier version."""
        text = os.pread(self.file, SIZE, 0)
        try:
            found = json.loads(text)
        except ValueError:
            found = {"half": text.hex()} if text.startswith(b"{") else {}  # read while it was written
        return found if isinstance(found, dict) else {}

    def _write(self) -> None:
        who = {
            "process": os.getpid(),
            "host": socket.gethostname(),
            "job": os.environ.get("SLURM_JOB_ID"),
            "machine": machine(),
        }
        text = json.dumps(who | {"seconds": round(self.seconds(), 2), "over": self.over, "token": self.token})
        os.pwrite(self.file, f"{text.ljust(SIZE - 1)}\n".encode(), 0)


def describe(holder: dict[str, Any]) -> str:
    """The job that wrote `holder`, in words."""
    if not holder:
        return "another process"
    return f"process {holder.get('process')} on {holder.get('host')}" + (f", job {holder['job']}" if holder.get("job") else "")


def has_ended(holder: dict[str, Any]) -> bool:
    """Whether the job that wrote `holder` has certainly ended: it said so, or it was on this machine and is not there."""
    if holder.get("over"):
        return True
    if holder.get("machine") != machine():
        return False
    try:
        os.kill(int(holder["process"]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return bool(holder["process"] == os.getpid())  # of an earlier process with this number, as in containers


def machine() -> str:
    """This machine since its start, and this container: a process number has a meaning only there."""
    with suppress(OSError):
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()
