"""Airbench, a small network that learns in few steps."""

from itertools import pairwise

from torch import Tensor, nn

from distrib.models.layers import convolution


class Airbench(nn.Module):
    """A network for images of 8 to 64 pixels, whose head uses the maximum of each channel.

    After Jordan, "94% on CIFAR-10 in 3.29 seconds on a single GPU", 2024, with two changes. A block pools before its first
    convolution and not after it, which halves the multiplications; only a block that gets the image itself pools after it. And
    ReLU replaces GELU, which takes a CPU a fifth longer.
    """

    def __init__(self, channels: int, classes: int, width: int, dropout: float) -> None:
        super().__init__()
        widths = [channels, width, 2 * width, 4 * width]
        self.blocks = nn.Sequential(*(identity_block(*pair, of_image=pair[0] <= 3) for pair in pairwise(widths)))
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(widths[-1], classes, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.blocks(images)
        largest = features.flatten(2).max(2).values  # amax's gradient, when compiled in bf16, is not finite (pytorch#195214)
        logits: Tensor = self.head(self.dropout(largest))
        return logits / 9  # so that the first ones are small


def identity_block(channels: int, width: int, *, of_image: bool) -> nn.Sequential:
    """Max pooling and two convolutions, which are the identity at first, as far as their shapes allow.

    The first convolution widens. If the input is an image, it comes before the pooling, otherwise after it.
    """
    layers: list[nn.Module] = []
    for each in (convolution(channels, width), convolution(width, width)):
        nn.init.dirac_(each.weight[: each.in_channels])
        norm = nn.BatchNorm2d(width, momentum=0.4)  # there are few steps to gather statistics in
        norm.weight.requires_grad_(False)
        layers += [each, norm, nn.ReLU(inplace=True)]
    layers.insert(1 if of_image else 0, nn.MaxPool2d(2))
    return nn.Sequential(*layers)
