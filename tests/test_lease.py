"""The lease on a run folder: with locks, without them, with locks that lie, and with those of the dead."""

import errno
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

from distrib.errors import DiskError, RunError, UserError
from distrib.runtime import lease
from distrib.runtime.lease import Lease

HOLD = """
import itertools, sys
from pathlib import Path
from distrib.runtime import lease
if len(sys.argv) > 2:
    lease.machine = lambda: sys.argv[2]
numbers = itertools.count()
with lease.Lease(Path(sys.argv[1]), lambda: 7.5 + next(numbers), 1) as held:
    print("held", flush=True)
    while sys.stdin.readline():
        held.renew()
        print("renewed", flush=True)
"""


class Holder:
    """Another process that holds the folder. It gives a sign of life when it is asked to."""

    def __init__(self, run_dir: Path, *machine: str) -> None:
        command = [sys.executable, "-c", HOLD, str(run_dir), *machine]
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdin
        assert self.process.stdout
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        assert self.stdout.readline() == "held\n"

    def renew(self) -> None:
        print(file=self.stdin, flush=True)
        assert self.stdout.readline() == "renewed\n"

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.stdin.close()
        self.stdout.close()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("PATIENCE", 0.3), ("SILENCE", 0.6), ("SETTLE", 0.3)):
        monkeypatch.setattr(lease, name, seconds)


@pytest.fixture(params=["here", "elsewhere"])
def holder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Holder]:
    """A holder on this machine, and one on another as far as the lease knows."""
    found = Holder(tmp_path, *(["another machine"] if request.param == "elsewhere" else []))
    yield found
    found.kill()


def take(run_dir: Path, limit: float = 100) -> Lease:
    return Lease(run_dir, lambda: 1.0, limit)


def locks_that(monkeypatch: pytest.MonkeyPatch, code: int | None) -> None:
    """Locks that raise this error, or, if it is 0, lie; those of the system if it is None."""
    if code is None:
        return

    def lockf(*args: object) -> None:
        if code:
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(lease.fcntl, "lockf", lockf)


KINDS = {"locks": None, "ENOSYS": errno.ENOSYS, "ENOLCK": errno.ENOLCK, "lying locks": 0}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_of_a_job_that_lives_is_refused(
    tmp_path: Path, holder: Holder, quick: None, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    locks_that(monkeypatch, KINDS[kind])
    monkeypatch.setattr(lease, "SILENCE", 1e9)  # however busy this machine is, the holder is not taken for dead
    monkeypatch.setattr(lease.time, "sleep", lambda seconds: holder.renew())
    words = rf"run_dir .* is in use by process {holder.process.pid} on .*: stop that, or give another run_dir"
    with pytest.raises(UserError, match=words):
        take(tmp_path).__enter__()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_of_a_job_that_was_killed_is_taken_over(
    tmp_path: Path, holder: Holder, quick: None, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    locks_that(monkeypatch, KINDS[kind])
    holder.kill()
    with take(tmp_path) as taken:
        assert taken.earlier == 7.5
        assert bool(taken.warnings) == (kind in ("ENOSYS", "ENOLCK"))
        assert f'"process": {os.getpid()}' in (tmp_path / "lock").read_text()


@pytest.mark.slow
def test_a_lock_that_outlives_its_machine_is_waited_for_and_that_is_told(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As on NFSv4, whose server keeps the locks of a dead machine for 90 s."""
    holder = Holder(tmp_path, "another machine")
    holder.kill()
    answers, refused = iter([errno.EAGAIN] * 30), []

    def lockf(*args: object) -> None:
        for code in answers:
            refused.append(code)
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(lease.fcntl, "lockf", lockf)
    with take(tmp_path):
        assert len(refused) == 30
    told = capsys.readouterr().err
    assert re.search(r"was not left by process \d+ on .*, which has not written for \d+ s: waiting for at most 100 s\n", told)
    answers = iter([errno.EAGAIN] * 10**9)
    with pytest.raises(DiskError, match=r"is still locked by process \d+ on .*, which has not written for \d+ s"):
        take(tmp_path, limit=0.5).__enter__()


def test_a_job_whose_folder_was_taken_over_ends(tmp_path: Path) -> None:
    with take(tmp_path) as first:
        text = (tmp_path / "lock").read_text()
        (tmp_path / "lock").write_text(text.replace(first.token, "f" * 16))
        with pytest.raises(RunError, match=rf"run_dir {tmp_path} was taken over by process {os.getpid()} on "):
            first.renew()
    assert '"over": false' in (tmp_path / "lock").read_text()  # what another job wrote is left as it is


def test_of_two_jobs_that_start_at_once_without_locks_one_goes_on(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    locks_that(monkeypatch, errno.ENOSYS)
    second = take(tmp_path)
    monkeypatch.setattr(lease.time, "sleep", lambda seconds: second._write())  # while the first waits for such a one
    with pytest.raises(RunError, match="was taken over by"):
        take(tmp_path).__enter__()


def test_a_text_that_is_half_written_is_that_of_a_job(tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lock").write_text('{"process": 1, "ho')
    waits: list[float] = []
    sleep = lease.time.sleep
    monkeypatch.setattr(lease.time, "sleep", lambda seconds: (waits.append(seconds), sleep(seconds)))
    with take(tmp_path):
        assert waits  # until it was silent for long enough
    (tmp_path / "lock").write_text("process 1 on a host\n")  # of an earlier version
    waits.clear()
    with take(tmp_path):
        assert waits == []


def test_a_full_disk_does_not_end_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with take(tmp_path) as taken:
        size = (tmp_path / "lock").stat().st_size
        taken.renew()
        assert (tmp_path / "lock").stat().st_size == size
        monkeypatch.setattr(os, "pwrite", full)
        taken.renew()


def test_a_folder_that_was_left_is_taken_at_once_and_its_time_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Lease(tmp_path, lambda: 12.5, 1) as first:
        pass
    first.renew()  # by a thread that has not heard of it
    monkeypatch.setattr(lease.time, "sleep", None)  # nobody waits
    monkeypatch.setattr(lease, "machine", lambda: "another")
    with take(tmp_path) as second:
        assert second.earlier == 12.5
