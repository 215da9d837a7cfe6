"""Batches on the device: the images of each step, whether their set is in memory or workers read it from files."""

import math
import sys
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import chain, groupby, islice, tee
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from distrib.config import Config
from distrib.data.augment import Augment, Normalize
from distrib.data.files import Chunk, Reader
from distrib.data.source import Arrays, Files, Source
from distrib.data.steps import Share, Steps, val_range, val_shares
from distrib.errors import UserError
from distrib.runtime.signals import guard_worker
from distrib.runtime.stacks import stack_report

AUTO_FRACTION = 0.25  # of a device's free memory: what a set may take there if it is not told where to be
# How workers are started. The server that Python 3.14 has for that on Linux would die of a launcher's signal, and they with it.
START = "fork" if sys.platform == "linux" else None
AHEAD = 4  # shares that workers have read, or are reading, beyond the one that is computed
# Small shares of a set in memory are made together, so many and of so many bytes at most: a GPU's host takes as long for one.
TOGETHER, SMALL = 8, 2 << 20

Read = tuple[Share, Tensor, Tensor]  # a share, its images (uint8) and targets


class Batch(NamedTuple):
    """Normalised images, (n, channels, height, width) float32, channels last, and their targets, on the device.

    Targets are class ids, (n,) int64, or (n, classes) float.
    """

    images: Tensor
    targets: Tensor

    def split(self, count: int) -> "list[Batch]":
        """The batch as so many, which may be uneven by an image."""
        return list(map(Batch, *(each.tensor_split(count) for each in self))) if count > 1 else [self]


class Resident:
    """The images `mine` of a set in memory: the device's, or the machine's, from where each batch travels."""

    def __init__(self, arrays: Arrays, mine: range, where: str, device: torch.device) -> None:
        images, targets = arrays.images[mine.start : mine.stop], arrays.targets[mine.start : mine.stop]
        self.placement = placement(images.nbytes, where, device)
        self.images, self.targets = images.to(self.placement), targets.to(self.placement)  # on the CPU that is no copy
        self.first, self.device = mine.start, device

    def read(self, shares: Iterable[Share]) -> Iterator[Read]:
        reads = map(self._chosen, shares)
        return reads if self.placement == self.device else prefetch(reads, self.device)

    def _chosen(self, share: Share) -> Read:
        share = Share(share.epoch, to_device(share.images, self.placement))
        chosen = share.images - self.first
        return share, self.images[chosen], self.targets[chosen]


def placement(size: int, where: str, device: torch.device) -> torch.device:
    """Where a set of `size` bytes is kept, if data.resident is `where`."""
    if where == "auto" and device.type == "cuda":
        where = "device" if size <= AUTO_FRACTION * torch.cuda.mem_get_info(device)[0] else "host"
    return torch.device("cpu") if where == "host" else device


class ChunkQueue:
    """The chunks that the workers of a set are to read: others in each reading, while the workers stay."""

    def __init__(self) -> None:
        self.chunks: Iterable[Chunk] = ()

    def __iter__(self) -> Iterator[Chunk]:
        return iter(self.chunks)


class Streamed:
    """A set of files, which worker processes read ahead: each of them a chunk of every share. The first reading starts them."""

    def __init__(self, reader: Reader, device: torch.device, workers: int, report: Path) -> None:
        self.targets, self.device, self.workers, self.queue = reader.files.targets, device, workers, ChunkQueue()
        kept: Any = {"persistent_workers": True, "prefetch_factor": AHEAD, "multiprocessing_context": START} if workers else {}
        data: Any = reader  # has __getitem__, which is all that is asked of a data set whose sampler yields chunks
        guard = partial(guard_worker, report=report)
        self.loader = DataLoader(data, sampler=self.queue, batch_size=None, num_workers=workers, worker_init_fn=guard, **kept)

    def read(self, shares: Iterable[Share]) -> Iterator[Read]:
        return prefetch(self._read(shares), self.device)

    def _read(self, shares: Iterable[Share]) -> Iterator[Read]:
        shares, wanted = tee(shares)
        self.queue.chunks = chunks = (chunk for share in wanted for chunk in self._chunks_of(share))
        images = iter(self.loader)
        try:
            for share in shares:
                yield share, self._joined(list(islice(images, len(self._chunks_of(share))))), self.targets[share.images]
        finally:
            chunks.close()  # it knows who asks: workers of a set that only the garbage collector finds take 5 s each to end

    def _chunks_of(self, share: Share) -> list[Chunk]:
        chunks = min(max(1, self.workers), len(share.images))
        # As numbers, which take 0.3 ms to a worker: a tensor takes 1.6 ms, in shared memory of its own.
        return [(share.epoch, each.tolist()) for each in share.images.tensor_split(chunks)]

    def _joined(self, chunks: list[Tensor | UserError]) -> Tensor:
        whole = []
        for chunk in chunks:
            if isinstance(chunk, UserError):
                raise chunk
            whole.append(chunk)
        room = torch.empty(
            (sum(map(len, whole)), *whole[0].shape[1:]),
            dtype=torch.uint8,
            memory_format=torch.channels_last,
            pin_memory=self.device.type == "cuda",  # here, and not by a thread of the DataLoader, which would be one copy more
        )
        return torch.cat(whole, out=room)


def prefetch(reads: Iterable[Read], device: torch.device) -> Iterator[Read]:
    """What was read on the host, on the device: a batch travels, on a stream of its own, while the one before is computed."""
    if device.type != "cuda":
        yield from reads
        return
    cuda: Any = torch.cuda  # which is not typed
    side, under_way = cuda.Stream(device), None
    for read in chain(reads, [None]):
        arrived, here = under_way, cuda.current_stream(device)
        here.wait_stream(side)  # the device does, not the host
        with cuda.stream(side):
            under_way = on_device(read, device) if read else None
        if arrived:
            for tensor in (arrived[0].images, *arrived[1:]):
                tensor.record_stream(here)  # whose memory is not given away before `here` has used it
            yield arrived


def on_device(read: Read, device: torch.device) -> Read:
    share, images, targets = read
    return Share(share.epoch, to_device(share.images, device)), to_device(images, device), to_device(targets, device)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host, on the device; the host does not wait for it to arrive."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


class Loader:
    """Batches for training by step, and for validation in order. Every rank has its own, which gives its shares only."""

    def __init__(self, source: Source, config: Config, steps: Steps, device: torch.device) -> None:
        self.source, self.steps, self.device = source, steps, device
        mean, std = (torch.tensor(each, device=device) for each in (source.mean, source.std))
        self.augment = Augment(config.data, config.seed, (255 * mean).round().to(torch.uint8))
        self.normalize = Normalize(mean, std, width=source.shape[2])
        # An epoch's order reaches all images of the training set; an evaluation, this rank's range only.
        whole, mine = range(len(source.train)), val_range(len(source.val), steps.rank, steps.world)

        def open_split(images: Arrays | Files, mine: range, crop_area: float | None) -> Resident | Streamed:
            if isinstance(images, Arrays):
                return Resident(images, mine, config.data.resident, device)
            reader = Reader(images, config.seed, crop_area)
            return Streamed(reader, device, config.data.workers, stack_report(config.run_dir, steps.rank))

        self.sets = open_split(source.train, whole, config.data.crop_area), open_split(source.val, mine, None)

    def train(self, steps: range) -> Iterator[Batch]:
        for share, images, targets in self.sets[0].read(self._together(steps)):
            yield from Batch(self.normalize(self.augment(images, share)), targets).split(len(targets) // self.steps.share)

    def _together(self, steps: range) -> Iterator[Share]:
        """The shares of these steps, those of several in one where that is worth it and they are of one epoch."""
        size = self.steps.share * math.prod(self.source.shape)
        most = max(1, min(TOGETHER, SMALL // size)) if isinstance(self.sets[0], Resident) else 1
        for epoch, shares in groupby(map(self.steps, steps), lambda share: share.epoch):
            while several := list(islice(shares, most)):
                yield Share(epoch, torch.cat([share.images for share in several]))

    def sample(self, pixels: int = 1 << 20) -> Tensor:
        """Training images, neither moved nor mirrored, spread over the set, of about so many pixels: the same for each rank."""
        images, (_, height, width) = len(self.source.train), self.source.shape
        chosen = torch.arange(0, images, max(1, images * height * width // pixels))
        _, found, _ = next(iter(self.sets[0].read([Share(0, chosen)])))
        return self.normalize(found)

    def val(self, size: int) -> Iterator[Batch]:
        """This rank's range of the validation set, `size` images at a time."""
        shares = val_shares(len(self.source.val), self.steps.rank, self.steps.world, size)
        for _, images, targets in self.sets[1].read(shares):
            yield Batch(self.normalize(images), targets)
