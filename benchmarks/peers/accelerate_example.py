"""The idiom of Accelerate's examples/complete_cv_example.py.

As shipped: `accelerate launch` without flags, which gives a CPU process one thread; PIL images by four workers, normalised in
batches; model, optimizer, loaders and a OneCycleLR all prepared; the loss summed on the device as with tracking; an evaluation
after each epoch with gather_for_metrics. The example's Adam is SGD here, as with the other peers, and its random
resized crop is crop and flip.

Tuned: `accelerate launch --cpu --num_cpu_threads_per_process CORES` (on a GPU without --cpu), mixed_precision="bf16" where the
trainer would use bf16, channels last, a fused optimizer, persistent workers, tensors rather than PIL images, on a GPU pinned
memory and cuDNN's benchmark.
"""

import sys
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from benchmarks.peers.task import GPU, Pictures, Task, Work, asked


def normalized(images: Tensor, task: Task, device: torch.device) -> Tensor:
    if task.ready:
        return images
    mean = torch.tensor(task.source.mean)[None, :, None, None].to(device)
    std = torch.tensor(task.source.std)[None, :, None, None].to(device)
    return ((images - mean) / std).contiguous(memory_format=task.layout)


class Named(Dataset[Any]):
    """Items as the example has them: a dict."""

    def __init__(self, pictures: Pictures) -> None:
        self.pictures = pictures

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, label = self.pictures[index]
        return {"image": image, "label": label}


def loader(task: Task, *, train: bool) -> Any:
    if task.ready and train:
        made: Any = [{"image": images, "label": labels} for images, labels in task.batches(train=True, workers=0)]
        return DataLoader(made, batch_size=None)
    pictures = Named(task.images(train=train, normalize=False))
    options: Any = {"persistent_workers": task.tuned, "pin_memory": task.tuned and GPU, "num_workers": task.workers(4)}
    return DataLoader(pictures, task.config.batch_size, shuffle=train, drop_last=train, **options)


@torch.no_grad()
def evaluate(model: nn.Module, batches: Any, task: Task, accelerator: Accelerator) -> float:
    model.eval()
    right, seen = torch.zeros((), dtype=torch.long, device=accelerator.device), 0
    for batch in batches:
        images = normalized(batch["image"].to(accelerator.device), task, accelerator.device)
        predictions = model(images).argmax(dim=-1)
        predictions, labels = accelerator.gather_for_metrics((predictions, batch["label"]))
        right += (predictions == labels).sum()
        seen += len(labels)
    model.train()
    return 100 * right.item() / seen


def main() -> None:
    task = asked(sys.argv[1:])
    work = Work(task)
    torch.backends.cudnn.benchmark = task.tuned
    accelerator = Accelerator(cpu=task.tuned and not GPU, mixed_precision="bf16" if task.bf16 else "no")
    network = task.network().to(accelerator.device)
    optimizer = task.optimizer(network)
    train, val = loader(task, train=True), loader(task, train=False)
    model, optimizer, train, val, scheduler = accelerator.prepare(network, optimizer, train, val, task.one_cycle(optimizer))
    top1 = None
    for epoch in range(task.epochs):
        total_loss: Any = 0
        for batch in train:
            batch = {name: each.to(accelerator.device) for name, each in batch.items()}
            logits = model(normalized(batch["image"], task, accelerator.device))
            loss = F.cross_entropy(logits, batch["label"], label_smoothing=task.config.objective.label_smoothing)
            total_loss += loss.detach().float()
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            work.step(loss, len(batch["label"]))
            if work.done:
                break
        if task.validate:
            top1 = evaluate(model, val, task, accelerator)
            accelerator.print(f"epoch {epoch}: {top1:.2f}")
    accelerator.end_training()
    work.tell(network, top1)


if __name__ == "__main__":
    main()
