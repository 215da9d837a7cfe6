"""The run folder: one config, one trainer."""

import errno
import os
import signal
import subprocess
import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from conftest import ROOT

from distrib.command_line import read_config
from distrib.config import Config, OptimConfig
from distrib.errors import DiskError, LostRankError, RunError, UserError
from distrib.runtime import disk, lock, status
from distrib.runtime.control_channel import ControlChannel
from distrib.runtime.lock import run_lock
from distrib.runtime.run_folder import ask_for_requeue, open_run, refuse_another_config, write_config
from distrib.runtime.status import read_status, write_status


def opened(config: Config, ago: float = 0) -> AbstractContextManager[None]:
    """The folder of an attempt of one rank that began some seconds ago."""
    return open_run(config, ControlChannel(0, {}), time.time() - ago)


def begin(config: Config, *changes: str) -> None:
    refuse_another_config(config, changes)
    with opened(config):
        write_config(config)


def test_a_run_folder_keeps_its_config(tmp_path: Path) -> None:
    config = Config(run_dir=str(tmp_path / "deep" / "run"))
    begin(config)
    assert read_config(tmp_path / "deep" / "run" / "config.yaml") == config


def test_a_run_folder_of_another_config_is_refused_and_left_alone(tmp_path: Path) -> None:
    begin(Config(run_dir=str(tmp_path), seed=1))
    before = (tmp_path / "config.yaml").read_bytes()
    with pytest.raises(UserError, match=r"another seed \(1 there, 2 now\), optim.lr \(0.1 there, 0.3 now\): give another"):
        begin(Config(run_dir=str(tmp_path), seed=2, optim=OptimConfig(lr=0.3)))
    assert (tmp_path / "config.yaml").read_bytes() == before


def test_keys_that_do_not_change_the_result_may_change(tmp_path: Path) -> None:
    begin(Config(run_dir=str(tmp_path)))
    begin(Config(run_dir=str(tmp_path), log_every=1, micro_batches=4, keep=9, threads=1))
    assert read_config(tmp_path / "config.yaml").keep == 9


def test_more_epochs_have_to_be_asked_for_and_fewer_are_refused(tmp_path: Path) -> None:
    begin(Config(run_dir=str(tmp_path), epochs=5.0))
    words = r"epochs \(5.0 there, 9.0 now\): give another run_dir, or epochs=... on the command line to change it from here on"
    with pytest.raises(UserError, match=words):
        begin(Config(run_dir=str(tmp_path), epochs=9.0))
    begin(Config(run_dir=str(tmp_path), epochs=9.0), "epochs", "seed")
    with pytest.raises(UserError, match=r"another seed \(0 there, 1 now\): give another run_dir$"):
        begin(Config(run_dir=str(tmp_path), epochs=9.0, seed=1), "epochs", "seed")


def test_a_run_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written: Not a directory; give another run_dir"):
        begin(Config(run_dir=str(tmp_path / "file" / "run")))


HOLD = """
import time
from contextlib import AbstractContextManager
from pathlib import Path
from distrib.runtime.lock import run_lock
with run_lock(Path({!r})):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> "subprocess.Popen[str]":
    """Another process that holds the folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLD.format(str(tmp_path))], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.slow
def test_a_folder_in_use_is_refused_and_a_dead_ones_is_taken_over(
    tmp_path: Path, holder: "subprocess.Popen[str]", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "PATIENCE", 0.3)
    words = rf"is in use by process {holder.pid} on .*: stop that, or give another run_dir"
    with pytest.raises(UserError, match=words), run_lock(tmp_path):
        pass
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with run_lock(tmp_path):
        assert f"process {os.getpid()} on " in (tmp_path / "lock").read_text()


def test_a_file_system_without_locks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lockf(*args: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "lockf", lockf)
    with pytest.raises(UserError, match=r"cannot be written: No locks available; give another run_dir"):
        begin(Config(run_dir=str(tmp_path)))


@pytest.mark.slow
def test_a_trainer_that_is_about_to_leave_is_waited_for(
    tmp_path: Path, holder: "subprocess.Popen[str]", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "PATIENCE", 300)
    began = time.monotonic()
    killer = subprocess.Popen(["sh", "-c", f"sleep 0.5; kill -9 {holder.pid}"])
    with run_lock(tmp_path):
        assert time.monotonic() - began > 0.4
    killer.wait()
    holder.wait()


def test_the_status_tells_how_a_run_fares(tmp_path: Path) -> None:
    config = Config(run_dir=str(tmp_path))
    with opened(config):
        time.sleep(0.2)
        write_status(tmp_path, "running", step=3, kept_seconds=0.1)
        found = read_status(tmp_path)
        assert found.items() >= {"state": "running", "step": 3, "attempts": 1}.items()
        assert found["goodput"] == pytest.approx(0.1 / found["seconds"], abs=1e-3)
    with pytest.raises(ZeroDivisionError), opened(config):
        1 / 0  # noqa: B018
    write_status(tmp_path, step=4)  # by a save that was under way
    failed = {"state": "failed", "cause": "ZeroDivisionError: division by zero", "rank": 0, "attempts": 2, "step": 4}
    assert read_status(tmp_path).items() >= failed.items()
    refuse_another_config(config)


def test_the_time_of_a_killed_attempt_counts_up_to_its_last_sign_of_life(tmp_path: Path) -> None:
    config = Config(run_dir=str(tmp_path))
    begin(config)
    disk.write_atomically(tmp_path / "status.json", '{"seconds": 7.5}')
    os.utime(tmp_path / "status.json", (1000, 1000))
    os.utime(tmp_path / "lock", (1002.5, 1002.5))
    assert status.up_seconds(tmp_path) == 10


def test_a_status_that_cannot_be_written_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with opened(Config(run_dir=str(tmp_path))):
        monkeypatch.setattr(status, "write_atomically", full)
        write_status(tmp_path, "running", step=3)


def test_a_run_that_a_signal_stopped_asks_for_its_requeue_where_there_is_a_file_for_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask_for_requeue("SIGUSR1")
    monkeypatch.setenv("REQUEUE_FILE", str(tmp_path / "requeue"))
    for person in ("the file STOP", "SIGINT"):
        ask_for_requeue(person)
    assert not (tmp_path / "requeue").exists()
    ask_for_requeue("SIGUSR1")
    assert (tmp_path / "requeue").read_text() == "stopped by SIGUSR1\n"
    monkeypatch.setenv("REQUEUE_FILE", str(tmp_path / "not there" / "requeue"))
    with pytest.raises(RunError, match=r"requeue cannot be written: No such file or directory"):
        ask_for_requeue("SIGUSR1")


@pytest.mark.parametrize(
    ("error", "code", "asks"),
    [
        (LostRankError("rank 1 has exited"), 3, True),
        (DiskError("the disk is full"), 5, True),
        (RunError("the loss is not finite"), 1, False),
        (ZeroDivisionError("in the code"), 1, False),
        (UserError("another seed"), 2, False),
    ],
)
def test_a_failure_asks_for_a_requeue_only_if_it_may_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int, asks: bool
) -> None:
    monkeypatch.setenv("REQUEUE_FILE", str(tmp_path / "requeue"))
    with pytest.raises(type(error)), opened(Config(run_dir=str(tmp_path))):
        raise error
    assert read_status(tmp_path)["exit_code"] == code
    assert (tmp_path / "requeue").exists() == asks
    if asks:
        assert (tmp_path / "requeue").read_text() == f"failed with exit code {code}: {error}\n"


def test_a_run_that_began_before_a_key_was_there_goes_on_with_its_default(tmp_path: Path) -> None:
    config = Config(run_dir=str(tmp_path))
    begin(config)
    written = (tmp_path / "config.yaml").read_text()
    assert "  clip_norm: 0.0\n" in written
    (tmp_path / "config.yaml").write_text(written.replace("  clip_norm: 0.0\n", ""))
    begin(config)
    with pytest.raises(UserError, match=r"another optim.clip_norm \(0.0 there, 1.0 now\)"):
        begin(Config(run_dir=str(tmp_path), optim=OptimConfig(clip_norm=1.0)))


def test_the_time_between_two_attempts_does_not_count(tmp_path: Path) -> None:
    config = Config(run_dir=str(tmp_path))
    begin(config)
    disk.write_atomically(tmp_path / "status.json", '{"seconds": 7.5}')
    for name, ago in (("status.json", 1000), ("lock", 990)):
        os.utime(tmp_path / name, (time.time() - ago, time.time() - ago))
    with opened(config, 2):
        assert 19.5 <= read_status(tmp_path)["seconds"] < 100


def test_the_time_before_a_run_folder_is_opened_counts(tmp_path: Path) -> None:
    with opened(Config(run_dir=str(tmp_path)), 100):
        assert 100 <= read_status(tmp_path)["seconds"] < 200
