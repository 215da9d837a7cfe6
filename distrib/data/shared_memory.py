"""Memory that a rank shares with its loader workers: an anonymous file (memfd), so /dev/shm may be small."""

import mmap
import os
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from distrib.data.pixels import ImageSpec


class Place(NamedTuple):
    """A range of bytes in a SharedMemory."""

    start: int
    size: int


class SharedMemory:
    """An anonymous file that several processes map. It only grows. The kernel frees it when the last process ends."""

    def __init__(self) -> None:
        self.file, self.size = os.memfd_create("distrib"), 0
        self.view = cache(self._view)

    def allocate(self, size: int) -> Place:
        """Add a range of bytes. Raises OSError."""
        place = Place(self.size, max(1, size))
        os.posix_fallocate(self.file, *place)  # raises an error here; writing without memory would be a SIGBUS
        self.size += -(-place.size // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        return place

    def put(self, data: bytes | memoryview) -> Place:
        place = self.allocate(len(data))
        self.view(place)[: len(data)] = data
        return place

    def _view(self, place: Place) -> memoryview:
        return memoryview(mmap.mmap(self.file, place.size, offset=place.start))

    def close(self) -> None:
        """Free the memory, when the last tensor in it is gone."""
        self.view.cache_clear()
        os.close(self.file)


def images_in(memory: memoryview, number: int, spec: ImageSpec) -> Tensor:
    """The first `number` images in shared memory: (number, 3, height, width) uint8, channels last."""
    flat = torch.frombuffer(memory, dtype=torch.uint8, count=number * spec.height * spec.width * 3)
    return flat.view(number, spec.height, spec.width, 3).permute(0, 3, 1, 2)
