"""Checkpoints of format 1, which had all tensors in one file, are converted to today's format before a run resumes."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from distrib.runtime.checkpoint import (
    EMA,
    MANIFEST,
    MODEL,
    NUMBERS,
    TRAINING,
    Snapshot,
    Torn,
    as_outcomes,
    checkpoints,
    set_aside,
    sha256,
    write,
)
from distrib.training.state import IMAGES, NUMBER_TYPES, OPTIMIZER, SUMS, TrainState, read_numbers, read_tensors

TENSORS = "state.safetensors"
OLD = ".format1"  # suffix of a checkpoint that was converted


def upgrade(run_dir: Path, state: TrainState, about: Mapping[str, Any]) -> list[str]:
    """Convert each checkpoint of format 1; its original stays beside it. Returns lines for the user.

    `about` is the description of the run for the new manifests. After a kill at any point, the original or the new checkpoint
    has its name, or the next attempt renames the original back.
    """
    room, lines = run_dir / "upgrade", list[str]()
    if room.exists():  # an attempt was killed in here. Without this, an original without a new one is one that was pruned
        for old in (run_dir / "checkpoints").glob(f"step_*{OLD}"):
            if not old.with_suffix("").exists():
                os.rename(old, old.with_suffix(""))
    shutil.rmtree(room, ignore_errors=True)
    for folder in checkpoints(run_dir):
        if not (folder / TENSORS).exists():
            continue
        try:
            with as_outcomes(folder):
                files = json.loads((folder / MANIFEST).read_bytes())["files"]
                if any(sha256(folder / name) != files[name]["sha256"] for name in (TENSORS, NUMBERS)):
                    raise Torn("a file differs from what was written")
                write(snapshot_of(folder, state), room, dict(about), keep=2)
        except Torn as why:
            lines.append(f"{folder.name} is damaged ({why}): renamed to {set_aside(folder).name}")
            continue
        os.rename(folder, folder.with_suffix(OLD))
        os.rename(room / "checkpoints" / folder.name, folder)
        lines.append(f"{folder.name} was of an earlier version and was converted; the original is {folder.name}{OLD}")
    shutil.rmtree(room, ignore_errors=True)
    return lines


def snapshot_of(folder: Path, state: TrainState) -> Snapshot:
    """The content of a checkpoint of format 1, as a snapshot."""
    tensors, numbers = read_tensors(folder / TENSORS), read_numbers(folder / NUMBERS)
    learning = [(name, weight) for name, weight in state.network.named_parameters() if weight.requires_grad]
    order = [name for several in (True, False) for name, weight in learning if (weight.dim() > 1) == several]
    files: dict[str, dict[str, torch.Tensor]] = {MODEL: {}, EMA: {}, TRAINING: {}}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition(".")
        if kind == "optimizer":
            number, _, key = rest.partition(".")
            files[TRAINING][f"{OPTIMIZER}{order[int(number)]}.{key}"] = tensor
        elif kind != "sums":
            files[MODEL if kind == "model" else EMA][rest] = tensor
    loss, top1, _, images = tensors["sums"].unbind()
    files[TRAINING] |= {f"{SUMS}loss": loss.clone(), f"{SUMS}top1": top1.clone(), IMAGES: images.clone()}
    evaluated = numbers["evaluated_step"] == numbers["step"]
    numbers |= {"values": {"top1": numbers["top1"]}, "best_values": {"top1": numbers["best_top1"]}}
    kept = {name: numbers[name] for name in (*NUMBER_TYPES, "scaler")}
    return Snapshot(numbers["step"], files, kept, numbers["top1"] if evaluated else None)
