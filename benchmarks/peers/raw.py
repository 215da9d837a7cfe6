"""The ceiling: what an expert would write by hand for this one task, with none of the trainer's features.

The trainer's network, precision, batches and way with memory; a fused optimizer, DDP with bucket views, a static graph and no
broadcast of buffers; no logging, metrics, checkpoints, checks or signals. One process, or several under torchrun.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.peers.task import DEVICE, MOMENTUM, WEIGHT_DECAY, Task, Work, asked
from distrib.training.memory import keep_freed_memory
from distrib.training.precision import choose_precision


def batches(task: Task, rank: int, world: int) -> Iterator[tuple[Tensor, Tensor]]:
    if task.ready:
        made = task.batches(train=True, workers=0)
        yield from (batch for _ in range(task.epochs) for batch in made)
    else:
        yield from task.loader(rank, world).train(range(task.total))


def main() -> None:
    task = asked(["--tuned", *sys.argv[1:]])
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if not task.config.threads:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world))
    keep_freed_memory()
    precise = choose_precision(task.config.precision, DEVICE)[0] == "no"
    network: nn.Module = task.network()
    model = network
    if world > 1:
        dist.init_process_group("gloo")
        options: dict[str, Any] = {"gradient_as_bucket_view": True, "static_graph": True, "broadcast_buffers": False}
        model = DistributedDataParallel(network, **options)
    rate, total = task.config.optim.lr, task.total
    optimizer = torch.optim.SGD(model.parameters(), rate, MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True, fused=True)
    work = Work(task)
    for step, (images, labels) in enumerate(batches(task, rank, world)):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / total)
        with nullcontext() if precise else torch.autocast(DEVICE.type, torch.bfloat16):
            loss = F.cross_entropy(model(images), labels, label_smoothing=task.config.objective.label_smoothing)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        work.step(loss, len(labels) * world)
        if work.done:
            break
    if rank == 0:
        work.tell(network)
    if world > 1:
        del model
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
