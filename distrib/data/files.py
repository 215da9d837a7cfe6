"""Image files of any size, decoded and brought to one size by loader workers; the crop of an image is keyed by the image."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from distrib.config import UserError
from distrib.data.steps import CROP, Share, fold, noise

VIEW = 0.875  # of the shorter side: what validation shows, as in most ImageNet recipes

Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels


@dataclass(frozen=True)
class Files:
    """Image files and their labels, (n,) int64, to be read as squares of `size` pixels."""

    paths: Sequence[str]
    labels: Tensor
    size: int

    def __len__(self) -> int:
        return len(self.paths)


@dataclass(frozen=True)
class Reader:
    """Reads the images of a share: as torch's DataLoader wants it, `reader[share]`.

    With `crop_area` the view of an image is drawn anew each epoch, and shows at least that part of its area; without, it is
    the middle. A file that is no image is returned as the UserError that names it, since a worker's exceptions would
    reach the user as a traceback.
    """

    files: Files
    seed: int = 0
    crop_area: float | None = None

    def __getitem__(self, share: Share) -> tuple[Share, Tensor, Tensor] | UserError:
        draws = noise(fold(self.seed, CROP, share.epoch), share.images, draws=4).tolist()
        images = torch.empty(len(share.images), 3, self.files.size, self.files.size, dtype=torch.uint8)
        try:
            for place, (index, drawn) in enumerate(zip(share.images.tolist(), draws, strict=True)):
                images[place] = self._read(self.files.paths[index], drawn)
        except UserError as error:
            return error
        return share, images, self.files.labels[share.images]

    def _read(self, path: str, drawn: Sequence[float]) -> Tensor:
        size = (self.files.size, self.files.size)
        try:
            with Image.open(path) as image:
                image.draft("RGB", size)  # lets JPEG decode at a half, a quarter or an eighth where that is enough
                box = middle(*image.size) if self.crop_area is None else random_box(*image.size, self.crop_area, drawn)
                pixels = np.asarray(image.convert("RGB").resize(size, Image.Resampling.BILINEAR, box))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise UserError(f"{path} cannot be read as an image: {error}") from None
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


def middle(width: int, height: int) -> Box:
    side = min(width, height) * VIEW
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def random_box(width: int, height: int, least_area: float, drawn: Sequence[float]) -> Box:
    """Inception's crop (Szegedy et al., 2015): an area, a ratio of 3:4 to 4:3 and a place, from four numbers in [0, 1)."""
    area = width * height * (least_area + (1 - least_area) * drawn[0])
    ratio = math.exp(math.log(4 / 3) * (2 * drawn[1] - 1))
    across, down = min(math.sqrt(area * ratio), width), min(math.sqrt(area / ratio), height)
    left, top = (width - across) * drawn[2], (height - down) * drawn[3]
    return left, top, left + across, top + down
