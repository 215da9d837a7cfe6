"""The loop, in one process: steps, evaluation, going on after an interruption."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from conftest import SMALL, assert_same, joined, points, weights
from torch import Tensor, nn
from torch._dynamo.utils import counters

import distrib
from distrib.command_line import load_config, read_config
from distrib.config import Config, ObjectiveConfig, OptimConfig
from distrib.data.loaders import Batch
from distrib.data.steps import Steps
from distrib.errors import RunError, UserError
from distrib.reporting.log import Log
from distrib.runtime.checkpoint import read_manifest
from distrib.runtime.status import read_status
from distrib.runtime.stopwatch import Stopwatch
from distrib.training import loop, memory
from distrib.training.context import Run
from distrib.training.evaluation import evaluate
from distrib.training.loop import due, report, train_step
from distrib.training.objective import CrossEntropy, build_objective
from distrib.training.optim import build_optimizer
from distrib.training.state import TrainState


class Kill(Exception):  # noqa: N818
    """What stands for a kill: nothing in the trainer catches it."""


def run(run_dir: Path, *args: str, **handed: Any) -> TrainState:
    """Train as SMALL and `args` say, with a data set, a network and an objective that are `handed` in, if any are."""
    small = [key for key in SMALL if "network" not in handed or not key.startswith("model.")]
    config = load_config([*small, f"run_dir={run_dir}", "threads=1", *args])
    return distrib.train(config, changes={arg.partition("=")[0] for arg in args}, **handed)


def run_killed(monkeypatch: pytest.MonkeyPatch, at: int, run_dir: Path, *args: str) -> None:
    def step(state: TrainState, *rest: Any) -> None:
        if state.step == at:
            raise Kill
        train_step(state, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "train_step", step)
        with pytest.raises(Kill):
            run(run_dir, *args)


def plain(model: nn.Module, config: Config, rate: float = 0.1, micro_batches: int = 1) -> tuple[TrainState, Run]:
    """The state of a network and what a step works with, without data, and with the same learning rate in each step."""
    accelerator = Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(model, build_optimizer(model, config.optim))
    unused: Any = None
    loader: Any = SimpleNamespace(steps=Steps(100, 7, 0))
    schedule: Any = lambda step: rate  # noqa: E731
    objective, stopwatch = build_objective(config), Stopwatch()
    run = Run(config, objective, accelerator, loader, schedule, unused, unused, unused, stopwatch, unused, {})
    return TrainState(model, prepared, optimizer), replace(run, micro_batches=micro_batches)


def changed(state: TrainState, before: dict[str, Tensor]) -> list[str]:
    """The tensors that are not as before, or were not there and are not 0."""
    tensors = joined(state.files()).items()
    return [name for name, each in tensors if not torch.equal(each, before.get(name, torch.zeros_like(each)))]


def copied(state: TrainState) -> dict[str, Tensor]:
    """What the tensors of a state are now."""
    return {name: each.clone() for name, each in joined(state.files()).items()}


ALL = [
    "model.dropout=0.3",
    "data.flip=alternating",
    "data.cutout=2",
    "model.whiten=1",
    "tta=6",
    "optim.ema_decay=0.9",
    "save_every=8",
    "eval_every=13",
]


@pytest.mark.parametrize(("optimizer", "kills"), [("sgd", [1, 39]), ("adamw", [13]), ("muon", [20, 39])])
def test_a_killed_run_goes_on_as_if_it_had_not_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str, kills: list[int]
) -> None:
    keys = [*ALL, f"optim.name={optimizer}", "optim.lr=0.01"]
    run(tmp_path / "whole", *keys)
    for at in kills:
        run_killed(monkeypatch, at, tmp_path / "killed", *keys)
    run(tmp_path / "killed", *keys)
    assert_same(tmp_path / "killed", tmp_path / "whole")


def test_the_moving_average_is_evaluated_as_exactly_as_the_network(tmp_path: Path) -> None:
    run(tmp_path, "precision=bf16", "tta=2", "epochs=1", "optim.ema_decay=1e-12")  # so it has the weights of the network
    found = points(tmp_path)
    assert found["val_ema/loss"] == found["val/loss"]


class Tiny(nn.Sequential):
    """A network for 8x8 pixels that is compiled in seconds."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(nn.Conv2d(1, width, 3), nn.GroupNorm(2, width), nn.ReLU(), nn.Flatten(), nn.Linear(36 * width, 10))


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch 2.11's, of itself
@pytest.mark.slow
def test_a_compiled_network_trains_like_a_plain_one_and_its_weights_keep_their_names(tmp_path: Path) -> None:
    keys = ["epochs=1", "log_every=1"]
    plain = run(tmp_path / "plain", *keys, network=Tiny)
    counters.clear()
    compiled = run(tmp_path / "compiled", *keys, "compile=default", network=Tiny)
    assert counters["stats"]["unique_graphs"] >= 1
    assert compiled.network._compiled_call_impl is None  # it may be trained again, and otherwise
    assert {file: each.keys() for file, each in compiled.files().items()} == {
        file: each.keys() for file, each in plain.files().items()
    }
    expected, got = (dict(points(tmp_path / name)["train/loss"]) for name in ("plain", "compiled"))
    assert got == pytest.approx(expected, rel=1e-3)


@contextmanager
def types_of(layer: nn.Module) -> Iterator[list[torch.dtype]]:
    """The type of what a layer gives, each time that it computes."""
    types = list[torch.dtype]()
    hook = layer.register_forward_hook(lambda layer, images, out: types.append(out.dtype))
    yield types
    hook.remove()


def test_a_network_that_was_trained_in_bf16_computes_in_its_own_precision_afterwards(tmp_path: Path) -> None:
    network = Tiny()
    for precision, inside in (("bf16", torch.bfloat16), ("no", torch.float32)):
        with types_of(network[0]) as types:
            state = run(tmp_path / precision, f"precision={precision}", network=network)
        assert state.network is network
        assert inside in types
        device = next(network.parameters()).device
        with types_of(network[0]) as types:
            assert network(torch.zeros(1, 1, 8, 8, device=device)).dtype == torch.float32
        assert types == [torch.float32]


def test_runs_of_one_process_have_each_its_own_precision(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, precision in (("first", "no"), ("bf16", "bf16"), ("no", "no")):
        run(tmp_path / name, f"precision={precision}")
        assert f"precision {precision} (as asked)" in capsys.readouterr().out
    first, bf16, no = (weights(tmp_path / name) for name in ("first", "bf16", "no"))
    assert first.keys() == no.keys()
    assert [name for name in first if not torch.equal(no[name], first[name])] == []
    assert not all(map(torch.equal, bf16.values(), first.values()))
    assert all(each.isfinite().all() for each in bf16.values())


def test_a_finished_run_is_left_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = run(tmp_path)
    capsys.readouterr()
    before = weights(tmp_path)
    again = run(tmp_path)
    assert again.numbers() == state.numbers()
    assert all(map(torch.equal, before.values(), weights(tmp_path).values()))
    assert f"done: top1 {state.values['top1']:.2f} %" in capsys.readouterr().out


def test_a_finished_run_can_be_trained_longer(tmp_path: Path) -> None:
    first = run(tmp_path)
    assert run(tmp_path, "epochs=3").step == first.step * 3 // 2


def test_a_run_under_way_takes_another_learning_rate_from_the_command_line_says_so_and_records_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    half = run(tmp_path, "epochs=1").step
    capsys.readouterr()
    changes = ["epochs=2", "optim.lr=0.02", "optim.weight_decay=0", "optim.clip_norm=1"]
    state = run(tmp_path, *changes)
    said = "epochs 1.0 -> 2.0, optim.lr 0.1 -> 0.02, optim.weight_decay 0.0005 -> 0.0, optim.clip_norm 0.0 -> 1.0"
    assert f"from here on: {said}\n" in capsys.readouterr().out
    assert {group["weight_decay"] for group in state.optimizer.param_groups} == {0}
    assert max(rate for step, rate in points(tmp_path)["train/lr"] if step > half) <= 0.02
    last = json.loads((tmp_path / "attempts.jsonl").read_text().splitlines()[-1])
    assert (last["after_step"], last["changed"]["optim.lr"]) == (half, {"from": 0.1, "to": 0.02})
    run(tmp_path, *changes)  # the same command again: nothing changes
    assert "from here on" not in capsys.readouterr().out


def test_an_edited_file_changes_no_run_under_way_and_a_run_cannot_end_before_where_it_is(tmp_path: Path) -> None:
    run(tmp_path)
    config = read_config(tmp_path / "config.yaml")
    with pytest.raises(
        UserError, match=r"another optim.lr \(0.1 there, 0.02 now\): give another run_dir, or optim.lr=... on the"
    ):
        distrib.train(replace(config, optim=replace(config.optim, lr=0.02)))
    with pytest.raises(UserError, match=r"is at epoch 2.00, past epochs=1: give more epochs"):
        run(tmp_path, "epochs=1")


def test_the_best_checkpoint_is_there_whenever_a_run_is_evaluated_and_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = run(tmp_path, "epochs=6", "eval_every=4", "save_every=25", "keep=2", "optim.lr=0.3")
    best = tmp_path / "checkpoints" / f"step_{state.best_step:08d}"
    assert state.best_step not in (0, state.step)
    assert f"best {state.best_values['top1']:.2f} % in {best}; " in capsys.readouterr().out
    assert distrib.evaluate(tmp_path) == pytest.approx(state.best_values)
    assert read_status(tmp_path)["best"] == {"step": state.best_step, "top1": state.best_values["top1"]}
    assert read_manifest(best)["score"] == state.best_values["top1"]


def test_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    run(tmp_path, "save_every=10", "keep=3")
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step_00000030",
        "step_00000040",
        "step_00000046",
    ]


def test_what_is_due_is_done_every_so_many_steps_and_at_the_end() -> None:
    assert [step for step in range(1, 24) if due(step, 10, total=23)] == [10, 20, 23]


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_parts_of_any_size_give_the_gradient_of_the_whole(parts: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 5))
    batch = Batch(torch.randn(7, 1, 4, 4), torch.randint(5, (7,)))
    gradient = torch.autograd.grad(F.cross_entropy(model(batch.images), batch.targets, label_smoothing=0.1), model[1].weight)[0]
    before = model[1].weight.detach().clone()
    config = Config(objective=ObjectiveConfig(label_smoothing=0.1), optim=OptimConfig(momentum=0, weight_decay=0))
    state, run = plain(model, config, rate=0.5, micro_batches=parts)
    train_step(state, batch, run)
    torch.testing.assert_close(before - model[1].weight, 0.5 * gradient)
    assert state.step == 1
    assert run.records[-1].images == [len(part) for part in torch.arange(7).tensor_split(parts)]


def test_a_long_gradient_is_cut() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 5))
    before = [each.detach().clone() for each in model.parameters()]
    state, run = plain(model, Config(optim=OptimConfig(momentum=0, weight_decay=0, clip_norm=0.01)), rate=1.0)
    train_step(state, Batch(torch.randn(7, 1, 4, 4), torch.randint(5, (7,))), run)
    moved = torch.cat([(a - b).flatten() for a, b in zip(before, model.parameters(), strict=True)]).norm()
    assert moved.item() == pytest.approx(0.01, rel=1e-3)


def test_a_step_that_fp16s_scaler_skips_is_counted_logged_and_changes_nothing(tmp_path: Path) -> None:
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(16, 5))
    config = Config(run_dir=str(tmp_path), optim=OptimConfig(momentum=0))
    state, run = plain(model, config)
    # Accelerate has a scaler on GPUs only; torch's works on a CPU too, and here it is what a GPU would get.
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    run.accelerator.scaler = scaler
    state.optimizer = AcceleratedOptimizer(build_optimizer(model, config.optim, fused=False), scaler=scaler)
    run.accelerator._optimizers = [state.optimizer]

    before = {name: each.clone() for name, each in model.state_dict().items()}
    good = Batch(torch.randn(7, 1, 4, 4), torch.randint(5, (7,)))
    train_step(state, Batch(good.images * float("inf"), good.targets), run)
    assert (state.skipped_steps, state.step, scaler.get_scale()) == (1, 1, 2.0)
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
    train_step(state, good, run)
    assert (state.skipped_steps, state.step) == (1, 2)
    assert not torch.equal(model[2].weight, before["2.weight"])
    forms = {name: meter.form for name, meter in run.objective.meters.items()}
    log = Log(config, 2, run.loader.steps, forms, run.objective.main)
    with log.opened(0):
        run.stopwatch.stepped()
        report(state, replace(run, log=log))
    assert points(tmp_path)["train/skipped_steps"] == [(2, 1.0)]
    ((_, loss),) = points(tmp_path)["train/loss"]
    assert math.isfinite(loss)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_changes_nothing(optimizer: Literal["sgd", "adamw", "muon"], bad: float) -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5))
    state, run = plain(model, Config(nonfinite="skip", optim=OptimConfig(name=optimizer)))
    good = Batch(torch.randn(7, 1, 4, 4), torch.randint(5, (7,)))
    before = copied(state)
    train_step(state, Batch(good.images * bad, good.targets), run)
    assert changed(state, before) == []
    train_step(state, good, run)
    before = copied(state)
    train_step(state, Batch(good.images * bad, good.targets), run)
    assert state.step == 3
    assert changed(state, before) == []
    train_step(state, good, run)
    after = joined(state.files())
    assert not torch.equal(after["model.0.weight"], before["model.0.weight"])
    assert all(each.isfinite().all() for each in after.values())
    assert [record.values[0].item() for record in run.records] == [1, 0, 1, 0]


def test_a_share_without_batch_statistics_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Expected more than 1 value per channel .*: give a larger batch_size, or model.norm"):
        run(tmp_path, "batch_size=1")
    with pytest.raises(UserError, match=r"Expected more than 1 value per channel .*: give a larger batch_size, or model.norm"):
        run(tmp_path, "batch_size=4", "micro_batches=4")


def test_the_rehearsal_of_a_step_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path / "rehearsed")
    monkeypatch.setattr(memory, "fits", lambda *args: True)
    run(tmp_path / "plain")
    for name in ("rehearsed", "plain"):
        manifest = json.loads((max((tmp_path / name / "checkpoints").iterdir()) / "manifest.json").read_text())
        assert manifest["chosen"]["virtual_ranks"] == 1  # so a share was not cut
    expected, got = weights(tmp_path / "plain"), weights(tmp_path / "rehearsed")
    assert got.keys() == expected.keys()
    assert [name for name, each in got.items() if not torch.equal(each, expected[name])] == []


def test_parts_that_were_asked_for_and_do_not_fit_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "fits", lambda *args: False)
    with pytest.raises(UserError, match=r"^rank 0 has too little memory for micro_batches=2: use 4, or auto$"):
        run(tmp_path, "micro_batches=2")
    with pytest.raises(RunError, match=r"^rank 0 has too little memory for a step with a single image$"):
        run(tmp_path, "batch_size=4", "micro_batches=4")


class Memorizer(nn.Module):
    """Knows the label of each image by its first pixel, or gets it wrong for some."""

    def forward(self, images: Tensor) -> Tensor:
        return F.one_hot(images[:, 0, 0, 0].round().long() % 10, 10).float()


class OddLoader:
    """A validation set whose batches are uneven, and which may lose some of its images."""

    def __init__(self, lost: int) -> None:
        self.source, self.lost = type("Source", (), {"val": range(11)})(), lost
        self.skips_bad_images = False

    def val(self, size: int) -> Any:
        images = torch.arange(11.0 - self.lost).view(-1, 1, 1, 1)
        targets = torch.arange(11 - self.lost) % 10
        targets[0] = 5
        return (Batch(*each) for each in zip(images.split(size), targets.split(size), strict=True))


def test_an_evaluation_counts_each_image_once_and_says_so_if_one_is_lost() -> None:
    accelerator = Accelerator(cpu=True)
    whole: Any = OddLoader(lost=0)
    assert evaluate(Memorizer(), whole, CrossEntropy(), accelerator, size=4, views=1)["top1"] == pytest.approx(100 * 10 / 11)
    torn: Any = OddLoader(lost=1)
    with pytest.raises(AssertionError, match=r"\(10, 0, 11\)"):
        evaluate(Memorizer(), torn, CrossEntropy(), accelerator, size=4, views=1)


def test_dropout_differs_between_steps_and_ranks_and_not_between_tries() -> None:
    def drawn(step: int, rank: int) -> Tensor:
        loop.seed_dropout(loop.fold(0, loop.DROPOUT, step, rank), torch.device("cpu"))
        return F.dropout(torch.ones(100))

    assert torch.equal(drawn(3, 1), drawn(3, 1))
    assert not torch.equal(drawn(3, 1), drawn(4, 1))
    assert not torch.equal(drawn(3, 1), drawn(3, 0))


def test_bf16_trains_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = run(tmp_path, "precision=bf16")
    assert "precision bf16 (as asked)" in capsys.readouterr().out
    assert all(each.dtype == torch.float32 for each in state.network.parameters())
    accelerator = Accelerator()
    with accelerator.autocast():
        assert state.network.stem(torch.zeros(1, 1, 8, 8, device=accelerator.device)).dtype == torch.bfloat16


@pytest.mark.slow
def test_the_config_of_cifar10_trains_on_files_of_the_true_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from test_datasets import datasets, write_cifar

    write_cifar(tmp_path, datasets.CIFAR10, "labels", "label_names", 10, monkeypatch)
    config = load_config(
        ["configs/cifar10.yaml", f"run_dir={tmp_path / 'run'}", f"data.root={tmp_path}", "epochs=1", "batch_size=20"]
    )
    state = distrib.train(replace(config, precision="no"))
    assert state.step == 5
    assert points(tmp_path / "run")["val/top5"]


def test_a_network_whose_run_was_refused_computes_in_its_own_precision_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = Tiny()
    monkeypatch.setattr(memory, "fits", lambda *args: False)
    with pytest.raises(UserError, match=r"has too little memory for micro_batches=2"):
        run(tmp_path, "precision=bf16", "micro_batches=2", network=network)
    assert network(torch.zeros(1, 1, 8, 8)).dtype == torch.float32
