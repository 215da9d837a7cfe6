"""The images of a step and their random numbers: pure functions of (seed, step).

They do not depend on the number of ranks or workers, on the device, or on interruptions. Only dropout's seed includes the rank,
since a layer draws its numbers in its own order and does not know which images it sees.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from distrib.config import refuse_uneven
from distrib.errors import UserError

# Each use of random numbers has its own stream. The values are part of every run: add new ones at the end. FLIP is that of
# alternating flips; random ones of left and right take a number of AUGMENT.
ORDER, AUGMENT, CROP, DROPOUT, FLIP, REPLACE, VERTICAL_FLIP = range(7)

GOLDEN = 0x9E3779B97F4A7C15
MIX = (30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)  # shifts and factors of SplitMix64
MASK = (1 << 64) - 1


def fold(*numbers: int) -> int:
    """Hash several numbers, such as (seed, stream, epoch), to one 64-bit number."""
    folded = 0
    for number in numbers:
        folded = ((folded ^ number) + GOLDEN) & MASK
        for shift, factor in MIX:
            folded = ((folded ^ (folded >> shift)) * factor) & MASK
        folded ^= folded >> 31
    return folded


def hashes(key: int, counters: Tensor) -> Tensor:
    """SplitMix64 at the positions `counters` (int64, any shape) of the stream `key`: int64, the same on every device.

    A counter-based generator (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014) computes number i
    without the numbers before it. So the random numbers of an image depend on the key and its index only.
    """
    x = counters * _signed(GOLDEN) + _signed(key)
    for shift, factor in MIX:
        x = (x ^ _shifted(x, shift)) * _signed(factor)
    return x ^ _shifted(x, 31)


def _signed(number: int) -> int:
    return ((number + (1 << 63)) & MASK) - (1 << 63)


def _shifted(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # a logical shift; torch's >> repeats the sign


def noise(key: int, images: Tensor, draws: int) -> Tensor:
    """Uniform numbers in [0, 1), (n, draws) float32, for `images` (n,), which are indices in the data set."""
    counters = images[:, None] * draws + torch.arange(draws, device=images.device)
    return ((hashes(key, counters) >> 40) & 0xFFFFFF).float() / (1 << 24)  # 24 bits: the precision of float32


@lru_cache(maxsize=2)
def order(images: int, seed: int, epoch: int) -> Tensor:
    """The order of the images in an epoch: a permutation of range(images), sorted by hash."""
    return hashes(fold(seed, ORDER, epoch), torch.arange(images)).argsort(stable=True)


class Share(NamedTuple):
    """One rank's share of a batch: the epoch, for the random numbers, and the indices of its images, int64."""

    epoch: int
    images: Tensor


@dataclass(frozen=True)
class Steps:
    """The images of every step: step s is in epoch s // per_epoch, and rank r takes the r-th contiguous share of its batch.

    The remainder of images % batch_size is left out of an epoch; each epoch leaves out other images. Raises UserError if the
    batch does not divide among the ranks, or if there are fewer images than a batch has.
    """

    images: int
    batch_size: int
    seed: int
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        refuse_fewer_than_ranks(self.images, self.world, "training")
        if self.images < self.batch_size:
            raise UserError(
                f"batch_size {self.batch_size} is more than the {self.images} training images: use {self.images} or less"
            )
        refuse_uneven(self.batch_size, self.world)

    @property
    def per_epoch(self) -> int:
        return self.images // self.batch_size

    @property
    def share(self) -> int:
        """The number of images of a rank in each step."""
        return self.batch_size // self.world

    def of_rank(self, rank: int) -> "Steps":
        """The same steps for another rank."""
        return replace(self, rank=rank)

    def __call__(self, step: int) -> Share:
        epoch, batch = divmod(step, self.per_epoch)
        first = batch * self.batch_size + self.rank * self.share
        return Share(epoch, order(self.images, self.seed, epoch)[first : first + self.share])


def refuse_fewer_than_ranks(images: int, world: int, split: str) -> None:
    """Raise UserError if a split of the data has fewer images than there are ranks."""
    if images < world:
        raise UserError(f"{world} ranks are more than the {images} {split} images: use {images} or fewer")


def val_range(images: int, rank: int, world: int) -> range:
    """The range of validation images that a rank evaluates."""
    return range(rank * images // world, (rank + 1) * images // world)


def val_shares(images: int, rank: int, world: int, size: int) -> Iterator[Share]:
    """A rank's validation range in shares of `size` images. The last share may be smaller; there is no padding."""
    mine = val_range(images, rank, world)
    return (Share(0, torch.arange(first, min(first + size, mine.stop))) for first in mine[::size])
