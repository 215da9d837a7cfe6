"""The same data set on every rank; of one in memory, the ranks of a machine hold one copy.

The copy lies in files without a name, so /dev/shm may be small, and nothing is left behind: the kernel frees them with the last
process that maps them, however that ends.
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
from distrib.runtime.environment import launched_rank, local_rank, local_world

NONE = Arrays(torch.empty(0), torch.empty(0))


@dataclass(frozen=True)
class Offer:
    """Tensors that a process of some machine has in files: their descriptors there, and what they are."""

    process: int
    name: str  # of the files: no other process has any of that name
    files: tuple[int, ...]
    kinds: tuple[tuple[torch.Size, torch.dtype], ...]

    def tensors(self) -> list[Tensor]:
        """The tensors, in the same memory as everywhere: to be read only. Raises OSError if it is not of this machine."""
        paths = [f"/proc/{self.process}/fd/{file}" for file in self.files]
        if any(os.readlink(path) != f"/memfd:{self.name} (deleted)" for path in paths):
            raise FileNotFoundError(self.name)
        return [map_file(path, *kind) for path, kind in zip(paths, self.kinds, strict=True)]


def map_file(path: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    return torch.from_file(path, shared=True, size=math.prod(shape), dtype=dtype).view(shape)


def share(tensors: list[Tensor]) -> Offer:
    """A copy of tensors, for the other ranks of this machine. Raises OSError if it cannot be had; the files stay open."""
    name, files = f"distrib-{secrets.token_hex(8)}", []
    for tensor in tensors:
        files.append(os.memfd_create(name))
        os.posix_fallocate(files[-1], 0, tensor.nbytes)  # an error here, rather than a signal when it is written to
    offer = Offer(os.getpid(), name, tuple(files), tuple((each.shape, each.dtype) for each in tensors))
    for copy, tensor in zip(offer.tensors(), tensors, strict=True):
        copy.copy_(tensor)
    return offer


def load_shared(config: DataConfig) -> Source:
    """The data set, of which the ranks of a machine hold one copy, if it is in memory. Every rank must call this.

    Rank 0 downloads what is absent, and lists the files of a set of files: the others receive the list. A rank for which there
    is nothing to share loads a copy of its own. Raises UserError as `load_source` does.
    """
    source = ranks.rank0_first(lambda leads: load_source(config, download=True) if leads else None)
    in_memory = source is not None and isinstance(source.train, Arrays)
    outline = ranks.broadcast_object(replace(source, train=NONE, val=NONE) if source and in_memory else source)
    assert outline is not None
    if not isinstance(outline.train, Arrays):
        return outline

    offer = None
    if local_rank() == 0:
        source = source or load_source(config, download=False)
        if local_world() > 1:
            with suppress(OSError, AttributeError):  # AttributeError: a system that has no such files
                splits = [each for each in (source.train, source.val) if isinstance(each, Arrays)]
                offer = share([tensor for each in splits for tensor in (each.images, each.targets)])
    for each in ranks.all_gather_object(offer):
        with suppress(OSError, RuntimeError):
            if each and (source is None or each == offer):
                images, targets, *val = each.tensors()
                source = replace(outline, train=Arrays(images, targets), val=Arrays(*val))
    ranks.all_gather_object(None)  # until all have mapped them, the files stay open
    for file in offer.files if offer else ():
        os.close(file)
    return source or load_source(config, download=False)


def agreed_fingerprint(source: Source, *, own: bool) -> dict[str, Any]:
    """The fingerprint of the data, the same on all ranks. Every rank must call this. Raises UserError if one has other data.

    Each rank computes it of a source of its `own`; else one rank of each machine, whose copy all of them use, or rank 0 alone,
    which made the list of files.
    """
    computes = own or launched_rank() == 0 or (local_rank() == 0 and isinstance(source.train, Arrays))
    found = ranks.all_gather_object(source.fingerprint() if computes else None)
    assert found[0] is not None
    for rank, each in enumerate(found):
        if each and each != found[0]:
            differ = data_differences(found[0], each, ("on rank 0", f"on rank {rank}"))
            raise UserError(f"the ranks have other data: another {', '.join(differ)}")
    return found[0]
