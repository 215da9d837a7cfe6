"""Optimizers, and the learning rate as a function of the step."""

import math
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.swa_utils import get_ema_multi_avg_fn

from distrib.config import Config, OptimConfig
from distrib.training.groups import parameter_groups
from distrib.training.muon import Muon


@dataclass(frozen=True)
class Schedule:
    """The learning rate of each step: it rises linearly to `peak` in `warmup` steps, then falls to 0 at step `total`.

    In the first `frozen` steps, only the last layer learns.
    """

    peak: float
    warmup: int
    total: int
    shape: Literal["cosine", "linear"] = "cosine"
    frozen: int = 0

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.total - self.warmup)
        return self.peak * ((1 + math.cos(math.pi * done)) / 2 if self.shape == "cosine" else 1 - done)


def build_schedule(config: Config, steps_per_epoch: int) -> Schedule:
    """The schedule in steps. Only here are epochs converted to steps."""
    total = max(1, round(config.epochs * steps_per_epoch))
    warmup = min(total - 1, round(config.optim.warmup_epochs * steps_per_epoch))
    frozen = round(config.model.freeze * steps_per_epoch)
    return Schedule(config.optim.lr, warmup, total, config.optim.schedule, frozen)


def build_optimizer(model: nn.Module, config: OptimConfig, *, fused: bool = True) -> Optimizer:
    """An optimizer whose groups have learning rates of `scale` times that of the step."""
    groups = parameter_groups(model, config)
    device = groups[0]["params"][0].device
    on_gpu = fused and device.type == "cuda"
    for group in groups if on_gpu else ():
        group["lr"] = torch.tensor(config.lr, device=device)  # a replayed step reads it from the device
    if config.name == "adamw":
        return AdamW(groups, config.lr, betas=(config.momentum, 0.999), fused=fused, capturable=on_gpu)
    optimizer = Muon if config.name == "muon" else partial(SGD, nesterov=config.momentum > 0)
    return with_momentum(optimizer(groups, config.lr, config.momentum, fused=fused))


def with_momentum(optimizer: SGD) -> SGD:
    """Create the momentum buffers now, as zeros: fused SGD leaves them uninitialised if its first step is skipped."""
    for group in optimizer.param_groups:
        for weight in group["params"] if group["momentum"] or "inertia" in group else ():
            optimizer.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
    return optimizer


def build_ema(model: nn.Module, decay: float) -> nn.Module | None:
    """A copy of a network, for the moving average of its weights; None if decay is 0."""
    return deepcopy(model).requires_grad_(False) if decay else None


def update_ema(means: list[Tensor], values: list[Tensor], decay: float) -> None:
    """Update each mean: decay * mean + (1 - decay) * value.

    torch's AveragedModel copies a counter to the device in each step and waits for it.
    """
    get_ema_multi_avg_fn(decay)(means, values, None)  # type: ignore[no-untyped-call]


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate * group["scale"])
        else:
            group["lr"] = rate * group["scale"]
