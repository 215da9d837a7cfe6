"""What is refused when a checkpoint is put back."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from distrib.config import OptimConfig
from distrib.errors import UserError
from distrib.runtime.checkpoint import EMA, MODEL, NUMBERS, TRAINING, Torn
from distrib.training.meters import Totals
from distrib.training.optim import build_ema, build_optimizer
from distrib.training.state import TrainState, check_numbers, check_tensors, put_tensors, snapshot


def some_state() -> TrainState:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(3))
    network(torch.zeros(2, 1, 6, 6))
    optimizer = build_optimizer(network, OptimConfig(name="adamw"))
    for each in network.parameters():
        each.grad = torch.ones_like(each)
    optimizer.step()
    totals = Totals.zero().plus({"loss": torch.tensor(2.5), "by_class": torch.arange(3)}, 7)
    return TrainState(network, network, optimizer, None, build_ema(network, 0.9), totals, step=3, values={"top1": 50.0})


def write(
    state: TrainState, folder: Path, changed: Callable[[dict[str, dict[str, Tensor]]], object] = lambda files: None
) -> None:
    files = {file: dict(tensors) for file, tensors in snapshot(state, None, None).files.items()}
    changed(files)
    folder.mkdir(exist_ok=True)
    for file, tensors in files.items():
        save_file(tensors, folder / file)
    (folder / NUMBERS).write_text(json.dumps(state.numbers()))


CHANGES: dict[str, tuple[Callable[[dict[str, dict[str, Tensor]]], object], str]] = {
    "a shape": (
        lambda files: files[MODEL].update({"0.weight": torch.zeros(4, 1, 3, 4)}),
        "0.weight is [4, 1, 3, 4] there, [4, 1, 3, 3] now",
    ),
    "a type": (lambda files: files[MODEL].update({"0.weight": torch.zeros(4, 1, 3, 3).half()}), "0.weight is "),
    "one less": (lambda files: files[EMA].pop("0.weight"), "0.weight is only now"),
    "one more": (lambda files: files[MODEL].update({"9.weight": torch.zeros(1)}), "9.weight is only there"),
    "a layer more": (
        lambda files: files[MODEL].update({f"{i}.w": torch.zeros(1) for i in range(5)}),
        "0.w is only there, 1.w is only there, 2.w is only there and 2 more",
    ),
    "a momentum of no weight": (
        lambda files: files[TRAINING].update({"optimizer.9.weight.exp_avg": torch.zeros(1)}),
        "optimizer.9.weight.exp_avg is [1]",
    ),
    "a momentum of another shape": (
        lambda files: files[TRAINING].update({"optimizer.0.weight.exp_avg": torch.zeros(7)}),
        "optimizer.0.weight.exp_avg is [7]",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_tensors_of_another_network_are_refused_by_name(tmp_path: Path, change: str) -> None:
    state = some_state()
    write(state, tmp_path / "whole")
    check_tensors(tmp_path / "whole", state)
    changed, words = CHANGES[change]
    write(state, tmp_path / "odd", changed)
    with pytest.raises(UserError) as told:
        check_tensors(tmp_path / "odd", state)
    assert words in str(told.value)
    assert "\n" not in str(told.value)


def test_a_type_that_no_network_has_is_damage(tmp_path: Path) -> None:
    state = some_state()
    write(state, tmp_path / "odd", lambda files: files[MODEL].update({"0.weight": torch.zeros(4, 1, 3, 3).to(torch.complex64)}))
    with pytest.raises(Torn):
        check_tensors(tmp_path / "odd", state)


def test_what_was_saved_is_put_back(tmp_path: Path) -> None:
    state = some_state()
    write(state, tmp_path / "whole")
    other = some_state()
    with torch.no_grad():
        for tensors in other.files().values():
            for each in tensors.values():
                each.zero_()
    other.totals = Totals.zero()
    put_tensors(tmp_path / "whole", other)
    expected, got = state.files(), other.files()
    assert {file: each.keys() for file, each in got.items()} == {file: each.keys() for file, each in expected.items()}
    assert [name for file in got for name, each in got[file].items() if not torch.equal(each, expected[file][name])] == []


@pytest.mark.parametrize(
    ("numbers", "error", "words"),
    [
        ({"step": 3}, None, ""),  # an earlier version had no other numbers: they have their defaults
        ({"step": 3, "wings": 2}, UserError, "has numbers that this version does not know (wings): update distrib"),
        ({"step": 4}, Torn, "step cannot be 4"),
        ({"step": 3, "values": 1.5}, Torn, "values cannot be 1.5"),
        ({"step": 3, "kept_seconds": "a"}, Torn, "kept_seconds cannot be 'a'"),
        ([], Torn, "has no numbers"),
    ],
)
def test_numbers_are_of_the_run_or_it_is_told_what_they_are(
    tmp_path: Path, numbers: object, error: type[Exception] | None, words: str
) -> None:
    (tmp_path / NUMBERS).write_text(json.dumps(numbers))
    if error is None:
        check_numbers(tmp_path / NUMBERS, 3)
        return
    with pytest.raises(error) as told:
        check_numbers(tmp_path / NUMBERS, 3)
    assert words in str(told.value)


def test_a_snapshot_stays_as_it_is_while_the_state_goes_on_and_its_memory_is_used_again() -> None:
    state = some_state()
    first = snapshot(state, None, None)
    before = {name: each.clone() for file in first.files.values() for name, each in file.items()}
    with torch.no_grad():
        for each in state.network.parameters():
            each += 1
    assert all(torch.equal(before[name], each) for file in (MODEL, TRAINING) for name, each in first.files[file].items())
    second = snapshot(state, first, 1.0)
    for file, tensors in first.files.items():
        assert all(second.files[file][name].data_ptr() == each.data_ptr() for name, each in tensors.items())
    assert torch.equal(second.files[MODEL]["0.weight"], state.network[0].weight)
    assert second.score == 1.0
