"""Image files, read by loader workers. A random crop is a function of (seed, epoch, image)."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from distrib.data.pixels import pixels_of
from distrib.data.source import Files
from distrib.data.steps import CROP, REPLACE, fold, noise
from distrib.errors import UserError
from distrib.runtime.disk import read_from

TRIES = 100  # images that may replace a bad one, of which all are bad too


class BadImage(NamedTuple):
    """An image that cannot be used, why, and the image that is shown instead; None if it is left out."""

    number: int
    why: str
    instead: int | None


@dataclass(frozen=True)
class Reader:
    """Reads image files: in each epoch a random crop, of at least the fraction `crop_area` of an image; the center if None.

    `skip`: a bad image is replaced by another one, a function of (seed, epoch, image); in validation it is left out.
    """

    files: Files
    seed: int = 0
    crop_area: float | None = None
    skip: bool = False

    def read(self, epoch: int, numbers: list[int], images: Tensor) -> dict[int, BadImage]:
        """Read the images with these numbers into `images`, (n, 3, height, width) uint8; returns the bad ones, by their place.

        Raises UserError if one is bad and not skipped, and DiskError if one cannot be read now.
        """
        found = dict[int, BadImage]()
        for place, (number, drawn) in enumerate(zip(numbers, self._draws(epoch, numbers), strict=True)):
            try:
                images[place] = self._read(number, drawn)
            except UserError as error:
                if not self.skip:
                    raise
                instead = None if self.crop_area is None else self._replace(epoch, number, images[place])
                found[place] = BadImage(number, str(error), instead)
        return found

    def _draws(self, epoch: int, numbers: list[int]) -> list[list[float]]:
        draws: list[list[float]] = noise(fold(self.seed, CROP, epoch), torch.tensor(numbers), draws=4).tolist()
        return draws

    def _replace(self, epoch: int, number: int, image: Tensor) -> int:
        """Read another image in place of a bad one; returns its number. Raises UserError."""
        key, count = fold(self.seed, REPLACE, epoch, number), len(self.files)
        candidates = (noise(key, torch.arange(TRIES), draws=1)[:, 0] * count).long().clamp_max(count - 1).tolist()
        for instead in candidates:
            with suppress(UserError):
                image.copy_(self._read(instead, self._draws(epoch, [instead])[0]))
                return int(instead)
        raise UserError(f"{self.files.name_of(number)} and {TRIES} images to replace it cannot be used: run distrib scan")

    def _read(self, number: int, drawn: Sequence[float]) -> Tensor:
        path, spec, area = self.files.name_of(number), self.files.spec, self.crop_area
        choose = spec.center if area is None else lambda width, height: spec.random(width, height, area, drawn)
        return read_image(path, lambda: pixels_of(path, spec, choose))


def read_image(path: str, read: Callable[[], Tensor]) -> Tensor:
    """What `read` reads of an image file. Raises UserError if the image cannot be used, and DiskError if not now."""
    try:
        return read_from(path, read)
    except UserError as error:
        raise UserError(f"{path} cannot be used: {error}") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{path} cannot be read as an image: {error}") from None
