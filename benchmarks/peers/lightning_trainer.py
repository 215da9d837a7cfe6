"""Lightning's Trainer.

As shipped: a LightningModule and a DataLoader as in the tutorial on CIFAR-10 of Lightning's documentation (crop, flip, ToTensor
and Normalize on PIL images, half as many workers as cores, SGD under OneCycleLR by step, self.log of the training loss;
validation logs loss and accuracy, on the progress bar), and a Trainer with its defaults: TensorBoard logger, progress
bar, checkpoint callback, model summary. The tutorial's accuracy is torchmetrics', as here.

Tuned: what its pages on speeding up and on performance advise: bf16-mixed where the trainer would use bf16,
channels last, persistent workers, a fused optimizer, on a GPU pinned memory and cuDNN's benchmark, and barebones=True, which
leaves out logging, progress bar and checkpoints. Images are tensors rather than PIL's.
"""

import os
import sys
import tempfile
from typing import Any

import lightning
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional import accuracy

from benchmarks.peers.task import Task, Work, asked


class Classifier(lightning.LightningModule):
    def __init__(self, task: Task, work: Work) -> None:
        super().__init__()
        self.network, self.task, self.work = task.network(), task, work

    def forward(self, images: Tensor) -> Any:
        return self.network(images.contiguous(memory_format=self.task.layout))

    def training_step(self, batch: Any, index: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self(images), labels, label_smoothing=self.task.config.objective.label_smoothing)
        if not self.task.tuned:
            self.log("train_loss", loss)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.work.step(outputs["loss"], len(batch[1]))

    def validation_step(self, batch: Any, index: int) -> None:
        images, labels = batch
        logits = self(images)
        found = accuracy(logits.argmax(1), labels, task="multiclass", num_classes=len(self.task.source.classes))
        self.log("val_loss", F.cross_entropy(logits, labels), prog_bar=True)
        self.log("val_acc", found, prog_bar=True)

    def configure_optimizers(self) -> Any:
        optimizer = self.task.optimizer(self)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.task.one_cycle(optimizer), "interval": "step"}}


def main() -> None:
    task = asked(sys.argv[1:])
    work = Work(task)
    workers = task.workers(len(os.sched_getaffinity(0)) // 2)
    model = Classifier(task, work)
    train = task.batches(train=True, workers=workers, pinned=task.tuned)
    val = task.batches(train=False, workers=workers) if task.validate else None
    options: dict[str, Any] = {"barebones": not task.validate, "benchmark": True} if task.tuned else {}
    if task.validate:  # it does not evaluate after a part of an epoch
        options["limit_train_batches"] = task.total // task.epochs
    with tempfile.TemporaryDirectory() as folder:
        trainer = lightning.Trainer(
            max_steps=task.total,
            max_epochs=task.epochs,
            default_root_dir=folder,
            precision="bf16-mixed" if task.bf16 else "32-true",
            accelerator="auto",
            **options,
        )
        trainer.fit(model, train, val)
    top1 = trainer.callback_metrics.get("val_acc")
    work.tell(model, None if top1 is None else 100 * float(top1))


if __name__ == "__main__":
    main()
