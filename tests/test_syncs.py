"""The host never waits for the device in a steady step. On a CPU all is there at once, so what would wait is refused.

On a GPU torch knows by itself, and is asked to refuse too; benchmarks/gpu.py counts.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import waits_refused
from test_loop import ALL, run
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from distrib.data.loaders import Batch, Loader
from distrib.training import loop
from distrib.training.meters import Meter, hits
from distrib.training.objective import CrossEntropy
from distrib.training.replay import WARM_UP
from distrib.training.state import TrainState

# What brings a value, or a size that depends on values, from a device to the host.
METHODS = ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__array__")
OPERATORS = {"_local_scalar_dense", "equal", "nonzero", "masked_select", "unique_dim", "_unique2", "is_nonzero"}


WAITS: list[Callable[[Tensor], object]] = [
    lambda x: x.item(),
    lambda x: x.tolist(),
    lambda x: x.nonzero(),
    lambda x: [0][x],
    lambda x: 1 if x else 0,
    lambda x: x.cpu(),
    lambda x: f"{x}",
]


class Refused(Exception):  # noqa: N818
    pass


class Watched(TorchDispatchMode):
    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator.overloadpacket.__name__ in OPERATORS:
            raise Refused(operator)
        return operator(*args, **kwargs or {})


@contextmanager
def nothing_waits() -> Iterator[None]:
    def refusing(method: Any) -> Any:
        def refuse(self: Tensor, *args: Any) -> Any:
            if threading.current_thread() is threading.main_thread():  # a checkpoint is written in another one
                raise Refused(method)
            return method(self, *args)

        return refuse

    with pytest.MonkeyPatch.context() as patched, Watched():
        for name in METHODS:
            patched.setattr(Tensor, name, refusing(getattr(Tensor, name)))
        with waits_refused():
            yield


def guard(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step of a run from the second on (a GPU's: from the fifth), and what prepares its images, under `nothing_waits`."""
    step, batches = loop.train_step, Loader.train
    begun = WARM_UP if torch.cuda.is_available() else 0  # optimizers make their state in the first; a GPU's last is recorded

    def guarded_step(state: TrainState, *rest: Any) -> None:
        if state.step <= begun:
            step(state, *rest)
        else:
            with nothing_waits():
                step(state, *rest)

    def guarded_batches(self: Loader, steps: range) -> Iterator[Batch]:
        found = batches(self, steps)
        yield next(found)
        for _ in steps[1:]:
            with nothing_waits():
                batch = next(found)
            yield batch

    monkeypatch.setattr(loop, "train_step", guarded_step)
    monkeypatch.setattr(Loader, "train", guarded_batches)


MORE = [*ALL, "nonfinite=skip", "micro_batches=3", "optim.clip_norm=1"]


@pytest.mark.parametrize(
    ("optimizer", "keys"),
    [
        ("sgd", ["cuda_graph=true"]),
        ("sgd", []),
        ("muon", ALL),
        *(pytest.param(name, keys, marks=pytest.mark.slow) for name, keys in (("sgd", ALL), ("sgd", MORE), ("muon", MORE))),
        pytest.param("adamw", MORE, marks=pytest.mark.slow),
    ],
)
def test_no_step_waits_for_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str, keys: list[str]) -> None:
    guard(monkeypatch)
    assert run(tmp_path, "cuda_graph=false", f"optim.name={optimizer}", *keys).step == 46


@pytest.mark.parametrize("wait", WAITS)
def test_a_wait_would_be_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wait: Any) -> None:
    def waiting(logits: Tensor, targets: Tensor) -> Tensor:
        wait(torch.zeros((), dtype=torch.int64))
        return hits(logits, targets)

    class Waiting(CrossEntropy):
        @cached_property
        def meters(self) -> Mapping[str, Meter]:
            return {**super().meters, "top1": replace(super().meters["top1"], sums=waiting)}

    guard(monkeypatch)
    with pytest.raises(Refused):
        run(tmp_path, "cuda_graph=false", objective=Waiting(0.1))  # else, a GPU's host is not there when the work is done again
