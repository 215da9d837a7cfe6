"""Builds the network for a data set: by name, or the caller's, with fitting channels and classes."""

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torchvision import models

from distrib.config import ModelConfig
from distrib.errors import UserError, one_line
from distrib.models import NETWORKS, package_of
from distrib.models.layers import Shape, Whitening, evaluating, with_fast_depthwise, with_group_norm
from distrib.models.weights import load_pretrained
from distrib.registry import lookup

NetworkOrBuilder = nn.Module | Callable[[], nn.Module]  # a network, or a function that builds it after the seed is set


def build_model(
    config: ModelConfig,
    shape: Shape,
    classes: int,
    own: NetworkOrBuilder | None = None,
    *,
    names: Sequence[str] = (),
    load: bool = True,
    tell: Callable[[str], None] = lambda line: None,
) -> nn.Module:
    """A network from images (n, *shape) to logits (n, classes). Raises UserError if name, size or weights do not fit.

    The initial weights come from torch's global generator: seed it first. If the config has `whiten`, call `fit_whitening`
    afterwards. Without `load`, `config.weights` are not loaded; `tell` gets a line on what was loaded. `names` are those of the
    classes: the last layer of a run on others is not loaded.
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
        model = of_a_package(config, inner, classes)
    if config.stem != "auto" and not isinstance(model, models.ResNet):
        raise UserError(f"model.stem={config.stem} would be ignored: it applies to ResNets only; omit it")
    if config.norm == "group":
        model = with_group_norm(model)
    if config.weights and load:
        tell(load_pretrained(model, config, names))
    if whitening:
        model = nn.Sequential(OrderedDict(whitening=whitening, network=model))
    try_out(model, config.name, shape, classes)
    return model.to(memory_format=torch.channels_last)


def of_a_package(config: ModelConfig, shape: Shape, classes: int) -> nn.Module:
    """A network of torchvision or timm. Raises UserError."""
    try:
        network: nn.Module = package_of(config.name).build(config, shape, classes)
    except UserError:
        raise
    except (AssertionError, ValueError) as error:  # such as a size that does not divide into patches
        raise unfit(config.name, shape, error) from None
    return with_fast_depthwise(network)


def unfit(name: str, shape: Shape, error: Exception) -> UserError:
    return UserError(f"model {name} does not accept images of {'x'.join(map(str, shape))}: {one_line(error)}")


def try_out(model: nn.Module, name: str, shape: Shape, classes: int) -> None:
    """Raise UserError if a network does not compute logits from an image."""
    device = next((each.device for each in model.parameters()), None)
    try:
        with torch.no_grad(), evaluating(model):
            out = model(torch.zeros(1, *shape, device=device))
    except (RuntimeError, AssertionError, ValueError, LookupError, TypeError) as error:
        raise unfit(name, shape, error) from None
    found = list(out.shape) if isinstance(out, torch.Tensor) else f"a {type(out).__name__}"
    if found != [1, classes]:
        raise UserError(f"model {name} returns {found} for one image, not the logits of {classes} classes: [1, {classes}]")
