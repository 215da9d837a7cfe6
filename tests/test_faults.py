"""What goes wrong inside a run: ranks that hang or die, numbers that are none, memory that runs out. Real processes."""

import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from subprocess import PIPE
from types import FrameType
from typing import Any

import pytest
from conftest import ROOT, SCRIPTS, SMALL, assert_same, launch, points, weights
from test_launch import ACCELERATE, pictures

from distrib.data.steps import Steps
from distrib.errors import HANG, LOST_RANK
from distrib.runtime.stacks import blocking_ranks, current_call, summary
from distrib.runtime.status import read_status

LIMIT = 10  # seconds of a step: many times what one takes on a busy machine
KEYS = [*SMALL, "threads=1", f"limits.step={LIMIT}", "save_every=10", "eval_every=46", "model.norm=group"]


def faulty(fault: str, rank: int, step: int, run_dir: Path, *keys: str, restarts: int = 0) -> subprocess.CompletedProcess[str]:
    """Two ranks of train.py with a fault in one of them; under accelerate launch, if that is to restart them."""
    program = ["tests/faulty.py", fault, str(rank), str(step), str(run_dir.with_suffix(".mark"))]
    program += [*KEYS, f"run_dir={run_dir}", *keys]
    if not restarts:
        return launch(2, *program)
    command = [*ACCELERATE, "--multi_gpu", "--num_processes=2", "--main_process_port=0", f"--max_restarts={restarts}", *program]
    options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 600, "check": False}
    return subprocess.run(command, cwd=ROOT, env=os.environ | SCRIPTS, **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks without a fault."""
    run_dir = tmp_path_factory.mktemp("faults") / "whole"
    done = launch(2, "train.py", *KEYS, f"run_dir={run_dir}")
    assert done.returncode == 0, done.stderr
    return run_dir


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "culprit"),
    [
        ("sleep", r"rank 1 is at faulty.py:\d+ in steps_aside; rank 0 waits for other ranks"),
        ("lock", r"rank 1 gives no sign of life; rank 0 waits for other ranks"),
        ("SIGSTOP", r"rank 1 gives no sign of life; rank 0 waits for other ranks"),
    ],
)
def test_a_rank_that_hangs_is_named_and_the_restarted_run_finishes(
    tmp_path: Path, whole: Path, fault: str, culprit: str
) -> None:
    """The first one is restarted by its launcher, the others by the same command."""
    run_dir = tmp_path / "run"
    done = faulty(fault, 1, 25, run_dir, restarts=int(fault == "sleep"))
    assert done.returncode == (0 if fault == "sleep" else HANG), done.stderr
    words = rf"^distrib: no progress for \d+ s \(limits.step={LIMIT}\): {culprit}; stacks are in \S+$"
    assert len(re.findall(words, done.stderr, re.M)) == 1, done.stderr
    told = {path.name: path for path in (run_dir / "hang").iterdir()}
    assert told.keys() == ({"rank_0.txt", "rank_1.txt"} if fault == "sleep" else {"rank_0.txt"})
    if fault == "sleep":
        assert "in steps_aside" in told["rank_1.txt"].read_text()
    else:
        assert faulty(fault, 1, 25, run_dir).returncode == 0
    if fault == "lock":
        assert "in steps_aside" in done.stderr  # what faulthandler wrote
    assert read_status(run_dir)["attempts"] == 2
    assert_same(run_dir, whole)


@pytest.mark.slow
def test_a_loader_worker_that_hangs_is_shown_with_its_rank(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "folder")
    keys = ["data.name=folder", f"data.root={folder}", "data.size=16", "batch_size=4", "data.workers=1", "micro_batches=1"]
    done = faulty("worker", 1, 0, tmp_path / "run", *keys)
    assert done.returncode == HANG
    assert re.search(r"rank 1 waits for its loader workers; rank 0 waits for other ranks; stacks", done.stderr), done.stderr
    assert re.search(r"loader worker 0, process \d+:\n(.*\n)+.* in stuck\n", (tmp_path / "run/hang/rank_1.txt").read_text())


@pytest.mark.slow
def test_a_dead_rank_is_named_and_the_first_restart_goes_on(tmp_path: Path, whole: Path) -> None:
    done = faulty("SIGKILL", 0, 25, tmp_path / "run", restarts=1)
    assert done.returncode == 0, done.stderr
    assert "distrib: rank 0 has exited, so the other ranks exit too" in done.stderr
    assert "resumes after step 20" in done.stdout
    assert read_status(tmp_path / "run")["attempts"] == 2
    assert_same(tmp_path / "run", whole)


@pytest.mark.slow
@pytest.mark.parametrize("dead", [0, 1])
@pytest.mark.parametrize("backend", ["gloo", "blocks"])
def test_a_dead_rank_is_what_the_status_says_also_if_the_collective_blocks_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str, dead: int
) -> None:
    if backend == "blocks":
        monkeypatch.setenv("BLOCK", "1")
    done = faulty("SIGKILL", dead, 25, tmp_path / "run")
    assert done.returncode in (-signal.SIGKILL, LOST_RANK)  # of the rank that was seen first
    assert done.stderr.count(f"distrib: rank {dead} has exited, so the other ranks exit too") == 1
    status = read_status(tmp_path / "run")
    assert (status["state"], status["cause"], status["rank"]) == ("failed", f"rank {dead} has exited", dead)
    assert status["step"] in ((20,) if dead else (10, 20))  # a rank 0 that is killed may still be saving step 20


@pytest.mark.slow
def test_a_loader_worker_that_outlives_its_rank_does_not_hide_its_death(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker, which is suspended, inherited what its rank had open."""
    folder = pictures(tmp_path / "folder")
    keys = ["data.name=folder", f"data.root={folder}", "data.size=16", "batch_size=4", "data.workers=1", "limits.step=60"]
    monkeypatch.setenv("BLOCK", "1")
    done = faulty("orphan", 1, 3, tmp_path / "run", *keys)
    os.kill(int((tmp_path / "run.mark").read_text()), signal.SIGKILL)
    assert "distrib: rank 1 has exited, so the other ranks exit too" in done.stderr


@pytest.mark.slow
def test_a_loss_that_is_not_finite_on_one_rank_stops_all(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    done = faulty("nan", 1, 22, run_dir)
    assert done.returncode == 1
    words = r"^distrib: the loss of rank 1 is not finite in step 23: .*nonfinite=skip skips such steps$"
    assert len(re.findall(words, done.stderr, re.M)) == 1, done.stderr
    images = Steps(1437, 60, 0, 1, 2)(22).images.tolist()
    assert (
        f"step 23: the loss of rank 1 is not finite, and no weight was changed; images {', '.join(map(str, images[:8]))} and"
        in done.stdout
    )
    assert read_status(run_dir)["state"] == "failed"
    assert max((run_dir / "checkpoints").iterdir()).name == "step_00000020"


@pytest.mark.slow
def test_a_step_that_is_not_finite_is_skipped_on_all_ranks(tmp_path: Path) -> None:
    done = faulty("nan", 1, 22, tmp_path / "run", "nonfinite=skip", "model.norm=batch", "save_every=1")
    assert done.returncode == 0, done.stderr  # so the replicas were the same at each save
    assert done.stdout.count("the loss of rank 1 is not finite") == 1
    curves = points(tmp_path / "run")
    assert curves["train/skipped_steps"][0] == (25, 1.0)
    assert all(math.isfinite(value) for _, value in curves["train/loss"])
    assert all(each.isfinite().all() for each in weights(tmp_path / "run").values())


@pytest.mark.slow
def test_too_many_steps_in_a_row_that_are_not_finite_end_a_run(tmp_path: Path) -> None:
    done = faulty("nan", -1, 22, tmp_path / "run", "nonfinite=skip", "nonfinite_limit=3")
    assert done.returncode == 1
    assert done.stdout.count("the loss of rank 1 is not finite") == 4
    assert "distrib: 4 steps in a row were not finite, up to step 26: try a smaller optim.lr" in done.stderr


@pytest.mark.slow
def test_a_weight_that_differs_by_a_bit_between_ranks_stops_the_run_at_the_next_save(tmp_path: Path) -> None:
    done = faulty("bit", 1, 22, tmp_path / "run")
    assert done.returncode == 1
    assert done.stderr.count("distrib: the weights of rank 1 differ from those of the other ranks after step 30, so") == 1
    assert max((tmp_path / "run" / "checkpoints").iterdir()).name == "step_00000020"


@pytest.mark.slow
def test_a_share_is_cut_on_all_ranks_until_it_fits_on_the_one_with_the_least_memory(tmp_path: Path, whole: Path) -> None:
    done = faulty("memory", 1, 0, tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "a rank's share of 30 images is cut into micro_batches=4: rank 1 has too little memory for 15 at once" in done.stdout
    # The same images in the same order: the same numbers, but for rounding.
    got, expected = (dict(points(run)["train/loss"]) for run in (tmp_path / "run", whole))
    assert got == pytest.approx(expected, rel=1e-3)
    assert got != expected


@pytest.mark.slow
def test_memory_that_runs_out_late_is_told_and_the_next_attempt_takes_smaller_parts(tmp_path: Path) -> None:
    done = faulty("late memory", 1, 22, tmp_path / "run")
    assert done.returncode == 1
    assert "rank 1 ran out of memory after step 22 with micro_batches=1: run the same command, which tries 2" in done.stderr
    again = faulty("late memory", 1, 22, tmp_path / "run")
    assert again.returncode == 0, again.stderr
    assert "is cut into micro_batches=2: as in the last attempt" in again.stdout
    assert read_status(tmp_path / "run")["micro_batches"] == 2


@pytest.mark.slow
def test_ranks_of_several_machines_meet_again_when_one_of_them_died(tmp_path: Path, whole: Path) -> None:
    """Two launchers of torchrun, which count restarts each for itself: only that of the dead rank does."""
    store = socket.create_server(("127.0.0.1", 0))
    port = store.getsockname()[1]
    store.close()
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--max_restarts=2"]
    command += ["--rdzv_backend=c10d", "--rdzv_id=1", f"--rdzv_endpoint=127.0.0.1:{port}"]
    fault = ["tests/faulty.py", "SIGKILL", "1", "25", str(tmp_path / "mark"), *KEYS, f"run_dir={tmp_path / 'run'}"]
    nodes = [
        subprocess.Popen([*command, f"--rdzv_conf=is_host={hosts}", *fault], cwd=ROOT, env=os.environ | SCRIPTS, stderr=PIPE)
        for hosts in (1, 0)
    ]
    told = [each.communicate(timeout=600)[1].decode() for each in nodes]
    assert [each.returncode for each in nodes] == [0, 0], told
    assert read_status(tmp_path / "run")["attempts"] == 2
    assert_same(tmp_path / "run", whole)


RANKS, DEVICE = "waits for other ranks", "waits for its device"


@pytest.mark.parametrize(
    ("told", "culprits", "words"),
    [
        ({0: RANKS, 2: "is at a.py:1 in f"}, [1, 2], f"rank 1 gives no sign of life; rank 2 is at a.py:1 in f; rank 0 {RANKS}"),
        ({0: RANKS, 1: RANKS, 2: RANKS}, [], f"rank 0, 1, 2 {RANKS}"),
        ({0: DEVICE, 1: RANKS, 2: "is at a.py:1 in f"}, [2], f"rank 2 is at a.py:1 in f; rank 0 {DEVICE}; rank 1 {RANKS}"),
        ({0: DEVICE, 1: DEVICE, 2: RANKS}, [0, 1], f"rank 0 {DEVICE}; rank 1 {DEVICE}; rank 2 {RANKS}"),
    ],
)
def test_who_waits_for_whom(told: dict[int, str], culprits: list[int], words: str) -> None:
    assert list(blocking_ranks(told, 3)) == culprits
    assert summary(told, 3) == words


class Slow:
    """What a rank reads from its device; gives the frame of the rank that waits for it."""

    def tolist(self) -> FrameType:
        return sys._getframe(1)

    def other(self) -> FrameType:
        return sys._getframe(1)


def test_a_rank_that_reads_from_its_device_waits_for_that(monkeypatch: pytest.MonkeyPatch) -> None:
    def reading() -> FrameType:
        return Slow().tolist()

    def computing() -> FrameType:
        return Slow().other()

    for at, words in ((reading, DEVICE), (computing, r"is at test_faults.py:\d+ in computing")):
        frame = at()
        monkeypatch.setattr(sys, "_current_frames", lambda frame=frame: {threading.main_thread().ident: frame})
        assert re.fullmatch(words, current_call(several=True))
