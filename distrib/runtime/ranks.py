"""The ranks of a run: one process for each device, which meet before anything else and then agree on everything."""

import atexit
import gc
import os
import secrets
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, broadcast_object_list, gather_object
from torch import nn

from distrib.config import Config
from distrib.errors import RunError, UserError
from distrib.runtime.environment import launched_world, local_world, refuse_lone_processes, threads_of_a_rank

T = TypeVar("T")


def join(config: Config) -> PartialState:
    """Take this rank's threads and device, and meet the other ranks. Every rank must call this.

    Raises UserError if the launch would become several runs that know nothing of each other.
    """
    threads = config.threads or threads_of_a_rank(local_world())
    os.environ["OMP_NUM_THREADS"] = str(threads)  # where it is not set, accelerate chooses another number for torch
    torch.set_num_threads(threads)  # launchers export OMP_NUM_THREADS=1, which would leave most of a machine idle
    gpus = torch.cuda.device_count()  # ROCm's too; with a GPU of another kind, such as a Mac's, a rank trains on the CPU
    refuse_lone_processes()
    if 0 < gpus < local_world():
        way_out = f"start {gpus}, or export CUDA_VISIBLE_DEVICES= to train on the CPU"
        raise UserError(f"{local_world()} ranks on this machine are more than its {gpus} GPUs: {way_out}")
    if gpus:
        torch.backends.cudnn.benchmark = config.cudnn_benchmark
        torch.backends.cudnn.deterministic = not config.cudnn_benchmark  # else, some ways to convolve add in any order
        torch.set_float32_matmul_precision("high")  # TF32, which convolutions have anyway
    meet("cuda" if gpus else "cpu", config)
    state = PartialState(cpu=not gpus)  # else, without a GPU, accelerate takes each process for the only one
    assert state.num_processes == launched_world(), state.num_processes
    return state


def meet(device: str, config: Config) -> None:
    """Make torch's process group, if there are several ranks. What is exchanged fails after the longest of the limits."""
    if launched_world() == 1 or torch.distributed.is_initialized():
        return
    limit, distributed = patience(config), cast(Any, torch.distributed)
    store, rank, world = next(distributed.rendezvous("env://", timeout=limit))
    attempt = distributed.PrefixStore(name_attempt(store, rank, world), store)
    backend = distributed.get_default_backend_for_device(device)
    distributed.init_process_group(backend, timeout=limit, store=attempt, rank=rank, world_size=world)
    atexit.register(part)  # of a program that uses distrib as a library


def part() -> None:
    """Leave the other ranks, at the end of a program. Every rank must call this, where nothing refers to a DDP model any more.

    gloo aborts a process that ends while a DDP model still holds its group, 3 to 27 times in 100 clean runs.
    """
    failed = hasattr(sys, "last_value")  # a program that ends with an error: the others may be gone
    if torch.distributed.is_initialized() and not failed:
        gc.collect()
        PartialState().wait_for_everyone()
        torch.distributed.destroy_process_group()


def name_attempt(store: Any, rank: int, world: int) -> str:
    """A name for the keys of this attempt, new and the same for each rank. Every rank must call this.

    A launcher that restarts its ranks keeps their store, and the keys of the ranks that died are in it: with those, two in
    three restarts fail or hang. Restarts are counted by each machine for itself, which is no name either. So each rank says
    a word that was never said, and rank 0 answers with its own until each has thanked for that, which the dead do not.
    """
    word = secrets.token_hex(8)
    if rank:
        store.set(f"rank {rank}", word)
        name: str = store.get(f"answer to {word}").decode()
        store.set(f"thanks for {name} of {word}", "")
        return name
    words = dict.fromkeys(range(1, world), "")
    while words:
        for other, heard in [*words.items()]:
            if heard and store.check([f"thanks for {word} of {heard}"]):
                del words[other]
            elif store.check([f"rank {other}"]):
                words[other] = store.get(f"rank {other}").decode()
                store.set(f"answer to {words[other]}", word)
        time.sleep(0.01)
    return word


def patience(config: Config) -> timedelta:
    """How long a rank waits for another: a little longer than any of them may take, so that its watchdog speaks first."""
    return timedelta(seconds=max(asdict(config.limits).values()) + 30)


def is_rank0() -> bool:
    """Whether this is rank 0, among ranks that have met."""
    leads: bool = PartialState().is_main_process
    return leads


def rank0_first(action: Callable[[bool], T]) -> T:
    """`action(True)` on rank 0 and, when that is done, `action(False)` on the others. Every rank must call this.

    If rank 0 raises a UserError or a RunError then all do, so that none waits for the others.
    """
    error: UserError | RunError | None = None
    if is_rank0():
        try:
            result = action(True)
        except (UserError, RunError) as met:
            error = met
    error = broadcast_object(error)
    if error is not None:
        raise error from None
    return result if is_rank0() else action(False)


def on_rank0(action: Callable[[], T]) -> T:
    """What `action` gives on rank 0, on every rank. Every rank must call this; what rank 0 raises, all do."""
    return broadcast_object(rank0_first(lambda leads: action() if leads else cast(T, None)))


def broadcast_object(value: T) -> T:
    """Rank 0's value, on every rank. Every rank must call this."""
    shared: list[T] = broadcast_object_list([value])
    return shared[0]


def all_gather_object(value: T) -> list[T]:
    """What each rank gives, by rank, on every rank. Every rank must call this."""
    shared: list[T] = gather_object([value])
    return shared


def raise_on_all(error: UserError | RunError | None) -> None:
    """Raise on all ranks what one of them met: that of the lowest. Every rank must call this."""
    met = next((each for each in all_gather_object(error) if each), None)
    if met:
        raise met from None


def broadcast_buffers(network: nn.Module) -> None:
    """Give each rank the buffers of rank 0. Every rank must call this."""
    for buffer in network.buffers():
        broadcast(buffer)


def broadcast_network(network: nn.Module) -> None:
    """Give each rank the weights and buffers of rank 0. Every rank must call this."""
    for each in network.state_dict().values():
        broadcast(each)
