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

import train
from distrib import loop, ranks
from distrib.config import Config, DataConfig, load_config
from distrib.data import loaders
from distrib.data.augment import Augment
from distrib.data.sources import SOURCES, Arrays, Source, digits
from distrib.data.steps import Share

TRAIN, VAL, BATCH = 997, 101, 60
KEYS = [
    "epochs=2",
    f"batch_size={BATCH}",
    "model.norm=group",
    "model.width=16",
    "precision=no",
    "optim.lr=0.05",
    "optim.warmup_epochs=0.5",
    "optim.average_decay=0.9",
]
NOISE = ["data.shift=1", "data.flip=random", "data.erase=2"]
WAYS = {
    "memory": ["data.name=uneven"],
    "micro": ["data.name=uneven", "micro_batches=3"],
    "files": ["data.name=folder", "data.size=8", "data.workers=0"],
    "workers": ["data.name=folder", "data.size=8", "data.workers=2", "micro_batches=3"],
}


def uneven(config: DataConfig, download: bool) -> Source:
    whole = digits(config, download)
    images = torch.cat([whole.train.images, whole.val.images])
    labels = torch.cat([whole.train.labels, whole.val.labels])
    val = slice(TRAIN, TRAIN + VAL)
    return Source(
        Arrays(images[:TRAIN], labels[:TRAIN]),
        Arrays(images[val], labels[val]),
        whole.classes,
        whole.shape,
        whole.mean,
        whole.std,
    )


def write_folder(root: Path) -> None:
    """The same images as PNG files of several sizes."""
    source = uneven(DataConfig(), download=False)
    for part, arrays in (("train", source.train), ("val", source.val)):
        for i, (image, label) in enumerate(zip(arrays.images, arrays.labels.tolist(), strict=True)):
            path = root / part / str(label) / f"{i:04d}.png"
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
        seen.ids += share.images.split(BATCH // ranks.launched_world())  # those of several steps may come together
        return augment(self, images, share)

    def stepped(state: loop.TrainState, batch: loaders.Batch, *rest: object) -> None:
        seen.batches.append(batch.images.clone())
        seen.exchanged.append(0)
        if state.step == 0 and isinstance(state.model, DistributedDataParallel):
            state.model.register_comm_hook(seen, exchange)
        step(state, batch, *rest)

    loaders.Augment.__call__ = noted
    loop.train_step = stepped


train_step, plain_augment = loop.train_step, Augment.__call__
SOURCES["uneven"] = uneven


def main(out: Path) -> None:
    # Whatever differs is then a difference of method: in float32, rounding puts a ReLU on its other side now and then.
    torch.set_default_dtype(torch.float64)
    for way, keys in WAYS.items():
        run_dir = out / way
        config: Config = load_config([f"run_dir={run_dir}", f"data.root={out.parent / 'folder'}", *KEYS, *NOISE, *keys])
        seen = Seen()
        watch(seen)
        state = train.train(config)
        loaders.Augment.__call__, loop.train_step = plain_augment, train_step
        noted = {"ids": seen.ids, "batches": seen.batches, "exchanged": seen.exchanged, "network": state.network.state_dict()}
        torch.save(noted, run_dir / f"rank{ranks.launched_rank()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    ranks.leave(0)
