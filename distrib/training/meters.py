"""Meters: numbers measured on logits and targets. Each is a sum over images, batches and ranks, divided once, at the end."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Sums = dict[str, Tensor]  # by the name of a meter: tensors of any shape


@dataclass(frozen=True)
class Meter:
    """A number to report: how it is summed over images, and how it is printed.

    `sums(logits, targets)` returns a tensor of any shape, summed over the images; it stays on the device. `value(sum, images)`
    turns the sum over all images, on the host, and their number into the reported number.
    """

    sums: Callable[[Tensor, Tensor], Tensor]
    value: Callable[[Tensor, float], float]
    form: str = "{:.2f} %"
    higher_is_better: bool = True
    least_classes: int = 1  # with fewer classes the meter is left out


def class_ids(targets: Tensor) -> Tensor:
    """The class of each image, (n,): for targets (n, classes), the class with the largest weight."""
    return targets if targets.dim() == 1 else targets.argmax(1)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in nats, summed over the images."""
    return F.cross_entropy(logits.float(), targets, reduction="sum")


def hits(logits: Tensor, targets: Tensor) -> Tensor:
    """The number of images whose largest logit is at their class."""
    return (logits.argmax(1) == class_ids(targets)).sum()


def images_and_hits(logits: Tensor, targets: Tensor) -> Tensor:
    """For each class its images, and how many of them have their largest logit there: (2, classes)."""
    ids, classes = class_ids(targets), logits.shape[1]
    found = torch.zeros(2, classes, dtype=torch.int64, device=logits.device)
    found[0].index_add_(0, ids, torch.ones_like(ids))
    found[1].index_add_(0, ids, (logits.argmax(1) == ids).long())
    return found


def hits_in_five(logits: Tensor, targets: Tensor) -> Tensor:
    """The number of images that have one of their five largest logits at their class."""
    return (logits.topk(5).indices == class_ids(targets)[:, None]).sum()


def mean(total: Tensor, images: float) -> float:
    return total.item() / images


def percent(total: Tensor, images: float) -> float:
    return 100 * total.item() / images


# The default meters of an objective, beside the loss.
METERS = {
    "top1": Meter(hits, percent),
    "top5": Meter(hits_in_five, percent, least_classes=6),
}


class Totals(NamedTuple):
    """Sums over a number of `images`, in float64, where counts are exact up to 2^53."""

    sums: Sums
    images: Tensor

    @classmethod
    def zero(cls, device: torch.device | str = "cpu") -> "Totals":
        """Totals over no images."""
        return cls({}, torch.zeros((), dtype=torch.float64, device=device))

    def plus(self, sums: Mapping[str, Tensor], images: int) -> "Totals":
        """Totals with the sums of more images added."""
        more = {name: each.double() for name, each in sums.items()}
        return Totals(
            {name: self.sums[name] + each if self.sums else each for name, each in more.items()}, self.images + images
        )

    def flat(self) -> Tensor:
        """All numbers in one vector, for one collective."""
        return torch.cat([each.reshape(-1) for each in (*self.sums.values(), self.images)])

    def with_values(self, flat: Tensor) -> "Totals":
        """Totals of the same shapes, from a vector that `flat` returned."""
        shapes = [each.shape for each in (*self.sums.values(), self.images)]
        pieces = torch.split(flat, [math.prod(shape) for shape in shapes])
        *values, images = (piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True))
        return Totals(dict(zip(self.sums, values, strict=True)), images)

    def values(self, meters: Mapping[str, Meter]) -> dict[str, float]:
        """The reported number of each meter; nan over no images. Waits for the device."""
        host = self.with_values(self.flat().cpu())
        images = host.images.item() or math.nan
        return {name: meter.value(host.sums[name], images) for name, meter in meters.items() if name in host.sums}
