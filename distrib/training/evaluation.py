"""Evaluation: each validation image is counted once, on one rank; the ranks add their sums once, at the end."""

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from distrib.data.augment import mean_logits
from distrib.data.loaders import Loader
from distrib.errors import UserError
from distrib.models.layers import evaluating
from distrib.runtime import ranks
from distrib.training.meters import Sums, Totals, images_and_hits
from distrib.training.objective import Objective

IMAGES = "images"  # the number of images of an evaluation, if some were left out
MISSED = "missed_classes"  # the number of classes of which no image was recognized, if there are any
BY_CLASS = "by class"  # the images and hits of each class


def evaluate(
    network: nn.Module, loader: Loader, objective: Objective, accelerator: Accelerator, size: int, views: int
) -> dict[str, float]:
    """The meters of `network` on the whole validation set, `size` images at a time. Every rank must call this.

    If bad images were left out, the number of the others is there too, and so is the number of classes of which no image was
    recognized. Raises UserError if no image can be used.
    """
    return values_of(measure(network, loader, objective, accelerator, size, views), objective, len(loader.source.val))


def values_of(totals: Totals, objective: Objective, all_images: int) -> dict[str, float]:
    """What is reported of the sums over a validation set."""
    images, (of_class, hits) = round(totals.images.item()), totals.sums[BY_CLASS].cpu()
    missed = int(((of_class > 0) & (hits == 0)).sum())
    extra = ({IMAGES: float(images)} if images < all_images else {}) | ({MISSED: float(missed)} if missed else {})
    return totals.values(objective.meters) | extra


@torch.no_grad()
def measure(
    network: nn.Module,
    loader: Loader,
    objective: Objective,
    accelerator: Accelerator,
    size: int,
    views: int,
) -> Totals:
    """The sums of the meters over the validation images of all ranks, with the images and hits of each class.

    Logits are averaged over the `views` of each image. The shares of the ranks may be uneven: `network` is not wrapped in DDP,
    so the ranks exchange nothing before the sums.
    """
    ranks.broadcast_buffers(network)  # each rank has its own batch statistics; rank 0's are the ones that are saved
    totals = Totals.zero(accelerator.device)

    def sums_of(logits: Tensor, targets: Tensor) -> Sums:
        return objective.measure(logits, targets) | {BY_CLASS: images_and_hits(logits, targets)}

    with evaluating(network):
        for images, targets in loader.val(size):
            with accelerator.autocast():
                logits = mean_logits(network, images, views)
            totals = totals.plus(sums_of(logits, targets), len(targets))
    if not totals.sums:  # this rank's images are all bad: it adds sums of zero, in the shapes of the other ranks' sums
        like = torch.zeros(1, len(loader.source.classes), device=accelerator.device)
        sums = sums_of(like, loader.source.val.targets[:1].to(accelerator.device))
        totals = totals.plus({name: 0 * each for name, each in sums.items()}, 0)
    totals = reduce_totals(totals, accelerator)
    images_seen, all_images = round(totals.images.item()), len(loader.source.val)
    left_out = sum(ranks.all_gather_object(loader.left_out)) if loader.skips_bad_images else 0
    assert images_seen + left_out == all_images, (images_seen, left_out, all_images)
    if not images_seen:
        raise UserError(f"none of the {all_images:,} validation images can be used: run distrib scan")
    return totals


def reduce_totals(totals: Totals, accelerator: Accelerator) -> Totals:
    """The totals of all ranks together, in one collective. Every rank must call this."""
    return totals.with_values(accelerator.reduce(totals.flat().to(accelerator.device)))
