"""A checkpoint is complete and as it was written, or it is not there.

run_dir/checkpoints/step_00000123/ holds every tensor in state.safetensors, every number in state.json, and the sizes and
SHA-256 of both in manifest.json. It is written beside its name, brought to the disk, and then renamed. Nothing is ever
unpickled.
"""

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from distrib.config import Config, one_line

TENSORS, NUMBERS, MANIFEST = "state.safetensors", "state.json", "manifest.json"
FORMAT = 1
SMALL = 1 << 20  # bytes: no JSON of ours is larger


class Damaged(Exception):  # noqa: N818
    """A checkpoint that no run can go on from, and why."""


@dataclass(frozen=True)
class Snapshot:
    """A run's state at one step, on the CPU, apart from the one that goes on changing."""

    step: int
    tensors: dict[str, Tensor]
    numbers: dict[str, Any]


def checkpoints(run_dir: Path) -> list[Path]:
    """The folders that have the name of a checkpoint, oldest first."""
    return sorted(path for path in (run_dir / "checkpoints").glob("step_*") if not path.suffix)


def write(taken: Snapshot, run_dir: Path, about: dict[str, Any], keep: int) -> None:
    """Commit a checkpoint, whose manifest says what it is `about`, then prune the old ones.

    At whatever point this is killed or fails, every checkpoint that was there is there, or a newer one is. It raises what the
    file system does, and Damaged if a tensor is not finite.
    """
    # By numpy, in one thread: torch would have its threads fight for the cores with those that train.
    arrays = {name: np.asarray(tensor.numpy(), order="C") for name, tensor in taken.tensors.items()}
    odd = next((name for name, array in arrays.items() if not np.isfinite(array).all()), None)
    if odd:
        raise Damaged(f"{odd} is not finite")
    folder = run_dir / "checkpoints" / f"step_{taken.step:08d}"
    partial = folder.with_suffix(".partial")
    for torn in folder.parent.glob("step_*.partial"):
        shutil.rmtree(torn, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file({name: torch.from_numpy(array) for name, array in arrays.items()}, partial / TENSORS)
    (partial / NUMBERS).write_text(json.dumps(taken.numbers))
    files = {name: {"bytes": (partial / name).stat().st_size, "sha256": sha256(partial / name)} for name in (TENSORS, NUMBERS)}
    manifest = {"format": FORMAT, "step": taken.step, **about, "files": files}
    (partial / MANIFEST).write_text(json.dumps(manifest | {"sha256": own_sha256(manifest)}, indent=2))
    for path in (partial / TENSORS, partial / NUMBERS, partial / MANIFEST, partial):
        to_disk(path)
    os.rename(partial, folder)
    to_disk(folder.parent)
    prune(run_dir, keep)


def prune(run_dir: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints and the most accurate one, if any was evaluated.

    What is being deleted has lost its name; what cannot be is left for the next time.
    """
    found = checkpoints(run_dir)
    scores = {folder: accuracy(folder) for folder in found}
    best = max(found, key=scores.__getitem__, default=None)
    for folder in found[:-keep]:
        if folder != best or scores[folder] < 0:
            with suppress(OSError):
                os.rename(folder, folder.with_suffix(".pruned"))
    for folder in (run_dir / "checkpoints").glob("step_*.pruned"):
        shutil.rmtree(folder, ignore_errors=True)


def accuracy(folder: Path) -> float:
    """The validation accuracy of a checkpoint, in percent; -1 if it was not evaluated at its step."""
    try:
        numbers = json.loads((folder / NUMBERS).read_text())
        return float(numbers["top1"]) if numbers["evaluated_step"] == numbers["step"] else -1.0
    except (OSError, ValueError, TypeError, LookupError):
        return -1.0


def newest(run_dir: Path, check: Callable[[Path, dict[str, Any]], None]) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is as it was written and passes `check(folder, manifest)`, which raises Damaged.

    One that is not good is set aside under another name, and a line for the user says so.
    """
    told: list[str] = []
    for folder in reversed(checkpoints(run_dir)):
        try:
            check(folder, verified(folder))
            return folder, told
        except Damaged as why:
            names = (folder.with_suffix(f".damaged{i or ''}") for i in range(len(list(folder.parent.iterdir())) + 1))
            aside = next(name for name in names if not name.exists())
            os.rename(folder, aside)
            told.append(f"{folder.name} is damaged ({why}): it is now {aside.name}, and the run goes on from an older one")
    return None, told


def verified(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose files are as it says; nothing but JSON has been parsed until then. Raises Damaged."""
    try:
        manifest: dict[str, Any] = json.loads(regular(folder / MANIFEST, SMALL).read_bytes())
        if manifest.pop("sha256") != own_sha256(manifest):
            raise Damaged(f"{MANIFEST} is not as it was written")
        if manifest["format"] != FORMAT or folder.name != f"step_{manifest['step']:08d}":
            raise Damaged(f"{MANIFEST} is of format {manifest['format']} and step {manifest['step']}")
        for name, most in ((TENSORS, None), (NUMBERS, SMALL)):
            path, told = regular(folder / name, most), manifest["files"][name]
            if path.stat().st_size != told["bytes"]:
                raise Damaged(f"{name} has {path.stat().st_size} bytes, not {told['bytes']}")
            if sha256(path) != told["sha256"]:
                raise Damaged(f"{name} is not as it was written")
        return manifest
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise Damaged(f"{type(error).__name__}: {error}") from None


def regular(path: Path, most: int | None) -> Path:
    """`path`, if it is a file of its own, and of at most so many bytes. Raises Damaged."""
    if path.is_symlink() or not path.is_file():
        raise Damaged(f"{path.name} is not there" if not os.path.lexists(path) else f"{path.name} is no file of its own")
    if most is not None and path.stat().st_size > most:
        raise Damaged(f"{path.name} has {path.stat().st_size} bytes, more than {most}")
    return path


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def own_sha256(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Saver:
    """Writes checkpoints behind the training's back, one at a time; whoever leaves it waits for the last one.

    `saved` is called with each one that is on the disk.
    """

    def __init__(self, config: Config, about: dict[str, Any], saved: Callable[[Snapshot], None]) -> None:
        self.run_dir, self.keep, self.about, self.saved = Path(config.run_dir), config.keep, about, saved
        self.thread: threading.Thread | None = None
        self.taken: Snapshot | None = None  # the last one, whose memory the next one takes
        self.failure: str | None = None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, *error: object) -> None:
        self.wait()

    def save(self, taken: Snapshot) -> None:
        """Begin to write `taken`. Wait for the one before first."""
        self.taken, self.failure = taken, None
        self.thread = threading.Thread(target=self._write, args=(taken,), name=f"save step {taken.step}")
        self.thread.start()

    def wait(self) -> str | None:
        """Wait until nothing is being written; returns what went wrong with the last one, in a line."""
        if self.thread:
            self.thread.join()
            self.thread = None
        return self.failure

    def _write(self, taken: Snapshot) -> None:
        try:
            write(taken, self.run_dir, self.about, self.keep)
            self.saved(taken)
        except Exception as error:  # whatever it is, training goes on, and all ranks are told
            self.failure = f"no checkpoint of step {taken.step} could be saved: {type(error).__name__}: {one_line(error)}"
