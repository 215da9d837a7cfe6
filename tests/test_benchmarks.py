"""The bench: its arithmetic, what it refuses, and one peer for real."""

import json
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import ROOT, launch, requires

from benchmarks import runs, table
from benchmarks.cells import microseconds, rate, subset, throughput
from benchmarks.gpu_parts import Meter
from benchmarks.runs import RunError, peer, run, trainer

WORK = {"images": 512, "updates": 8, "timed": 6, "parameters": 10, "loss": 1.0, "wall": 9.0, "cpu": 8.0, "rss_mb": 700.0}
TASK = ["data.name=digits", "model.width=8", "batch_size=60", "precision=no", "epochs=0.22", "log_every=2", "threads=1"]
EQUAL = ("images", "updates", "timed", "parameters")


def ran(name: str, value: float, **other: Any) -> dict[str, Any]:
    return WORK | {"cell": "c", "name": name, "round": 0, "value": value} | other


def about(**other: Any) -> dict[str, Any]:
    told = {"cell": "c", "title": "T", "date": "d", "rounds": 3, "keys": ["k=v"], "unit": "images/s", "machine": ["CPU: x"]}
    return told | {"ratios": [], "minus": [], "unequal": [], "before": "b", "after": "a", "stolen": 0.0} | other


def test_rounds_run_in_turn_and_back() -> None:
    rounds = [table.order("ABC", round_) for round_ in range(3)]
    assert rounds == [["A", "B", "C"], ["C", "B", "A"], ["A", "B", "C"]]


def test_a_quotient_is_of_medians_so_that_one_slow_run_does_not_count() -> None:
    found = [ran("ours", value) for value in (10.0, 30.0, 31.0)] + [ran("raw", value) for value in (15.0, 15.0, 1.0)]
    assert table.quotient(found, "ours", "raw") == 2.0
    assert table.quotient(found, "ours", "a peer that is not installed") is None


def test_beside_a_quotient_and_a_difference_stands_what_they_are_within_a_round() -> None:
    values = {"ours": (10.0, 30.0), "raw": (20.0, 40.0)}
    found = [ran(name, each[round_], round=round_) for name, each in values.items() for round_ in (0, 1)]
    shown = table.page([*found, about(ratios=[["ours", "raw", 0.9, 1e9, ""]], minus=[["ours", "raw"]])])
    assert "| ours / raw | 0.667 | 0.500 to 0.750 | >= 0.9 | NO |" in shown
    assert "- ours: -10 images/s over raw (by round: -10 to -10)" in shown


def test_only_the_timed_steps_count() -> None:
    assert rate(WORK | {"seconds": 3.0}) == 512 / 8 * 6 / 3
    assert microseconds(WORK | {"seconds": 3.0}) == 500_000


@pytest.mark.parametrize("what", EQUAL)
def test_runs_of_unequal_work_are_not_compared(what: str) -> None:
    found = [ran("ours", 2.0), ran("raw", 1.0)]
    assert table.unequal(found, EQUAL, 0.25) == []
    wrong = table.unequal([*found, ran("raw", 1.0, **{what: WORK[what] + 1})], EQUAL, 0.25)
    assert len(wrong) == 1
    assert what in wrong[0]


@pytest.mark.parametrize("loss", [1.3, 0.7, float("nan")])
def test_a_peer_that_learns_something_else_is_not_compared(loss: float) -> None:
    wrong = table.unequal([ran("ours", 2.0), ran("raw", 1.0, loss=loss)], EQUAL, 0.25)
    assert len(wrong) == 1
    assert "training loss" in wrong[0]


def test_the_page_shows_cells_that_are_lost_and_peers_that_are_missing_or_failed() -> None:
    ratios = [["ours", "fast", 1.0, 1e9, ""], ["ours", "gone", 1.0, 1e9, ""]]
    absent = {"cell": "c", "name": "gone", "round": 0, "failed": "not installed"}
    shown = table.page([ran("ours", 10.0), ran("fast", 20.0), absent, about(ratios=ratios, unequal=["images differ"])])
    assert "| ours / fast | 0.500 | 0.500 to 0.500 | >= 1 | NO |" in shown
    assert "| ours / gone |  |  | >= 1 | not measured |" in shown
    assert "| gone | not installed |" in shown
    assert "UNEQUAL WORK" in shown
    assert "images differ" in shown


def test_the_time_to_an_accuracy_is_that_of_the_fastest_recipe_which_has_it_on_the_mean() -> None:
    def recipe(name: str, wall: float, *tops: float) -> list[dict[str, Any]]:
        return [ran(name, 0, wall=wall, top1=top, seed=seed) | {"cell": "accuracy"} for seed, top in enumerate(tops)]

    found = recipe("a.yaml", 10.0, 93.2, 92.9) + recipe("p:6", 60.0, 93.1, 93.1) + recipe("p:5", 50.0, 92.9, 93.0)
    shown = table.page([*found, about(cell="accuracy")])
    assert "a.yaml is 6.00 times sooner than p:6; should be >= 5.0: yes" in shown
    assert "| p:5 | 2 | 92.95 +- 0.07 |" in shown


@pytest.mark.slow
def test_the_hand_written_loop_and_the_trainer_do_the_same_work_and_end_with_the_same_loss() -> None:
    keys = [
        *TASK,
        "epochs=1.3",
        "log_every=10",
        "optim.warmup_epochs=0",
        "optim.schedule=linear",
        "objective.label_smoothing=0",
    ]
    raw = peer([sys.executable, "-m", "benchmarks.peers.raw"], keys)
    ours = trainer([sys.executable, "train.py"], keys)
    assert raw["updates"] == 30
    assert raw["timed"] == ours["timed"] == 20
    assert min(raw["seconds"], ours["seconds"], raw["cpu"], ours["cpu"]) > 0
    found = [ran(name, 1.0, **{what: told[what] for what in (*EQUAL, "loss")}) for name, told in (("ours", ours), ("raw", raw))]
    assert table.unequal(found, EQUAL, 0.03) == []


@pytest.mark.slow
def test_a_run_that_fails_is_told_with_its_last_words() -> None:
    with pytest.raises(RunError, match="exit code 3: so it ends"):
        run([sys.executable, "-c", "print('so it ends'); raise SystemExit(3)"])


def alive(pid: int) -> bool:
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


@pytest.mark.slow
def test_a_run_that_hangs_is_ended_with_what_it_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(runs, "TIMEOUT", 2.0)
    child = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    with pytest.raises(RunError, match="not done after 2 s"):
        run([sys.executable, "-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"])
    give_up = time.monotonic() + 300
    while alive(int((tmp_path / "pid").read_text())):
        assert time.monotonic() < give_up
        time.sleep(0.05)


@pytest.mark.slow
def test_the_costs_of_a_run_are_those_of_its_children_too() -> None:
    burn = "import time\nwhile time.process_time() < 0.4: pass"
    cost = run([sys.executable, "-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {burn!r}])"])
    assert cost.cpu > 0.4


def test_every_program_of_a_cell_exists() -> None:
    for entry in throughput("cnn", 2, 3.0, []).entries:
        names = [each for each in entry.run.args[0] if each.startswith("benchmarks.peers.")]
        assert all((ROOT / f"{name.replace('.', '/')}.py").exists() for name in names), entry.name


def test_a_smaller_set_is_the_beginning_of_the_whole(tmp_path: Path) -> None:
    requires(Path("/usr/share/datasets/fashion-mnist").is_dir(), "apt-get install dataset-fashion-mnist")
    from distrib.config import DataConfig
    from distrib.data.datasets import load_source

    few = load_source(DataConfig(name="fashion_mnist", root=str(subset(100, tmp_path))), download=False)
    every = load_source(DataConfig(name="fashion_mnist", root=str(tmp_path / "none")), download=False)
    assert len(few.train) == 100
    assert few.train.images.equal(every.train.images[:100])
    assert few.train.targets.equal(every.train.targets[:100])


@pytest.mark.slow
def test_a_peer_tells_what_it_did_in_one_line() -> None:
    said = launch(1, "-m", "benchmarks.peers.torchvision_reference", "--tuned", "--validate", "--ready", *TASK)
    assert said.returncode == 0, said.stderr
    told = json.loads(said.stdout.splitlines()[-1])
    assert (told["images"], told["updates"]) == (300, 5)
    assert 0 <= told["top1"] <= 100
    assert len(told["stamps"]) == 5


@pytest.mark.parametrize("waits", [0, 2])
def test_what_a_gpus_steps_wait_for_is_counted(waits: int) -> None:
    def step(state: Any) -> None:
        for _ in range(waits):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        state.step += 1

    meter, state = Meter(step, total=24), SimpleNamespace(step=0)
    meter.cuda = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        while state.step < 24:
            meter(state)
    assert meter.found["syncs"] == waits
    assert meter.found["step"] > 0


@pytest.mark.slow
def test_help_is_there() -> None:
    said = subprocess.run([sys.executable, "-m", "benchmarks.bench", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert said.returncode == 0
    assert "--recipes" in said.stdout
