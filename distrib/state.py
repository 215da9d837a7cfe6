"""All that changes while a run goes on; how it becomes a checkpoint, and how a checkpoint becomes it again."""

import json
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer

from distrib import ranks
from distrib.checkpoint import NUMBERS, TENSORS, Damaged, Snapshot, newest, sha256
from distrib.config import Config, UserError, digest
from distrib.replay import Replay

# A checkpoint's numbers, with their types in JSON.
NUMBER_TYPES = {"step": int, "top1": float, "evaluated_step": int, "best_top1": float, "best_step": int, "skipped_steps": int}
NUMBER_TYPES |= {"nonfinite_in_a_row": int, "kept_seconds": float}
TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}


class Told(NamedTuple):
    """What a step has to tell: it stays on the device until somebody waits for that anyway."""

    scalars: list[Tensor]  # 1.0 if its gradient was not finite, else 0.0; then each part's mean loss and hits
    images: list[int]  # of each part


@dataclass
class TrainState:
    """All that changes while a run goes on."""

    model: nn.Module  # what a step calls: the network, inside DDP if there are several ranks
    network: nn.Module
    optimizer: Optimizer
    average: nn.Module | None
    sums: Tensor  # over this rank's training images since the last report
    step: int = 0
    top1: float = 0.0  # percent, of the last evaluation: the average's, if there is one
    evaluated_step: int = 0
    best_top1: float = 0.0
    best_step: int = 0
    skipped_steps: int = 0  # since gradients overflowed in fp16, or were not finite
    nonfinite_in_a_row: int = 0
    kept_seconds: float = 0.0  # of steps and evaluations that led here
    micro_batches: int = 1  # parts that a share is cut into
    told: list[Told] = field(default_factory=list)  # by the steps since they were last looked at
    replay: Replay = field(default_factory=Replay)  # of a step's work, on one GPU

    @property
    def scaler(self) -> Any:
        """fp16's, which is on the optimizer that accelerate prepared; None otherwise."""
        return getattr(self.optimizer, "scaler", None)

    @cached_property
    def weights(self) -> list[nn.Parameter]:
        """The parameters, listed once: to find them in a network takes as long as a small network's step."""
        return list(self.network.parameters())

    @cached_property
    def averaged(self) -> tuple[list[Tensor], list[Tensor]]:
        """Each tensor of the moving average, and what it is the average of."""
        assert self.average is not None
        pairs = zip(self.average.state_dict().values(), self.network.state_dict().values(), strict=True)
        means, values = zip(*((mean, value) for mean, value in pairs if mean.is_floating_point()), strict=True)
        return list(means), list(values)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the run, under a name of its own."""
        named = {f"model.{name}": each for name, each in self.network.state_dict().items()}
        if self.average is not None:
            named |= {f"average.{name}": each for name, each in self.average.state_dict().items()}
        for index, values in self.optimizer.state_dict()["state"].items():
            named |= {f"optimizer.{index}.{name}": each for name, each in values.items() if each is not None}
        return named | {"sums": self.sums}

    def numbers(self) -> dict[str, Any]:
        """All that is no tensor."""
        return {name: getattr(self, name) for name in NUMBER_TYPES} | {
            "scaler": self.scaler.state_dict() if self.scaler else {}
        }


def progress(numbers: dict[str, Any]) -> dict[str, Any]:
    """What status.json says of a state's numbers."""
    return {name: numbers[name] for name in ("step", "top1", "kept_seconds")}


def about(config: Config, world: int) -> dict[str, Any]:
    """What a checkpoint's manifest says of the run."""
    versions = {name: version(name) for name in ("torch", "torchvision", "accelerate")}
    return {"config": digest(config), "world": world, "versions": versions}


def snapshot(state: TrainState, earlier: Snapshot | None) -> Snapshot:
    """Copy `state`, into the memory of an `earlier` snapshot if there is one. Training waits for this, and for no more.

    The copies lie in memory as the originals do: to bring channels last into another order would take three times as long.
    Those of a GPU's tensors are pinned: only so does a copy run at the speed of the bus.
    """
    room = earlier.tensors if earlier else {}
    copies = {}
    for name, each in state.tensors().items():
        copies[name] = room[name] if name in room else torch.empty_like(each, device="cpu", pin_memory=each.is_cuda)
        copies[name].copy_(each, non_blocking=True)
    if state.sums.is_cuda:
        torch.cuda.synchronize()
    return Snapshot(state.step, copies, state.numbers())


def restore(state: TrainState, config: Config) -> list[str]:
    """Put the newest good checkpoint into `state`, if there is one; returns lines for the user. Every rank must call this.

    Rank 0 chooses. Raises UserError if another rank sees something else, or if the checkpoint is of another config.
    """

    def check(folder: Path, manifest: dict[str, Any]) -> None:
        if manifest.get("config") != digest(config):
            raise UserError(f"{folder} was saved with another config: give another run_dir")
        check_tensors(folder / TENSORS, state)
        check_numbers(folder / NUMBERS, manifest["step"])

    def choose(leads: bool) -> tuple[Path | None, list[str]]:
        return newest(Path(config.run_dir), check) if leads else (None, [])

    folder, told = ranks.agreed(ranks.first(choose))
    if folder is None:
        return told
    seen = sha256(folder / TENSORS) if folder.is_dir() else ""
    if ranks.agreed(seen) != seen:
        raise UserError(f"{folder} is not the same for all ranks: is run_dir shared by all machines?")
    _put(load_file(folder / TENSORS), state)
    for name, value in json.loads((folder / NUMBERS).read_bytes()).items():
        if name != "scaler":
            setattr(state, name, value)
        elif value:
            state.scaler.load_state_dict(value)
    return told


def check_tensors(path: Path, state: TrainState) -> None:
    """Raise Damaged unless the tensors in a file have the names, shapes and types of those in `state`."""
    expected = {name: each for name, each in state.tensors().items() if not name.startswith("optimizer.")}
    weights = _weights(state.optimizer)
    try:
        with safe_open(path, framework="pt") as file:  # reads no more than the header
            for name in list(file.keys()):
                entry = file.get_slice(name)
                shape, kind = torch.Size(entry.get_shape()), TYPES[entry.get_dtype()]
                if name.startswith("optimizer."):
                    like = weights[int(name.split(".")[1])]
                    fits = kind == like.dtype and shape in (like.shape, torch.Size([]))
                else:
                    like = expected.pop(name)
                    fits = (shape, kind) == (like.shape, like.dtype)
                if not fits:
                    raise Damaged(f"{name} is {kind} {list(shape)}, not {like.dtype} {list(like.shape)}")
    except (SafetensorError, LookupError, ValueError) as error:
        raise Damaged(f"{path.name}: {error}") from None
    if expected:
        raise Damaged(f"{path.name} lacks {next(iter(expected))}")


def check_numbers(path: Path, step: int) -> None:
    """Raise Damaged unless a file has all numbers, of the right types, and is of `step`."""
    numbers = json.loads(path.read_bytes())
    if not isinstance(numbers, dict) or numbers.keys() != {*NUMBER_TYPES, "scaler"} or not isinstance(numbers["scaler"], dict):
        raise Damaged(f"{path.name} has not the numbers of a run")
    odd = [name for name, kind in NUMBER_TYPES.items() if type(numbers[name]) is not kind]
    if odd or numbers["step"] != step:
        raise Damaged(f"{path.name}: {odd[0] if odd else 'step'} cannot be {numbers[odd[0] if odd else 'step']!r}")


def _put(found: dict[str, Tensor], state: TrainState) -> None:
    def part(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): each for name, each in found.items() if name.startswith(prefix)}

    state.network.load_state_dict(part("model."))
    if state.average is not None:
        state.average.load_state_dict(part("average."))
    weights = _weights(state.optimizer)
    values: dict[int, dict[str, Tensor]] = {}
    for name, tensor in part("optimizer.").items():
        index, _, what = name.partition(".")
        like = weights[int(index)]
        # Fused optimizers go through a weight and its momentum side by side: they must lie in memory alike.
        values.setdefault(int(index), {})[what] = torch.empty_like(like).copy_(tensor) if tensor.dim() else tensor
    state.optimizer.load_state_dict({"state": values, "param_groups": state.optimizer.state_dict()["param_groups"]})
    state.sums.copy_(found["sums"] * ranks.is_first())  # the others' sums were moved to rank 0 before they were saved


def _weights(optimizer: Optimizer) -> list[Tensor]:
    """The weights in the order in which an optimizer numbers them."""
    return [weight for group in optimizer.param_groups for weight in group["params"]]
