"""Evaluation: each validation image is counted once, on one rank; the ranks add their sums once, at the end."""

import torch
from accelerate import Accelerator
from torch import nn

from distrib.data.augment import tta_views
from distrib.data.loaders import Loader
from distrib.runtime.ranks import broadcast_buffers
from distrib.training.meters import Totals
from distrib.training.objective import Objective


@torch.no_grad()
def evaluate(
    network: nn.Module, loader: Loader, objective: Objective, accelerator: Accelerator, size: int, views: int
) -> dict[str, float]:
    """The meters of `network` on the whole validation set, `size` images at a time. Every rank must call this.

    Logits are averaged over the `views` of each image. The shares of the ranks may be uneven: `network` is not wrapped in DDP,
    so the ranks exchange nothing before the sums.
    """
    broadcast_buffers(network)  # each rank has its own batch statistics; rank 0's are the ones that are saved
    totals = Totals.zero(accelerator.device)
    network.eval()
    for images, targets in loader.val(size):
        with accelerator.autocast():
            logits = torch.stack([weight * network(view).float() for weight, view in tta_views(images, views)]).sum(0)
        totals = totals.plus(objective.measure(logits, targets), len(targets))
    network.train()
    totals = reduce_totals(totals, accelerator)
    images_seen = round(totals.images.item())
    assert images_seen == len(loader.source.val), (images_seen, len(loader.source.val))
    return totals.values(objective.meters)


def reduce_totals(totals: Totals, accelerator: Accelerator) -> Totals:
    """The totals of all ranks together, in one collective. Every rank must call this."""
    return totals.with_values(accelerator.reduce(totals.flat().to(accelerator.device)))
