"""An evaluation: every image of the validation set once, on some rank, and one sum over the ranks at the end."""

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
    """What the objective reports of the whole validation set, `size` images at a time. Every rank must call this.

    Logits are averaged over the `views` of an image. The ranks' shares may be uneven: `network` is not the DDP one, so nothing
    is exchanged before the sums are.
    """
    broadcast_buffers(network)  # each rank has batch statistics of its own images; rank 0's are those that are saved
    totals = Totals.of_none(accelerator.device)
    network.eval()
    for images, targets in loader.val(size):
        with accelerator.autocast():
            logits = torch.stack([weight * network(view).float() for weight, view in tta_views(images, views)]).sum(0)
        totals = totals.plus(objective.measure(logits, targets), len(targets))
    network.train()
    totals = summed(totals, accelerator)
    images_seen = round(totals.images.item())
    assert images_seen == len(loader.source.val), (images_seen, len(loader.source.val))
    return totals.values(objective.meters)


def summed(totals: Totals, accelerator: Accelerator) -> Totals:
    """The sums over the images of all ranks, in one exchange. Every rank must call this."""
    return totals.with_values(accelerator.reduce(totals.flat().to(accelerator.device)))
