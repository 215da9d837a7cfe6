"""The loop, in one process: steps, evaluation, going on after an interruption."""

import math
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from conftest import SMALL, points, weights
from torch import Tensor, nn

import train
from distrib import loop, memory, models
from distrib.config import Config, OptimConfig, RunError, UserError, load_config
from distrib.data.loaders import Batch
from distrib.data.steps import Steps
from distrib.log import Log
from distrib.loop import TrainState, due, evaluate, report, train_step
from distrib.metrics import zeros
from distrib.optim import build_optimizer
from distrib.watch import Watch


class Kill(Exception):  # noqa: N818
    """What stands for a kill: nothing in the trainer catches it."""


def run(run_dir: Path, *args: str) -> TrainState:
    config = load_config([*SMALL, f"run_dir={run_dir}", "threads=1", *args])
    return train.train(config, longer=any(arg.startswith("epochs=") for arg in args))


def run_killed(monkeypatch: pytest.MonkeyPatch, at: int, run_dir: Path, *args: str) -> None:
    def step(state: TrainState, *rest: Any) -> None:
        if state.step == at:
            raise Kill
        train_step(state, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "train_step", step)
        with pytest.raises(Kill):
            run(run_dir, *args)
    time.sleep(1 - time.time() % 1)  # the files of one process that begin in the same second are not in order for TensorBoard


def plain_state(model: nn.Module, accelerator: Accelerator, config: OptimConfig) -> TrainState:
    prepared, optimizer = accelerator.prepare(model, build_optimizer(model, config))
    return TrainState(prepared, model, optimizer, None, zeros(accelerator.device))


def changed(state: TrainState, before: dict[str, torch.Tensor]) -> list[str]:
    """The tensors that are not as before, or were not there and are not 0."""
    tensors = state.tensors().items()
    return [name for name, each in tensors if not torch.equal(each, before.get(name, torch.zeros_like(each)))]


ALL = [
    "model.dropout=0.3",
    "data.flip=alternating",
    "data.erase=2",
    "model.whiten=1",
    "views=6",
    "optim.average_decay=0.9",
    "save_every=8",
    "eval_every=7",
]


@pytest.mark.parametrize(("at", "optimizer"), [(1, "sgd"), (13, "adamw"), (20, "muon"), (39, "sgd"), (39, "muon")])
def test_a_killed_run_goes_on_as_if_it_had_not_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, optimizer: str
) -> None:
    keys = [*ALL, f"optim.name={optimizer}", "optim.lr=0.01"]
    run(tmp_path / "whole", *keys)
    run_killed(monkeypatch, at, tmp_path / "killed", *keys)
    run(tmp_path / "killed", *keys)

    whole, killed = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert whole.keys() == killed.keys()
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    expected, got = points(tmp_path / "whole"), points(tmp_path / "killed")
    for tag in expected.keys() - {"train/images_per_second"}:
        assert got[tag] == expected[tag], tag


def test_the_moving_average_is_evaluated_as_exactly_as_the_network(tmp_path: Path) -> None:
    run(tmp_path, "precision=bf16", "views=2", "epochs=1", "optim.average_decay=1e-12")  # so it has the weights of the network
    found = points(tmp_path)
    assert found["val_average/loss"] == found["val/loss"]


class Tiny(nn.Sequential):
    """A network for 8x8 pixels that is compiled in seconds."""

    def __init__(self, channels: int, classes: int, width: int, dropout: float) -> None:
        super().__init__(
            nn.Conv2d(channels, width, 3), nn.GroupNorm(2, width), nn.ReLU(), nn.Flatten(), nn.Linear(36 * width, classes)
        )


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch 2.11's, of itself
def test_a_compiled_network_trains_like_a_plain_one_and_its_weights_keep_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(models.OWN, "tiny", Tiny)
    keys = ["epochs=1", "model.name=tiny", "log_every=1"]
    plain, compiled = run(tmp_path / "plain", *keys), run(tmp_path / "compiled", *keys, "compile=default")
    assert compiled.network._compiled_call_impl is not None
    assert compiled.tensors().keys() == plain.tensors().keys()
    expected, got = (dict(points(tmp_path / name)["train/loss"]) for name in ("plain", "compiled"))
    assert got == pytest.approx(expected, rel=1e-3)


def test_a_finished_run_is_left_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = run(tmp_path)
    capsys.readouterr()
    before = weights(tmp_path)
    again = run(tmp_path)
    assert (again.step, again.top1, again.best_step) == (state.step, state.top1, state.best_step)
    assert all(map(torch.equal, before.values(), weights(tmp_path).values()))
    assert f"done: top1 {state.top1:.2f} %" in capsys.readouterr().out


def test_a_finished_run_can_be_trained_longer(tmp_path: Path) -> None:
    first = run(tmp_path)
    assert run(tmp_path, "epochs=3").step == first.step * 3 // 2


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
    gradient = torch.autograd.grad(F.cross_entropy(model(batch.images), batch.labels, label_smoothing=0.1), model[1].weight)[0]
    before = model[1].weight.detach().clone()
    config = Config(optim=OptimConfig(momentum=0, weight_decay=0, label_smoothing=0.1))
    accelerator = Accelerator(cpu=True)
    state = plain_state(model, accelerator, config.optim)
    state.micro_batches = parts
    train_step(state, batch, 0.5, config, accelerator)
    torch.testing.assert_close(before - model[1].weight, 0.5 * gradient)
    assert state.step == 1
    assert state.told[-1].images == [len(part) for part in torch.arange(7).tensor_split(parts)]


def test_a_long_gradient_is_cut() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 5))
    before = [each.detach().clone() for each in model.parameters()]
    config = Config(optim=OptimConfig(momentum=0, weight_decay=0, clip_norm=0.01))
    accelerator = Accelerator(cpu=True)
    state = plain_state(model, accelerator, config.optim)
    train_step(state, Batch(torch.randn(7, 1, 4, 4), torch.randint(5, (7,))), 1.0, config, accelerator)
    moved = torch.cat([(a - b).flatten() for a, b in zip(before, model.parameters(), strict=True)]).norm()
    assert moved.item() == pytest.approx(0.01, rel=1e-3)


def test_a_step_that_fp16s_scaler_skips_is_counted_logged_and_changes_nothing(tmp_path: Path) -> None:
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(16, 5))
    accelerator = Accelerator(cpu=True)
    config = Config(optim=OptimConfig(momentum=0))
    state = plain_state(model, accelerator, config.optim)
    # Accelerate has a scaler on GPUs only; torch's works on a CPU too, and here it is what a GPU would get.
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    accelerator.scaler = scaler
    plain = build_optimizer(model, config.optim, fused=False)
    state.optimizer = AcceleratedOptimizer(plain, scaler=scaler)
    accelerator._optimizers = [state.optimizer]

    before = {name: each.clone() for name, each in model.state_dict().items()}
    good = Batch(torch.randn(7, 1, 4, 4), torch.randint(5, (7,)))
    train_step(state, Batch(good.images * float("inf"), good.labels), 0.1, config, accelerator)
    assert (state.skipped_steps, state.step, scaler.get_scale()) == (1, 1, 2.0)
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
    train_step(state, good, 0.1, config, accelerator)
    assert (state.skipped_steps, state.step) == (1, 2)
    assert not torch.equal(model[2].weight, before["2.weight"])
    with Log(replace(config, run_dir=str(tmp_path)), 0, 2, Steps(100, 7, 0), silent=False) as log:
        loader: Any = SimpleNamespace(steps=Steps(100, 7, 0))
        unused: Any = None
        watch = Watch(config)
        watch.stepped()
        report(state, 0.1, loop.Run(config, accelerator, loader, unused, log, unused, watch))
    assert points(tmp_path)["train/skipped_steps"] == [(2, 1.0)]
    ((_, loss),) = points(tmp_path)["train/loss"]
    assert math.isfinite(loss)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_changes_nothing(optimizer: Literal["sgd", "adamw", "muon"], bad: float) -> None:
    config = Config(nonfinite="skip", optim=OptimConfig(name=optimizer))
    accelerator = Accelerator(cpu=True)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5))
    state = plain_state(model, accelerator, config.optim)
    good = Batch(torch.randn(7, 1, 4, 4), torch.randint(5, (7,)))
    before = {name: each.clone() for name, each in state.tensors().items()}
    train_step(state, Batch(good.images * bad, good.labels), 0.1, config, accelerator)
    assert changed(state, before) == []
    train_step(state, good, 0.1, config, accelerator)
    before = {name: each.clone() for name, each in state.tensors().items()}
    train_step(state, Batch(good.images * bad, good.labels), 0.1, config, accelerator)
    assert state.step == 3
    assert changed(state, before) == []
    train_step(state, good, 0.1, config, accelerator)
    after = state.tensors()
    assert not torch.equal(after["model.0.weight"], before["model.0.weight"])
    assert all(each.isfinite().all() for each in after.values())
    assert [step.scalars[0].item() for step in state.told] == [1, 0, 1, 0]


def test_a_share_without_batch_statistics_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Expected more than 1 value per channel .*: give a larger batch_size, or model.norm"):
        run(tmp_path, "batch_size=1")
    with pytest.raises(UserError, match=r"Expected more than 1 value per channel .*: give a larger batch_size, or model.norm"):
        run(tmp_path, "batch_size=4", "micro_batches=4")


def test_the_rehearsal_of_a_step_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rehearsed = run(tmp_path / "rehearsed")
    monkeypatch.setattr(memory, "fits", lambda *args: True)
    plain = run(tmp_path / "plain")
    assert (rehearsed.micro_batches, plain.micro_batches) == (1, 1)
    expected = plain.tensors()
    assert [name for name, each in rehearsed.tensors().items() if not torch.equal(each, expected[name])] == []


def test_parts_that_were_asked_for_and_do_not_fit_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "fits", lambda *args: False)
    with pytest.raises(UserError, match=r"^rank 0 has no memory for micro_batches=2: use 4, or auto$"):
        run(tmp_path, "micro_batches=2")
    with pytest.raises(RunError, match=r"^rank 0 has not enough memory for a step with a single image$"):
        run(tmp_path, "batch_size=4", "micro_batches=4")


class Memorizer(nn.Module):
    """Knows the label of each image by its first pixel, or gets it wrong for some."""

    def forward(self, images: Tensor) -> Tensor:
        return F.one_hot(images[:, 0, 0, 0].round().long() % 10, 10).float()


class OddLoader:
    """A validation set whose batches are uneven, and which may lose some of its images."""

    def __init__(self, lost: int) -> None:
        self.source, self.lost = type("Source", (), {"val": range(11)})(), lost

    def val(self, size: int) -> Any:
        images = torch.arange(11.0 - self.lost).view(-1, 1, 1, 1)
        labels = torch.arange(11 - self.lost) % 10
        labels[0] = 5
        return (Batch(*each) for each in zip(images.split(size), labels.split(size), strict=True))


def test_an_evaluation_counts_each_image_once_and_says_so_if_one_is_lost() -> None:
    accelerator = Accelerator(cpu=True)
    whole: Any = OddLoader(lost=0)
    assert evaluate(Memorizer(), whole, 4, 1, accelerator)["top1"] == pytest.approx(100 * 10 / 11)
    torn: Any = OddLoader(lost=1)
    with pytest.raises(AssertionError, match=r"\(10, 11\)"):
        evaluate(Memorizer(), torn, 4, 1, accelerator)


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


def test_the_config_of_cifar10_trains_on_files_of_the_true_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from test_sources import datasets, write_cifar

    write_cifar(tmp_path, datasets.CIFAR10, "labels", "label_names", 10, monkeypatch)
    config = load_config(
        ["configs/cifar10.yaml", f"run_dir={tmp_path / 'run'}", f"data.root={tmp_path}", "epochs=1", "batch_size=20"]
    )
    state = train.train(replace(config, precision="no"))
    assert state.step == 5
    assert points(tmp_path / "run")["val/top5"]
