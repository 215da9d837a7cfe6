"""Weights to start from: a run, a file or torchvision. The network may differ in its first and last layer."""

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision import models

from distrib.config import ModelConfig
from distrib.errors import UserError, one_line
from distrib.runtime.checkpoint import EMA, MODEL, best_checkpoint, refuse_damaged

DENSE_LAYER = r"(denselayer\d+\.(?:norm|conv))\.(\d)"  # the published densenets have an older form of these names


def load_pretrained(model: nn.Module, config: ModelConfig) -> None:
    """Load `config.weights` into `model`, except a first layer with other channels and a last layer with other classes.

    Raises UserError if they cannot be read or do not fit.
    """
    own = model.state_dict()
    # Weights of torch 0.4 lack num_batches_tracked; those of a network with group norm lack all statistics.
    optional = ("num_batches_tracked", *(("running_mean", "running_var") if config.norm == "group" else ()))
    weights = {name: each for name, each in own.items() if name.endswith(optional)} | read_weights(config)
    layers = [name for name, each in model.named_modules() if isinstance(each, (nn.Conv2d, nn.Linear))]
    ends = [f"{layer}.{part}" for layer in (*layers[:1], *layers[-1:]) for part in ("weight", "bias")]
    unfit = [name for name in own if name not in weights or weights[name].shape != own[name].shape]
    wrong = [name for name in unfit if name not in ends]
    if wrong:
        raise UserError(f"model.weights={config.weights} do not fit {config.name}: {len(wrong)} tensors, such as {wrong[0]}")
    model.load_state_dict({name: weights[name] for name in own if name not in unfit}, strict=False)


def read_weights(config: ModelConfig) -> dict[str, Tensor]:
    """Read the tensors of `config.weights`. Raises UserError if that fails."""
    path = Path(config.weights)
    if path.is_dir():  # a run folder or checkpoint: the moving average, if there is one
        folder, _ = best_checkpoint(path)
        refuse_damaged(folder)
        path = folder / (EMA if (folder / EMA).exists() else MODEL)
    try:
        if path.suffix == ".safetensors":
            found: Any = load_file(path)
        elif path.suffix in (".pth", ".pt"):
            found = torch.load(path, map_location="cpu", weights_only=True)
        else:
            found = published(config).get_state_dict(progress=False, check_hash=True)
            found = {re.sub(DENSE_LAYER, r"\1\2", name): each for name, each in found.items()}
    except UserError:
        raise
    except Exception as error:  # damaged files and failed downloads raise errors of many kinds
        raise UserError(f"model.weights={config.weights} cannot be read: {one_line(error)}") from None
    if not isinstance(found, dict):
        raise UserError(f"model.weights={config.weights} has a {type(found).__name__}, not a state_dict")
    tensors = {name: each for name, each in found.items() if isinstance(each, Tensor)}
    if any(name.startswith("whitening.") for name in tensors):  # the network behind a Whitening, which is not loaded
        tensors = {name.removeprefix("network."): each for name, each in tensors.items() if name.startswith("network.")}
    return tensors


def from_published(weights: str) -> bool:
    """Whether weights are torchvision's, or those of a run that started with them."""
    if weights and Path(weights).is_dir():
        return from_published(best_checkpoint(Path(weights))[1]["config"]["model"].get("weights", ""))
    return bool(weights) and not Path(weights).suffix


def published(config: ModelConfig) -> Any:
    """torchvision's weights named `config.weights` for a network. Raises UserError."""
    named = models.get_model_weights(config.name).__members__
    if config.weights not in named:
        raise UserError(f"{config.name} has no weights {config.weights!r}: use a file, or {', '.join(named)}")
    return named[config.weights]
