"""Noise on whole batches, on the device, on uint8: what happens to an image is a function of (seed, epoch, image)."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from distrib.config import DataConfig
from distrib.data.steps import AUGMENT, TURN, Share, fold, noise


@dataclass(frozen=True)
class Augment:
    """Moves, mirrors and blanks training images, (n, channels, height, width) uint8, as `config` says.

    What is blanked gets the `mean` of the images, (channels,) uint8.
    """

    config: DataConfig
    seed: int
    mean: Tensor

    def __call__(self, images: Tensor, share: Share) -> Tensor:
        shift, flip, erase = self.config.shift, self.config.flip, self.config.erase
        if not shift and flip == "none" and not erase:
            return images
        ids = share.images.to(images.device)
        down, right, side, row, column = noise(fold(self.seed, AUGMENT, share.epoch), ids, draws=5).unbind(1)
        mirror = None if flip == "none" else side < 0.5 if flip == "random" else self.turned(ids, share.epoch)
        if shift:
            images = moved(images, down, right, mirror, shift)
        elif mirror is not None:
            images = mirrored(images, mirror)
        return erased(images, row, column, erase, self.mean) if erase else images

    def turned(self, ids: Tensor, epoch: int) -> Tensor:
        """Whether an image is mirrored, (n,): half of them are in the first epoch, and each is in every other one.

        So two epochs in a row show both sides of each (Jordan, "94% on CIFAR-10 in 3.29 seconds on a single GPU", 2024).
        """
        return (noise(fold(self.seed, TURN), ids, draws=1)[:, 0] < 0.5) != bool(epoch % 2)


def moved(images: Tensor, down: Tensor, right: Tensor, mirror: Tensor | None, shift: int) -> Tensor:
    """Each image moved by up to `shift` pixels, black where it came from, and mirrored where `mirror` (n,) says so.

    `down` and `right`, (n,) in [0, 1), stand for -shift to shift. One gather does it all.
    """
    n, channels, height, width = images.shape
    rows = torch.arange(height, device=images.device) + (down[:, None] * (2 * shift + 1)).long()  # in the padded image
    columns = torch.arange(width, device=images.device)
    if mirror is not None:
        columns = torch.where(mirror[:, None], columns.flip(0), columns)
    columns = columns + (right[:, None] * (2 * shift + 1)).long()
    padded = F.pad(images, (shift,) * 4).flatten(2)
    pixels = rows[:, :, None] * (width + 2 * shift) + columns[:, None, :]
    return padded.gather(2, pixels.view(n, 1, -1).expand(n, channels, -1)).view(images.shape)


def mirrored(images: Tensor, mirror: Tensor) -> Tensor:
    """Each image, mirrored where `mirror` (n,) says so; without a gather, and on a CPU in half the time of torch.where."""
    sides = mirror[:, None, None, None]
    return images.flip(3) * sides + images * ~sides


def erased(images: Tensor, row: Tensor, column: Tensor, side: int, mean: Tensor) -> Tensor:
    """Each image with a square of `side` pixels of the `mean` around (row, column), each (n,) in [0, 1).

    DeVries and Taylor, "Improved regularization of convolutional neural networks with Cutout", 2017.
    """
    height, width = images.shape[2:]
    top, left = (row * height).long() - side // 2, (column * width).long() - side // 2
    rows = torch.arange(height, device=images.device) - top[:, None]
    columns = torch.arange(width, device=images.device) - left[:, None]
    square = ((rows >= 0) & (rows < side))[:, :, None] & ((columns >= 0) & (columns < side))[:, None, :]
    return torch.where(square[:, None], mean[:, None, None], images)


def views(images: Tensor, count: int) -> Iterator[tuple[float, Tensor]]:
    """What an evaluation shows of normalised images, with the weights that the logits get, which add up to 1.

    1 is the images; 2 also mirrors them; 6 also moves both by a pixel, up and left or down and right, with half the weight.
    """
    shown = [(1.0, images)]
    if count == 6:
        height, width = images.shape[2:]
        padded = F.pad(images, (1, 1, 1, 1), "replicate")
        shown += [(0.5, padded[:, :, :height, :width]), (0.5, padded[:, :, 2:, 2:])]
    for weight, each in shown:
        for side in (each, each.flip(3)) if count > 1 else (each,):
            yield weight / sum(other for other, _ in shown) / min(count, 2), side.contiguous(memory_format=torch.channels_last)


class Normalize:
    """Makes uint8 images (n, channels, height, width) floats of mean 0 and variance 1 in each channel, channels last.

    `mean` and `std`, (channels,), are those of pixels in [0, 1].
    """

    def __init__(self, mean: Tensor, std: Tensor, width: int) -> None:
        # Row by row: on a CPU, arithmetic along runs of three channels takes ten times as long.
        self.mean, self.std = (each.repeat(width) * 255 for each in (mean, std))

    def __call__(self, images: Tensor) -> Tensor:
        n, channels, height, width = images.shape
        rows = images.permute(0, 2, 3, 1).to(self.mean.dtype, memory_format=torch.contiguous_format).view(n, height, -1)
        return rows.sub_(self.mean).div_(self.std).view(n, height, width, channels).permute(0, 3, 1, 2)
