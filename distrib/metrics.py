"""Metrics are sums: add them over batches and ranks, and take the mean once, last."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

FIELDS = 4  # loss, hits at 1, hits at 5, images


def zeros(device: torch.device) -> Tensor:
    """The sums over no images, (FIELDS,)."""
    return torch.zeros(FIELDS, dtype=torch.float64, device=device)  # counts are exact in it up to 2^53


def losses(logits: Tensor, labels: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """The mean cross-entropy, in nats, that is trained on, and the plain one that is reported; both out of one softmax.

    A part `smoothing` of a label's weight is spread over all classes (Szegedy et al., 2016, section 7).
    """
    logs = F.log_softmax(logits, dim=1)
    plain = F.nll_loss(logs, labels)
    return (1 - smoothing) * plain - smoothing * logs.mean() if smoothing else plain, plain


def hits(logits: Tensor, labels: Tensor) -> Tensor:
    """How many of `labels` (n,) have the largest of their `logits` (n, classes)."""
    return (logits.argmax(1) == labels).sum()


@torch.no_grad()
def totals(logits: Tensor, labels: Tensor) -> Tensor:
    """The sums over a batch, (FIELDS,), from logits (n, classes) and labels (n,); they stay on the device.

    The loss is the plain cross-entropy in nats, whatever loss is trained on, so that training and validation compare.
    """
    loss = F.cross_entropy(logits.float(), labels, reduction="sum")
    ranked = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
    images = torch.full_like(loss, len(labels))
    return torch.stack([loss, ranked[:, 0].sum(), ranked.sum(), images]).to(zeros(logits.device).dtype)


def means(sums: Tensor) -> dict[str, float]:
    """`loss` in nats, `top1` and `top5` in percent; of no images they are nan. This waits for the device."""
    loss, top1, top5, images = sums.tolist()
    images = images or math.nan
    return {"loss": loss / images, "top1": 100 * top1 / images, "top5": 100 * top5 / images}
