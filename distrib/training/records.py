"""The record of a step: it stays on the device until a report or a save waits for the device anyway."""

from typing import NamedTuple

import torch
from torch import Tensor

from distrib.training.meters import Sums


class StepRecord(NamedTuple):
    """The result of one step as a vector: 1.0 if its gradient was not finite, else 0.0; then the sums of each micro-batch."""

    values: Tensor
    images: list[int]  # number of images in each micro-batch
    shapes: dict[str, torch.Size]  # of the sums of one micro-batch

    @classmethod
    def of(cls, nonfinite: Tensor, sums: list[Sums], images: list[int]) -> "StepRecord":
        flat = [nonfinite.reshape(1), *(each.reshape(-1) for part in sums for each in part.values())]
        return cls(torch.cat(flat), images, {name: each.shape for name, each in sums[0].items()})
