"""Image files, read by loader workers. A random crop is a function of (seed, epoch, image)."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distrib.data.pixels import pixels_of
from distrib.data.source import Files
from distrib.data.steps import CROP, fold, noise
from distrib.errors import UserError
from distrib.runtime.disk import cannot_be_read, is_temporary, try_again


@dataclass(frozen=True)
class Reader:
    """Reads image files: in each epoch a random crop, of at least the fraction `crop_area` of an image; the center if None."""

    files: Files
    seed: int = 0
    crop_area: float | None = None

    def read(self, epoch: int, numbers: list[int], images: Tensor) -> None:
        """Read the images with these numbers into `images`, (n, 3, height, width) uint8.

        Raises UserError if one is not an image, and DiskError if one cannot be read now.
        """
        draws = noise(fold(self.seed, CROP, epoch), torch.tensor(numbers), draws=4).tolist()
        for place, (number, drawn) in enumerate(zip(numbers, draws, strict=True)):
            images[place] = self._read(os.fsdecode(self.files.paths[number]), drawn)

    def _read(self, path: str, drawn: Sequence[float]) -> Tensor:
        spec, area = self.files.spec, self.crop_area
        choose = spec.center if area is None else lambda width, height: spec.random(width, height, area, drawn)
        try:
            return try_again(lambda: pixels_of(path, spec, choose))
        except UserError as error:
            raise UserError(f"{path} cannot be used: {error}") from None
        except (OSError, SyntaxError, ValueError) as error:
            if isinstance(error, OSError) and is_temporary(error):
                raise cannot_be_read(path, error) from None
            raise UserError(f"{path} cannot be read as an image: {error}") from None
