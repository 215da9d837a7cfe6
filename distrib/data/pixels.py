"""From an image file to a network's pixels: orientation, color, crop and size. Training, evaluation and prediction use this."""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, PngImagePlugin
from torch import Tensor

from distrib.config import DataConfig
from distrib.errors import UserError, one_line

CENTER_CROP = 0.875  # fraction of the largest crop that validation shows, as in most ImageNet recipes
MARGIN = (124, 116, 104)  # the color around an image if fit=pad: the mean of ImageNet
DARK = 1 / 16  # a grey image whose values all lie below this fraction of white is refused: its white is probably another

ORIENTATION = 0x112  # the EXIF tag
# How an image is turned to stand upright: mirrored horizontally, then vertically, then transposed.
TURNS = {
    2: (True, False, False),
    3: (True, True, False),
    4: (False, True, False),
    5: (False, False, True),
    6: (False, True, True),
    7: (True, True, True),
    8: (True, False, True),
}
Turn = tuple[bool, bool, bool]
Box = tuple[int, int, int, int]  # left, top, right, bottom, in pixels

# Pillow refuses images of more than 179 million pixels, and PNG files with more than 1 MB of text. Ours is data.max_pixels.
Image.MAX_IMAGE_PIXELS = None
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 1 << 28


# Names of files that Pillow may decode; not of films, of science data, or of what needs other programs.
OTHERS = ("MPEG", "HDF5", "GRIB", "BUFR", "WMF", "EPS", "FITS")
Image.init()
SUFFIXES = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN and kind not in OTHERS}


@dataclass(frozen=True)
class ImageSpec:
    """How images become pixels.

    `fit`: an image of another shape is cropped, padded or stretched. `white`: the value of white in grey images of more than 8
    bits; 0: 65,535 in those of 16 bits, 1 in those of floats. `center_crop`: the fraction of the largest crop that validation
    shows, if images are cropped.
    """

    height: int
    width: int
    fit: Literal["crop", "pad", "stretch"] = "crop"
    white: float = 0.0
    max_pixels: int = 10**9
    center_crop: float = CENTER_CROP
    filter: Literal["bilinear", "bicubic"] = "bilinear"

    @classmethod
    def of(cls, config: DataConfig) -> "ImageSpec":
        """As a config says, where auto is what fits most networks."""
        part = CENTER_CROP if isinstance(config.center_crop, str) else config.center_crop
        how = "bilinear" if config.filter == "auto" else config.filter
        fit = "crop" if config.fit == "auto" else config.fit
        return cls(*config.height_and_width(), fit, config.white, config.max_pixels, part, how)

    def center(self, width: int, height: int) -> Box:
        """The box that validation shows: the center, or the whole image if it is not cropped."""
        if self.fit != "crop":
            return 0, 0, width, height
        largest = min(height, width * self.height / self.width)
        down, across = (max(1, round(side * self.center_crop)) for side in (largest, largest * self.width / self.height))
        left, top = (width - across) // 2, (height - down) // 2
        return left, top, left + across, top + down

    def random(self, width: int, height: int, least_area: float, drawn: Sequence[float]) -> Box:
        """Inception's random crop (Szegedy et al., 2015): area, ratio from 3:4 to 4:3, and place, from four numbers in [0, 1).

        If a crop of this area and ratio does not fit into the image, the area is kept and the ratio is changed. The ratio is
        relative to that of the network's pixels; if images are padded or stretched, it is the image's own.
        """
        area = width * height * (least_area + (1 - least_area) * drawn[0])
        ratio = math.exp(math.log(4 / 3) * (2 * drawn[1] - 1)) * (self.width / self.height)
        if self.fit != "crop":
            ratio = width / height
        ratio = min(max(ratio, area / height**2), width**2 / area)
        across, down = (max(1, round(side)) for side in (math.sqrt(area * ratio), math.sqrt(area / ratio)))
        left, top = int((width - across + 1) * drawn[2]), int((height - down + 1) * drawn[3])
        return left, top, left + across, top + down


def is_image(path: str) -> bool:
    """Whether the first bytes of a file are those of an image. Raises OSError if it cannot be read."""
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
            return image.format not in OTHERS
    except Exception as error:  # decoders raise errors of many kinds
        if isinstance(error, OSError) and error.errno:
            raise
        return False


def pixels_of(file: str | Path | IO[bytes], spec: ImageSpec, choose: Callable[[int, int], Box]) -> Tensor:
    """The pixels of an image file, (3, height, width) uint8. `choose(width, height)` returns the box that is shown.

    Raises OSError or ValueError if the file cannot be read or is no image, and UserError if it is one that cannot be shown.
    """
    with opened(file, spec, choose) as (image, turn):
        box = choose(*upright_size(image, turn))
        return resize(upright(decode(image, stored_box(box, turn, image.size), spec), turn), spec)


def picture_of(file: str | Path | IO[bytes], spec: ImageSpec) -> Tensor:
    """The whole picture, (height, width, 3) uint8, of which `pixels_of` shows the center. Raises as it does."""
    with opened(file, spec, spec.center) as (image, turn):
        return upright(decode(image, (0, 0, *image.size), spec), turn)


def center_of(picture: Tensor, spec: ImageSpec) -> Tensor:
    """The center of a whole picture, as `pixels_of` shows it: (3, height, width) uint8."""
    left, top, right, bottom = spec.center(picture.shape[1], picture.shape[0])
    return resize(picture[top:bottom, left:right], spec)


@contextmanager
def opened(
    file: str | Path | IO[bytes], spec: ImageSpec, choose: Callable[[int, int], Box]
) -> Iterator[tuple[Image.Image, Turn | None]]:
    """An image file, to be decoded as small as the box that is chosen allows, and how it is turned to stand upright."""
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(file) as image:  # of damaged tags, which do no harm
            if image.width * image.height > spec.max_pixels:
                size = f"{image.width:,} x {image.height:,} pixels"
                raise UserError(f"it has {size}, more than data.max_pixels={spec.max_pixels:,}")
            image.decodermaxblock = 1 << 20  # bytes: most files are then read at once, and not 64 kB at a time
            turn = turn_of(image)
            reduce(image, stored_box(choose(*upright_size(image, turn)), turn, image.size), spec, turned=bool(turn and turn[2]))
            yield image, turn
    except (OSError, ValueError, MemoryError):
        raise
    except Exception as error:  # decoders raise errors of many kinds for damaged files
        raise ValueError(f"{type(error).__name__}: {one_line(error)}") from None


def upright_size(image: Image.Image, turn: Turn | None) -> tuple[int, int]:
    """The width and height of an image when it stands upright."""
    return image.size[::-1] if turn and turn[2] else image.size


def turn_of(image: Image.Image) -> Turn | None:
    """How an image is turned to stand upright, by its EXIF tag; None if it stands so already."""
    if image.format == "TIFF":
        return None  # Pillow turns these itself
    try:
        return TURNS.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # Pillow raises many kinds of errors for a damaged tag, which does not damage the image
        return None


def stored_box(box: Box, turn: Turn | None, size: tuple[int, int]) -> Box:
    """A box in the upright image as a box in the image as it is stored, which has this width and height."""
    if turn is None:
        return box
    mirror, flip, transpose = turn
    left, top, right, bottom = (box[1], box[0], box[3], box[2]) if transpose else box
    if mirror:
        left, right = size[0] - right, size[0] - left
    if flip:
        top, bottom = size[1] - bottom, size[1] - top
    return left, top, right, bottom


def upright(pixels: Tensor, turn: Turn | None) -> Tensor:
    """Turn (height, width, 3)."""
    if turn is None:
        return pixels
    mirror, flip, transpose = turn
    pixels = pixels.flip([axis for axis, wanted in ((1, mirror), (0, flip)) if wanted])
    return pixels.transpose(0, 1) if transpose else pixels


def reduce(image: Image.Image, box: Box, spec: ImageSpec, *, turned: bool = False) -> None:
    """Have a JPEG decoded at 1/2, 1/4 or 1/8 of its size if at least twice the requested size of `box` remains.

    With fewer pixels, rounding the edges of a box to whole pixels would visibly move them. `turned`: the image's rows are
    columns of the result.
    """
    (width, height), (left, top, right, bottom) = image.size, box
    across, down = (spec.height, spec.width) if turned else (spec.width, spec.height)
    if spec.fit == "pad":  # then one side is not filled
        scale = min(across / (right - left), down / (bottom - top))
        across, down = math.ceil((right - left) * scale), math.ceil((bottom - top) * scale)
    image.draft("RGB", (math.ceil(width * 2 * across / (right - left)), math.ceil(height * 2 * down / (bottom - top))))


def decode(image: Image.Image, box: Box, spec: ImageSpec) -> Tensor:
    """The part of an image inside `box`: (height, width, 3) uint8."""
    grey = values_of_grey(image, spec)
    crop = image.crop(box)
    if grey:
        return grey(np.array(crop))
    if crop.has_transparency_data:
        crop = crop.convert("RGBA")
        crop = Image.alpha_composite(Image.new("RGBA", crop.size, "white"), crop)
    return torch.from_numpy(np.array(crop if crop.mode == "RGB" else crop.convert("RGB")))


def values_of_grey(image: Image.Image, spec: ImageSpec) -> Callable[[Any], Tensor] | None:
    """How the values of a grey image of more than 8 bits become pixels; None for other images. Raises UserError."""
    sixteen = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")
    if not sixteen and image.mode not in ("I", "F"):
        return None
    values = np.asarray(image)  # Pillow's own getextrema does not know all kinds
    low, high = values.min().item(), values.max().item()
    white = spec.white or (65535 if sixteen else 1 if image.mode == "F" and low >= 0 and high <= 1 else 0)
    if not white or (high < DARK * white and not spec.white):
        kind = "grey values" if not white else f"grey values below {DARK:.0%} of the largest possible one, {white:,}"
        raise UserError(f"it has {kind}, from {low:g} to {high:g}: set data.white to the value that is white")

    def shown(values: Any) -> Tensor:
        # The upper 8 bits of 16: as exact as the division, and what earlier versions did.
        grey = values >> 8 if sixteen and not spec.white else (values.clip(0, white) * (255 / white)).round()
        return torch.from_numpy(grey.astype(np.uint8))[..., None].expand(-1, -1, 3)

    return shown


def resize(pixels: Tensor, spec: ImageSpec) -> Tensor:
    """Resize (height, width, 3) uint8 to (3, height, width), with the filter of Pillow's resize in a quarter of its time."""
    height, width = spec.height, spec.width
    if spec.fit == "pad":
        scale = min(height / pixels.shape[0], width / pixels.shape[1])
        height, width = (max(1, round(side * scale)) for side in pixels.shape[:2])
    found = F.interpolate(pixels[None].permute(0, 3, 1, 2), (height, width), mode=spec.filter, antialias=True)[0]
    if (height, width) == (spec.height, spec.width):
        return found
    padded = torch.tensor(MARGIN, dtype=torch.uint8)[:, None, None].repeat(1, spec.height, spec.width)
    top, left = (spec.height - height) // 2, (spec.width - width) // 2
    padded[:, top : top + height, left : left + width] = found
    return padded
