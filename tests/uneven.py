"""Run by test_topology.py under torchrun: trains on a set of 997 and 101 images in several ways and notes what each rank saw.

usage: uneven.py OUT
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.distributed import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

import distrib
from distrib.command_line import load_config
from distrib.config import DataConfig
from distrib.data import loaders
from distrib.data.augment import Augment
from distrib.data.datasets import load_source
from distrib.data.source import Arrays, Source
from distrib.data.steps import Share
from distrib.runtime import exits
from distrib.runtime.environment import env_rank, env_world_size
from distrib.training import loop
from distrib.training.context import Run
from distrib.training.state import TrainState

TRAIN, VAL, BATCH = 997, 101, 60
KEYS = [
    "epochs=2",
    f"batch_size={BATCH}",
    "model.norm=group",
    "model.width=16",
    "precision=no",
    "optim.lr=0.05",
    "optim.warmup_epochs=0.5",
    "optim.ema_decay=0.9",
]
NOISE = ["data.translate=1", "data.flip=random", "data.cutout=2"]
WAYS = {
    "memory": [],
    "micro": ["micro_batches=3"],
    "files": ["data.name=folder", "data.size=8", "data.workers=0"],
    "workers": ["data.name=folder", "data.size=8", "data.workers=2", "micro_batches=3"],
}


def uneven() -> Source:
    """Digits, whose numbers no batch and no number of ranks divides."""
    whole = load_source(DataConfig(), download=False)
    images = torch.cat([whole.train.images, whole.val.images])
    targets = torch.cat([whole.train.targets, whole.val.targets])
    val = slice(TRAIN, TRAIN + VAL)
    return Source(
        Arrays(images[:TRAIN], targets[:TRAIN]),
        Arrays(images[val], targets[val]),
        whole.classes,
        whole.shape,
        whole.mean,
        whole.std,
        "uneven",
    )


def write_folder(root: Path) -> None:
    """The same images as PNG files of several sizes."""
    source = uneven()
    for part, arrays in (("train", source.train), ("val", source.val)):
        for i, (image, target) in enumerate(zip(arrays.images, arrays.targets.tolist(), strict=True)):
            path = root / part / str(target) / f"{i:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[0].numpy()).resize((12 + i % 5, 12 + i % 3)).save(path)


@dataclass
class Seen:
    """What this rank did in each step: the images' indices, the batch itself after all noise, the gradients exchanged."""

    ids: list[Tensor] = field(default_factory=list)
    batches: list[Tensor] = field(default_factory=list)
    exchanged: list[int] = field(default_factory=list)  # numbers of them


def exchange(seen: Seen, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """DDP's own all-reduce, counted."""
    seen.exchanged[-1] += bucket.buffer().numel()
    return allreduce_hook(None, bucket)


def watch(seen: Seen) -> None:
    """Note what reaches the augmentation and the training step, on its way there."""
    augment, step = Augment.__call__, train_step

    def noted(self: Augment, images: Tensor, share: Share) -> Tensor:
        seen.ids += share.images.split(BATCH // env_world_size())  # those of several steps may come together
        return augment(self, images, share)

    def stepped(state: TrainState, batch: loaders.Batch, run: Run) -> None:
        seen.batches.append(batch.images.clone())
        seen.exchanged.append(0)
        if state.step == 0 and isinstance(state.model, DistributedDataParallel):
            state.model.register_comm_hook(seen, exchange)
        step(state, batch, run)

    loaders.Augment.__call__ = noted
    loop.train_step = stepped


train_step, plain_augment = loop.train_step, Augment.__call__


def main(out: Path) -> None:
    # Whatever differs is then a difference of method: in float32, rounding puts a ReLU on its other side now and then.
    torch.set_default_dtype(torch.float64)
    for way, keys in WAYS.items():
        run_dir = out / way
        of_files = "data.name=folder" in keys
        root = [f"data.root={out.parent / 'folder'}"] if of_files else []
        config = load_config([f"run_dir={run_dir}", *root, *KEYS, *NOISE, *keys])
        seen = Seen()
        watch(seen)
        state = distrib.train(config, source=None if of_files else uneven())
        loaders.Augment.__call__, loop.train_step = plain_augment, train_step
        noted = {"ids": seen.ids, "batches": seen.batches, "exchanged": seen.exchanged, "network": state.network.state_dict()}
        torch.save(noted, run_dir / f"rank{env_rank()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    exits.leave(0)
