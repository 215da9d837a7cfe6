"""Networks by name: ours, then torchvision's, brought to the channels, classes and size of the data."""

from collections import OrderedDict
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import models

from distrib.config import ModelConfig, UserError
from distrib.pretrained import load_pretrained

SMALL = 64  # pixels: below this a network made for ImageNet loses its picture in the first layers

RIDGE = 5e-4  # keeps directions in which patches hardly vary from being blown up

Shape = tuple[int, int, int]  # channels, height, width


def build_model(config: ModelConfig, shape: Shape, classes: int) -> nn.Module:
    """A network from images (n, *shape) to logits (n, classes). Raises UserError if the name, size or weights do not fit.

    The initial weights are drawn from torch's global generator: seed it first. With `whiten`, fit the `Whitening` next.
    """
    whitening = Whitening(shape, config.whiten) if config.whiten else None
    inner = whitening.shape if whitening else shape
    if config.name in OWN:
        model: nn.Module = OWN[config.name](inner[0], classes, config.width, config.dropout)
    else:
        model = adapted(_of_torchvision(config.name, classes), inner)
    if config.weights:
        load_pretrained(model, config)
    if config.norm == "group":
        model = with_group_norm(model)
    if whitening:
        model = nn.Sequential(OrderedDict(whitening=whitening, network=model))
    _try_out(model, config.name, shape, classes)
    return model.to(memory_format=torch.channels_last)


class Whitening(nn.Module):
    """A first layer that is computed, not learned: its outputs over a patch of the images are uncorrelated, of variance 1.

    Each filter comes with its negative, so that nothing is lost in the ReLU (Page, "How to train your ResNet", 2018; Jordan,
    "94% on CIFAR-10 in 3.29 seconds on a single GPU", 2024, where biases are learned: that takes 6 % longer and gains nothing).
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
    """Fit the first layer of `model`, if it is a `Whitening`, to the images that `sample` gives."""
    for each in model.modules():
        if isinstance(each, Whitening):
            each.fit(sample())


class CNN(nn.Module):
    """A small residual network for images of 8 to 64 pixels: a stem, then three blocks that each halve the picture.

    Only the stem is at full size, and it is narrow, which keeps 28x28 pixels at 30 million multiplications.
    """

    def __init__(self, channels: int, classes: int, width: int = 64, dropout: float = 0.0) -> None:
        super().__init__()
        stem = -(-width // 2)
        self.stem = unit(channels, stem)
        self.blocks = nn.Sequential(Block(stem, width), Block(width, 2 * width), Block(2 * width, 4 * width))
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(4 * width, classes)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.blocks(self.stem(images))
        logits: Tensor = self.head(self.dropout(features.mean(dim=(2, 3))))
        return logits


class Block(nn.Module):
    """Halves the picture, then adds to it; what it adds is nothing at first (Goyal et al., 2017, section 5.1)."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.halve = nn.Sequential(nn.MaxPool2d(2), unit(channels, width))
        self.convolution, self.norm = convolution(width, width), nn.BatchNorm2d(width)
        nn.init.zeros_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.halve(x)
        return F.relu(x + self.norm(self.convolution(x)))


def unit(channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(convolution(channels, width), nn.BatchNorm2d(width), nn.ReLU(inplace=True))


def convolution(channels: int, width: int) -> nn.Conv2d:
    return nn.Conv2d(channels, width, 3, padding=1, bias=False)


class Airbench(nn.Module):
    """A small network that learns in few steps, for images of 8 to 64 pixels: and a head that sees the largest values.

    After Jordan, "94% on CIFAR-10 in 3.29 seconds on a single GPU", 2024. But a block halves the picture before it widens it,
    not after, which takes half of the multiplications; unless it is given the image itself, without `Whitening`. And ReLU is in
    place of GELU, which takes a CPU a fifth longer.
    """

    def __init__(self, channels: int, classes: int, width: int = 64, dropout: float = 0.0) -> None:
        super().__init__()
        widths = [channels, width, 2 * width, 4 * width]
        self.blocks = nn.Sequential(*(identity_block(*pair, of_image=pair[0] <= 3) for pair in pairwise(widths)))
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(widths[-1], classes, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.blocks(images)
        largest = features.flatten(2).max(2).values  # amax's gradient, when compiled in bf16, is not finite (pytorch#195214)
        logits: Tensor = self.head(self.dropout(largest))
        return logits / 9  # so that the first ones are small


def identity_block(channels: int, width: int, *, of_image: bool) -> nn.Sequential:
    """Halves the picture and widens it, then convolves it again; of an image itself, it widens before it halves.

    At first, both convolutions hand on what they can.
    """
    layers: list[nn.Module] = []
    for each in (convolution(channels, width), convolution(width, width)):
        nn.init.dirac_(each.weight[: each.in_channels])
        norm = nn.BatchNorm2d(width, momentum=0.4)  # there are few steps to gather statistics in
        norm.weight.requires_grad_(False)
        layers += [each, norm, nn.ReLU(inplace=True)]
    layers.insert(1 if of_image else 0, nn.MaxPool2d(2))
    return nn.Sequential(*layers)


OWN: dict[str, Callable[..., nn.Module]] = {"cnn": CNN, "airbench": Airbench}


def _of_torchvision(name: str, classes: int) -> nn.Module:
    known = models.list_models(module=models)
    if name not in known:
        raise UserError(f"there is no model {name!r}: use {' or '.join(OWN)}, or one of torchvision's: {', '.join(known)}")
    # These two have extra outputs while they train, which no other network has.
    extra = {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}
    model: nn.Module = models.get_model(name, weights=None, num_classes=classes, **extra)
    return model


def adapted(model: nn.Module, shape: Shape) -> nn.Module:
    """A torchvision network for images of `shape`: its first convolution takes their channels, a ResNet's keeps their size."""
    channels, height, _ = shape
    name, first = next((name, each) for name, each in model.named_modules() if isinstance(each, nn.Conv2d))
    if isinstance(model, models.ResNet) and height <= SMALL:  # He et al., 2016, section 4.2: the stem for CIFAR
        model.conv1 = nn.Conv2d(channels, first.out_channels, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        model.maxpool = nn.Identity()
    elif channels != first.in_channels:
        model.set_submodule(name, _with_channels(first, channels))
    return model


def _with_channels(convolution: nn.Conv2d, channels: int) -> nn.Conv2d:
    names = ("out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    options: dict[str, Any] = {name: getattr(convolution, name) for name in names}
    return nn.Conv2d(channels, bias=convolution.bias is not None, **options)


def with_group_norm(model: nn.Module) -> nn.Module:
    """Every BatchNorm2d becomes a GroupNorm (Wu and He, 2018) of 16 channels a group, or as many as divide."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            channels = module.num_features
            groups = next(n for n in range(max(1, channels // 16), 0, -1) if channels % n == 0)
            norm = nn.GroupNorm(groups, channels)
            norm.load_state_dict({"weight": module.weight, "bias": module.bias})
            norm.weight.requires_grad_(module.weight.requires_grad)
            model.set_submodule(name, norm)
    return model


def _try_out(model: nn.Module, name: str, shape: Shape, classes: int) -> None:
    training = model.training
    try:
        with torch.no_grad():
            out = model.eval()(torch.zeros(1, *shape))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UserError(
            f"model {name} does not take images of {'x'.join(map(str, shape))}: {str(error).splitlines()[0]}"
        ) from None
    finally:
        model.train(training)
    assert out.shape == (1, classes), (out.shape, classes)
