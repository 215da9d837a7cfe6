"""The learning rate of each step, and what decays."""

import pytest
import torch
from torch import nn

from distrib.config import Config, OptimConfig
from distrib.optim import Schedule, build_average, build_optimizer, build_schedule, move_average
from distrib.state import TrainState


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


def test_an_average_follows_weights_and_batch_statistics() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    average = build_average(model, decay=0.75)
    assert average is not None
    start = [each.detach().clone() for each in (model[0].weight, model[1].running_mean)]
    with torch.no_grad():
        model[0].weight += 1
        model[1].running_mean += 1
    state = TrainState(model, model, build_optimizer(model, OptimConfig()), average, torch.zeros(4))
    move_average(*state.averaged, decay=0.75)
    torch.testing.assert_close(average[0].weight, start[0] + 0.25)
    torch.testing.assert_close(average[1].running_mean, start[1] + 0.25)
    assert build_average(model, decay=0) is None
