"""The learning rate of each step, and what decays."""

import pytest
import torch
from torch import nn

from distrib.config import Config, OptimConfig
from distrib.training.muon import orthogonal
from distrib.training.optim import Schedule, build_ema, build_optimizer, build_schedule, set_learning_rate, update_ema
from distrib.training.state import TrainState


@pytest.mark.parametrize("shape", ["cosine", "linear"])
def test_the_rate_rises_to_its_peak_and_falls_to_nothing(shape: str) -> None:
    rates = [Schedule(0.5, warmup=10, total=100, shape=shape)(step) for step in range(101)]
    assert rates[:10] == pytest.approx([0.05 * (step + 1) for step in range(10)])
    assert rates[10] == max(rates) == 0.5
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[55] == pytest.approx(0.25)
    assert rates[100] == pytest.approx(0)


def test_a_run_without_warmup_begins_at_the_peak() -> None:
    assert Schedule(0.5, warmup=0, total=3)(0) == 0.5


def test_epochs_become_steps() -> None:
    config = Config(epochs=2.5, optim=OptimConfig(lr=0.3, warmup_epochs=0.5, schedule="linear"))
    assert build_schedule(config, steps_per_epoch=10) == Schedule(0.3, warmup=5, total=25, shape="linear")
    assert build_schedule(Config(epochs=0.01), steps_per_epoch=10) == Schedule(0.1, warmup=0, total=1)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_biases_and_norms_do_not_decay(name: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    optimizer = build_optimizer(model, OptimConfig(name=name, lr=0.1, weight_decay=0.5))
    before = {key: each.detach().clone() for key, each in model.named_parameters()}
    for each in model.parameters():
        each.grad = torch.zeros_like(each)
    optimizer.step()
    shrunk = {key for key, each in model.named_parameters() if not torch.equal(each, before[key])}
    assert shrunk == {"0.weight", "3.weight"}


@pytest.mark.parametrize("name", ["sgd", "adamw", "muon"])
def test_biases_and_the_last_layer_learn_at_rates_of_their_own(name: str) -> None:
    def moved(**keys: float) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
        optimizer = build_optimizer(model, OptimConfig(name=name, momentum=0.0, weight_decay=0.0, **keys))
        before = {key: each.detach().clone() for key, each in model.named_parameters()}
        for each in model.parameters():
            each.grad = torch.ones_like(each)
        set_learning_rate(optimizer, 0.01)
        optimizer.step()
        return {key: each - before[key] for key, each in model.named_parameters()}

    plain, scaled = moved(), moved(bias_lr=3, head_lr=5)
    factors = {"0.weight": 1, "0.bias": 3, "1.weight": 3, "1.bias": 3, "3.weight": 5, "3.bias": 3}
    for key, factor in factors.items():
        torch.testing.assert_close(scaled[key], factor * plain[key], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("shape", [(8, 8), (8, 50), (50, 8)])
def test_a_step_of_muon_is_nearly_orthogonal_and_turns_no_direction_around(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    along = left.T @ orthogonal(matrix, rounds=5) @ right.T
    assert 0.6 < along.diagonal().min() <= along.diagonal().max() < 1.3
    torch.testing.assert_close(along, along.diagonal().diag())


def test_muon_moves_filters_by_an_orthogonal_matrix() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.Flatten(), nn.Linear(4, 2))
    optimizer = build_optimizer(model, OptimConfig(name="muon", momentum=0.5, weight_decay=0))
    filters = model[0].weight
    for _ in range(2):
        start = filters.detach().clone()
        filters.grad = torch.randn_like(filters)
        gradient = filters.grad.clone()
        optimizer.step()
    momentum = optimizer.state[filters]["momentum_buffer"]
    step = orthogonal((gradient + 0.5 * momentum).flatten(1)).view_as(filters)
    torch.testing.assert_close(filters.detach(), start - optimizer.param_groups[0]["lr"] * step)


def test_an_average_follows_weights_and_batch_statistics() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    average = build_ema(model, decay=0.75)
    assert average is not None
    start = [each.detach().clone() for each in (model[0].weight, model[1].running_mean)]
    with torch.no_grad():
        model[0].weight += 1
        model[1].running_mean += 1
    state = TrainState(model, model, build_optimizer(model, OptimConfig()), ema=average)
    update_ema(*state.ema_pairs, decay=0.75)
    torch.testing.assert_close(average[0].weight, start[0] + 0.25)
    torch.testing.assert_close(average[1].running_mean, start[1] + 0.25)
    assert build_ema(model, decay=0) is None
