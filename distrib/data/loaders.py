"""Batches on the device: the images of each step, whether their set is in memory or workers read it from files."""

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from distrib.config import Config, UserError
from distrib.data.augment import Augment, normalized
from distrib.data.files import Reader
from distrib.data.sources import Arrays, Source
from distrib.data.steps import Share, Steps, contiguous
from distrib.interrupt import guard_worker, stack_report

Read = tuple[Share, Tensor, Tensor]  # a share, its images (uint8) and labels, on the device


class Batch(NamedTuple):
    """Normalised images, (n, channels, height, width) float32, channels last, and labels, (n,) int64, on the device."""

    images: Tensor
    labels: Tensor


class Resident:
    """A set that is on the device as a whole."""

    def __init__(self, arrays: Arrays, device: torch.device) -> None:
        self.images, self.labels = arrays.images.to(device), arrays.labels.to(device)

    def read(self, shares: Iterable[Share]) -> Iterator[Read]:
        for share in shares:
            chosen = share.images.to(self.labels.device)
            yield share, self.images[chosen], self.labels[chosen]


class Streamed:
    """A set of files, which worker processes read ahead."""

    def __init__(self, reader: Reader, device: torch.device, workers: int, report: Path) -> None:
        self.reader, self.device, self.workers = reader, device, workers
        self.guard = partial(guard_worker, report=report)

    def read(self, shares: Iterable[Share]) -> Iterator[Read]:
        reader: Any = self.reader  # has __getitem__, which is all that is asked of a data set whose sampler yields shares
        pinned = self.device.type == "cuda"
        options: Any = {"num_workers": self.workers, "worker_init_fn": self.guard, "pin_memory": pinned}
        for read in DataLoader(reader, sampler=shares, batch_size=None, **options):
            if isinstance(read, UserError):
                raise read
            share, images, labels = read
            yield share, images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)


class Loader:
    """Batches for training by step, and for validation in order. Every rank has its own, which gives its shares only."""

    def __init__(self, source: Source, config: Config, steps: Steps, device: torch.device) -> None:
        self.source, self.steps, self.device = source, steps, device
        self.augment = Augment(config.data, config.seed)
        workers, report = config.data.workers, stack_report(config.run_dir, steps.rank)
        self.sets = [
            Resident(images, device)
            if isinstance(images, Arrays)
            else Streamed(Reader(images, config.seed, crop_area), device, workers, report)
            for images, crop_area in ((source.train, config.data.crop_area), (source.val, None))
        ]
        self.mean, self.std = (torch.tensor(each, device=device).view(-1, 1, 1) for each in (source.mean, source.std))

    def train(self, steps: range) -> Iterator[Batch]:
        for share, images, labels in self.sets[0].read(map(self.steps, steps)):
            yield Batch(normalized(self.augment(images, share), self.mean, self.std), labels)

    def sample(self, pixels: int = 1 << 20) -> Tensor:
        """Training images without noise, evenly spread over the set, of about so many pixels: the same for each rank."""
        images, (_, height, width) = len(self.source.train), self.source.shape
        chosen = torch.arange(0, images, max(1, images * height * width // pixels))
        _, found, _ = next(iter(self.sets[0].read([Share(0, chosen)])))
        return normalized(found, self.mean, self.std)

    def val(self, size: int) -> Iterator[Batch]:
        """This rank's part of the validation set, `size` images at a time."""
        shares = contiguous(len(self.source.val), self.steps.rank, self.steps.world, size)
        for _, images, labels in self.sets[1].read(shares):
            yield Batch(normalized(images, self.mean, self.std), labels)
