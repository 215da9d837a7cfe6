"""What a step leaves to be read later. It stays on the device until somebody waits for that anyway."""

from typing import NamedTuple

import torch
from torch import Tensor

from distrib.training.meters import Sums


class StepRecord(NamedTuple):
    """Of one step, in a vector: 1.0 if its gradient was not finite, else 0.0; then the sums of each micro-batch."""

    values: Tensor
    images: list[int]  # of each micro-batch
    shapes: dict[str, torch.Size]  # of the sums of one

    @classmethod
    def of(cls, nonfinite: Tensor, sums: list[Sums], images: list[int]) -> "StepRecord":
        flat = [nonfinite.reshape(1), *(each.reshape(-1) for part in sums for each in part.values())]
        return cls(torch.cat(flat), images, {name: each.shape for name, each in sums[0].items()})
