"""Image files, decoded, cropped and resized by loader workers. A crop is a function of (seed, epoch, image)."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from distrib.data.source import Files
from distrib.data.steps import CROP, fold, noise
from distrib.errors import UserError
from distrib.runtime.disk import cannot_be_read, is_temporary, try_again

VIEW = 0.875  # fraction of the shorter side that validation shows, as in most ImageNet recipes

Box = tuple[int, int, int, int]  # left, top, right, bottom, in pixels


@dataclass(frozen=True)
class Reader:
    """Reads image files: in each epoch a random crop, of at least the fraction `crop_area` of an image; the center if None."""

    files: Files
    seed: int = 0
    crop_area: float | None = None

    def read(self, epoch: int, numbers: list[int], images: Tensor) -> None:
        """Read the images with these numbers into `images`, (n, 3, size, size) uint8.

        Raises UserError if one is not an image, and DiskError if one cannot be read now.
        """
        draws = noise(fold(self.seed, CROP, epoch), torch.tensor(numbers), draws=4).tolist()
        for place, (number, drawn) in enumerate(zip(numbers, draws, strict=True)):
            images[place] = self._read(os.fsdecode(self.files.paths[number]), drawn)

    def _read(self, path: str, drawn: Sequence[float]) -> Tensor:
        try:
            return try_again(lambda: self._decode(path, drawn))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            if isinstance(error, OSError) and is_temporary(error):
                raise cannot_be_read(path, error) from None
            raise UserError(f"{path} cannot be read as an image: {error}") from None

    def _decode(self, path: str, drawn: Sequence[float]) -> Tensor:
        with Image.open(path) as image:
            image.decodermaxblock = 1 << 20  # bytes: most files are then read at once, and not 64 kB at a time
            box = center_box(*image.size) if self.crop_area is None else random_box(*image.size, self.crop_area, drawn)
            return resize(decode(image, box, self.files.size), self.files.size)


def decode(image: Image.Image, box: Box, size: int) -> Tensor:
    """The part of an image inside `box`: (height, width, 3) uint8.

    A JPEG is decoded at 1/2, 1/4 or 1/8 of its size if at least twice the requested `size` remains. With fewer pixels, rounding
    the edges of the box to whole pixels would visibly move them.
    """
    size *= 2
    (width, height), (left, top, right, bottom) = image.size, box
    image.draft("RGB", (math.ceil(width * size / (right - left)), math.ceil(height * size / (bottom - top))))
    across, down = image.width / width, image.height / height
    crop = image.crop((round(left * across), round(top * down), round(right * across), round(bottom * down)))
    if crop.mode.startswith("I"):  # 16-bit grey: Pillow's conversion would clip it at 255
        return torch.from_numpy((np.array(crop) >> 8).astype(np.uint8))[..., None].expand(-1, -1, 3)
    return torch.from_numpy(np.array(crop if crop.mode == "RGB" else crop.convert("RGB")))


def resize(pixels: Tensor, size: int) -> Tensor:
    """Resize (height, width, 3) uint8 to (3, size, size), with the filter of Pillow's resize in a quarter of its time."""
    return F.interpolate(pixels[None].permute(0, 3, 1, 2), (size, size), mode="bilinear", antialias=True)[0]


def center_box(width: int, height: int) -> Box:
    side = max(1, round(min(width, height) * VIEW))
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def random_box(width: int, height: int, least_area: float, drawn: Sequence[float]) -> Box:
    """Inception's random crop (Szegedy et al., 2015): area, ratio from 3:4 to 4:3, and place, from four numbers in [0, 1).

    If a crop of this area and ratio does not fit into the image, the area is kept and the ratio is changed.
    """
    area = width * height * (least_area + (1 - least_area) * drawn[0])
    ratio = math.exp(math.log(4 / 3) * (2 * drawn[1] - 1))
    ratio = min(max(ratio, area / height**2), width**2 / area)
    across, down = (max(1, round(side)) for side in (math.sqrt(area * ratio), math.sqrt(area / ratio)))
    left, top = int((width - across + 1) * drawn[2]), int((height - down + 1) * drawn[3])
    return left, top, left + across, top + down
