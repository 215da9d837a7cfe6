"""What every peer is asked to do, in the trainer's own keys, and the one JSON line in which it tells what it did.

python -m benchmarks.peers.NAME [--tuned] [--validate] [--ready] [CONFIG.yaml] [key=value ...]

Without --tuned a peer is as it ships. --validate: it evaluates after every epoch. --ready: its batches are made before it
starts, so that nothing but the loop is timed.
"""

import json
import os
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.transforms import v2

from distrib.command_line import load_config
from distrib.config import Config
from distrib.data.datasets import load_source
from distrib.data.loaders import Loader
from distrib.data.source import Arrays, Source
from distrib.data.steps import Steps
from distrib.data.workers import Workers
from distrib.models.build import build_model
from distrib.models.layers import fit_whitening
from distrib.training.memory import keep_freed_memory
from distrib.training.precision import choose_precision

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4


@dataclass(frozen=True)
class Task:
    """What to train, on what, for how long."""

    config: Config
    tuned: bool
    validate: bool
    ready: bool

    @cached_property
    def source(self) -> Source:
        return load_source(self.config.data, download=False)

    @property
    def per_epoch(self) -> int:
        return len(self.source.train) // self.config.batch_size

    @property
    def total(self) -> int:
        """Optimizer steps of the whole run."""
        return max(1, round(self.config.epochs * self.per_epoch))

    @property
    def epochs(self) -> int:
        """Epochs that are begun."""
        return -(-self.total // self.per_epoch)

    @property
    def bf16(self) -> bool:
        """Whether a tuned peer computes in bf16: where the trainer would."""
        return self.tuned and choose_precision(self.config.precision, DEVICE)[0] == "bf16"

    def workers(self, shipped: int) -> int:
        """As many as a peer ships with; if it is tuned, all cores where a GPU computes, and one where they do it themselves."""
        if not self.tuned:
            return shipped
        return len(os.sched_getaffinity(0)) if GPU else 1

    @property
    def layout(self) -> torch.memory_format:
        return torch.channels_last if self.tuned else torch.contiguous_format

    def network(self) -> nn.Module:
        """The trainer's network, with the trainer's initial weights, whitening included if that is asked for."""
        torch.manual_seed(self.config.seed)
        network = build_model(self.config.model, self.source.shape, len(self.source.classes)).to(DEVICE)
        fit_whitening(network, self.loader().sample)
        return network.to(memory_format=self.layout)

    def placed(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Images and labels on the device, the images laid out as the network is."""
        images, labels = (each.to(DEVICE, non_blocking=self.tuned) for each in batch)
        return images.contiguous(memory_format=self.layout), labels

    def loader(self, rank: int = 0, world: int = 1) -> Loader:
        """The trainer's own."""
        steps = Steps(len(self.source.train), self.config.batch_size, self.config.seed, rank, world)
        return Loader(self.source, self.config, steps, DEVICE, Workers())

    def images(self, *, train: bool, normalize: bool = True) -> "Pictures":
        """The data set as a peer's own documentation would have it: PIL images, or tensors if it is tuned."""
        data = self.config.data
        noise: list[Any] = []
        if train and data.translate:
            noise.append(transforms.RandomCrop(self.source.shape[1:], padding=data.translate))
        if train and data.flip != "none":
            noise.append(transforms.RandomHorizontalFlip())
        to_float = [v2.ToDtype(torch.float32, scale=True)] if self.tuned else [transforms.ToTensor()]
        steps = [*noise, *to_float]
        if normalize:
            steps.append(transforms.Normalize(self.source.mean, self.source.std))
        arrays = self.source.train if train else self.source.val
        assert isinstance(arrays, Arrays), self.config.data.name
        return Pictures(arrays, transforms.Compose(steps), pil=not self.tuned)

    def batches(self, *, train: bool, workers: int, pinned: bool = False) -> DataLoader[Any]:
        """Batches of (images, labels), in a new order each epoch."""
        images, size = self.images(train=train), self.config.batch_size
        if self.ready and train:
            plain = DataLoader(images, batch_size=size, drop_last=True)
            made: Any = [batch for batch, _ in zip(plain, range(self.per_epoch), strict=False)]
            return DataLoader(made, batch_size=None)
        options: Any = {"persistent_workers": self.tuned and workers > 0, "pin_memory": pinned and GPU}
        return DataLoader(images, size, shuffle=train, drop_last=train, num_workers=workers, **options)

    def optimizer(self, network: nn.Module) -> torch.optim.SGD:
        options: Any = {"fused": True} if self.tuned else {}
        rate = self.config.optim.lr
        return torch.optim.SGD(network.parameters(), rate, MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True, **options)

    def one_cycle(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.OneCycleLR:
        rate = self.config.optim.lr
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=max(self.total, 2))


class Pictures(Dataset[Any]):
    """(image, label) by index, one at a time, as torchvision's data sets give them."""

    def __init__(self, arrays: Arrays, transform: Any, *, pil: bool) -> None:
        self.data, self.targets, self.transform, self.pil = arrays.images, arrays.targets, transform, pil

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image: Any = self.data[index]
        if self.pil:
            image = Image.fromarray(image.squeeze(0).numpy() if len(image) == 1 else image.permute(1, 2, 0).numpy())
        return self.transform(image), int(self.targets[index])


class Work:
    """What a loop has done. `step` costs a fraction of a microsecond and waits for nothing."""

    def __init__(self, task: Task) -> None:
        self.task, self.images = task, 0
        self.stamps: list[float] = []
        self.losses: deque[Tensor] = deque(maxlen=min(task.config.log_every, task.total))

    def step(self, loss: Tensor, images: int) -> None:
        """An optimizer step is done, on so many images; on a GPU, it is where the clock is read."""
        if GPU and len(self.stamps) + 1 in (self.first, self.task.total):
            torch.cuda.synchronize()
        self.images += images
        self.losses.append(loss.detach())
        self.stamps.append(time.time())

    @property
    def first(self) -> int:
        """The step after which the time is taken."""
        return min(self.task.config.log_every, self.task.total - 1)

    @property
    def done(self) -> bool:
        return len(self.stamps) >= self.task.total

    def tell(self, network: nn.Module, top1: float | None = None) -> None:
        """Print the line. The timed steps are those after the first `log_every`: before them, everything warms up."""
        told = {
            "images": self.images,
            "updates": len(self.stamps),
            "parameters": sum(each.numel() for each in network.parameters()),
            "timed": len(self.stamps) - self.first,
            "seconds": self.stamps[-1] - self.stamps[self.first - 1],
            "loss": torch.stack([*self.losses]).float().mean().item(),
            "top1": top1,
            "stamps": self.stamps,
        }
        print(json.dumps(told), flush=True)


def asked(args: Sequence[str]) -> Task:
    """The task that a command line asks for."""
    flags = {arg for arg in args if arg.startswith("--")}
    assert flags <= {"--tuned", "--validate", "--ready"}, flags
    config = load_config([arg for arg in args if arg not in flags])
    task = Task(config, "--tuned" in flags, "--validate" in flags, "--ready" in flags)
    if task.tuned:
        keep_freed_memory()  # PyTorch's tuning guide advises another allocator, which does the same
    if config.threads:
        torch.set_num_threads(config.threads)
    return task
