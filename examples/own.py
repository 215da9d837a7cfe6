"""Your own images, network and loss:  accelerate launch examples/own.py RUN_DIR"""

import sys

import torch
import torch.nn.functional as F
from torch import nn

import distrib


def stripes(count, seed):
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (count,), generator=random)
    images = torch.randint(160, (count, 1, 16, 16), dtype=torch.uint8, generator=random)
    images[torch.arange(count), 0, 4 * labels + 1] += 60  # a bright row, which tells the class
    return images, labels


class Focal(distrib.Objective):
    def loss(self, logits, targets):
        cross_entropy = F.cross_entropy(logits, targets, reduction="none")
        return ((1 - torch.exp(-cross_entropy)) ** 2 * cross_entropy).mean()


def network():
    rows = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d((16, 1)))
    return nn.Sequential(rows, nn.Flatten(), nn.Linear(256, 4))


if __name__ == "__main__":
    source = distrib.Source.from_arrays(
        stripes(3000, seed=0), stripes(600, seed=1), classes=["top", "upper", "lower", "bottom"]
    )
    config = distrib.Config(run_dir=sys.argv[1], epochs=3, batch_size=60, save_every=10)
    distrib.train(config, source=source, network=network, objective=Focal())
