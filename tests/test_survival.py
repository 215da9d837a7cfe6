"""Runs that are stopped or killed, as real processes, and what becomes of them."""

import json
import os
import random
import re
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import pytest
from conftest import ROOT, SCRIPTS, Ranks, assert_same, launch, weights
from test_launch import LAUNCHERS, pictures

from distrib.data.steps import Steps
from distrib.runtime.signals import SIGNALS

pytestmark = pytest.mark.slow

KEYS = ["epochs=4", "batch_size=60", "precision=no", "model.width=8", "model.dropout=0.3", "data.cutout=2", "threads=1"]
KEYS += ["optim.ema_decay=0.9", "log_every=5", "eval_every=46", "save_every=20"]
FILES = ["data.name=folder", "data.size=16", "batch_size=4", "epochs=3"]
KILLS = int(os.environ.get("DISTRIB_KILLS", "4"))
ALL_STOPS = bool(os.environ.get("DISTRIB_ALL_STOPS"))
# A launcher may take seconds to die of a signal: until then, the run must not end. So its steps wait after the first 30.
SLOW = {"PACE": "0.5", "PACE_FROM": "30"}


class Run:
    """A run under way, and every process that belongs to it."""

    def __init__(self, launcher: str, run_dir: Path, *keys: str, **environment: str) -> None:
        """`environment` may have the variables of tests/paced.py."""
        self.run_dir, self.log = run_dir, run_dir.with_suffix(f".{time.monotonic_ns()}.log")
        with self.log.open("w") as log:
            command = [*LAUNCHERS[launcher][:-1], "tests/paced.py", "train.py", *KEYS, f"run_dir={run_dir}", *keys]
            environment = os.environ | SCRIPTS | environment
            options: dict[str, Any] = {"stdout": log, "stderr": log, "start_new_session": True}
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, **options)

    def said(self) -> str:
        return self.log.read_text()

    def wait_for(self, words: str, timeout: float = 300, *, launcher_too: bool = True) -> None:
        """Wait until the run has said this; its launcher has to run until then, if `launcher_too`."""
        give_up = time.monotonic() + timeout
        while not re.search(words, self.said(), re.M):
            assert not launcher_too or self.process.poll() is None, self.said()
            assert time.monotonic() < give_up, self.said()
            time.sleep(0.01)

    def ranks(self) -> list[psutil.Process]:
        """The processes that train: not their launcher, and not their loader workers."""
        mine = self.processes()
        return [each for each in mine if each.ppid() == self.process.pid] or mine

    def processes(self) -> list[psutil.Process]:
        """All that are left of this run, wherever they have gone."""
        left = []
        for each in psutil.process_iter():
            try:
                if f"run_dir={self.run_dir}" in each.cmdline() and each.status() != psutil.STATUS_ZOMBIE:
                    left.append(each)
            except psutil.Error:
                pass
        return left

    def end(self, timeout: float = 300) -> int:
        """Wait until nothing is left of it; returns the launcher's exit code."""
        code = self.process.wait(timeout)
        give_up = time.monotonic() + timeout
        while self.processes():
            assert time.monotonic() < give_up, self.processes()
            time.sleep(0.05)
        return code


def reading(root: Path | dict[tuple[int, int], Path], workers: int) -> list[str]:
    """Keys for a run on images in memory, or on files that so many workers read."""
    if not workers:
        return []
    folder = next(iter(root.values())).parent / "folder" if isinstance(root, dict) else root / "folder"
    return [*FILES, f"data.root={folder}", f"data.workers={workers}"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], Path]:
    """Runs that nobody disturbed, on 1 and 2 ranks, with 0 and 2 loader workers."""
    root, runs = tmp_path_factory.mktemp("whole"), {}
    pictures(root / "folder", train=120, val=30)
    for workers in (0, 2):
        for ranks in (1, 2):
            runs[ranks, workers] = root / f"{ranks}_{workers}"
            done = launch(ranks, "train.py", *KEYS, *reading(root, workers), f"run_dir={runs[ranks, workers]}")
            assert done.returncode == 0, done.stderr
    return runs


def status(run_dir: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((run_dir / "status.json").read_text())
    return found


LAUNCHED = ("python", "accelerate", "accelerate 2", "torchrun", "torchrun 2")
# accelerate's launcher and torchrun's die of USR2, and torchrun's of USR1: what is left of the run then stops by itself.
MATRIX = [
    (launcher, target, number, workers)
    for launcher in LAUNCHED
    for workers in (0, 2)
    for target in ("launcher", "one rank", "all ranks", "group", "all groups", "file")
    for number in (SIGNALS if target != "file" else (0,))
    if target in ("launcher", "group", "file") or launcher != "python"  # with python, these are the same
    if target != "all ranks" or launcher.endswith("2")
]
STOPS = [
    ("python", "file", 0, 2),
    ("python", "group", signal.SIGTERM, 2),
    ("accelerate 2", "launcher", signal.SIGTERM, 2),
    ("accelerate 2", "one rank", signal.SIGUSR2, 2),
    ("accelerate 2", "all groups", signal.SIGTERM, 2),
    ("torchrun 2", "launcher", signal.SIGHUP, 0),
    ("torchrun 2", "all ranks", signal.SIGUSR1, 2),
    ("torchrun 2", "launcher", signal.SIGINT, 2),
]
TIMES: dict[str, list[float]] = {}  # seconds from the signal until nothing is left, by launcher


@pytest.mark.parametrize(("launcher", "target", "number", "workers"), MATRIX if ALL_STOPS else STOPS)
def test_a_run_that_is_asked_to_stop_saves_leaves_and_goes_on(
    tmp_path: Path, whole: dict[tuple[int, int], Path], launcher: str, target: str, number: int, workers: int
) -> None:
    """`make stops` has all of them."""
    # With one thread, torch starts none in a loader worker, which could take the signal.
    keys = [*reading(whole, workers), *(["threads=2"] if "group" in target else [])]
    run = Run(launcher, tmp_path / "run", *keys, **SLOW)
    run.wait_for(r"step 30/")
    asked = time.monotonic()
    if target == "file":
        (run.run_dir / "STOP").write_text("")
    elif target == "group":
        os.killpg(run.process.pid, number)
    elif target == "all groups":  # launchers give each rank a process group of its own, which it shares with its loader workers
        for group in {os.getpgid(each.pid) for each in run.ranks()} | {run.process.pid}:
            os.killpg(group, number)
    else:
        found = run.ranks()
        targets = {"launcher": [psutil.Process(run.process.pid)], "one rank": found[-1:], "all ranks": found}[target]
        for each in targets:
            each.send_signal(number)
    code = run.end()
    TIMES.setdefault(launcher, []).append(time.monotonic() - asked)
    said = re.search(
        r"^stopped by (\S+|the file STOP) after step (\d+), which is saved: run the same command to resume$", run.said(), re.M
    )
    assert said, run.said()
    assert max((run.run_dir / "checkpoints").iterdir()).name == f"step_{int(said[2]):08d}"
    stopped = {"state": "stopped", "step": int(said[2]), "cause": said[1], "attempts": 1}
    assert status(run.run_dir).items() >= stopped.items()
    if target in ("one rank", "all ranks", "file") or launcher == "python":
        assert code == 0
    assert not (run.run_dir / "STOP").exists()

    ranks = 2 if launcher.endswith("2") else 1
    again = launch(ranks, "train.py", *KEYS, *keys, f"run_dir={run.run_dir}")
    assert again.returncode == 0, again.stderr
    assert f"resumes after step {said[2]}" in again.stdout
    if "group" not in target:  # two threads may add in another order
        assert_same(run.run_dir, whole[ranks, workers])
    assert status(run.run_dir)["state"] == "completed"
    print(launcher, target, int(number), workers, {name: [round(each, 1) for each in times] for name, times in TIMES.items()})


def test_a_second_trainer_in_a_folder_is_refused(tmp_path: Path) -> None:
    keys = [*KEYS, f"run_dir={tmp_path / 'run'}", "epochs=2000"]
    first = Ranks(1, "train.py", *keys)
    while not (tmp_path / "run" / "checkpoints").exists():
        assert first.run()
        time.sleep(0.01)
    second = launch(1, "train.py", *keys)
    assert second.returncode == 2
    assert first.run()
    assert f"is in use by process {first.ranks[0].pid} on " in second.stderr
    first.kill()
    first.wait()


def kills(seed: int, whom: Sequence[str]) -> Iterator[tuple[str, bool, float]]:
    """Whom to kill, whether in the middle of a save, and how many seconds after the first report otherwise."""
    chance = random.Random(seed)
    while True:
        for who in chance.sample(whom, len(whom)):
            yield who, chance.random() < 0.4, chance.uniform(0, 0.8)


@pytest.mark.parametrize(
    ("number", "whom", "environment", "more"),
    [
        (KILLS, ["rank 0", "rank 1", "all ranks", "launcher"], {}, []),
        (-(-KILLS // 4), ["rank 0", "rank 1"], {"BLOCK": "1"}, []),  # collectives block for ever if a rank is gone: NCCL's may
        (-(-KILLS // 10), ["rank 0", "rank 1", "all ranks"], {}, ["model.freeze={number}", "optim.layer_decay=0.8"]),
    ],
    ids=["gloo", "blocked", "thaw"],
)
def test_a_run_that_is_killed_again_and_again_ends_as_if_it_had_not_been(
    tmp_path: Path, number: int, whom: list[str], environment: dict[str, str], more: list[str]
) -> None:
    """`make kill-storm` is the long form. With `thaw`, the middle of the run is where all layers begin to learn."""
    keys = [f"epochs={2 * number}", *(key.format(number=number) for key in more)]
    slow = {"PACE": "0.05"}  # so that the run lasts for all of them
    whole, run_dir = tmp_path / "whole", tmp_path / "run"
    assert launch(2, "train.py", *KEYS, *keys, f"run_dir={whole}", timeout=300 + 120 * number).returncode == 0

    told: Counter[str] = Counter()
    named: list[float] = []  # seconds from the death of a rank to the line that names it
    began = time.time()
    for who, in_a_save, delay in islice(kills(number, whom), number):
        run = Run("accelerate 2", run_dir, *keys, **slow, **environment)
        run.wait_for(r"step [\d,]+/[\d,]+  train")
        due = time.monotonic() + delay
        while time.monotonic() < due if not in_a_save else not list(run_dir.glob("checkpoints/step_*.partial")):
            assert run.process.poll() is None, run.said()
        ranks = run.ranks()
        for each in {"launcher": [run.process], "rank 0": ranks[:1], "rank 1": ranks[1:], "all ranks": ranks}[who]:
            each.kill()
        killed = time.monotonic()
        told[f"{who}, {'in a save' if in_a_save else 'at any time'}"] += 1
        if environment:
            run.wait_for(rf"^distrib: {who} has exited, so the other ranks exit too", launcher_too=False)
            named.append(time.monotonic() - killed)
        assert run.end() != 0
        reached = max(int(step.replace(",", "")) for step in re.findall(r"step ([\d,]+)/", run.said()))
        saved = max((int(path.name[5:]) for path in run_dir.glob("checkpoints/step_????????")), default=0)
        assert saved >= reached - 2 * 20, run.said()  # the save before a save is on the disk before that begins

    last = launch(2, "train.py", *KEYS, *keys, f"run_dir={run_dir}", timeout=300 + 120 * number)
    assert last.returncode == 0, last.stderr
    assert_same(run_dir, whole)
    assert status(run_dir)["attempts"] == number + 1
    assert 0 < float(str(status(run_dir)["kept_seconds"])) < float(str(status(run_dir)["seconds"])) < time.time() - began
    print(dict(told), *([f"named after {median(named):.1f} s (median), {max(named):.1f} s (worst)"] if named else []))


def test_a_run_that_goes_on_with_other_numbers_of_ranks_sees_the_same_images_and_ends_the_same(tmp_path: Path) -> None:
    """2 -> 3 -> 1 ranks, with a kill between each, in float64 and without batch statistics; and 1 that was not disturbed."""
    seen: dict[int, list[list[int]]] = {}
    for world, kill in ((2, 7), (3, 16), (1, 0)):
        notes = tmp_path / f"until_{kill}"
        notes.mkdir()
        done = launch(world, "tests/chained.py", tmp_path / "chained", str(kill), notes)
        assert (done.returncode == 0) == (kill == 0), done.stderr
        of_ranks = [map(json.loads, path.read_text().splitlines()) for path in sorted(notes.iterdir())]
        for shares in zip(*of_ranks, strict=False):
            (step,) = {share["step"] for share in shares}
            seen.setdefault(step, []).append([image for share in shares for image in share["images"]])

    steps = Steps(997, 60, seed=0)
    assert sorted(seen) == list(range(32))
    for step, batches in seen.items():
        assert all(batch == steps(step).images.tolist() for batch in batches), step
    assert max(map(len, seen.values())) > 1  # what was lost was done again

    assert launch(1, "tests/chained.py", tmp_path / "whole", "0", tmp_path).returncode == 0
    got, expected = weights(tmp_path / "chained"), weights(tmp_path / "whole")
    assert max((got[name] - expected[name]).abs().max().item() for name in expected if name.startswith("model.")) < 1e-12
