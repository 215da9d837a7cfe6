"""A step is recorded and replayed. Without a GPU, OnCPU stands for a CUDA graph: numbers of Python are frozen in it, too."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_same
from test_loop import ALL, run, run_killed
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves

from distrib import run as run_module
from distrib.config import Config
from distrib.data.loaders import Batch
from distrib.training import loop, replay
from distrib.training.records import StepRecord
from distrib.training.replay import WARM_UP, Recording, Replay, Work, can_replay
from distrib.training.state import TrainState

GPU = torch.cuda.is_available()
MORE = ["nonfinite=skip", "micro_batches=3", "optim.clip_norm=1"]


class Tape(TorchDispatchMode):
    """Notes each operation of torch's, with the tensors and the numbers that it gets, and what it gives."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operation is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("it waits for the device")
        result = operation(*args, **(kwargs or {}))
        self.operations.append((operation, args, kwargs or {}, result))
        return result


def tensors_of(state: TrainState) -> list[Tensor]:
    """All that a step may change."""
    ema = [] if state.ema is None else list(state.ema.state_dict().values())
    memory = [each for each in tree_leaves([*state.optimizer.state.values()]) if isinstance(each, Tensor)]
    return [*state.network.state_dict().values(), *ema, *memory]


class OnCPU:
    """Stands for a CUDA graph: recording it computes nothing, and a replay does the same operations on the same memory."""

    def __init__(self, work: Any, like: Batch) -> None:
        (self.state, *_), self.batch, tape = work.args, Batch(*map(torch.zeros_like, like)), Tape()
        before, random = [each.clone() for each in tensors_of(self.state)], torch.get_rng_state()
        with tape:
            self.record = work(self.batch)
        with torch.no_grad():
            for each, value in zip(tensors_of(self.state), before, strict=True):
                each.copy_(value)
        torch.set_rng_state(random)
        self.operations = tape.operations

    @torch.no_grad()
    def __call__(self, batch: Batch) -> StepRecord:
        for place, tensor in zip(self.batch, batch, strict=True):
            place.copy_(tensor)
        for operation, args, kwargs, results in self.operations:
            schema = operation._schema
            if not schema.is_mutable and any(each.alias_info for each in schema.returns):
                continue  # a view of memory that is there
            again = operation(*args, **kwargs)
            if not schema.is_mutable:
                for place, tensor in zip(tree_flatten(results)[0], tree_flatten(again)[0], strict=True):
                    if isinstance(place, Tensor):
                        place.copy_(tensor)
        return self.record._replace(values=self.record.values.clone())


def rates_on_device(build: Any, *args: Any, **options: Any) -> Any:
    """An optimizer whose learning rates are tensors, as on a GPU: where a step that is replayed reads them anew."""
    optimizer = build(*args, **options)
    for group in optimizer.param_groups:
        group["lr"] = torch.as_tensor(group["lr"])
    return optimizer


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[Replay]:
    """What does the steps of each run."""
    made: list[Replay] = []

    def build(**options: Any) -> Replay:
        made.append(Replay(**options))
        return made[-1]

    monkeypatch.setattr("distrib.run.Replay", build)
    return made


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """All that are made, on a GPU if there is one."""
    made: list[Any] = []

    def recording(*args: Any) -> Any:
        made.append((Recording if GPU else OnCPU)(*args))
        return made[-1]

    monkeypatch.setattr(replay, "Recording", recording)
    if not GPU:
        monkeypatch.setattr(run_module, "build_optimizer", partial(rates_on_device, run_module.build_optimizer))
        monkeypatch.setattr("distrib.run.can_replay", lambda config, *_, **__: config.cuda_graph)
    return made


@pytest.mark.parametrize(
    ("optimizer", "keys"),
    [
        ("sgd", []),
        ("sgd", MORE),
        pytest.param("adamw", [*ALL, *MORE], marks=pytest.mark.slow),
        ("muon", ALL),
        ("sgd", ["precision=bf16"]),
    ],
)
def test_a_run_whose_steps_are_replayed_is_the_same_bit_by_bit(
    tmp_path: Path, recordings: list[Any], replays: list[Replay], optimizer: str, keys: list[str]
) -> None:
    keys = [f"optim.name={optimizer}", "optim.lr=0.01", *keys]
    run(tmp_path / "plain", "cuda_graph=false", *keys)
    assert recordings == []
    run(tmp_path / "replayed", *keys)
    assert len(recordings) == 1
    assert (replays[-1].recording, replays[-1].steps) == (recordings[0], WARM_UP + 1)
    assert_same(tmp_path / "replayed", tmp_path / "plain")


@pytest.mark.slow
def test_a_run_that_is_killed_is_recorded_anew_and_goes_on_bit_by_bit(
    tmp_path: Path, recordings: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "whole", *ALL)
    run_killed(monkeypatch, 30, tmp_path / "killed", *ALL)
    run(tmp_path / "killed", *ALL)
    assert len(recordings) == 3
    assert_same(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.skipif(GPU, reason="a GPU's optimizer has its rates on the device")
def test_a_number_of_python_that_changes_from_step_to_step_would_be_found(
    tmp_path: Path, recordings: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "build_optimizer", run_module.build_optimizer.args[0])  # type: ignore[attr-defined]
    run(tmp_path / "plain", "cuda_graph=false")
    run(tmp_path / "replayed")
    with pytest.raises(AssertionError):
        assert_same(tmp_path / "replayed", tmp_path / "plain")


def test_a_step_that_cannot_be_recorded_is_told_of_and_the_run_is_the_same(
    tmp_path: Path, replays: list[Replay], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    update, attempts = loop.update, list[bool]()

    def waiting(state: TrainState, *rest: Any) -> Any:
        if GPU:
            state.weights[0].sum().item()  # allowed, but not while it is recorded
        elif attempts and attempts[-1]:
            raise RuntimeError("it waits")
        return update(state, *rest)

    class Attempt:
        def __init__(self, work: Work, like: Batch) -> None:
            attempts.append(True)
            try:
                work(like)  # which fails when its gradients are there
            finally:
                attempts.append(False)

    monkeypatch.setattr(loop, "update", waiting)
    # A CPU's attempt is done for real: it would change buffers, and draw for dropout.
    keys = ["model.norm=group", *(["model.dropout=0.2"] if GPU else [])]
    run(tmp_path / "plain", "cuda_graph=false", *keys)
    capsys.readouterr()
    if not GPU:
        monkeypatch.setattr(replay, "Recording", Attempt)
        monkeypatch.setattr("distrib.run.can_replay", lambda *_, **__: True)
    run(tmp_path / "waits", *keys)
    assert (replays[-1].recording, replays[-1].wanted) == (None, False)
    assert capsys.readouterr().out.count("warning: a step cannot be recorded, so cuda_graph is off: ") == 1
    assert_same(tmp_path / "waits", tmp_path / "plain")


def test_a_recording_makes_room_for_an_evaluation(
    tmp_path: Path,
    recordings: list[Any],
    replays: list[Replay],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run(tmp_path / "plain", *ALL)
    evaluate, failed = loop.evaluate, list[bool]()

    def greedy(*args: Any) -> Any:
        if recordings and not failed:
            failed.append(True)
            raise torch.OutOfMemoryError
        return evaluate(*args)

    monkeypatch.setattr(loop, "evaluate", greedy)
    run(tmp_path / "full", *ALL)
    assert (replays[-1].recording, replays[-1].wanted) == (None, False)
    said = "warning: too little memory for an evaluation beside a recorded step, so cuda_graph is off"
    assert capsys.readouterr().out.count(said) == 1
    assert_same(tmp_path / "full", tmp_path / "plain")


def test_what_is_not_wanted_is_never_recorded(recordings: list[Any]) -> None:
    batch, steps = Batch(torch.zeros(2, 1, 4, 4), torch.zeros(2, dtype=torch.int64)), Replay()
    for _ in range(2 * WARM_UP):
        assert steps(lambda batch: StepRecord(batch.images.sum(), [], {}), batch) == (0, [], {})
    assert recordings == []


@pytest.mark.parametrize(
    ("device", "world", "scaled", "keys", "expected"),
    [
        ("cuda", 1, False, {}, True),
        ("cuda", 1, False, {"compile": "no"}, True),
        ("cuda", 1, False, {"compile": "default"}, True),
        ("cuda", 1, False, {"compile": "reduce-overhead"}, False),
        ("cuda", 1, False, {"cuda_graph": False}, False),
        ("cuda", 2, False, {}, False),
        ("cuda", 1, True, {}, False),
        ("cpu", 1, False, {}, False),
    ],
)
def test_steps_of_one_gpu_are_replayed_unless_something_in_them_waits(
    device: str, world: int, scaled: bool, keys: Any, expected: bool
) -> None:
    assert can_replay(Config(**keys), torch.device(device), world, scaled=scaled) == expected
