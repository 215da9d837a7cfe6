"""The same data set on all ranks. The ranks of a machine share one copy of images in memory.

The copy is in anonymous files (memfd), so /dev/shm may be small. The kernel frees them when the last process that maps them
ends, in whatever way.
"""

import math
import os
import secrets
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from distrib.config import DataConfig
from distrib.data.datasets import load_source
from distrib.data.source import Arrays, Source, data_differences
from distrib.errors import UserError
from distrib.runtime import ranks
from distrib.runtime.environment import env_local_rank, env_local_world_size, env_rank

NONE = Arrays(torch.empty(0), torch.empty(0))


@dataclass(frozen=True)
class Offer:
    """Tensors in the anonymous files of a process: its file descriptors, and the shape and type of each tensor."""

    process: int
    name: str  # of the files; unique
    files: tuple[int, ...]
    kinds: tuple[tuple[torch.Size, torch.dtype], ...]

    def tensors(self) -> list[Tensor]:
        """The tensors in shared memory: read them only. Raises OSError if the process is on another machine."""
        paths = [f"/proc/{self.process}/fd/{file}" for file in self.files]
        if any(os.readlink(path) != f"/memfd:{self.name} (deleted)" for path in paths):
            raise FileNotFoundError(self.name)
        return [map_file(path, *kind) for path, kind in zip(paths, self.kinds, strict=True)]


def map_file(path: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    return torch.from_file(path, shared=True, size=math.prod(shape), dtype=dtype).view(shape)


def copy_to_shared_memory(tensors: list[Tensor]) -> Offer:
    """Copy tensors to shared memory, for the other ranks of this machine. The files stay open. Raises OSError."""
    name, files = f"distrib-{secrets.token_hex(8)}", []
    for tensor in tensors:
        files.append(os.memfd_create(name))
        os.posix_fallocate(files[-1], 0, tensor.nbytes)  # raises an error here; writing without memory would be a SIGBUS
    offer = Offer(os.getpid(), name, tuple(files), tuple((each.shape, each.dtype) for each in tensors))
    for copy, tensor in zip(offer.tensors(), tensors, strict=True):
        copy.copy_(tensor)
    return offer


def load_shared(config: DataConfig) -> Source:
    """Load the data set; the ranks of a machine share one copy of images in memory. Every rank must call this.

    Rank 0 downloads what is missing. It also lists image files, and sends the list to the other ranks. A rank that finds no
    shared copy loads its own. Raises UserError as `load_source` does.
    """
    source = ranks.rank0_first(lambda rank0: load_source(config, download=True) if rank0 else None)
    in_memory = source is not None and isinstance(source.train, Arrays)
    outline = ranks.broadcast_object(replace(source, train=NONE, val=NONE) if source and in_memory else source)
    assert outline is not None
    if not isinstance(outline.train, Arrays):
        return outline

    offer = None
    if env_local_rank() == 0:
        source = source or load_source(config, download=False)
        if env_local_world_size() > 1:
            with suppress(OSError, AttributeError):  # AttributeError: a system without memfd
                splits = [each for each in (source.train, source.val) if isinstance(each, Arrays)]
                offer = copy_to_shared_memory([tensor for each in splits for tensor in (each.images, each.targets)])
    for each in ranks.all_gather_object(offer):
        with suppress(OSError, RuntimeError):
            if each and (source is None or each == offer):
                images, targets, *val = each.tensors()
                source = replace(outline, train=Arrays(images, targets), val=Arrays(*val))
    ranks.all_gather_object(None)  # the files stay open until all ranks have mapped them
    for file in offer.files if offer else ():
        os.close(file)
    return source or load_source(config, download=False)


def agreed_fingerprint(source: Source, *, own: bool, skip: bool) -> dict[str, Any]:
    """The fingerprint of the data. Every rank must call this. Raises UserError if the data differ between ranks.

    A source of a rank's `own` is hashed on each rank. Shared images in memory are hashed by one rank of each machine, and a
    list of files by rank 0, which made it; a file may be missing if bad images are skipped.
    """
    computes = own or env_rank() == 0 or (env_local_rank() == 0 and isinstance(source.train, Arrays))
    found = ranks.all_gather_object(source.fingerprint(skip=skip) if computes else None)
    assert found[0] is not None
    for rank, each in enumerate(found):
        if each and each != found[0]:
            differ = data_differences(found[0], each, ("on rank 0", f"on rank {rank}"))
            raise UserError(f"the data differ between ranks: another {', '.join(differ)}")
    return found[0]
