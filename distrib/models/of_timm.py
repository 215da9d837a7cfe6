"""timm's networks, their published weights, and how the images of these weights were shown. timm is an optional dependency."""

from difflib import get_close_matches
from typing import Any

from torch import Tensor, nn

from distrib.config import ModelConfig
from distrib.errors import UserError
from distrib.models import TIMM, refuse_unknown_network
from distrib.models.layers import Shape

FITS = {"center": "crop", "squash": "stretch", "border": "pad"}  # timm's crop_mode as data.fit


def published(name: str) -> Any:
    """timm's description of the weights of a network, timm:NAME or timm:NAME.TAG. Raises UserError."""
    refuse_unknown_network(name)
    import timm

    known = name.removeprefix(TIMM)
    try:
        found = timm.get_pretrained_cfg(known)
    except RuntimeError as error:  # an unknown tag
        raise UserError(f"model.name={name}: {error} timm.list_pretrained() lists the names with their tags") from None
    if found is None:
        near = get_close_matches(known.partition(".")[0], timm.list_models(), n=5)
        way_out = f"did you mean {', '.join(near)}?" if near else "timm.list_models() lists them"
        raise UserError(f"timm has no network {known!r}: {way_out}")
    return found


def build(config: ModelConfig, shape: Shape, classes: int) -> nn.Module:
    """A network for images of this shape. Raises UserError if there is no network of this name."""
    sized: dict[str, Any] = {"img_size": shape[1:]} if published(config.name).fixed_input_size else {}
    import timm

    name = config.name.removeprefix(TIMM)
    network: nn.Module = timm.create_model(name, num_classes=classes, in_chans=shape[0], **sized)
    return network


def tensors(name: str, weights: str) -> dict[str, Tensor]:
    """The published weights, downloaded if they are missing. Raises UserError, and errors of many kinds if a download fails."""
    published(name)
    if weights != "DEFAULT":
        raise UserError(f"{name} has no weights {weights!r}: use a file, or DEFAULT; the tag of timm:NAME.TAG chooses others")
    import timm

    found: dict[str, Tensor] = timm.create_model(name.removeprefix(TIMM), pretrained=True).state_dict()
    return found


def shown(name: str, weights: str) -> dict[str, Any]:
    """How the images were shown with which the network's weights were evaluated, as keys of data. Raises UserError."""
    found = published(name)
    height, width = found.input_size[1:]
    fit = FITS[found.crop_mode]
    return {
        "data.size": height if height == width else f"{height}x{width}",
        "data.fit": fit,
        **({"data.center_crop": min(1.0, found.crop_pct)} if fit == "crop" else {}),
        "data.filter": found.interpolation,
        "data.mean": found.mean,
        "data.std": found.std,
    }


def depths(network: nn.Module) -> dict[str, int]:
    """The layer of each parameter, by its name, as the network says; the first layer is 0."""
    from timm.models import group_parameters

    matcher: Any = network.group_matcher
    found: dict[str, int] = group_parameters(network, matcher(coarse=False), reverse=True)
    return found
