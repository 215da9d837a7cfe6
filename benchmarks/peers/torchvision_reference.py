"""The loop of torchvision's references/classification/train.py.

As shipped: 16 workers and transforms on PIL images, SGD, and in every step the loss, top-1 and top-5 are read from the device
and put into meters with a window of 20, which are printed every 10 steps; an evaluation after each epoch. Its learning
rate falls by epochs (StepLR), made for 90 of them; here it is OneCycleLR by step, as with the other peers.

Tuned: one persistent worker, or on a GPU as many as cores, tensors rather than PIL images, bf16 autocast where the trainer
would use bf16 (its --amp), and what PyTorch's tuning guide adds: channels last and a fused optimizer.
"""

import sys
import time
from collections import deque
from contextlib import nullcontext
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers.task import DEVICE, Task, Work, asked

PRINT_EVERY, WINDOW = 10, 20


class Meters:
    """Named series, each with the last values and the sum of all."""

    def __init__(self) -> None:
        self.recent: dict[str, deque[float]] = {}
        self.sums: dict[str, tuple[float, int]] = {}

    def add(self, count: int, **values: float) -> None:
        for name, value in values.items():
            self.recent.setdefault(name, deque(maxlen=WINDOW)).append(value)
            total, seen = self.sums.get(name, (0.0, 0))
            self.sums[name] = total + value * count, seen + count

    def mean(self, name: str) -> float:
        total, seen = self.sums[name]
        return total / seen

    def __str__(self) -> str:
        return "  ".join(f"{name}: {median(self.recent[name]):.4f} ({self.mean(name):.4f})" for name in self.recent)


@torch.inference_mode()
def accuracies(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Top-1 and top-5, in percent."""
    hits = logits.topk(5, dim=1).indices.t() == labels[None]
    at_1, at_5 = (hits[:k].flatten().sum(dtype=torch.float32) * (100 / len(labels)) for k in (1, 5))
    return at_1, at_5


@torch.inference_mode()
def evaluate(model: nn.Module, criterion: nn.Module, batches: Any, task: Task) -> float:
    model.eval()
    meters = Meters()
    for images, labels in batches:
        images, labels = task.placed((images, labels))
        logits = model(images)
        at_1, at_5 = accuracies(logits, labels)
        meters.add(len(labels), loss=criterion(logits, labels).item(), acc1=at_1.item(), acc5=at_5.item())
    print(f"Test: {meters}")
    model.train()
    return meters.mean("acc1")


def main() -> None:
    task = asked(sys.argv[1:])
    work, top1 = Work(task), None
    torch.backends.cudnn.benchmark = True
    workers = task.workers(16)
    train, val = (task.batches(train=part, workers=workers, pinned=True) for part in (True, False))
    model = task.network()
    criterion = nn.CrossEntropyLoss(label_smoothing=task.config.objective.label_smoothing)
    optimizer = task.optimizer(model)
    scheduler = task.one_cycle(optimizer)
    for epoch in range(task.epochs):
        meters = Meters()
        for i, (images, labels) in enumerate(train):
            began = time.time()
            images, labels = task.placed((images, labels))
            with torch.autocast(DEVICE.type, torch.bfloat16) if task.bf16 else nullcontext():
                logits = model(images)
                loss = criterion(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            at_1, at_5 = accuracies(logits, labels)
            rate = optimizer.param_groups[0]["lr"]
            meters.add(1, loss=loss.item(), lr=rate)
            meters.add(len(labels), acc1=at_1.item(), acc5=at_5.item())
            meters.add(1, images_per_second=len(labels) / (time.time() - began))
            if i % PRINT_EVERY == 0:
                print(f"Epoch: [{epoch}]  [{i}/{len(train)}]  {meters}", flush=True)
            work.step(loss, len(labels))
            if work.done:
                break
        if task.validate:
            top1 = evaluate(model, criterion, val, task)
    work.tell(model, top1)


if __name__ == "__main__":
    main()
