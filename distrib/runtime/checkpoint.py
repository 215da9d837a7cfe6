"""Checkpoints: a checkpoint exists under its name only if it is complete.

run_dir/checkpoints/step_00000123/ contains model.safetensors: the network's tensors, under the network's own names;
ema.safetensors: their moving average, if there is one; training.safetensors: the optimizer's state; state.json: all numbers;
and manifest.json: a description of the run, and the size and SHA-256 of each file. All files are written to a temporary folder
and synced to the disk, then the folder is renamed. Nothing is unpickled.

Reading a checkpoint has four outcomes. Intact: it is used. Torn, which means that its bytes differ from what was written: it is
renamed, and the one before is used. Of another run: UserError. Unreadable now: tried again, then RunError.
"""

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from distrib.errors import DiskError, UserError, one_line
from distrib.runtime.disk import to_disk, try_again

MODEL, EMA, TRAINING = "model.safetensors", "ema.safetensors", "training.safetensors"
NUMBERS, MANIFEST = "state.json", "manifest.json"
FORMAT = 2
SMALL = 1 << 24  # bytes: a larger JSON file is none of ours


class Format1(UserError):  # noqa: N818
    """A checkpoint of an earlier version, which training can convert."""


class Torn(Exception):  # noqa: N818
    """A checkpoint differs from what was written, or is none; the message says why."""


@dataclass(frozen=True)
class Snapshot:
    """A copy of a run's state at one step, on the CPU."""

    step: int
    files: dict[str, dict[str, Tensor]]  # the tensors of each file, by name
    numbers: dict[str, Any]
    score: float | None  # of the evaluation at this step, if there was one: higher is better


def checkpoints(run_dir: Path) -> list[Path]:
    """The folders of a run's checkpoints, oldest first."""
    return sorted(path for path in (run_dir / "checkpoints").glob("step_*") if not path.suffix)


def checkpoint_at(run_dir: Path, step: int) -> Path:
    """The folder of the checkpoint of a step."""
    return run_dir / "checkpoints" / f"step_{step:08d}"


def write(snapshot: Snapshot, run_dir: Path, about: dict[str, Any], keep: int) -> None:
    """Write a checkpoint, with the run's description `about` in its manifest, then delete old ones.

    If this is killed or fails at any point, the existing checkpoints, or a newer one, are still intact. Raises OSError, and
    Torn if a tensor is not finite.
    """
    folder = checkpoint_at(run_dir, snapshot.step)
    partial = folder.with_suffix(".partial")
    arrays = {file: in_order(tensors) for file, tensors in snapshot.files.items() if tensors}
    for left in folder.parent.glob("step_*.partial"):
        shutil.rmtree(left, ignore_errors=True)
    partial.mkdir(parents=True)
    for file, tensors in arrays.items():
        save_file(tensors, partial / file)
    (partial / NUMBERS).write_text(json.dumps(snapshot.numbers))
    files = {name: {"bytes": (partial / name).stat().st_size, "sha256": sha256(partial / name)} for name in (*arrays, NUMBERS)}
    manifest = {"format": FORMAT, "step": snapshot.step, "score": snapshot.score, **about, "files": files}
    (partial / MANIFEST).write_text(json.dumps(manifest | {"sha256": own_sha256(manifest)}, indent=2))
    for path in (*(partial / name for name in files), partial / MANIFEST, partial):
        to_disk(path)
    os.rename(partial, folder)
    to_disk(folder.parent)
    prune(run_dir, keep)


def in_order(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as contiguous arrays, as safetensors needs them. Raises Torn if one is not finite.

    This uses numpy, which needs one thread; torch's threads would compete with training for the cores.
    """
    arrays = {name: np.asarray(tensor.numpy(), order="C") for name, tensor in tensors.items()}
    odd = next((name for name, array in arrays.items() if not np.isfinite(array).all()), None)
    if odd:
        raise Torn(f"{odd} is not finite")
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def prune(run_dir: Path, keep: int) -> None:
    """Delete all checkpoints but the newest `keep` and the one with the best score.

    A checkpoint is renamed before it is deleted. If it cannot be deleted now, the next call tries again.
    """
    found = checkpoints(run_dir)
    best = best_of(found)
    for folder in found[:-keep]:
        if folder != best:
            with suppress(OSError):
                os.rename(folder, folder.with_suffix(".pruned"))
    for folder in (run_dir / "checkpoints").glob("step_*.pruned"):
        shutil.rmtree(folder, ignore_errors=True)


def best_of(found: list[Path]) -> Path | None:
    """The checkpoint with the best score, the oldest in a tie; None if none was evaluated."""
    scores = {folder: score for folder in found if (score := score_of(folder)) is not None}
    return max(scores, key=scores.__getitem__, default=None)


def score_of(folder: Path) -> float | None:
    """The score of a checkpoint, if it was evaluated at its step and its manifest can be read."""
    try:
        score = json.loads((folder / MANIFEST).read_text())["score"]
        return None if score is None else float(score)
    except (OSError, ValueError, TypeError, LookupError):
        return None


def newest(run_dir: Path, check: Callable[[Path, dict[str, Any]], None]) -> tuple[Path | None, dict[str, Any], list[str]]:
    """The newest intact checkpoint, its manifest, and lines for the user; None if there never was a checkpoint.

    `check(folder, manifest)` checks the content of the files. It raises Torn, and the checkpoint is renamed; or UserError if it
    belongs to another run. Raises UserError if all are torn: a run never starts anew by itself.
    """
    lines: list[str] = []
    for folder in reversed(checkpoints(run_dir)):
        try:
            manifest = verified(folder)
            with as_outcomes(folder):
                check(folder, manifest)
            return folder, manifest, lines
        except Torn as why:
            lines.append(f"{folder.name} is damaged ({why}): renamed to {set_aside(folder).name}")
    damaged = sorted(path.name for path in (run_dir / "checkpoints").glob("step_*.damaged*"))
    if damaged:
        raise UserError(
            f"{run_dir} has no intact checkpoint, only {', '.join(damaged[:3])}{' ...' if len(damaged) > 3 else ''}: "
            f"give another run_dir, or delete them to start anew{''.join(f'; {line}' for line in lines)}"
        )
    return None, {}, lines


def best_checkpoint(run: Path) -> tuple[Path, dict[str, Any]]:
    """The checkpoint `run`, or the best one in the run folder `run`, and its manifest; `refuse_damaged` checks the files.

    Renames nothing. Raises UserError.
    """
    found = [run] if (run / MANIFEST).exists() else checkpoints(run)
    if not found:
        raise UserError(f"{run} has no checkpoints: give a run folder or a checkpoint")
    folder = best_of(found) or found[-1]
    with torn_refused(folder):
        return folder, read_manifest(folder)


def weights_of(folder: Path, manifest: dict[str, Any]) -> Path:
    """The file of a checkpoint's weights: of their moving average, if there is one."""
    return folder / (EMA if EMA in manifest["files"] else MODEL)


def refuse_damaged(folder: Path) -> None:
    """Raise UserError if the files of a checkpoint differ from what was written."""
    with torn_refused(folder):
        verified(folder)


@contextmanager
def torn_refused(folder: Path) -> Iterator[None]:
    try:
        yield
    except Torn as why:
        raise UserError(f"{folder} is damaged ({why}): give another checkpoint") from None


def latest_manifest(run_dir: Path) -> dict[str, Any]:
    """The newest valid manifest of today's format; empty if there is none. Changes nothing and reads no other file."""
    for folder in reversed(checkpoints(run_dir)):
        with suppress(Torn, Format1):
            return read_manifest(folder)
    return {}


def set_aside(folder: Path) -> Path:
    """Rename a torn checkpoint; returns its new path."""
    names = (folder.with_suffix(f".damaged{i or ''}") for i in range(len(list(folder.parent.iterdir())) + 1))
    aside = next(name for name in names if not name.exists())
    os.rename(folder, aside)
    return aside


@contextmanager
def as_outcomes(folder: Path) -> Iterator[None]:
    """Turn errors of reading a checkpoint into Torn, or into RunError if it cannot be read now."""
    try:
        yield
    except FileNotFoundError as error:
        raise Torn(f"{Path(error.filename or folder).name} is missing") from None
    except OSError as error:
        raise DiskError(
            f"{folder} cannot be read now: {error.strerror or error}; nothing was changed, try again later"
        ) from None
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise Torn(f"{type(error).__name__}: {one_line(error)}") from None


def verified(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, after comparing the files with it. Raises Torn, UserError or RunError."""
    manifest = read_manifest(folder)
    with as_outcomes(folder):
        for name, expected in manifest["files"].items():
            path = regular(folder, name, SMALL if name.endswith(".json") else None)
            size = path.stat().st_size
            if size != expected["bytes"]:
                raise Torn(f"{name} has {size} bytes, not {expected['bytes']}")
            if sha256(path) != expected["sha256"]:
                raise Torn(f"{name} differs from what was written")
        missing = {MODEL, TRAINING, NUMBERS} - manifest["files"].keys()
        if missing:
            raise Torn(f"{MANIFEST} lacks {', '.join(sorted(missing))}")
    return manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, with its hash checked. Raises Torn, RunError, or UserError if it is of a later format."""
    with as_outcomes(folder):
        path = regular(folder, MANIFEST, SMALL)
        manifest: dict[str, Any] = json.loads(try_again(path.read_bytes))
        if manifest.pop("sha256") != own_sha256(manifest):
            raise Torn(f"{MANIFEST} differs from what was written")
        if folder.name != f"step_{manifest['step']:08d}":
            raise Torn(f"{MANIFEST} is of step {manifest['step']}")
        if manifest["format"] == 1:
            raise Format1(f"{folder} is of an earlier version: run its training command again, which converts it")
        if manifest["format"] != FORMAT:
            raise UserError(f"{folder} has format {manifest['format']}, and this version reads format {FORMAT}: update distrib")
    return manifest


def regular(folder: Path, name: str, most: int | None) -> Path:
    """The path of a regular file in the folder, of at most `most` bytes. Raises Torn."""
    path = folder / name
    if Path(name).name != name:
        raise Torn(f"{name} is outside of the folder")
    found = try_again(path.lstat)
    if not stat.S_ISREG(found.st_mode):
        raise Torn(f"{name} is not a regular file")
    if most is not None and found.st_size > most:
        raise Torn(f"{name} has {found.st_size} bytes, more than {most}")
    return path


def sha256(path: Path) -> str:
    def read() -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    return try_again(read)


def own_sha256(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
