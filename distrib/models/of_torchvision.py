"""torchvision's networks, their published weights, and how the images of these weights were shown."""

import re
from typing import Any

from torch import Tensor, nn
from torchvision import models

from distrib.config import ModelConfig
from distrib.errors import UserError
from distrib.models import refuse_unknown_network
from distrib.models.layers import Shape

SMALL = 64  # pixels: up to this size, a ResNet gets the stem for small images
INCEPTIONS = ("googlenet", "inception_v3")
DENSE_LAYER = r"(denselayer\d+\.(?:norm|conv))\.(\d)"  # the published densenets have an older form of these names


def build(config: ModelConfig, shape: Shape, classes: int) -> nn.Module:
    """A network for images of this shape. Raises UserError if there is no network of this name."""
    name = config.name
    refuse_unknown_network(name)
    options: dict[str, Any] = {}
    if name in INCEPTIONS:  # only these two have auxiliary outputs in training
        options = {"aux_logits": False, "init_weights": True}
    if name.startswith("vit_"):
        options = {"image_size": shape[1]}
    return adapt(models.get_model(name, weights=None, num_classes=classes, **options), shape, config)


def adapt(model: nn.Module, shape: Shape, config: ModelConfig) -> nn.Module:
    """Fit torchvision's network to the images: the channels of its first convolution, and a ResNet's stem for small images.

    A network that starts from weights keeps the stem of these.
    """
    channels, height, _ = shape
    name, first = next((name, each) for name, each in model.named_modules() if isinstance(each, nn.Conv2d))
    small = config.stem == "small" or (config.stem == "auto" and height <= SMALL and not config.weights)
    if isinstance(model, models.ResNet) and small:  # He et al., 2016, section 4.2: the stem for CIFAR
        model.conv1 = nn.Conv2d(channels, first.out_channels, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        model.maxpool = nn.Identity()
    elif channels != first.in_channels:
        model.set_submodule(name, with_channels(first, channels))
    return model


def with_channels(convolution: nn.Conv2d, channels: int) -> nn.Conv2d:
    names = ("out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    options: dict[str, Any] = {name: getattr(convolution, name) for name in names}
    return nn.Conv2d(channels, bias=convolution.bias is not None, **options)


def published(name: str, weights: str) -> Any:
    """The weights of this name for a network. Raises UserError."""
    named = models.get_model_weights(name).__members__
    if weights not in named:
        raise UserError(f"{name} has no weights {weights!r}: use a file, or {', '.join(named)}")
    return named[weights]


def tensors(name: str, weights: str) -> dict[str, Tensor]:
    """Published weights, downloaded if they are missing. Raises UserError, and errors of many kinds if a download fails."""
    found = published(name, weights).get_state_dict(progress=False, check_hash=True)
    return {re.sub(DENSE_LAYER, r"\1\2", key): each for key, each in found.items()}


def shown(name: str, weights: str) -> dict[str, Any]:
    """How the images were shown with which these weights were evaluated, as keys of data. Raises UserError."""
    preset = published(name, weights).transforms()
    size = preset.crop_size[0]
    # Weights from TensorFlow: torchvision's networks normalise the images again, if their transform_input is set.
    half = (0.5, 0.5, 0.5) if name in INCEPTIONS else None
    return {
        "data.size": size,
        "data.fit": "crop",
        "data.center_crop": size / preset.resize_size[0],
        "data.filter": preset.interpolation.value,
        "data.mean": half or preset.mean,
        "data.std": half or preset.std,
    }
