"""What ranks do together."""

import errno
import itertools
import json
import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import agreeing
import pytest
import rounded
import torch
from conftest import SMALL, launch, points

from distrib import train
from distrib.command_line import load_config, read_config
from distrib.config import Config
from distrib.errors import UserError
from distrib.runtime import environment, ranks, stop_vote
from distrib.runtime.control_channel import ControlChannel
from distrib.runtime.environment import accelerate_settings_hidden, cgroup_quota, threads_of_a_rank, with_accelerate_settings
from distrib.runtime.stop_vote import StopVote


@pytest.mark.slow
def test_rank_0_goes_first_decides_and_its_mistake_is_everyones(tmp_path: Path) -> None:
    done = launch(3, agreeing.__file__, tmp_path)
    assert done.returncode == 0, done.stderr
    noted = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(3)]
    assert noted == [{"first": True, "agreed": "rank 0's", "told": "rank 0 could not"}] * 3


@pytest.mark.slow
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
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    asked: int,
    local_ranks: int,
    threads: float | None,
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local_ranks))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as a launcher sets it
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    train(load_config([*SMALL, f"run_dir={tmp_path}", f"threads={asked}", "epochs=0.1"]))
    expected = asked if threads is None else max(1, int(len(os.sched_getaffinity(0)) * threads))
    assert torch.get_num_threads() == expected
    assert f"threads {expected}, precision no (as asked)" in capsys.readouterr().out


def test_a_rank_that_is_a_task_of_slurm_takes_the_cores_of_that_task(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    for name, value in {"WORLD_SIZE": "8", "SLURM_STEP_NUM_TASKS": "8", "SLURM_CPUS_PER_TASK": "12"}.items():
        monkeypatch.setenv(name, value)
    assert threads_of_a_rank(local_ranks=4) == 12
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")  # a launcher is the task, and starts four ranks
    assert threads_of_a_rank(local_ranks=4) == max(1, len(os.sched_getaffinity(0)) // 4)


CGROUPS = {
    "a container of v2": ("0::/\n", {"cpu.max": "50000 100000"}, 0.5),
    "no limit": ("0::/\n", {"cpu.max": "max 100000"}, math.inf),
    "a limit of a parent": (
        "0::/slurm/job_7/task_0\n",
        {"slurm/job_7/task_0/cpu.max": "max 100000", "slurm/job_7/cpu.max": "400000 100000"},
        4,
    ),
    "a container of v1": (
        "4:cpu,cpuacct:/docker/abc\n1:name=systemd:/docker/abc\n",
        {"cpu/cpu.cfs_quota_us": "150000\n", "cpu/cpu.cfs_period_us": "100000\n"},
        1.5,
    ),
    "a group of v1": (
        "4:cpu,cpuacct:/jobs/1\n",
        {"cpu/cpu.cfs_quota_us": "-1", "cpu/jobs/1/cpu.cfs_quota_us": "300000", "cpu/jobs/1/cpu.cfs_period_us": "100000"},
        3,
    ),
}


@pytest.mark.parametrize("name", CGROUPS)
def test_a_limit_of_cpus_is_read_from_the_cgroups(tmp_path: Path, name: str) -> None:
    own, files, expected = CGROUPS[name]
    (tmp_path / "own").write_text(own)
    for path, text in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    assert cgroup_quota(tmp_path, tmp_path / "own") == expected


@pytest.mark.parametrize(("quota", "ranks", "cores"), [(0.5, 1, 1), (2.9, 1, 2), (2.9, 2, 1), (math.inf, 1, 6)])
def test_the_cores_of_a_rank_are_limited_by_its_cgroup(
    monkeypatch: pytest.MonkeyPatch, quota: float, ranks: int, cores: int
) -> None:
    monkeypatch.setattr(environment, "cgroup_quota", lambda: quota)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(6)))
    assert environment.cores_of_a_rank(ranks) == cores


@pytest.mark.parametrize(
    ("threads", "launcher", "expected"), [("3", True, 3), ("1", True, 6), ("3", False, 3), ("1", False, 1), (None, False, 6)]
)
def test_the_users_own_number_of_threads_is_kept_unless_a_launcher_set_it(
    monkeypatch: pytest.MonkeyPatch, threads: str | None, launcher: bool, expected: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(6)))
    monkeypatch.setattr(environment, "cgroup_quota", lambda: math.inf)
    for name, value in (("OMP_NUM_THREADS", threads), ("TORCHELASTIC_RUN_ID", "1" if launcher else None)):
        monkeypatch.delenv(name, raising=False)
        if value:
            monkeypatch.setenv(name, value)
    assert threads_of_a_rank(local_ranks=1) == expected


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(UserError, match=r"4 ranks on this machine are more than its 2 GPUs: start 2 ranks, or export"):
        ranks.connect(Config())


def test_a_vote_comes_twice_a_second_wherever_a_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, voted = [0.0], []
    monkeypatch.setattr(stop_vote.time, "perf_counter", lambda: clock[0])
    vote = StopVote(Config(run_dir=str(tmp_path)), ControlChannel(0, {}))
    for step in range(5000, 6000):  # resumes after step 5000, at 20 steps a second
        before = vote.next
        assert vote(step) == ""
        if vote.next != before:
            voted.append(step)
        clock[0] += 0.05
    gaps = [b - a for a, b in itertools.pairwise(voted)]
    assert gaps[:3] == [1, 2, 4]
    assert set(gaps[4:]) == {10}


def test_the_file_stop_is_heard_once(tmp_path: Path) -> None:
    vote = StopVote(Config(run_dir=str(tmp_path)), ControlChannel(0, {}))
    assert vote(0) == ""
    (tmp_path / "STOP").write_text("")
    assert vote(1) == "the file STOP"
    assert not (tmp_path / "STOP").exists()
    assert vote(vote.next) == ""


def test_a_disk_that_fails_for_a_moment_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stale(path: object, **_: object) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    vote = StopVote(Config(run_dir=str(tmp_path)), ControlChannel(0, {}))
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
            return ranks.agree_on_attempt_name(store, rank, 3)

        with ThreadPoolExecutor() as pool:
            return [*pool.map(late, arriving)]

    names = [attempt(0, 1, 2), attempt(0, 1, 2), attempt(2, 1, 0)]
    for rank in (1, 2):
        store.set(f"rank {rank}", "of one that died before it heard an answer")
    names += [attempt(0, 2, 1)]
    assert all(len(set(each)) == 1 for each in names)
    assert len({each[0] for each in names}) == 4


def settings(monkeypatch: pytest.MonkeyPatch, **values: str) -> None:
    """What accelerate launch exports where nothing was asked for, and these."""
    plain = {"MIXED_PRECISION": "no", "DYNAMO_BACKEND": "NO", "DYNAMO_MODE": "default", "USE_CPU": "False"}
    for name, value in (plain | values).items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)


def test_settings_of_accelerate_that_ask_for_nothing_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert with_accelerate_settings(Config()) == (Config(), [])
    settings(monkeypatch, USE_FSDP="false", USE_DEEPSPEED="false", GRADIENT_ACCUMULATION_STEPS="1")
    for config in (Config(), Config(precision="bf16", compile="reduce-overhead", micro_batches=3)):
        assert with_accelerate_settings(config) == (config, [])


@pytest.mark.parametrize(
    ("asked", "key", "value"),
    [
        ({"MIXED_PRECISION": "bf16"}, "precision", "bf16"),
        ({"MIXED_PRECISION": "fp16"}, "precision", "fp16"),
        ({"DYNAMO_BACKEND": "INDUCTOR"}, "compile", "default"),
        ({"DYNAMO_BACKEND": "INDUCTOR", "DYNAMO_MODE": "reduce-overhead"}, "compile", "reduce-overhead"),
        ({"DYNAMO_BACKEND": "INDUCTOR", "DYNAMO_MODE": ""}, "compile", "default"),
        ({"GRADIENT_ACCUMULATION_STEPS": "4"}, "micro_batches", 4),
    ],
)
def test_what_accelerates_settings_ask_for_is_done_and_told_unless_a_key_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, asked: dict[str, str], key: str, value: Any
) -> None:
    settings(monkeypatch, **asked)
    honoured, told = replace(Config(), **{key: value}), [f"as accelerate's settings say: {key}={value}"]
    assert with_accelerate_settings(Config()) == (honoured, told)
    assert with_accelerate_settings(honoured) == (honoured, told)
    other: dict[str, Any] = {"precision": "no", "compile": "no", "micro_batches": 2}
    with pytest.raises(UserError, match=rf"^{key}={other[key]}, but accelerate's settings ask for {value}: change them with"):
        with_accelerate_settings(replace(Config(), **{key: other[key]}))


def test_all_that_accelerates_settings_ask_for_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    settings(monkeypatch, MIXED_PRECISION="bf16", DYNAMO_BACKEND="INDUCTOR", GRADIENT_ACCUMULATION_STEPS="2")
    config, told = with_accelerate_settings(Config())
    assert config == Config(precision="bf16", compile="default", micro_batches=2)
    assert told == ["as accelerate's settings say: precision=bf16, compile=default, micro_batches=2"]


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("USE_FSDP", "true", "FSDP, and distrib trains with DDP"),
        ("USE_DEEPSPEED", "true", "DeepSpeed, and distrib trains with DDP"),
        ("USE_MEGATRON_LM", "true", "Megatron-LM, and distrib trains with DDP"),
        ("USE_PARALLELISM_CONFIG", "true", "a parallelism config, and distrib trains with DDP"),
        ("MIXED_PRECISION", "fp8", "mixed_precision fp8, and distrib has no, bf16, fp16"),
        ("DYNAMO_BACKEND", "CUDAGRAPHS", "dynamo_backend cudagraphs, and distrib has no, inductor"),
    ],
)
def test_settings_of_accelerate_that_ask_for_another_way_to_train_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, words: str
) -> None:
    settings(monkeypatch, **{name: value})
    with pytest.raises(UserError, match=rf"^accelerate's settings ask for {words}: change them with `accelerate config`"):
        with_accelerate_settings(Config())
    with pytest.raises(UserError, match=words):
        train(load_config([*SMALL, f"run_dir={tmp_path / 'run'}"]))
    assert not (tmp_path / "run").exists()


def test_a_run_honours_accelerates_settings_once_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings(monkeypatch, MIXED_PRECISION="bf16", GRADIENT_ACCUMULATION_STEPS="3")
    keys = [key for key in SMALL if key != "precision=no"]
    assert len(keys) < len(SMALL)
    state = train(load_config([*keys, f"run_dir={tmp_path}", "threads=1", "epochs=1", "save_every=10"]))
    out = capsys.readouterr().out
    assert out.count("as accelerate's settings say: precision=bf16, micro_batches=3\n") == 1
    assert "precision bf16 (as asked)" in out
    assert state.step == 23  # micro-batches are parts of a step, and take none for themselves
    config = read_config(tmp_path / "config.yaml")
    assert (config.precision, config.micro_batches) == ("bf16", 3)
    with pytest.raises(UserError, match=r"^precision=no, but accelerate's settings ask for bf16: "):
        train(load_config([*keys, f"run_dir={tmp_path}", "threads=1", "epochs=1", "precision=no"]))


def test_accelerates_settings_are_hidden_from_itself_and_back_again(monkeypatch: pytest.MonkeyPatch) -> None:
    settings(monkeypatch, MIXED_PRECISION="bf16", DYNAMO_BACKEND="INDUCTOR", GRADIENT_ACCUMULATION_STEPS="3")
    before = dict(os.environ)

    def fail() -> None:
        with accelerate_settings_hidden():
            assert {name for name in os.environ if name.startswith("ACCELERATE_")} == {"ACCELERATE_USE_CPU"}
            raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        fail()
    assert dict(os.environ) == before
