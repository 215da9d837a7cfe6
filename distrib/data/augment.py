"""Augmentation of whole uint8 batches, on the device. An image's augmentation is a function of (seed, epoch, image)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from distrib.config import DataConfig
from distrib.data.steps import AUGMENT, FLIP, VERTICAL_FLIP, Share, fold, noise


@dataclass(frozen=True)
class Augment:
    """Translates, flips and cuts out training images, (n, channels, height, width) uint8, as `config` says.

    Cut out pixels get the `mean` of the data set, (channels,) uint8.
    """

    config: DataConfig
    seed: int
    mean: Tensor

    def __call__(self, images: Tensor, share: Share) -> Tensor:
        most, flip, side = self.config.translate, self.config.flip, self.config.cutout
        if not most and flip == "none" and not side:
            return images  # all of this class's work is left out, so each augmentation is named here
        ids = share.images.to(images.device)
        # The numbers depend on `draws` too: with one more draw, all of them change.
        down, right, half, row, column = noise(fold(self.seed, AUGMENT, share.epoch), ids, draws=5).unbind(1)
        mirror = None if flip == "none" else self.alternates(ids, share.epoch) if flip == "alternating" else half < 0.5
        if most:
            images = translate(images, down, right, mirror, most)
        elif mirror is not None:
            images = flip_where(images, mirror, axis=3)
        if flip == "both":
            upside_down = noise(fold(self.seed, VERTICAL_FLIP, share.epoch), ids, draws=1)[:, 0] < 0.5
            images = flip_where(images, upside_down, axis=2)
        return cutout(images, row, column, side, self.mean) if side else images

    def alternates(self, ids: Tensor, epoch: int) -> Tensor:
        """Which images are mirrored, (n,): half of them in the first epoch, and each image in every second epoch.

        Two epochs in a row show both sides of each image (Jordan, "94% on CIFAR-10 in 3.29 seconds on a single GPU", 2024).
        """
        return (noise(fold(self.seed, FLIP), ids, draws=1)[:, 0] < 0.5) != bool(epoch % 2)


def translate(images: Tensor, down: Tensor, right: Tensor, mirror: Tensor | None, most: int) -> Tensor:
    """Shift each image by up to `most` pixels, filling with black, and mirror it where `mirror` (n,) is true.

    `down` and `right`, (n,) in [0, 1), are mapped to -most to most. It takes a single gather.
    """
    n, channels, height, width = images.shape
    rows = torch.arange(height, device=images.device) + (down[:, None] * (2 * most + 1)).long()  # in the padded image
    columns = torch.arange(width, device=images.device)
    if mirror is not None:
        columns = torch.where(mirror[:, None], columns.flip(0), columns)
    columns = columns + (right[:, None] * (2 * most + 1)).long()
    padded = F.pad(images, (most,) * 4).flatten(2)
    pixels = rows[:, :, None] * (width + 2 * most) + columns[:, None, :]
    return padded.gather(2, pixels.view(n, 1, -1).expand(n, channels, -1)).view(images.shape)


def flip_where(images: Tensor, which: Tensor, axis: int) -> Tensor:
    """Flip each image along an axis where `which` (n,) is true. On a CPU this takes half the time of torch.where."""
    which = which[:, None, None, None]
    return images.flip(axis) * which + images * ~which


def cutout(images: Tensor, row: Tensor, column: Tensor, side: int, mean: Tensor) -> Tensor:
    """Fill a square of `side` pixels around (row, column), each (n,) in [0, 1), with the `mean`.

    DeVries and Taylor, "Improved regularization of convolutional neural networks with Cutout", 2017.
    """
    height, width = images.shape[2:]
    top, left = (row * height).long() - side // 2, (column * width).long() - side // 2
    rows = torch.arange(height, device=images.device) - top[:, None]
    columns = torch.arange(width, device=images.device) - left[:, None]
    square = ((rows >= 0) & (rows < side))[:, :, None] & ((columns >= 0) & (columns < side))[:, None, :]
    return torch.where(square[:, None], mean[:, None, None], images)


def tta_views(images: Tensor, count: int) -> Iterator[tuple[float, Tensor]]:
    """The views of normalised images for test-time augmentation, each with the weight of its logits; weights add up to 1.

    1: the images; 2: also their mirror images; 6: also both shifted by a pixel, up and left or down and right, at half weight.
    """
    shown = [(1.0, images)]
    if count == 6:
        height, width = images.shape[2:]
        padded = F.pad(images, (1, 1, 1, 1), "replicate")
        shown += [(0.5, padded[:, :, :height, :width]), (0.5, padded[:, :, 2:, 2:])]
    for weight, each in shown:
        for side in (each, each.flip(3)) if count > 1 else (each,):
            yield weight / sum(other for other, _ in shown) / min(count, 2), side.contiguous(memory_format=torch.channels_last)


def mean_logits(network: Callable[[Tensor], Tensor], images: Tensor, views: int) -> Tensor:
    """The logits of normalised images, (n, classes), averaged over so many views of each."""
    return torch.stack([weight * network(view).float() for weight, view in tta_views(images, views)]).sum(0)


class Normalize:
    """Converts uint8 images (n, channels, height, width) to floats of mean 0 and variance 1 per channel, channels last.

    `mean` and `std`, (channels,), are for pixels in [0, 1].
    """

    def __init__(self, mean: Tensor, std: Tensor, width: int) -> None:
        # Whole rows: on a CPU, arithmetic on three channels at a time takes ten times as long.
        self.mean, self.std = (each.repeat(width) * 255 for each in (mean, std))

    def __call__(self, images: Tensor) -> Tensor:
        n, channels, height, width = images.shape
        rows = images.permute(0, 2, 3, 1).to(self.mean.dtype, memory_format=torch.contiguous_format).view(n, height, -1)
        return rows.sub_(self.mean).div_(self.std).view(n, height, width, channels).permute(0, 3, 1, 2)
