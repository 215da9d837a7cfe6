"""Run by test_scale.py under torchrun: two steps of each config's network in DDP; rank 0 prints the bytes of its buckets.

usage: bucketed.py CONFIG.yaml ...
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from distrib.command_line import read_config
from distrib.models.build import build_model
from distrib.scale.network import data_of

sizes: list[int] = []


def noted(group: Any, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    sizes.append(bucket.buffer().nbytes)
    return allreduce_hook(group, bucket)


torch.distributed.init_process_group("gloo")
for config in map(read_config, map(Path, sys.argv[1:])):
    data = data_of(config.data)
    model = DistributedDataParallel(build_model(config.model, data.shape, data.classes), gradient_as_bucket_view=True)
    model.register_comm_hook(None, noted)
    for _ in range(2):  # DDP makes its buckets after the first
        sizes.clear()
        model(torch.zeros(2, *data.shape)).sum().backward()
    if torch.distributed.get_rank() == 0:
        print(*sizes)
    del model
torch.distributed.destroy_process_group()
