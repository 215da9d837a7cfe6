"""Batches on the device, for images in memory and for image files."""

import math
from collections.abc import Iterable, Iterator
from itertools import chain, groupby, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distrib.config import Config
from distrib.data.augment import Augment, Normalize
from distrib.data.files import Reader
from distrib.data.source import Arrays, Files, Source
from distrib.data.steps import Share, Steps, refuse_fewer_than_ranks, val_range, val_shares
from distrib.data.workers import Stream, Workers

AUTO_FRACTION = 0.25  # data.resident=auto: largest fraction of a device's free memory that images may take
# Small shares of images in memory are augmented together, at most so many, of so many bytes: a host needs as long for one.
TOGETHER, SMALL = 8, 2 << 20

Read = tuple[Share, Tensor, Tensor]  # a share, its images (uint8) and targets


class Batch(NamedTuple):
    """Normalised images, (n, channels, height, width) float32, channels last, and their targets, on the device.

    Targets are class ids, (n,) int64, or (n, classes) float.
    """

    images: Tensor
    targets: Tensor

    def split(self, count: int) -> "list[Batch]":
        """The batch in `count` parts, whose sizes differ by one image at most."""
        return list(map(Batch, *(each.tensor_split(count) for each in self))) if count > 1 else [self]


class Resident:
    """The images `mine` of a data set in memory: on the device, or on the host, from where each batch is copied."""

    def __init__(self, arrays: Arrays, mine: range, where: str, device: torch.device) -> None:
        images, targets = arrays.images[mine.start : mine.stop], arrays.targets[mine.start : mine.stop]
        self.placement = placement(images.nbytes, where, device)
        self.images, self.targets = images.to(self.placement), targets.to(self.placement)  # no copy if it is the CPU
        self.first, self.device = mine.start, device

    def read(self, shares: Iterable[Share]) -> Iterator[Read]:
        reads = map(self._chosen, shares)
        return reads if self.placement == self.device else prefetch(reads, self.device)

    def _chosen(self, share: Share) -> Read:
        share = Share(share.epoch, to_device(share.images, self.placement))
        chosen = share.images - self.first
        return share, self.images[chosen], self.targets[chosen]


def placement(size: int, where: str, device: torch.device) -> torch.device:
    """Where images of `size` bytes are kept, if data.resident is `where`."""
    if where == "auto" and device.type == "cuda":
        where = "device" if size <= AUTO_FRACTION * torch.cuda.mem_get_info(device)[0] else "host"
    return torch.device("cpu") if where == "host" else device


class Streamed:
    """A set of image files, which worker processes read ahead."""

    def __init__(self, reader: Reader, device: torch.device, workers: Workers) -> None:
        self.targets, self.device = reader.files.targets, device
        self.stream = Stream(reader, workers, pinned=device.type == "cuda")

    def read(self, shares: Iterable[Share]) -> Iterator[Read]:
        reads = ((share, images, self.targets[share.images]) for share, images in self.stream.read(shares))
        return prefetch(reads, self.device)


def prefetch(reads: Iterable[Read], device: torch.device) -> Iterator[Read]:
    """Copy what was read to the device, on a separate CUDA stream, one batch ahead of the computation."""
    if device.type != "cuda":
        yield from reads
        return
    cuda: Any = torch.cuda  # it has no types
    copying, next_read = cuda.Stream(device), None
    for read in chain(reads, [None]):
        ready, computing = next_read, cuda.current_stream(device)
        computing.wait_stream(copying)  # the device waits, not the host
        with cuda.stream(copying):
            next_read = on_device(read, device) if read else None
        if ready:
            for tensor in (ready[0].images, *ready[1:]):
                tensor.record_stream(computing)  # its memory is not reused before `computing` has used it
            yield ready


def on_device(read: Read, device: torch.device) -> Read:
    share, images, targets = read
    return Share(share.epoch, to_device(share.images, device)), to_device(images, device), to_device(targets, device)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a host tensor to the device; the host does not wait."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


class Loader:
    """Batches of this rank: its share of each training step, and its range of the validation set.

    Raises UserError if there are more ranks than validation images.
    """

    def __init__(self, source: Source, config: Config, steps: Steps, device: torch.device, workers: Workers) -> None:
        refuse_fewer_than_ranks(len(source.val), steps.world, "validation")
        self.source, self.steps, self.device = source, steps, device
        mean, std = (torch.tensor(each, device=device) for each in (source.mean, source.std))
        self.augment = Augment(config.data, config.seed, (255 * mean).round().to(torch.uint8))
        self.normalize = Normalize(mean, std, width=source.shape[2])
        # A rank needs all training images, since each epoch has another order, but only its range of the validation images.
        self.skips_bad_images, self.left_out = config.data.bad_images == "skip", 0  # of this rank's last evaluation
        whole, mine = range(len(source.train)), val_range(len(source.val), steps.rank, steps.world)

        def open_split(images: Arrays | Files, mine: range, crop_area: float | None) -> Resident | Streamed:
            if isinstance(images, Arrays):
                return Resident(images, mine, config.data.resident, device)
            reader = Reader(images, config.seed, crop_area, skip=config.data.bad_images == "skip")
            return Streamed(reader, device, workers)

        self.sets = open_split(source.train, whole, config.data.crop_area), open_split(source.val, mine, None)

    def train(self, steps: range) -> Iterator[Batch]:
        for share, images, targets in self.sets[0].read(self._together(steps)):
            yield from Batch(self.normalize(self.augment(images, share)), targets).split(len(targets) // self.steps.share)

    def _together(self, steps: range) -> Iterator[Share]:
        """The shares of these steps. Small shares of several steps of one epoch are joined."""
        size = self.steps.share * math.prod(self.source.shape)
        most = max(1, min(TOGETHER, SMALL // size)) if isinstance(self.sets[0], Resident) else 1
        for epoch, shares in groupby(map(self.steps, steps), lambda share: share.epoch):
            while several := list(islice(shares, most)):
                yield Share(epoch, torch.cat([share.images for share in several]))

    def sample(self, pixels: int = 1 << 20) -> Tensor:
        """Training images without augmentation, evenly spaced, with about so many pixels in all; the same on each rank."""
        images, (_, height, width) = len(self.source.train), self.source.shape
        chosen = torch.arange(0, images, max(1, images * height * width // pixels))
        _, found, _ = next(iter(self.sets[0].read([Share(0, chosen)])))
        return self.normalize(found)

    def val(self, size: int) -> Iterator[Batch]:
        """This rank's range of the validation set, `size` images at a time."""
        shares = val_shares(len(self.source.val), self.steps.rank, self.steps.world, size)
        before = self._left_out()
        for _, images, targets in self.sets[1].read(shares):
            if len(images):
                yield Batch(self.normalize(images), targets)
        self.left_out = self._left_out() - before

    def _left_out(self) -> int:
        return self.sets[1].stream.left_out if isinstance(self.sets[1], Streamed) else 0

    def bad_images(self) -> list[str]:
        """Why images could not be used, of those that this rank has read."""
        return [why for each in self.sets if isinstance(each, Streamed) for why in each.stream.bad.values()]
