"""A checkpoint is complete or not there: run_dir/checkpoints/step_00000123/, written beside its name, then renamed.

Tensors are in safetensors and the rest is in JSON: nothing is unpickled.
"""

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file
from torch import Tensor

from distrib.ranks import agreed

if TYPE_CHECKING:
    from distrib.loop import TrainState


FACTS = ("step", "top1", "best_top1", "best_step", "skipped_steps")


def save(state: "TrainState", run_dir: Path, keep: int) -> None:
    """Write `state` and prune all but the newest `keep`. Call it on rank 0.

    A process that dies meanwhile leaves a folder with `.partial` in its name, which nothing reads and the next save removes.
    """
    folder = run_dir / "checkpoints" / f"step_{state.step:08d}"
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(tensors(state), partial / "state.safetensors")
    (partial / "state.json").write_text(json.dumps(facts(state), indent=2))
    for path in (*partial.iterdir(), partial):
        _to_disk(path)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    _to_disk(folder.parent)
    for old in checkpoints(run_dir)[:-keep]:
        shutil.rmtree(old)


def checkpoints(run_dir: Path) -> list[Path]:
    """The complete ones, oldest first."""
    return sorted(path for path in (run_dir / "checkpoints").glob("step_*") if not path.suffix)


def restore(state: "TrainState", run_dir: Path) -> None:
    """Put the newest checkpoint into `state`, if there is one. Every rank must call this; rank 0 chooses."""
    newest = agreed(next(reversed(checkpoints(run_dir)), None))
    if newest is None:
        return
    found = load_file(newest / "state.safetensors")
    part = {name: _under(name, found) for name in ("model", "average", "optimizer")}
    state.network.load_state_dict(part["model"])
    if state.average is not None:
        state.average.load_state_dict(part["average"])
    _restore_optimizer(state.optimizer, part["optimizer"])
    state.sums.copy_(found["sums"] * PartialState().is_main_process)  # they were moved to rank 0
    restore_facts(state, json.loads((newest / "state.json").read_text()))


def tensors(state: "TrainState") -> dict[str, Tensor]:
    """Every tensor of `state` under a name of its own, copied, contiguous, on the CPU."""
    named: dict[str, Any] = {f"model.{name}": each for name, each in state.network.state_dict().items()}
    if state.average is not None:
        named |= {f"average.{name}": each for name, each in state.average.state_dict().items()}
    for index, values in state.optimizer.state_dict()["state"].items():
        named |= {f"optimizer.{index}.{name}": each for name, each in values.items() if each is not None}
    named["sums"] = state.sums
    return {name: each.detach().cpu().clone(memory_format=torch.contiguous_format) for name, each in named.items()}


def facts(state: "TrainState") -> dict[str, Any]:
    """What is not a tensor."""
    scaler = getattr(state.optimizer, "scaler", None)  # fp16's, on the optimizer that accelerate prepared
    return {name: getattr(state, name) for name in FACTS} | {"scaler": scaler.state_dict() if scaler else {}}


def restore_facts(state: "TrainState", facts: dict[str, Any]) -> None:
    for name in FACTS:
        setattr(state, name, facts[name])
    if facts["scaler"]:
        state.optimizer.scaler.load_state_dict(facts["scaler"])  # type: ignore[attr-defined]


def _under(prefix: str, named: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(f"{prefix}."): each for name, each in named.items() if name.startswith(f"{prefix}.")}


def _restore_optimizer(optimizer: torch.optim.Optimizer, named: dict[str, Tensor]) -> None:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    values: dict[int, dict[str, Tensor]] = {}
    for name, tensor in named.items():
        index, _, what = name.partition(".")
        like = parameters[int(index)]
        # Fused optimizers go through a weight and its momentum side by side: they must lie in memory alike.
        value = torch.empty_like(like).copy_(tensor) if tensor.shape == like.shape else tensor
        values.setdefault(int(index), {})[what] = value
    optimizer.load_state_dict({"state": values, "param_groups": optimizer.state_dict()["param_groups"]})


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
