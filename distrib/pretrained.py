"""Pretrained weights, from a file or from torchvision, for a network that may differ in its first and its last layer."""

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision import models

from distrib.config import ModelConfig, UserError, one_line

DENSE_LAYER = r"(denselayer\d+\.(?:norm|conv))\.(\d)"  # densenets were published when names still had these dots


def load_pretrained(model: nn.Module, config: ModelConfig) -> None:
    """Load `config.weights` into `model`: all but the first layer if the channels differ, and the last if the classes do.

    Raises UserError if they cannot be had, or do not fit.
    """
    own = model.state_dict()
    counters = {name: each for name, each in own.items() if name.endswith("num_batches_tracked")}  # torch 0.4 had none
    weights = counters | _read_weights(config)
    layers = [name for name, each in model.named_modules() if isinstance(each, (nn.Conv2d, nn.Linear))]
    ends = [f"{layers[end]}.{part}" for end in (0, -1) for part in ("weight", "bias")]
    unfit = [name for name in own if name not in weights or weights[name].shape != own[name].shape]
    wrong = [name for name in unfit if name not in ends]
    if wrong:
        raise UserError(f"model.weights {config.weights} do not fit {config.name}: {len(wrong)} tensors, such as {wrong[0]}")
    model.load_state_dict({name: weights[name] for name in own if name not in unfit}, strict=False)
    if hasattr(model, "transform_input") and not Path(config.weights).suffix:
        # The published weights of googlenet and inception_v3 are for images that were normalised otherwise.
        model.transform_input = own[f"{layers[0]}.weight"].shape[1] == 3


def _read_weights(config: ModelConfig) -> dict[str, Tensor]:
    path = Path(config.weights)
    try:
        if path.suffix == ".safetensors":
            found: Any = load_file(path)
        elif path.suffix in (".pth", ".pt"):
            found = torch.load(path, map_location="cpu", weights_only=True)
        else:
            found = _published(config).get_state_dict(progress=False, check_hash=True)
            found = {re.sub(DENSE_LAYER, r"\1\2", name): each for name, each in found.items()}
    except UserError:
        raise
    except Exception as error:  # a file can be damaged, and a download can fail, in as many ways as their libraries have
        raise UserError(f"model.weights {config.weights} cannot be read: {one_line(error)}") from None
    if not isinstance(found, dict):
        raise UserError(f"model.weights {config.weights} has a {type(found).__name__}, and not a network's state_dict()")
    return {name: each for name, each in found.items() if isinstance(each, Tensor)}


def _published(config: ModelConfig) -> Any:
    """The weights that torchvision has for a network under that name. Raises UserError."""
    named = models.get_model_weights(config.name).__members__
    if config.weights not in named:
        raise UserError(f"{config.name} has no weights {config.weights!r}: use a file, or {', '.join(named)}")
    return named[config.weights]
