"""Layers that several networks use."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distrib.errors import UserError

Shape = tuple[int, int, int]  # channels, height, width

RIDGE = 5e-4  # added to variances, so that directions in which patches hardly vary are not amplified


def unit(channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(convolution(channels, width), nn.BatchNorm2d(width), nn.ReLU(inplace=True))


def convolution(channels: int, width: int) -> nn.Conv2d:
    return nn.Conv2d(channels, width, 3, padding=1, bias=False)


class Whitening(nn.Module):
    """A first layer that is computed from the images and not trained: its outputs are uncorrelated, with variance 1.

    Each filter is there twice, with both signs, so that the ReLU loses nothing (Page, "How to train your ResNet", 2018; Jordan,
    "94% on CIFAR-10 in 3.29 seconds on a single GPU", 2024). Jordan also trains biases here; that took 6 % longer for no gain.
    """

    def __init__(self, shape: Shape, side: int) -> None:
        super().__init__()
        channels, height, width = shape
        self.shape: Shape = (2 * channels * side**2, height - side + 1, width - side + 1)
        self.convolution = nn.Conv2d(channels, self.shape[0], side, bias=False)
        self.convolution.weight.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        return F.relu(self.convolution(images))

    @torch.no_grad()
    def fit(self, images: Tensor) -> None:
        """Compute the filters from normalised training images, (n, channels, height, width)."""
        weight = self.convolution.weight
        patches = F.unfold(images.float(), weight.shape[2]).transpose(1, 2).flatten(0, 1)
        variances, directions = torch.linalg.eigh(patches.T.double() @ patches.double() / len(patches))
        largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
        filters = (directions * largest.sign() / (variances + RIDGE).sqrt()).T.reshape(-1, *weight.shape[1:])
        weight.copy_(torch.cat([filters, -filters]))


def fit_whitening(model: nn.Module, sample: Callable[[], Tensor]) -> None:
    """Fit the `Whitening` of `model`, if it has one, to the images that `sample` returns."""
    for each in model.modules():
        if isinstance(each, Whitening):
            each.fit(sample())


def with_group_norm(model: nn.Module) -> nn.Module:
    """Replace each BatchNorm2d by a GroupNorm (Wu and He, 2018), with groups of 16 channels or the nearest that divides.

    Raises UserError if a network has another batch norm, or none.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            channels = module.num_features
            groups = next(n for n in range(max(1, channels // 16), 0, -1) if channels % n == 0)
            norm = ActivatedGroupNorm(groups, module) if hasattr(module, "act") else nn.GroupNorm(groups, channels)
            norm.weight, norm.bias = module.weight, module.bias
            model.set_submodule(name, norm)
    left = {type(each).__name__ for each in model.modules() if isinstance(each, nn.modules.batchnorm._BatchNorm)}
    if left or not any(isinstance(each, nn.GroupNorm) for each in model.modules()):
        found = ", ".join(sorted(left)) or "no norm of this kind"
        raise UserError(f"model.norm=group replaces BatchNorm2d, but this network has {found}: omit it")
    return model


class ActivatedGroupNorm(nn.GroupNorm):
    """A GroupNorm in place of timm's BatchNormAct2d: the same dropout and activation follow."""

    def __init__(self, groups: int, batch_norm: Any) -> None:
        super().__init__(groups, batch_norm.num_features)
        self.drop, self.act = batch_norm.drop, batch_norm.act

    def forward(self, input: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(input)))  # type: ignore[no-any-return]


def with_fast_depthwise(model: nn.Module) -> nn.Module:
    """Train depthwise convolutions of large kernels or strides in float32 where a CPU trains in bf16.

    There their gradients take 2 to 17 times as long in bf16, for which oneDNN has no fast kernels.
    """
    convolutions = (each for each in model.modules() if isinstance(each, nn.Conv2d))
    for each in convolutions:
        kind: Any = type(each)
        depthwise = each.groups == each.in_channels > 1
        if depthwise and (max(each.stride) > 1 or max(each.kernel_size) > 3):
            each.__class__ = trained_in_float32(kind)
    return model


@cache
def trained_in_float32(kind: Any) -> Any:
    class TrainedInFloat32(kind):  # type: ignore[misc]
        def forward(self, images: Tensor) -> Any:
            mixed = images.device.type == "cpu" and torch.is_autocast_enabled("cpu") and torch.is_grad_enabled()
            if not mixed:
                return super().forward(images)
            with torch.autocast("cpu", enabled=False):
                return super().forward(images.float()).to(torch.get_autocast_dtype("cpu"))

    return TrainedInFloat32


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Put a network into evaluation mode; afterwards, each part is in the mode that it was in."""
    modes = [(each, each.training) for each in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for each, training in modes:
            each.training = training
