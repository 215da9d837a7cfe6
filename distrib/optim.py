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
from distrib.muon import Muon


@dataclass(frozen=True)
class Schedule:
    """The learning rate of each step: up linearly to `peak` in `warmup` steps, then down to 0 at step `total`."""

    peak: float
    warmup: int
    total: int
    shape: Literal["cosine", "linear"] = "cosine"

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.total - self.warmup)
        return self.peak * ((1 + math.cos(math.pi * done)) / 2 if self.shape == "cosine" else 1 - done)


def build_schedule(config: Config, steps_per_epoch: int) -> Schedule:
    """The one place where epochs become steps."""
    total = max(1, round(config.epochs * steps_per_epoch))
    warmup = min(total - 1, round(config.optim.warmup_epochs * steps_per_epoch))
    return Schedule(config.optim.lr, warmup, total, config.optim.schedule)


def build_optimizer(model: nn.Module, config: OptimConfig, *, fused: bool = True) -> Optimizer:
    """An optimizer whose groups have a learning rate of their own, `scale` times that of the step.

    Biases, and the weights and biases of norms, do not decay: all that have fewer than 2 dimensions. Muon makes the steps of
    all other weights orthogonal, but for those of the last layer, in which each class learns for itself.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices, vectors = ([p for p in parameters if (p.dim() > 1) == large] for large in (True, False))
    muon, decays = config.name == "muon", {"weight_decay": config.weight_decay}
    # Each group takes about 25 us of a step: the last layer is one only if something about it differs.
    last = -1 if muon or config.head_lr != 1 else len(matrices)
    groups = [
        {"params": matrices[:last], "scale": 1.0, **decays, **({"inertia": config.momentum} if muon else {})},
        {"params": matrices[last:], "scale": config.head_lr, **decays},
        {"params": vectors, "scale": config.bias_lr, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    on_gpu = fused and parameters[0].is_cuda
    for group in groups if on_gpu else ():
        group["lr"] = torch.tensor(config.lr, device=parameters[0].device)  # where a step that is replayed reads it anew
    if config.name == "adamw":
        return AdamW(groups, config.lr, betas=(config.momentum, 0.999), fused=fused, capturable=on_gpu)
    optimizer = Muon if muon else partial(SGD, nesterov=config.momentum > 0)
    return with_momentum(optimizer(groups, config.lr, config.momentum, fused=fused))


def with_momentum(optimizer: SGD) -> SGD:
    """With momentum of 0: torch's fused SGD makes it in its first step, even if it is to skip that, of what lay in memory."""
    for group in optimizer.param_groups:
        for weight in group["params"] if group["momentum"] or "inertia" in group else ():
            optimizer.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
    return optimizer


def build_average(model: nn.Module, decay: float) -> nn.Module | None:
    """A model for the moving average of another one, of which it is a copy at first; None if decay is 0."""
    return deepcopy(model).requires_grad_(False) if decay else None


def move_average(means: list[Tensor], values: list[Tensor], decay: float) -> None:
    """Move each mean a part 1 - `decay` of the way to its value.

    torch's AveragedModel would bring a counter of its own to the device in each step, and wait for it.
    """
    get_ema_multi_avg_fn(decay)(means, values, None)  # type: ignore[no-untyped-call]


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate * group["scale"])
        else:
            group["lr"] = rate * group["scale"]
