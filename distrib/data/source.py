"""A `Source` is a data set: training images, validation images, classes, and the mean and std of the pixels."""

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distrib.config import DataConfig
from distrib.data.pixels import ImageSpec
from distrib.errors import UserError, one_line
from distrib.runtime.disk import read_from

READERS = 16  # threads that read file sizes: on a network file system, most of that is waiting


@dataclass(frozen=True)
class Arrays:
    """Images in memory, (n, channels, height, width) uint8, and their targets: class ids, (n,) int64, or (n, classes) float."""

    images: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    def name_of(self, image: int) -> str:
        """How messages name an image: by its number."""
        return str(image)

    def sha256(self, *, skip: bool = False) -> str:
        """A hash of every pixel and target. No image in memory is missing, so nothing is skipped."""
        digest = hashlib.sha256()
        for tensor in (self.images, self.targets):
            digest.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
            pixels: Any = tensor.contiguous().view(-1).view(torch.uint8).numpy()
            digest.update(pixels)
        return digest.hexdigest()


def size_of(path: bytes, *, skip: bool) -> int:
    """The size of a file in bytes; -1 with `skip` if it is missing. Raises UserError, and DiskError."""
    try:
        return read_from(os.fsdecode(path), lambda: os.path.getsize(path))
    except OSError as error:
        if skip and isinstance(error, FileNotFoundError):
            return -1
        raise UserError(f"{os.fsdecode(path)} cannot be read: {error.strerror}") from None


@dataclass(frozen=True)
class Files:
    """Image files, to be read as `spec` says. Paths are an array of bytes; targets are those of `Arrays`.

    The fingerprint uses paths relative to `root`, so the folder may move.
    """

    paths: np.ndarray[Any, Any]
    targets: Tensor
    spec: ImageSpec
    root: str = ""

    def __len__(self) -> int:
        return len(self.paths)

    def name_of(self, image: int) -> str:
        """How messages name an image: by its path."""
        return os.fsdecode(self.paths[image])

    def sha256(self, *, skip: bool = False) -> str:
        """A hash of the targets and of the name and size of each file, in order. It does not read the files.

        Raises UserError if one is missing, unless `skip`.
        """
        digest = hashlib.sha256(self.targets.numpy().tobytes())
        with ThreadPoolExecutor(READERS) as pool:
            for path, size in zip(self.paths, pool.map(partial(size_of, skip=skip), self.paths, chunksize=256), strict=True):
                digest.update(os.path.relpath(os.fsdecode(path), self.root or "/").encode(errors="surrogateescape"))
                digest.update(f"\0{size}\0".encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class Source:
    """A data set. `mean` and `std` are per channel, for pixels in [0, 1]."""

    train: Arrays | Files
    val: Arrays | Files
    classes: tuple[str, ...]
    shape: tuple[int, int, int]  # channels, height, width
    mean: tuple[float, ...]
    std: tuple[float, ...]
    name: str = "source"
    notes: tuple[str, ...] = ()  # lines for the user

    @classmethod
    def from_arrays(
        cls, train: tuple[Any, Any], val: tuple[Any, Any], classes: Sequence[str], name: str = "source"
    ) -> "Source":
        """A data set of images and targets in memory: tensors, or anything that numpy converts to arrays.

        Images are (n, channels, height, width) uint8; targets are class ids (n,), or (n, classes) floats. Raises UserError.
        """
        splits = [arrays_of(each, split, len(classes)) for split, each in (("train", train), ("val", val))]
        shape = splits[0].images.shape[1:]
        if splits[1].images.shape[1:] != shape:
            raise UserError(f"training images are {list(shape)}, but validation images {list(splits[1].images.shape[1:])}")
        # From the counts of the 256 values: a conversion to double would take eight times the memory of the images.
        counts = torch.stack([torch.bincount(each.flatten(), minlength=256) for each in splits[0].images.unbind(1)]).double()
        values, pixels = torch.arange(256, dtype=torch.float64) / 255, counts.sum(1)
        mean = counts @ values / pixels
        std = (((values - mean[:, None]) ** 2 * counts).sum(1) / pixels).sqrt().clamp_min(1e-3)
        channels, height, width = shape
        size = (channels, height, width)
        return cls(splits[0], splits[1], tuple(classes), size, tuple(mean.tolist()), tuple(std.tolist()), name)

    def normalized_as(self, config: DataConfig) -> "Source":
        """This data set with the mean and std of a config, where they are given. Raises UserError."""
        channels = self.shape[0]

        def per_channel(name: str, values: list[float] | None, own: tuple[float, ...]) -> tuple[float, ...]:
            if values is None:
                return own
            if len(values) not in (1, channels) and channels != 1:
                raise UserError(f"{name} has {len(values)} numbers, but images have {channels} channels: give 1 or {channels}")
            return tuple(values) if len(values) == channels else (sum(values) / len(values),) * channels

        mean, std = config.mean_and_std()
        return replace(self, mean=per_channel("data.mean", mean, self.mean), std=per_channel("data.std", std, self.std))

    def fingerprint(self, *, skip: bool = False) -> dict[str, Any]:
        """The identity of this data set: number of images, classes, and a hash of everything else.

        Raises UserError if a file is missing, unless `skip`.
        """
        digest = hashlib.sha256(f"{self.train.sha256(skip=skip)} {self.val.sha256(skip=skip)}".encode()).hexdigest()
        return {"train": len(self.train), "val": len(self.val), "classes": list(self.classes), "sha256": digest}


def arrays_of(split: tuple[Any, Any], name: str, classes: int) -> Arrays:
    """Images and targets as Arrays. Raises UserError if they do not fit together."""
    try:
        images, targets = (each.cpu() if isinstance(each, Tensor) else torch.from_numpy(np.array(each)) for each in split)
    except (TypeError, ValueError) as error:
        raise UserError(f"{name}: images and targets cannot be converted to arrays: {one_line(error)}") from None
    soft, count = targets.dtype.is_floating_point, len(images)
    if images.dim() != 4 or images.dtype != torch.uint8 or not count:
        raise UserError(f"{name}: images are {images.dtype} {list(images.shape)}, not uint8 (n, channels, height, width)")
    if targets.shape != ((count, classes) if soft else (count,)):
        found = f"{targets.dtype} {list(targets.shape)}"
        raise UserError(f"{name}: targets are {found}, not ids ({count},) or floats ({count}, {classes})")
    if not soft and not 0 <= int(targets.min()) <= int(targets.max()) < classes:
        raise UserError(f"{name}: targets are {int(targets.min())} to {int(targets.max())}, but there are {classes} classes")
    if soft and not targets.isfinite().all():
        raise UserError(f"{name}: targets are not all finite")
    return Arrays(images, targets.float() if soft else targets.long())


def data_differences(before: dict[str, Any], after: dict[str, Any], where: tuple[str, str] = ("there", "now")) -> list[str]:
    """The differences between two fingerprints, in words; empty if they are equal."""
    if before == after:
        return []
    here, there = where[1], where[0]
    found, old, new = list[str](), before["classes"], after["classes"]
    if old != new:
        lost, added = (", ".join(sorted({*a} - {*b})[:5]) for a, b in ((old, new), (new, old)))
        only = f"{lost or 'none'} only {there}, {added or 'none'} only {here}" if lost or added else "in another order"
        found.append(f"set of classes ({len(old)} {there}, {len(new)} {here}: {only})")
    for split in ("train", "val"):
        if before[split] != after[split]:
            found.append(f"number of {split} images ({before[split]} {there}, {after[split]} {here})")
    return found or ["content of the data (as many images of the same classes, but other names, sizes or pixels)"]
