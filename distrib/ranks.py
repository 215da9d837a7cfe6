"""Who trains: one process for each device, which agree on everything or do not start at all."""

import gc
import os
import sys
import time
from collections.abc import Callable
from typing import NoReturn, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedDataParallelKwargs, broadcast_object_list, gather_object

from distrib.config import Config, UserError
from distrib.precision import choose_precision

T = TypeVar("T")

PATIENCE = 5.0  # seconds that rank 0 has to tell of a mistake, before another rank that met it does


def start(config: Config) -> tuple[Accelerator, str]:
    """Join the other ranks, with threads, device and precision as `config` says; and say in a line what came of it.

    Every rank must call this. Raises UserError if the launch would become several runs that know nothing of each other.
    """
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    threads = config.threads or max(1, cores() // local_ranks)
    torch.set_num_threads(threads)  # launchers export OMP_NUM_THREADS=1, which would leave most of a machine idle
    gpus = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    if gpus and local_ranks > gpus:
        raise UserError(f"{local_ranks} ranks on this machine are more than its {gpus} GPUs: start {gpus}, or set CUDA_VISIBLE_DEVICES= to train on the CPU")

    state = PartialState(cpu=not gpus)
    if state.num_processes != launched_ranks():
        raise UserError(
            f"{launched_ranks()} processes were started, but this one is in a group of {state.num_processes}: each would train alone. "
            "Start them with accelerate launch or torchrun, or export RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT"
        )
    choices = gather_object([choose_precision(config.precision, state.device)])
    precision, why = next((choice for choice in choices if choice[0] == "no"), choices[0])
    accelerator = Accelerator(
        cpu=not gpus,
        mixed_precision=precision,
        # Statistics of batches are made equal before they are used, not in each forward pass: a collective that waits.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
    )
    device = torch.cuda.get_device_name(state.device) if state.device.type == "cuda" else f"{state.device.type}, threads {threads}"
    return accelerator, f"ranks {state.num_processes}, device {device}, precision {precision} ({why})"


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def launched_rank() -> int:
    names = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
    return next((int(os.environ[name]) for name in names if os.environ.get(name)), 0)


def launched_ranks() -> int:
    """How many processes the launcher started, by what it left in the environment."""
    names = ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
    return next((int(os.environ[name]) for name in names if os.environ.get(name)), 1)


def first(action: Callable[[bool], T]) -> T:
    """`action(True)` on rank 0 and, when that is done, `action(False)` on the others. Every rank must call this.

    If rank 0 raises a UserError then all do, so that none waits for the others.
    """
    leads = PartialState().is_main_process
    mistake = None
    if leads:
        try:
            result = action(True)
        except UserError as error:
            mistake = str(error)
    mistake = agreed(mistake)
    if mistake is not None:
        raise UserError(mistake)
    return result if leads else action(False)


def agreed(value: T) -> T:
    """Rank 0's value, on every rank. Every rank must call this."""
    shared: list[T] = broadcast_object_list([value])
    return shared[0]


def say(text: str) -> int:
    """Print what was asked for, once; returns the exit code 0."""
    if launched_rank() == 0:
        print(text)
    return 0


def refuse(error: UserError | str, code: int = 2) -> int:
    """Say what is wrong, once; returns the exit code.

    Rank 0 speaks. Another rank does only if rank 0 is still there after a while, and so has not met the mistake.
    """
    rank = launched_rank()
    if rank:
        time.sleep(PATIENCE)  # the launcher ends this rank meanwhile, once rank 0 has spoken and left
    print(f"train.py: {f'rank {rank}: ' if rank else ''}{error}", file=sys.stderr, flush=True)
    return code


def leave(code: int) -> NoReturn:
    """End this process. Call it where nothing refers to the model any more.

    gloo aborts a process that ends while a DDP model still holds its group, 3 to 27 times in 100 clean runs.
    """
    gc.collect()
    if code == 0 and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        os._exit(code)  # a group whose other ranks may be gone can neither be used nor taken down
    sys.exit(0)
