"""Weights to start from: a run, a file, or published ones. The network may differ in its first and last layer."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import ResNet, VisionTransformer

from distrib.config import OWN, ModelConfig
from distrib.errors import UserError, one_line
from distrib.models import NETWORKS, TIMM, package_of
from distrib.models.weight_files import SUFFIXES, description_in, read_tensors, without_prefix
from distrib.runtime.checkpoint import best_checkpoint, refuse_damaged, weights_of

STEM = ": model.stem=small or large chooses it"
MISSING, NOT_FINITE = "is not there", "has values that are not finite"  # why a tensor cannot be loaded
PARTS = ("weight", "bias")
SHOWN_WITH = ("size", "fit", "center_crop", "filter")  # keys of data that say how an image file is shown to a network
BUILT_WITH = ("name", "norm", "width", "whiten", "stem")  # keys of model that decide which tensors there are
POSITIONS = ("pos_embed", "pos_embedding")  # timm's name, and torchvision's


def load_pretrained(model: nn.Module, config: ModelConfig, names: Sequence[str] = ()) -> str:
    """Load `config.weights` into `model`, except a last layer for other classes; returns a line on what was loaded.

    The weights of a run have another last layer if its classes had other `names`. The filters of a first layer are summed over
    their channels if `model` has one channel, and left out for other channels. Position embeddings for another image size are
    interpolated. Raises UserError if the weights cannot be read or do not fit.
    """
    own = model.state_dict()
    there, where, manifest = read_weights(config)
    found, prefix = without_prefix(there, {*own}, config.weights)
    counters = {name: each for name, each in own.items() if name.endswith("num_batches_tracked")}  # torch 0.4 had none
    first, last = first_and_last(model)
    weights, changed = adapted(model, first[:1], counters | found)
    other_classes = bool(names and manifest) and manifest["data"]["classes"] != [*names]
    why = {name: misfit(weights.get(name), each) for name, each in own.items()}
    unfit = [name for name in own if why[name] or (other_classes and name in last)]
    free = {*last, *(name for name in first if name in weights and weights[name].shape[2:] == own[name].shape[2:])}
    wrong = [name for name in unfit if name not in free or why[name] == NOT_FINITE]
    if wrong:
        name, count = wrong[0], f"{len(wrong)} of {len(own)} tensors"
        stem = isinstance(model, ResNet) and name == first[0] and why[name] not in (MISSING, NOT_FINITE)
        way_out = STEM if stem else other_keys(config, manifest)
        raise UserError(
            f"model.weights={config.weights} do not fit {config.name}: {count}, such as {name}, which {why[name]}{way_out}"
        )
    # A last layer of zeros: the features are good, and random logits would spoil them first (Kolesnikov et al., "BiT", 2020).
    zeros = [name for name in unfit if name in last]
    weights |= {name: torch.zeros_like(own[name]) for name in zeros}
    model.load_state_dict({name: weights[name] for name in own if name not in unfit or name in zeros}, strict=False)
    details = [f"its key {where}"] * bool(where) + [f"without the prefix {prefix}"] * bool(prefix)
    details += ["trained on other classes"] * other_classes
    details += ["trained with batch norm"] * (config.norm == "group" and any(name.endswith("running_mean") for name in there))
    parts = {
        "not loaded, so 0": zeros,
        "not loaded, so random": [name for name in unfit if name not in zeros],
        **changed,
        "not used": [name for name in there if name.removeprefix(prefix) not in own or not name.startswith(prefix)],
    }
    return f"weights: {len(own) - len(unfit)} of {len(own)} tensors from {config.weights}" + in_words(details, parts)


def manifest_of(weights: str) -> dict[str, Any]:
    """The manifest of a run, a checkpoint or an exported file; empty for other weights. Raises UserError."""
    path = Path(weights)
    if path.is_dir():
        return best_checkpoint(path)[1]
    return description_in(path).get("manifest", {}) if path.is_file() else {}


def misfit(there: Tensor | None, own: Tensor) -> str:
    """Why a tensor cannot be loaded into `own`; empty if it can."""
    if there is None:
        return MISSING
    if there.shape != own.shape:
        return f"is {list(there.shape)} there, {list(own.shape)} here"
    return "" if there.isfinite().all() else NOT_FINITE


def other_keys(config: ModelConfig, manifest: dict[str, Any]) -> str:
    """The keys of the network for which a run has other values, in words."""
    now, there = vars(config), manifest["config"]["model"] if manifest else {}
    differ = [f"model.{name}={there[name]}" for name in now if name in BUILT_WITH and there.get(name, now[name]) != now[name]]
    return f": it was trained with {' '.join(differ)}" if differ else ""


def first_and_last(model: nn.Module) -> tuple[list[str], list[str]]:
    """The names of the tensors of the first layer, and of the last one, which depend on the channels and the classes."""
    layers = [name for name, each in model.named_modules() if isinstance(each, (nn.Conv2d, nn.Linear))]
    last = layers[-1:]
    timms: Any = getattr(model, "pretrained_cfg", None)
    if timms:  # a distilled network has two last layers
        said = timms["classifier"]
        last = [said] if isinstance(said, str) else [*(said or last)]
    own, both = model.state_dict(), (layers[:1], last)
    first, ends = ([f"{name}.{part}" for name in each for part in PARTS if f"{name}.{part}" in own] for each in both)
    return first, ends


def adapted(model: nn.Module, first: list[str], weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """`weights` for the channels and the image size of `model`, whose filters are `first`; and the names of those changed."""
    own = model.state_dict()
    names = [name for name in first if is_summed(weights.get(name), own[name])]
    summed = {name: weights[name].sum(1, keepdim=True) for name in names}
    resized = interpolated(model, weights)
    return weights | summed | resized, {"summed over its channels": names, "interpolated": [*resized]}


def is_summed(there: Tensor | None, own: Tensor) -> bool:
    """Whether filters for several channels become filters for one."""
    return there is not None and there.dim() == 4 and own.shape[1] == 1 < there.shape[1] and there.shape[2:] == own.shape[2:]


def interpolated(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The position embeddings of `weights` that are for another number of patches, interpolated for `model`.

    (1, tokens, features): first those of tokens that are no patch, then the patches, row by row, in a square.
    """
    if isinstance(model, VisionTransformer):
        grid = (model.image_size // model.patch_size,) * 2
    else:
        grid = getattr(getattr(model, "patch_embed", None), "grid_size", (0, 0))
    found = {}
    for name, own in model.state_dict().items():
        there, others = weights.get(name), own.shape[1] - grid[0] * grid[1] if own.dim() == 3 else 0
        side = math.isqrt(max(0, there.shape[1] - others)) if there is not None and there.dim() == 3 else 0
        if not any(grid) or name.rpartition(".")[2] not in POSITIONS or there is None or not side or there.shape == own.shape:
            continue
        if side**2 == there.shape[1] - others and there.shape[2] == own.shape[2]:
            patches = there[:, others:].float().transpose(1, 2).reshape(1, -1, side, side)
            patches = F.interpolate(patches, grid, mode="bicubic", antialias=True, align_corners=False)
            found[name] = torch.cat([there[:, :others].float(), patches.flatten(2).transpose(1, 2)], 1).to(there.dtype)
    return found


def in_words(details: list[str], parts: dict[str, list[str]]) -> str:
    """How weights were loaded, after the number of tensors."""
    found = f" ({', '.join(details)})" if details else ""
    for what, names in parts.items():
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        found += f"; {what}: {', '.join(names[:4])}{more}" if names else ""
    return found


def read_weights(config: ModelConfig) -> tuple[dict[str, Tensor], str, dict[str, Any]]:
    """The tensors of `config.weights`, their key in the file, and the manifest of the run they are of. Raises UserError."""
    path, where, manifest = Path(config.weights), "", dict[str, Any]()
    if path.is_dir():  # a run folder or checkpoint: the moving average, if there is one
        folder, manifest = best_checkpoint(path)
        refuse_damaged(folder)
        path = weights_of(folder, manifest)
    if is_file(path):
        tensors, where = read_tensors(path)
        manifest = manifest or manifest_of(str(path))
    elif config.name in NETWORKS or config.name.startswith(OWN) or "/" in config.weights:
        raise UserError(f"model.weights={path} cannot be read: there is no such file or folder")
    else:
        try:
            tensors = package_of(config.name).tensors(config.name, config.weights)
        except UserError:
            raise
        except Exception as error:  # failed downloads raise errors of many kinds
            raise UserError(f"model.weights={config.weights} cannot be read: {one_line(error)}") from None
    if any(name.startswith("whitening.") for name in tensors):  # the network behind a Whitening, which is not loaded
        tensors = {name.removeprefix("network."): each for name, each in tensors.items() if name.startswith("network.")}
    return tensors, where, manifest


def is_file(path: Path) -> bool:
    """Whether weights are a file, and not a name, even if it is missing."""
    return path.suffix in SUFFIXES or path.is_file()


def shown_with(config: ModelConfig) -> dict[str, Any]:
    """How images were shown to the network of `config.weights`, as keys of data; those that are not known are missing.

    Raises UserError if there are no such weights.
    """
    manifest = manifest_of(config.weights)
    if manifest:
        had = manifest["config"]["data"]
        keys = {f"data.{name}": had[name] for name in SHOWN_WITH if name in had}
        return keys | {f"data.{name}": manifest["image"][name] for name in ("mean", "std")}
    unnamed = is_file(Path(config.weights)) and not config.name.startswith(TIMM)
    if config.name in NETWORKS or config.name.startswith(OWN) or unnamed:
        return {}  # a file says nothing, unless timm knows what the weights of this name are
    shown: dict[str, Any] = package_of(config.name).shown(config.name, config.weights)
    return shown
