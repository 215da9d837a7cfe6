"""A small residual network."""

import torch.nn.functional as F
from torch import Tensor, nn

from distrib.models.layers import convolution, unit


class CNN(nn.Module):
    """A small residual network for images of 8 to 64 pixels: a stem, then three blocks that each halve the resolution.

    Only the stem has full resolution, and it is narrow: an image of 28x28 pixels takes 30 million multiplications.
    """

    def __init__(self, channels: int, classes: int, width: int, dropout: float) -> None:
        super().__init__()
        stem = -(-width // 2)
        self.stem = unit(channels, stem)
        self.blocks = nn.Sequential(Block(stem, width), Block(width, 2 * width), Block(2 * width, 4 * width))
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(4 * width, classes)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.blocks(self.stem(images))
        logits: Tensor = self.head(self.dropout(features.mean(dim=(2, 3))))
        return logits


class Block(nn.Module):
    """Max pooling and a convolution, then a residual branch that starts at zero (Goyal et al., 2017, section 5.1)."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.halve = nn.Sequential(nn.MaxPool2d(2), unit(channels, width))
        self.convolution, self.norm = convolution(width, width), nn.BatchNorm2d(width)
        nn.init.zeros_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.halve(x)
        return F.relu(x + self.norm(self.convolution(x)))
