"""What ranks do together."""

import errno
import itertools
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import agreeing
import pytest
import rounded
import torch
from conftest import SMALL, launch, points

from distrib import ranks
from distrib.config import Config, UserError
from distrib.ranks import named_attempt
from distrib.vote import StopVote


def test_rank_0_goes_first_decides_and_its_mistake_is_everyones(tmp_path: Path) -> None:
    done = launch(3, agreeing.__file__, tmp_path)
    assert done.returncode == 0, done.stderr
    noted = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(3)]
    assert noted == [{"first": True, "agreed": "rank 0's", "told": "rank 0 could not"}] * 3


def test_gradients_that_are_rounded_for_their_exchange_train_nearly_alike(tmp_path: Path) -> None:
    done = launch(2, rounded.__file__, tmp_path, "no,bf16,fp16", *SMALL, "epochs=1")
    assert done.returncode == 0, done.stderr
    exact = dict(points(tmp_path / "no")["train/loss"])
    for hook in ("bf16", "fp16"):
        got = dict(points(tmp_path / hook)["train/loss"])
        assert got == pytest.approx(exact, rel=0.05)
        assert got != exact


@pytest.mark.parametrize(("asked", "local_ranks", "threads"), [(0, 1, 1.0), (0, 2, 0.5), (3, 2, None)])
def test_threads_are_the_cores_divided_among_the_ranks_of_a_machine_or_as_asked(
    monkeypatch: pytest.MonkeyPatch, asked: int, local_ranks: int, threads: float | None
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local_ranks))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    _, setup = ranks.start(Config(threads=asked, precision="no"))
    expected = asked if threads is None else max(1, int(len(os.sched_getaffinity(0)) * threads))
    assert torch.get_num_threads() == expected
    assert f"threads {expected}, precision no (as asked)" in setup


def test_a_rank_that_is_a_task_of_slurm_takes_the_cores_of_that_task(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "8", "SLURM_STEP_NUM_TASKS": "8", "SLURM_CPUS_PER_TASK": "12"}.items():
        monkeypatch.setenv(name, value)
    assert ranks.threads_of_a_rank(local_ranks=4) == 12
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")  # a launcher is the task, and starts four ranks
    assert ranks.threads_of_a_rank(local_ranks=4) == max(1, len(os.sched_getaffinity(0)) // 4)


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(UserError, match=r"4 ranks on this machine are more than its 2 GPUs: start 2, or export"):
        ranks.start(Config())


def test_a_vote_comes_twice_a_second_wherever_a_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, voted = [0.0], []
    monkeypatch.setattr(ranks.time, "perf_counter", lambda: clock[0])
    ranks.start(Config(precision="no", threads=1))
    vote = StopVote(Config(run_dir=str(tmp_path)))
    for step in range(5000, 6000):  # goes on after step 5000, at 20 steps a second
        before = vote.next
        assert vote(step) == ""
        if vote.next != before:
            voted.append(step)
        clock[0] += 0.05
    gaps = [b - a for a, b in itertools.pairwise(voted)]
    assert gaps[:3] == [1, 2, 4]
    assert set(gaps[4:]) == {10}


def test_the_file_stop_is_heard_once(tmp_path: Path) -> None:
    ranks.start(Config(precision="no", threads=1))
    vote = StopVote(Config(run_dir=str(tmp_path)))
    assert vote(0) == ""
    (tmp_path / "STOP").write_text("")
    assert vote(1) == "the file STOP"
    assert not (tmp_path / "STOP").exists()
    assert vote(vote.next) == ""


def test_a_disk_that_fails_for_a_moment_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stale(path: object, **_: object) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    ranks.start(Config(precision="no", threads=1))
    vote = StopVote(Config(run_dir=str(tmp_path)))
    with monkeypatch.context() as patched:
        patched.setattr(os, "stat", stale)
        assert vote(0) == ""
    (tmp_path / "STOP").write_text("")
    monkeypatch.setattr(os, "unlink", stale)
    assert vote(vote.next) == "the file STOP"


def test_each_attempt_has_a_name_of_its_own_whatever_the_dead_have_left_in_the_store() -> None:
    store = torch.distributed.HashStore()

    def attempt(*arriving: int) -> list[str]:
        def late(rank: int) -> str:
            time.sleep(0.1 * arriving.index(rank))
            return named_attempt(store, rank, 3)

        with ThreadPoolExecutor() as pool:
            return [*pool.map(late, arriving)]

    names = [attempt(0, 1, 2), attempt(0, 1, 2), attempt(2, 1, 0)]
    for rank in (1, 2):
        store.set(f"rank {rank}", "of one that died before it heard an answer")
    names += [attempt(0, 2, 1)]
    assert all(len(set(each)) == 1 for each in names)
    assert len({each[0] for each in names}) == 4
