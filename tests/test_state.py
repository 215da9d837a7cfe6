"""What is refused when a checkpoint is put back."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from distrib.checkpoint import Damaged
from distrib.config import OptimConfig
from distrib.metrics import zeros
from distrib.optim import build_average, build_optimizer
from distrib.state import TrainState, check_tensors, snapshot


def some_state() -> TrainState:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(3))
    network(torch.zeros(2, 1, 6, 6))
    optimizer = build_optimizer(network, OptimConfig(name="adamw"))
    for each in network.parameters():
        each.grad = torch.ones_like(each)
    optimizer.step()
    return TrainState(network, network, optimizer, build_average(network, 0.9), zeros(torch.device("cpu")))


CHANGES: dict[str, Callable[[dict[str, Tensor]], object]] = {
    "a shape": lambda named: named.update({"model.0.weight": torch.zeros(4, 1, 3, 4)}),
    "a type": lambda named: named.update({"model.0.weight": torch.zeros(4, 1, 3, 3).half()}),
    "an odd type": lambda named: named.update({"model.0.weight": torch.zeros(4, 1, 3, 3).to(torch.complex64)}),
    "one less": lambda named: named.pop("average.0.weight"),
    "one more": lambda named: named.update({"model.9.weight": torch.zeros(1)}),
    "a momentum of no weight": lambda named: named.update({"optimizer.99.exp_avg": torch.zeros(1)}),
    "a momentum of another shape": lambda named: named.update({"optimizer.0.exp_avg": torch.zeros(7)}),
    "a momentum without a number": lambda named: named.update({"optimizer.x.exp_avg": torch.zeros(7)}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_tensors_that_are_not_the_states_are_refused(tmp_path: Path, change: str) -> None:
    state = some_state()
    named = snapshot(state, None).tensors
    save_file(named, tmp_path / "whole.safetensors")
    check_tensors(tmp_path / "whole.safetensors", state)
    CHANGES[change](named)
    save_file(named, tmp_path / "odd.safetensors")
    with pytest.raises(Damaged):
        check_tensors(tmp_path / "odd.safetensors", state)


def test_a_snapshot_stays_as_it_is_while_the_state_goes_on_and_its_memory_is_used_again() -> None:
    state = some_state()
    first = snapshot(state, None)
    before = {name: each.clone() for name, each in first.tensors.items()}
    with torch.no_grad():
        for each in state.network.parameters():
            each += 1
    assert all(torch.equal(before[name], each) for name, each in first.tensors.items())
    second = snapshot(state, first)
    assert all(second.tensors[name].data_ptr() == each.data_ptr() for name, each in first.tensors.items())
    assert torch.equal(second.tensors["model.0.weight"], state.network[0].weight)
