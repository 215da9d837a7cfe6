"""The state of a run: everything that changes during training, and how it is saved and restored."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer

from distrib.errors import UserError
from distrib.runtime import ranks
from distrib.runtime.checkpoint import EMA, MODEL, NUMBERS, TRAINING, Snapshot, Torn, as_outcomes, newest
from distrib.runtime.disk import try_again
from distrib.training.meters import Totals

OPTIMIZER, SUMS, IMAGES = "optimizer.", "sums.", "images"  # names in training.safetensors
TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}

# The numbers in a checkpoint, with their JSON types. A number that an earlier version did not save has its default.
NUMBER_TYPES: dict[str, type] = {
    "step": int,
    "evaluated_step": int,
    "values": dict,
    "best_step": int,
    "best_values": dict,
    "skipped_steps": int,
    "nonfinite_in_a_row": int,
    "kept_seconds": float,
}


@dataclass(frozen=True)
class Frozen:
    """The weights that do not learn, and the norms that keep their statistics."""

    weights: list[nn.Parameter]
    norms: list[nn.Module]


@dataclass
class TrainState:
    """Everything that changes during training."""

    network: nn.Module
    model: nn.Module  # called by a step: the network, wrapped in DDP if there are several ranks
    optimizer: Optimizer  # wrapped by accelerate
    frozen: Frozen | None = None  # what does not learn now
    ema: nn.Module | None = None  # the moving average of the network's weights
    totals: Totals = field(default_factory=Totals.zero)  # of this rank's training images since the last report
    step: int = 0
    evaluated_step: int = 0
    values: dict[str, float] = field(default_factory=dict)  # of the last evaluation; of the moving average if there is one
    best_step: int = 0
    best_values: dict[str, float] = field(default_factory=dict)
    skipped_steps: int = 0  # because a gradient overflowed in fp16 or was not finite
    nonfinite_in_a_row: int = 0
    kept_seconds: float = 0.0  # spent in the steps and evaluations that led to this state

    @property
    def scaler(self) -> Any:
        """fp16's gradient scaler, an attribute of accelerate's optimizer; None in other precisions."""
        return getattr(self.optimizer, "scaler", None)

    @cached_property
    def weights(self) -> list[nn.Parameter]:
        """The parameters, listed once: walking the modules takes as long as a step of a small network."""
        return list(self.network.parameters())

    @cached_property
    def ema_pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        """The tensors of the moving average, and the tensors that they average."""
        assert self.ema is not None
        pairs = zip(self.ema.state_dict().values(), self.network.state_dict().values(), strict=True)
        means, values = zip(*((mean, value) for mean, value in pairs if mean.is_floating_point()), strict=True)
        return list(means), list(values)

    def files(self) -> dict[str, dict[str, Tensor]]:
        """Every tensor of the state, by file and by name in that file."""
        names = {id(each): name for name, each in self.network.named_parameters()}
        memory = {
            f"{OPTIMIZER}{names[id(weight)]}.{key}": each
            for weight, values in self.optimizer.state.items()
            for key, each in values.items()
            if each is not None
        }
        sums = {f"{SUMS}{name}": each for name, each in self.totals.sums.items()} | {IMAGES: self.totals.images}
        averages: dict[str, Tensor] = {} if self.ema is None else self.ema.state_dict()
        return {MODEL: self.network.state_dict(), EMA: averages, TRAINING: memory | sums}

    def size(self) -> int:
        """The size of all tensors, in bytes."""
        return sum(tensor.nbytes for tensors in self.files().values() for tensor in tensors.values())

    def numbers(self) -> dict[str, Any]:
        """Everything in the state that is not a tensor."""
        numbers = {name: getattr(self, name) for name in NUMBER_TYPES}
        return numbers | {"scaler": self.scaler.state_dict() if self.scaler else {}}


def snapshot(state: TrainState, earlier: Snapshot | None, score: float | None) -> Snapshot:
    """Copy `state`, into the memory of an `earlier` snapshot if there is one. This copy is all that training waits for.

    A copy has the memory format of its original: converting channels last takes three times as long. Copies of GPU tensors are
    in pinned memory, to use the full speed of the bus.
    """
    files: dict[str, dict[str, Tensor]] = {}
    for file, tensors in state.files().items():
        room, files[file] = earlier.files[file] if earlier else {}, {}
        for name, each in tensors.items():
            copy = room[name] if name in room else torch.empty_like(each, device="cpu", pin_memory=each.is_cuda)
            files[file][name] = copy.copy_(each, non_blocking=True)
    if any(each.is_cuda for each in state.weights):
        torch.cuda.synchronize()
    return Snapshot(state.step, files, state.numbers(), score)


def progress(numbers: dict[str, Any], main: str) -> dict[str, Any]:
    """The numbers of a state that status.json shows; `main` is the meter that decides which evaluation was the best."""
    best = {"step": numbers["best_step"], main: numbers["best_values"][main]} if numbers["best_values"] else None
    return {"step": numbers["step"], "kept_seconds": numbers["kept_seconds"], "best": best, **numbers["values"]}


def restore(state: TrainState, run_dir: Path, refuse_another: Callable[[dict[str, Any]], None]) -> list[str]:
    """Load the newest intact checkpoint into `state`, if there is one; returns lines for the user. Every rank must call this.

    Only rank 0 reads the files; it sends their content to the other ranks. `refuse_another(manifest)` raises UserError if the
    checkpoint belongs to another run. Raises RunError if it cannot be read now.
    """

    def check(folder: Path, manifest: dict[str, Any]) -> None:
        refuse_another(manifest)
        check_tensors(folder, state)
        check_numbers(folder / NUMBERS, manifest["step"])

    folder, _, lines = ranks.on_rank0(lambda: newest(run_dir, check))
    if folder is not None:
        put_tensors(folder, state)
        put_numbers(ranks.on_rank0(lambda: read_numbers(folder / NUMBERS)), state)
    return lines


def put_numbers(numbers: dict[str, Any], state: TrainState) -> None:
    """Load the numbers of a checkpoint into `state`."""
    for name, value in numbers.items():
        if name != "scaler":
            setattr(state, name, value)
        elif value:
            state.scaler.load_state_dict(value)


def shapes(path: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """The shape and type of each tensor in a file; reads only its header. Raises Torn."""

    def read() -> dict[str, tuple[torch.Size, torch.dtype]]:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: (torch.Size(each.get_shape()), TYPES[each.get_dtype()]) for name, each in slices.items()}

    try:
        return try_again(read)
    except (SafetensorError, LookupError, ValueError) as error:
        raise Torn(f"{path.name}: {error}") from None


def check_tensors(folder: Path, state: TrainState) -> None:
    """Raise UserError unless the tensors of a checkpoint fit the network and the optimizer in `state`."""
    expected = {
        file: {name: (each.shape, each.dtype) for name, each in tensors.items()} for file, tensors in state.files().items()
    }
    for file in (MODEL, EMA) if expected[EMA] else (MODEL,):
        differ = tensor_differences(shapes(folder / file), expected[file])
        if differ:
            raise UserError(f"{folder} was saved with another network: {differ}; give another run_dir")
    weights = dict(state.network.named_parameters())
    for name, (shape, kind) in shapes(folder / TRAINING).items():
        if name.startswith(OPTIMIZER):
            weight = weights.get(name.removeprefix(OPTIMIZER).rpartition(".")[0])
            if weight is None or kind != weight.dtype or shape not in (weight.shape, torch.Size([])):
                raise UserError(f"{folder} was saved with another optimizer: {name} is {list(shape)}; give another run_dir")


def tensor_differences(there: dict[str, Any], now: dict[str, Any]) -> str:
    """The first few differences between two lists of tensors, in words."""
    changed = [name for name in now if name in there and there[name] != now[name]]
    found = [f"{name} is {list(there[name][0])} there, {list(now[name][0])} now" for name in changed]
    found += [f"{name} is only there" for name in there if name not in now]
    found += [f"{name} is only now" for name in now if name not in there]
    return ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")


def check_numbers(path: Path, step: int) -> None:
    """Raise Torn unless a file holds the numbers of a run at `step`, with the right types; UserError if some are unknown."""
    numbers = read_numbers(path)
    if not isinstance(numbers, dict):
        raise Torn(f"{path.name} has no numbers")
    unknown = numbers.keys() - {*NUMBER_TYPES, "scaler"}
    if unknown:
        raise UserError(
            f"{path.parent} has numbers that this version does not know ({', '.join(sorted(unknown))}): update distrib"
        )
    odd = [name for name, kind in NUMBER_TYPES.items() if name in numbers and type(numbers[name]) is not kind]
    if odd or numbers.get("step") != step or not isinstance(numbers.get("scaler", {}), dict):
        raise Torn(f"{path.name}: {odd[0] if odd else 'step'} cannot be {numbers.get(odd[0] if odd else 'step')!r}")


def read_numbers(path: Path) -> dict[str, Any]:
    """The numbers in a file. Raises RunError."""
    with as_outcomes(path.parent):
        numbers: dict[str, Any] = json.loads(try_again(path.read_bytes))
    return numbers


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors in a file. Raises RunError."""
    with as_outcomes(path.parent):
        return try_again(lambda: load_file(path))


def put_tensors(folder: Path, state: TrainState) -> None:
    """Load the tensors of a checkpoint into `state`. Every rank must call this."""
    state.network.load_state_dict(dict(broadcast_file(folder / MODEL)))
    if state.ema is not None:
        state.ema.load_state_dict(dict(broadcast_file(folder / EMA)))
    weights = dict(state.network.named_parameters())
    memory: dict[nn.Parameter, dict[str, Tensor]] = {}
    found: dict[str, Tensor] = {}
    for name, tensor in broadcast_file(folder / TRAINING):
        owner, _, key = name.removeprefix(OPTIMIZER).rpartition(".")
        if not name.startswith(OPTIMIZER):
            found[name] = tensor.cpu() * ranks.is_rank0()  # a save moves the totals of all ranks to rank 0
        elif tensor.dim():
            # A fused optimizer needs a weight and its momentum in the same memory format.
            memory.setdefault(weights[owner], {})[key] = torch.empty_like(weights[owner]).copy_(tensor)
        else:
            memory.setdefault(weights[owner], {})[key] = tensor.cpu()
    load_memory(state.optimizer, memory)
    images = found.pop(IMAGES)
    state.totals = Totals({name.removeprefix(SUMS): each for name, each in found.items()}, images)


def broadcast_file(path: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors in a file, which rank 0 reads, on this rank's device. Every rank must call this. Raises RunError."""
    found = ranks.rank0_first(lambda rank0: read_tensors(path) if rank0 else {})
    return ranks.broadcast_tensors(found)


def load_memory(optimizer: Optimizer, memory: dict[nn.Parameter, dict[str, Tensor]]) -> None:
    """Load the saved state of each weight into an optimizer, through its state_dict."""
    numbered = [weight for group in optimizer.param_groups for weight in group["params"]]
    values = {index: memory[weight] for index, weight in enumerate(numbered) if weight in memory}
    optimizer.load_state_dict({"state": values, "param_groups": optimizer.state_dict()["param_groups"]})
