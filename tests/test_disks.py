"""Disks as they are: reads that fail for a while or for good, no locks, and containers with little shared memory."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, SCRIPTS, SMALL, Ranks, assert_same, launch, requires
from test_launch import pictures

from distrib.errors import DISK
from distrib.runtime.status import read_status

pytestmark = pytest.mark.slow

FILES = ["data.name=folder", "data.size=16", "batch_size=4", "epochs=1", "precision=no", "model.width=8", "threads=1"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on pictures, on a disk that works."""
    root = tmp_path_factory.mktemp("disks")
    done = launch(1, "train.py", *FILES, f"data.root={pictures(root)}", "data.workers=0", f"run_dir={root / 'whole'}")
    assert done.returncode == 0, done.stderr
    return root / "whole"


def on_a_mount(mount: str, *args: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run a program with a tmpfs mounted for it alone."""
    command = ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs {mount} && exec "$@"', "sh", sys.executable, *args]
    options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 600, "check": False}
    return subprocess.run(command, cwd=ROOT, env=os.environ | SCRIPTS | environment, **options)


def wait_for(event: Callable[[], bool], running: Ranks) -> None:
    while not event():
        assert running.run()
        time.sleep(0.05)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("code", ["EIO", "ESTALE", "ETIMEDOUT", "EAGAIN"])
def test_an_image_that_cannot_be_read_for_a_moment_is_read_again_and_that_is_told_once(
    tmp_path: Path, whole: Path, workers: int, code: str
) -> None:
    keys = [*FILES, f"data.root={whole.parent}", f"data.workers={workers}", f"run_dir={tmp_path / 'run'}"]
    done = launch(1, "tests/failing_disk.py", f"image:{code}:2", *keys)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("tried again for up to 240 s (limits.read)") == 1, done.stderr
    assert_same(tmp_path / "run", whole)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_can_never_be_read_ends_the_run_as_a_failure_of_the_disk(
    tmp_path: Path, whole: Path, workers: int
) -> None:
    keys = [*FILES, f"data.root={whole.parent}", f"data.workers={workers}", "limits.read=0.5", f"run_dir={tmp_path / 'run'}"]
    done = launch(2, "tests/failing_disk.py", "image:EIO:1000", *keys)
    assert done.returncode == DISK, done.stderr
    lines = [line for line in done.stderr.splitlines() if "distrib: " in line and "warning" not in line]
    assert len(lines) == 1, done.stderr
    assert lines[0].endswith("cannot be read: Input/output error, after 0.5 s of tries (limits.read)")
    assert read_status(tmp_path / "run")["exit_code"] == DISK
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("code", ["ENOSYS", "ENOLCK"])
def test_a_disk_without_locks_is_told_and_one_job_at_a_time_trains_there(tmp_path: Path, code: str) -> None:
    keys = [*SMALL, "threads=1", f"run_dir={tmp_path / 'run'}", "epochs=2000", "log_every=1", "limits.start=60"]
    running = Ranks(2, "tests/failing_disk.py", f"lock:{code}:1000", *keys)
    wait_for(lambda: "step" in read_status(tmp_path / "run"), running)
    second = launch(2, "tests/failing_disk.py", f"lock:{code}:1000", *keys)
    assert second.returncode == 2, second.stderr
    assert re.search(
        r"^distrib: run_dir \S+ is in use by process \d+ on \S+: stop that, or give another run_dir\n$", second.stderr
    )
    running.kill(signal.SIGTERM)
    done = running.wait()
    assert done.returncode == 0, done.stderr
    assert "has no locks: what each job writes each second into its file lock takes their place" in done.stdout
    assert launch(2, "train.py", *keys, "epochs=0.1", f"run_dir={tmp_path / 'run'}").returncode == 2  # it is at a later step


def test_a_job_whose_folder_another_took_over_ends_and_leaves_it_alone(tmp_path: Path) -> None:
    """As happens where locks reach one machine only."""
    run_dir = tmp_path / "run"
    running = Ranks(2, "train.py", *SMALL, "threads=1", f"run_dir={run_dir}", "epochs=2000", "log_every=1")
    wait_for(lambda: "step" in read_status(run_dir), running)
    token = json.loads((run_dir / "lock").read_text())["token"]
    with (run_dir / "lock").open("r+") as lock:  # in place, as another job would write
        lock.write((run_dir / "lock").read_text().replace(token, "f" * 16))
    (run_dir / "status.json").write_text("{}")
    done = running.wait()
    assert done.returncode == 1, done.stderr
    assert len(re.findall(r"^distrib: run_dir \S+ was taken over by process", done.stderr, re.M)) == 1, done.stderr
    assert read_status(run_dir).get("state") != "failed"


def test_a_disk_that_is_too_small_for_a_checkpoint_ends_the_run_before_the_first_step(tmp_path: Path) -> None:
    requires(os.geteuid() == 0 and bool(shutil.which("unshare")), "root, for a mount of its own")
    keys = [*SMALL, "model.width=64", "threads=1", f"run_dir={tmp_path / 'run'}"]
    done = on_a_mount(f"-o size=200k none {tmp_path}", "train.py", *keys)
    assert done.returncode == DISK, done.stderr
    words = r"^distrib: a checkpoint of \d\.\d MB cannot be saved in \S+/run: No space left on device\n$"
    assert re.search(words, done.stderr), done.stderr


def test_only_rank_0_reads_a_checkpoint(tmp_path: Path) -> None:
    keys, run, copy = [*SMALL, "threads=1"], tmp_path / "run", tmp_path / "copy"
    assert launch(2, "train.py", *keys, "epochs=1", f"run_dir={run}").returncode == 0
    shutil.copytree(run, copy)
    done = launch(2, "tests/failing_disk.py", "checkpoint:EACCES:1000", *keys, f"run_dir={run}")
    assert done.returncode == 0, done.stderr
    assert launch(2, "train.py", *keys, f"run_dir={copy}").returncode == 0
    assert_same(run, copy)


def test_workers_need_neither_shared_memory_of_the_container_nor_a_short_path_for_sockets(tmp_path: Path, whole: Path) -> None:
    """Docker gives /dev/shm 64 MB. Here it has one page, and TMPDIR has more than the 108 characters of a socket's path."""
    requires(os.geteuid() == 0 and bool(shutil.which("unshare")), "root, for a mount of its own")
    folder = tmp_path / ("long" * 30)
    folder.mkdir()
    keys = [*FILES, f"data.root={whole.parent}", "data.workers=2", f"run_dir={tmp_path / 'run'}"]
    done = on_a_mount("-o size=4k none /dev/shm", "train.py", *keys, TMPDIR=str(folder))
    assert done.returncode == 0, done.stderr
    assert_same(tmp_path / "run", whole)
