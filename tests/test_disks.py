"""Disks as they are: reads that fail for a while or for good, no locks, and containers with little shared memory."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, SCRIPTS, SMALL, assert_same, launch, requires
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
    command = 'mount -t tmpfs -o size=4k none /dev/shm && exec "$@"'
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", command, "sh", sys.executable, "train.py", *keys],
        cwd=ROOT, env=os.environ | SCRIPTS | {"TMPDIR": str(folder)}, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert_same(tmp_path / "run", whole)
