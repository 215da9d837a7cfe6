"""Builds the network for a data set: ours or torchvision's by name, or the caller's, with fitting channels and classes."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torchvision import models

from distrib.config import ModelConfig
from distrib.errors import UserError
from distrib.models import NETWORKS, refuse_unknown_network
from distrib.models.layers import Shape, Whitening, with_group_norm
from distrib.models.weights import from_published, load_pretrained
from distrib.registry import lookup

SMALL = 64  # pixels: up to this size, a ResNet gets the stem for small images

NetworkOrBuilder = nn.Module | Callable[[], nn.Module]  # a network, or a function that builds it after the seed is set


def build_model(
    config: ModelConfig,
    shape: Shape,
    classes: int,
    own: NetworkOrBuilder | None = None,
    *,
    load: bool = True,
    tell: Callable[[str], None] = lambda line: None,
) -> nn.Module:
    """A network from images (n, *shape) to logits (n, classes). Raises UserError if name, size or weights do not fit.

    The initial weights come from torch's global generator: seed it first. If the config has `whiten`, call `fit_whitening`
    afterwards. Without `load`, `config.weights` are not loaded; `tell` gets a line on what was loaded.
    """
    whitening = Whitening(shape, config.whiten) if config.whiten else None
    inner = whitening.shape if whitening else shape
    if own is not None:
        if whitening:
            raise UserError("model.whiten does not work with your own network: put such a layer into the network itself")
        model = own if isinstance(own, nn.Module) else own()
    elif config.name in NETWORKS:
        model = lookup(NETWORKS, config.name)(inner[0], classes, config.width, config.dropout)
    else:
        model = adapt(of_torchvision(config.name, classes), inner, config)
    if config.stem != "auto" and not isinstance(model, models.ResNet):
        raise UserError(f"model.stem={config.stem} would be ignored: it applies to ResNets only; omit it")
    if config.weights and load:
        tell(load_pretrained(model, config))
    if hasattr(model, "transform_input"):
        # The published weights of googlenet and inception_v3 expect another normalization, which this flag applies.
        model.transform_input = inner[0] == 3 and from_published(config.weights)  # type: ignore[assignment]
    if config.norm == "group":
        model = with_group_norm(model)
    if whitening:
        model = nn.Sequential(OrderedDict(whitening=whitening, network=model))
    try_out(model, config.name, shape, classes)
    return model.to(memory_format=torch.channels_last)


def of_torchvision(name: str, classes: int) -> nn.Module:
    refuse_unknown_network(name)
    # Only these two have auxiliary outputs in training.
    extra = {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}
    model: nn.Module = models.get_model(name, weights=None, num_classes=classes, **extra)
    return model


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


def try_out(model: nn.Module, name: str, shape: Shape, classes: int) -> None:
    """Raise UserError if a network does not compute logits from an image."""
    training, device = model.training, next((each.device for each in model.parameters()), None)
    try:
        with torch.no_grad():
            out = model.eval()(torch.zeros(1, *shape, device=device))
    except (RuntimeError, AssertionError, ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"model {name} does not accept images of {'x'.join(map(str, shape))}: {str(error).splitlines()[0]}"
        ) from None
    finally:
        model.train(training)
    found = list(out.shape) if isinstance(out, torch.Tensor) else f"a {type(out).__name__}"
    if found != [1, classes]:
        raise UserError(f"model {name} returns {found} for one image, not the logits of {classes} classes: [1, {classes}]")
