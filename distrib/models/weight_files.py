"""Files of weights as other programs write them. Nothing in them is executed."""

import json
import pickle
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from distrib.errors import UserError

# The keys under which programs keep the weights beside other things. An average of the weights is preferred.
AVERAGES = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
KEYS = ("state_dict", "model_state_dict", "model_state", "model", "network", "net", "module", "weights", "params")
SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".tar", ".bin", ".th", ".pkl")


class Ignored:
    """Stands for an object of a class that is not loaded, such as the arguments of a program."""

    def __init__(self, *args: object, **options: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def read_tensors(path: Path) -> tuple[dict[str, Tensor], str]:
    """The tensors in a file, by name, and the keys under which they were found. Raises UserError."""
    try:
        found = load_file(path) if is_safetensors(path) else load_pickle(path)
    except UserError:
        raise
    except Exception as error:  # damaged files raise errors of many kinds
        raise unreadable(f"model.weights={path}", error) from None
    candidates = [*state_dicts(found)]
    if not candidates:
        raise UserError(f"model.weights={path} has {contents(found)}, and no state_dict: save network.state_dict()")
    where, tensors = max(candidates, key=lambda each: (each[0].rpartition(".")[2] in AVERAGES, len(each[1])))
    return tensors, where


def is_safetensors(path: Path) -> bool:
    """Whether a file has the format of safetensors, whatever its name is. Raises OSError."""
    with path.open("rb") as file:
        start = file.read(9)
    return path.suffix == ".safetensors" or (len(start) == 9 and start[8:] == b"{" and not start.startswith(b"PK"))


def description_in(path: Path) -> dict[str, Any]:
    """What `distrib export` wrote into a .safetensors file beside the tensors; empty in other files. Raises UserError."""
    try:
        if not is_safetensors(path):
            return {}
        with safe_open(path, framework="pt") as file:
            found: dict[str, Any] = json.loads((file.metadata() or {}).get("distrib", "{}"))
    except Exception as error:  # damaged files raise errors of many kinds
        raise unreadable(str(path), error) from None
    return found


def unreadable(file: str, error: Exception) -> UserError:
    """That a file of weights cannot be read, and why; without torch's words, which tell how to load it unsafely."""
    words = f"it is damaged, or no file of weights ({type(error).__name__})"
    if isinstance(error, FileNotFoundError | PermissionError):
        words = str(error.strerror)
    return UserError(f"{file} cannot be read: {words}")


def load_pickle(path: Path) -> Any:
    """The content of a file that torch.save wrote. Objects that are no tensors or plain values are ignored, not made."""
    unknown = list[str]()
    with suppress(Exception):  # the old format, before torch 1.6, does not tell
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    ignored: list[Any] = [(Ignored, name) for name in unknown]
    try:
        with torch.serialization.safe_globals(ignored):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if not unknown:
            raise
        words = f"it has objects that are never loaded ({', '.join(unknown[:3])}): save network.state_dict() alone"
        raise UserError(f"model.weights={path} cannot be read: {words}") from error


def state_dicts(found: Any, where: str = "") -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The dicts of tensors in what a file contains, and their keys, with dots."""
    if not isinstance(found, Mapping):
        return
    tensors = {str(name): each for name, each in found.items() if isinstance(each, Tensor)}
    if any("." in name for name in tensors) or (tensors and len(tensors) == len(found)):
        yield where, tensors
        return
    for key in (*AVERAGES, *KEYS):
        if key in found:
            yield from state_dicts(found[key], f"{where}.{key}".lstrip("."))


def contents(found: Any) -> str:
    """What a file has instead of weights, in words."""
    if isinstance(found, Ignored):
        return "a whole network"
    if isinstance(found, Mapping):
        return f"a dict with {', '.join(map(str, [*found][:5])) or 'nothing'}"
    return f"a {type(found).__name__}"


def without_prefix(tensors: dict[str, Tensor], names: set[str], weights: str) -> tuple[dict[str, Tensor], str]:
    """The tensors without the prefix, such as `module.`, under which most of them have one of `names`; and the prefix.

    If there are several, that of an average. Raises UserError, for these `weights`, if it is not clear which one is meant.
    """
    prefixes = Counter(name[: -len(tail)] for name in tensors for tail in tails(name) if tail in names)
    most = max(prefixes.values(), default=0)
    # Fewer than half are chance: another network also has some of the names.
    best = sorted(prefix for prefix, count in prefixes.items() if count == most and 2 * count >= len(names)) or [""]
    averages = [prefix for prefix in best if "ema" in re.split(r"[._]", prefix.lower())]
    if len(best) > 1 and len(averages) != 1:
        words = " or ".join(repr(prefix) for prefix in best[:4])
        raise UserError(f"model.weights={weights} have several networks, {words}: save the tensors of one of them")
    [prefix, *_] = averages if len(best) > 1 else best
    return {name.removeprefix(prefix): each for name, each in tensors.items() if name.startswith(prefix)}, prefix


def tails(name: str) -> Iterator[str]:
    """`a.b.c`, `b.c` and `c` of the name `a.b.c`."""
    while name:
        yield name
        name = name.partition(".")[2]
