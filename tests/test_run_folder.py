"""The run folder: one config, one trainer."""

import errno
import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from distrib.command_line import read_config
from distrib.config import Config, OptimConfig
from distrib.errors import LOST_RANK, DiskError, LostRankError, RunError, UserError
from distrib.runtime import status as status_module
from distrib.runtime.control_channel import ControlChannel, Failure
from distrib.runtime.lease import Lease
from distrib.runtime.run_folder import ask_for_requeue, open_run, refuse_another_config, write_config, write_failure
from distrib.runtime.status import Status, read_status


def opened(config: Config, ago: float = 0, status: Status | None = None) -> AbstractContextManager[Lease | None]:
    """The folder of an attempt of one rank that began some seconds ago."""
    return open_run(config, ControlChannel(0, {}), status or Status(Path(config.run_dir), time.time() - ago))


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


@pytest.mark.parametrize(("code", "error"), [(errno.EACCES, UserError), (errno.ENOSPC, DiskError), (errno.EIO, DiskError)])
def test_a_folder_that_cannot_be_written_is_a_mistake_or_a_failure_of_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, error: type[Exception]
) -> None:
    def fail(*args: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "pwrite", fail)
    with pytest.raises(error, match=f"cannot be written: {os.strerror(code)}"):
        begin(Config(run_dir=str(tmp_path)))


def test_the_status_tells_how_a_run_fares(tmp_path: Path) -> None:
    config = Config(run_dir=str(tmp_path))
    status = Status(tmp_path, time.time())
    with opened(config, status=status):
        time.sleep(0.2)
        status.write("running", step=3, kept_seconds=0.1)
        found = read_status(tmp_path)
        assert found.items() >= {"state": "running", "step": 3, "attempts": 1}.items()
        assert found["goodput"] == pytest.approx(0.1 / found["seconds"], abs=1e-3)
    status = Status(tmp_path, time.time())
    with pytest.raises(ZeroDivisionError), opened(config, status=status):
        1 / 0  # noqa: B018
    status.write(step=4)  # by a save that was under way
    failed = {"state": "failed", "cause": "ZeroDivisionError: division by zero", "rank": 0, "attempts": 2, "step": 4}
    assert read_status(tmp_path).items() >= failed.items()
    refuse_another_config(config)


def test_threads_may_write_the_status_at_once(tmp_path: Path) -> None:
    status = Status(tmp_path, time.time())
    status.begin(0)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: status.write(**{f"fact{i}": i}), range(100)))
    assert read_status(tmp_path).items() >= {f"fact{i}": i for i in range(100)}.items()
    assert not list(tmp_path.glob("*.partial"))


def test_a_rank_that_has_not_begun_the_status_does_not_write_it(tmp_path: Path) -> None:
    Status(tmp_path, time.time()).write("failed")
    assert read_status(tmp_path) == {}


def test_another_rank_writes_the_failure_of_a_run_whose_rank_0_has_exited(tmp_path: Path) -> None:
    with opened(Config(run_dir=str(tmp_path)), 100):
        pass
    status = Status(tmp_path, time.time())
    write_failure(status, Failure("rank 0 has exited", LOST_RANK, [0], {"rank": 0}))
    found = read_status(tmp_path)
    assert found.items() >= {"state": "failed", "attempts": 1, "rank": 0, "exit_code": 3}.items()
    assert 100 <= found["seconds"] < 200


def test_a_status_that_cannot_be_written_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    status = Status(tmp_path, time.time())
    with opened(Config(run_dir=str(tmp_path)), status=status):
        monkeypatch.setattr(status_module, "write_atomically", full)
        status.write("running", step=3)


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


def test_the_time_of_attempts_is_added_up_to_the_last_sign_of_life_of_each_and_no_clock_of_the_disk_matters(
    tmp_path: Path,
) -> None:
    config = Config(run_dir=str(tmp_path))
    with opened(config, 100) as lease:
        assert 100 <= read_status(tmp_path)["seconds"] < 200
        (tmp_path / "status.json").write_text('{"seconds": 7.5}')  # the last one that was written before a kill
        assert lease
        lease.renew()
        text = (tmp_path / "lock").read_text()
    (tmp_path / "lock").write_text(text)
    for name in ("status.json", "lock"):
        os.utime(tmp_path / name, (1000, 1000))
    with opened(config, 2):
        assert 102 <= read_status(tmp_path)["seconds"] < 200


def test_the_status_of_an_earlier_version_is_gone_on_with(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text("process 1 on a host\n")
    (tmp_path / "status.json").write_text('{"seconds": 7.5, "attempts": 3, "micro_batches": 2}')
    with opened(Config(run_dir=str(tmp_path))):
        assert read_status(tmp_path).items() >= {"attempts": 4, "micro_batches": 2}.items()
        assert 7.5 <= read_status(tmp_path)["seconds"] < 100
