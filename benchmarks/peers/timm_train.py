"""timm's loader, optimizer, schedule, loss and meters, in the order in which its train.py uses them.

As shipped: four workers, timm's transforms on PIL images, its prefetcher, which normalises uint8 batches, its SGD, its cosine
schedule, updated in every step, its loss, which is read in every step; a line every 50. The network is the trainer's. Of its
transforms the random resized crop shows 80 to 100 % of an image (--scale 0.8 1) and there is no colour jitter, which small grey
pictures do without; the other peers crop with padding.

Tuned: --amp --amp-dtype bfloat16 where the trainer would use bf16, --channels-last, --opt-kwargs fused=True, --workers 1, or on
a GPU as many as cores and --pin-mem.
"""

import sys
import time
from contextlib import nullcontext
from typing import Any

import torch
from timm.data import create_loader
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, accuracy
from torch import nn

from benchmarks.peers.task import DEVICE, GPU, MOMENTUM, WEIGHT_DECAY, Pictures, Task, Work, asked

LOG_EVERY = 50


def loader(task: Task, *, train: bool) -> Any:
    arrays: Any = task.source.train if train else task.source.val
    noisy = train and (task.config.data.translate > 0 or task.config.data.flip != "none")
    return create_loader(
        Pictures(arrays, None, pil=True),  # its transforms are set by create_loader
        input_size=task.source.shape,
        batch_size=task.config.batch_size,
        is_training=train,
        no_aug=not noisy,
        scale=(0.8, 1.0),
        ratio=(0.9, 1.1),
        hflip=0.5 if task.config.data.flip != "none" else 0.0,
        color_jitter=0.0,
        interpolation="bilinear",
        crop_pct=1.0,
        mean=task.source.mean,
        std=task.source.std,
        num_workers=task.workers(4),
        device=DEVICE,
        pin_memory=task.tuned and GPU,
    )


@torch.inference_mode()
def evaluate(model: nn.Module, batches: Any, task: Task) -> float:
    model.eval()
    losses, top1, top5 = AverageMeter(), AverageMeter(), AverageMeter()
    for images, labels in batches:
        logits = model(images.contiguous(memory_format=task.layout))
        losses.update(nn.functional.cross_entropy(logits, labels).item(), len(labels))
        at_1, at_5 = accuracy(logits, labels, topk=(1, 5))
        top1.update(at_1.item(), len(labels))
        top5.update(at_5.item(), len(labels))
    print(f"Test: loss {losses.avg:.3f}  acc@1 {top1.avg:.3f}  acc@5 {top5.avg:.3f}", flush=True)
    model.train()
    return float(top1.avg)


def main() -> None:
    task = asked(sys.argv[1:])
    torch.backends.cudnn.benchmark = True
    work, top1 = Work(task), None
    model = task.network()
    fused: Any = {"fused": True} if task.tuned else {}
    rate = task.config.optim.lr
    optimizer = create_optimizer_v2(model, opt="sgd", lr=rate, weight_decay=WEIGHT_DECAY, momentum=MOMENTUM, **fused)
    train, val = loader(task, train=True), loader(task, train=False)
    warmup: Any = {"warmup_epochs": 1, "warmup_lr": 1e-4} if task.epochs > 1 else {}
    scheduler, _ = create_scheduler_v2(
        optimizer, "cosine", num_epochs=task.epochs, step_on_epochs=False, updates_per_epoch=len(train), **warmup
    )
    smoothing = task.config.objective.label_smoothing
    criterion: Any = LabelSmoothingCrossEntropy(smoothing) if smoothing else nn.CrossEntropyLoss()
    assert scheduler is not None
    for epoch in range(task.epochs):
        losses, waits, times = AverageMeter(), AverageMeter(), AverageMeter()
        began = time.time()
        for i, (images, labels) in enumerate(train):
            images = images.contiguous(memory_format=task.layout)
            waits.update(time.time() - began)
            with torch.autocast(DEVICE.type, torch.bfloat16) if task.bf16 else nullcontext():
                loss = criterion(model(images), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.update(loss.item(), len(labels))
            times.update(time.time() - began)
            if i % LOG_EVERY == 0:
                print(f"Train: {epoch} [{i}/{len(train)}]  loss {losses.val:.3f} ({losses.avg:.3f})  time {times.avg:.3f}")
            work.step(loss, len(labels))
            scheduler.step_update(num_updates=len(work.stamps), metric=losses.avg)
            began = time.time()
            if work.done:
                break
        if task.validate:
            top1 = evaluate(model, val, task)
        scheduler.step(epoch + 1)
    work.tell(model, top1)


if __name__ == "__main__":
    main()
