"""One copy of a data set in memory for all ranks of a machine.

It lies in files without a name, so /dev/shm may be small, and nothing is left behind: the kernel frees them with the last
process that maps them, however that ends.
"""

import math
import os
import secrets
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distrib import ranks
from distrib.config import DataConfig
from distrib.data.sources import Arrays, Source, load_source

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
        return [mapped(path, *kind) for path, kind in zip(paths, self.kinds, strict=True)]


def mapped(path: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    return torch.from_file(path, shared=True, size=math.prod(shape), dtype=dtype).view(shape)


def offered(tensors: list[Tensor]) -> Offer:
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

    Rank 0 downloads what is absent. A rank for which there is nothing to share loads a copy of its own. Raises UserError as
    `load_source` does.
    """
    source = ranks.first(lambda leads: load_source(config, download=True) if leads else None)
    outline = ranks.agreed(replace(source, train=NONE, val=NONE) if source and isinstance(source.train, Arrays) else None)
    if outline is None:  # a set of files, of which each rank has the list
        return source or load_source(config, download=False)

    offer = None
    if ranks.from_environment("LOCAL_RANK", default=0) == 0:
        source = source or load_source(config, download=False)
        if ranks.from_environment("LOCAL_WORLD_SIZE", default=1) > 1:
            with suppress(OSError, AttributeError):  # AttributeError: a system that has no such files
                sets = [each for each in (source.train, source.val) if isinstance(each, Arrays)]
                offer = offered([tensor for each in sets for tensor in (each.images, each.labels)])
    for each in ranks.gathered(offer):
        with suppress(OSError, RuntimeError):
            if each and (source is None or each == offer):
                images, labels, *val = each.tensors()
                source = replace(outline, train=Arrays(images, labels), val=Arrays(*val))
    ranks.gathered(None)  # until all have mapped them, the files stay open
    for file in offer.files if offer else ():
        os.close(file)
    return source or load_source(config, download=False)
