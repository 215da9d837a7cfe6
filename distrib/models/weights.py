"""Weights to start from: a run, a file or torchvision. The network may differ in its first and last layer."""

import re
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torchvision import models

from distrib.config import ModelConfig
from distrib.errors import UserError, one_line
from distrib.models.weight_files import SUFFIXES, read_tensors, without_prefix
from distrib.runtime.checkpoint import best_checkpoint, refuse_damaged, weights_of

STEM = ": model.stem=small or large chooses it"  # of a ResNet
DENSE_LAYER = r"(denselayer\d+\.(?:norm|conv))\.(\d)"  # the published densenets have an older form of these names


def load_pretrained(model: nn.Module, config: ModelConfig) -> str:
    """Load `config.weights` into `model`, except a last layer with other classes; returns a line on what was loaded.

    The filters of a first layer are summed over their channels if `model` has one channel, and left out for other channels.
    Raises UserError if the weights cannot be read or do not fit.
    """
    own = model.state_dict()
    found, where = read_weights(config)
    found, prefix = without_prefix(found, {*own})
    # Weights of torch 0.4 lack num_batches_tracked; those of a network with group norm lack all statistics.
    optional = ("num_batches_tracked", *(("running_mean", "running_var") if config.norm == "group" else ()))
    weights = {name: each for name, each in own.items() if name.endswith(optional)} | found
    layers = [name for name, each in model.named_modules() if isinstance(each, (nn.Conv2d, nn.Linear))]
    first, last = ([f"{layer}.{part}" for part in ("weight", "bias")] for layer in (layers[0], layers[-1]))
    summed = [name for name in first[:1] if name in own and is_summed(weights.get(name), own[name])]
    weights |= {name: weights[name].sum(1, keepdim=True) for name in summed}
    unfit = [name for name in own if name not in weights or weights[name].shape != own[name].shape]
    other_channels = {
        name for name in first if name in own and name in weights and weights[name].shape[2:] == own[name].shape[2:]
    }
    wrong = [name for name in unfit if name not in last and name not in other_channels]
    if wrong:
        name = wrong[0]
        how = f"is {list(weights[name].shape)} there, {list(own[name].shape)} here" if name in weights else "is not there"
        way_out = STEM if name == first[0] and name in weights else ""
        count = f"{len(wrong)} of {len(own)} tensors"
        raise UserError(
            f"model.weights={config.weights} do not fit {config.name}: {count}, such as {name}, which {how}{way_out}"
        )
    model.load_state_dict({name: weights[name] for name in own if name not in unfit}, strict=False)
    return in_words(config.weights, where, prefix, (len(own) - len(unfit), len(own)), unfit, summed)


def is_summed(there: Tensor | None, own: Tensor) -> bool:
    """Whether filters for several channels become filters for one."""
    return there is not None and there.dim() == 4 and own.shape[1] == 1 < there.shape[1] and there.shape[2:] == own.shape[2:]


def in_words(weights: str, where: str, prefix: str, counts: tuple[int, int], new: list[str], summed: list[str]) -> str:
    found = f"weights: {counts[0]} of {counts[1]} tensors from {weights}"
    details = [f"its key {where}"] * bool(where) + [f"without the prefix {prefix}"] * bool(prefix)
    found += f" ({', '.join(details)})" if details else ""
    found += f"; not loaded, so new: {', '.join(new)}" if new else ""
    return found + (f"; summed over its channels: {summed[0]}" if summed else "")


def read_weights(config: ModelConfig) -> tuple[dict[str, Tensor], str]:
    """The tensors of `config.weights`, and their key in the file. Raises UserError."""
    path, where = Path(config.weights), ""
    if path.is_dir():  # a run folder or checkpoint: the moving average, if there is one
        folder, manifest = best_checkpoint(path)
        refuse_damaged(folder)
        path = weights_of(folder, manifest)
    if path.suffix in SUFFIXES or path.is_file():
        tensors, where = read_tensors(path)
    else:
        try:
            tensors = published(config).get_state_dict(progress=False, check_hash=True)
        except UserError:
            raise
        except Exception as error:  # failed downloads raise errors of many kinds
            raise UserError(f"model.weights={config.weights} cannot be read: {one_line(error)}") from None
        tensors = {re.sub(DENSE_LAYER, r"\1\2", name): each for name, each in tensors.items()}
    if any(name.startswith("whitening.") for name in tensors):  # the network behind a Whitening, which is not loaded
        tensors = {name.removeprefix("network."): each for name, each in tensors.items() if name.startswith("network.")}
    return tensors, where


def from_published(weights: str) -> bool:
    """Whether weights are torchvision's, or those of a run that started with them."""
    if weights and Path(weights).is_dir():
        return from_published(best_checkpoint(Path(weights))[1]["config"]["model"].get("weights", ""))
    return bool(weights) and not Path(weights).suffix and not Path(weights).is_file()


def published(config: ModelConfig) -> Any:
    """torchvision's weights named `config.weights` for a network. Raises UserError."""
    named = models.get_model_weights(config.name).__members__
    if config.weights not in named:
        raise UserError(f"{config.name} has no weights {config.weights!r}: use a file, or {', '.join(named)}")
    return named[config.weights]
