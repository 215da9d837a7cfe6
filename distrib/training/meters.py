"""Meters: what is measured of logits and targets. Each is a sum over images, over batches and ranks, divided once, last."""

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
    """A number to report: how images add up to it, and how it is printed.

    `sums` turns logits (n, classes) and targets into a tensor of any shape, which stays on the device: a sum over the images.
    `value` turns the sum over all images, on the host, and their number into what is reported.
    """

    sums: Callable[[Tensor, Tensor], Tensor]
    value: Callable[[Tensor, float], float]
    form: str = "{:.2f} %"
    higher_is_better: bool = True
    least_classes: int = 1  # with fewer it says nothing, and is left out


def class_ids(targets: Tensor) -> Tensor:
    """The class of each image, (n,): of targets (n, classes), the one with the most weight."""
    return targets if targets.dim() == 1 else targets.argmax(1)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """In nats."""
    return F.cross_entropy(logits.float(), targets, reduction="sum")


def hits(logits: Tensor, targets: Tensor) -> Tensor:
    """How many images have the largest logit at their class."""
    return (logits.argmax(1) == class_ids(targets)).sum()


def hits_in_five(logits: Tensor, targets: Tensor) -> Tensor:
    """How many images have one of the five largest logits at their class."""
    return (logits.topk(5).indices == class_ids(targets)[:, None]).sum()


def mean(total: Tensor, images: float) -> float:
    return total.item() / images


def percent(total: Tensor, images: float) -> float:
    return 100 * total.item() / images


# What is reported beside the loss, of every objective that does not say otherwise.
METERS = {
    "top1": Meter(hits, percent),
    "top5": Meter(hits_in_five, percent, least_classes=6),
}


class Totals(NamedTuple):
    """Sums over `images`, which are float64: counts are exact in it up to 2^53."""

    sums: Sums
    images: Tensor

    @classmethod
    def of_none(cls, device: torch.device | str = "cpu") -> "Totals":
        """Over no images."""
        return cls({}, torch.zeros((), dtype=torch.float64, device=device))

    def plus(self, sums: Mapping[str, Tensor], images: int) -> "Totals":
        """With the sums of more images."""
        more = {name: each.double() for name, each in sums.items()}
        return Totals(
            {name: self.sums[name] + each if self.sums else each for name, each in more.items()}, self.images + images
        )

    def flat(self) -> Tensor:
        """All numbers in one vector, so that one exchange is enough for them."""
        return torch.cat([each.reshape(-1) for each in (*self.sums.values(), self.images)])

    def with_values(self, flat: Tensor) -> "Totals":
        """Totals of the same form, from such a vector."""
        shapes = [each.shape for each in (*self.sums.values(), self.images)]
        pieces = torch.split(flat, [math.prod(shape) for shape in shapes])
        *values, images = (piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True))
        return Totals(dict(zip(self.sums, values, strict=True)), images)

    def values(self, meters: Mapping[str, Meter]) -> dict[str, float]:
        """What is reported, by meter; over no images it is nan. This waits for the device."""
        host = self.with_values(self.flat().cpu())
        images = host.images.item() or math.nan
        return {name: meter.value(host.sums[name], images) for name, meter in meters.items() if name in host.sums}
