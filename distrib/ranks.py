"""Who trains: one process for each device, which agree on everything or do not start at all."""

import gc
import os
import secrets
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from datetime import timedelta
from typing import Any, NoReturn, TypeVar, cast

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DDPCommunicationHookType, DistributedDataParallelKwargs, broadcast_object_list, gather_object
from torch import nn
from torch.optim import Optimizer

from distrib import interrupt
from distrib.config import Config, UserError, one_line
from distrib.precision import choose_precision

T = TypeVar("T")

# What torch's backends say when the other end of a connection has gone.
LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited", "was aborted")

PATIENCE = 5.0  # seconds that one rank has to tell of a mistake, before another rank that met it does


def start(config: Config) -> tuple[Accelerator, str]:
    """Join the other ranks, with threads, device and precision as `config` says; and tell in a line what came of it.

    Every rank must call this. Raises UserError if the launch would become several runs that know nothing of each other.
    """
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    threads = config.threads or threads_of_a_rank(local_ranks)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # where it is not set, accelerate chooses another number for torch
    torch.set_num_threads(threads)  # launchers export OMP_NUM_THREADS=1, which would leave most of a machine idle
    gpus = torch.cuda.device_count()  # ROCm's too; with a GPU of another kind, such as a Mac's, a rank trains on the CPU
    refuse_lone_processes()
    if 0 < gpus < local_ranks:
        way_out = f"start {gpus}, or export CUDA_VISIBLE_DEVICES= to train on the CPU"
        raise UserError(f"{local_ranks} ranks on this machine are more than its {gpus} GPUs: {way_out}")

    if gpus:
        torch.backends.cudnn.benchmark = config.cudnn_benchmark
        torch.backends.cudnn.deterministic = not config.cudnn_benchmark  # else, some ways to convolve add in any order
        torch.set_float32_matmul_precision("high")  # TF32, which convolutions have anyway
    join("cuda" if gpus else "cpu", config)
    state = PartialState(cpu=not gpus)  # else, without a GPU, accelerate takes each process for the only one
    assert state.num_processes == launched_world(), state.num_processes
    choices = gathered(choose_precision(config.precision, state.device))
    precision, why = next((choice for choice in choices if choice[0] == "no"), choices[0])
    hook = DDPCommunicationHookType(config.comm_hook)
    accelerator = Accelerator(
        cpu=not gpus,
        mixed_precision=precision,
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True, comm_hook=hook)],
    )
    device = torch.cuda.get_device_name(state.device) if state.device.type == "cuda" else state.device.type
    return accelerator, f"ranks {state.num_processes}, device {device}, threads {threads}, precision {precision} ({why})"


def join(device: str, config: Config) -> None:
    """Meet the other ranks, if there are any. What is exchanged with them fails after the longest of the limits."""
    if launched_world() == 1 or torch.distributed.is_initialized():
        return
    limit, distributed = patience(config), cast(Any, torch.distributed)
    store, rank, world = next(distributed.rendezvous("env://", timeout=limit))
    attempt = distributed.PrefixStore(named_attempt(store, rank, world), store)
    backend = distributed.get_default_backend_for_device(device)
    distributed.init_process_group(backend, timeout=limit, store=attempt, rank=rank, world_size=world)


def named_attempt(store: Any, rank: int, world: int) -> str:
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


def prepared(accelerator: Accelerator, network: nn.Module, optimizer: Optimizer, config: Config) -> tuple[nn.Module, Optimizer]:
    """What a step calls, `network` inside DDP if there are several ranks, and its optimizer. Every rank must call this."""
    if config.compile != "no":
        network.compile(mode=config.compile)  # in place, so that its weights keep their names; before DDP, which cuts graphs
    model, optimizer = accelerator.prepare(network, optimizer)
    # Batch statistics are made equal when they are used: in each forward pass that would be a collective that waits.
    model.broadcast_buffers = False  # set here, since DDP's option of this name is being replaced by another
    return model, optimizer


def threads_of_a_rank(local_ranks: int) -> int:
    """This rank's part of the machine's cores: as SLURM says where a rank is one of its tasks, else an even one."""
    if from_environment("SLURM_STEP_NUM_TASKS", default=0) == launched_world():
        return from_environment("SLURM_CPUS_PER_TASK", default=1)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // local_ranks)


def refuse_lone_processes() -> None:
    """Raise UserError if a launcher started several processes without telling them how to find each other."""
    started = launched_world()
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if name not in os.environ]
    if started > 1 and missing:
        raise UserError(
            f"{started} processes were started, but without {', '.join(missing)} in the environment each would train alone: "
            "start them with accelerate launch, torchrun or launch/slurm.sbatch, or export these"
        )


def from_environment(*names: str, default: int) -> int:
    """The first of these variables that is set."""
    return next((int(os.environ[name]) for name in names if os.environ.get(name)), default)


def launched_rank() -> int:
    """This process's rank, also before it has joined the others."""
    return from_environment("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK", default=0)


def launched_world() -> int:
    """The number of ranks, also before this process has joined them."""
    return from_environment("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", default=1)


def lost(error: BaseException) -> bool:
    """Whether an error is that of a rank which has lost another one."""
    return isinstance(error, RuntimeError) and any(words in str(error) for words in LOST)


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


def gathered(value: T) -> list[T]:
    """What each rank gives, by rank, on every rank. Every rank must call this."""
    shared: list[T] = gather_object([value])
    return shared


def is_first() -> bool:
    """Whether this is rank 0."""
    leads: bool = PartialState().is_main_process
    return leads


def say(text: str) -> int:
    """Print what was asked for, once; returns the exit code 0."""
    if launched_rank() == 0:
        print(text)
    return 0


def refuse(error: Exception, code: int, speaker: int = 0) -> int:
    """Say in a line what is wrong, once; returns the exit code.

    Rank `speaker` does. Another one does only if it is still there after a while: then the speaker has not met the mistake.
    """
    rank = launched_rank()
    if rank != speaker:
        give_up = time.monotonic() + PATIENCE
        while time.monotonic() < give_up:
            if interrupt.asked() == signal.SIGTERM:  # the launcher's: a rank has spoken and left
                return code
            time.sleep(0.05)
    print(f"train.py: {f'rank {rank}: ' if rank != speaker else ''}{error}", file=sys.stderr, flush=True)
    return code


def fail(error: Exception) -> int:
    """Tell of what should not have happened; returns the exit code 1.

    If it is that another rank has gone, the other one tells why, and a line is enough here.
    """
    if lost(error):
        print(f"train.py: rank {launched_rank()} leaves, since another rank is gone ({one_line(error)})", file=sys.stderr)
    else:
        traceback.print_exception(error)
    return 1


def leave(code: int) -> NoReturn:
    """End this process. Call it where nothing refers to the model any more.

    gloo aborts a process that ends while a DDP model still holds its group, 3 to 27 times in 100 clean runs.
    """
    gc.collect()
    if code == 0 and torch.distributed.is_initialized():
        PartialState().wait_for_everyone()
        torch.distributed.destroy_process_group()
    with suppress(OSError):  # it may be a file on a disk that is full
        sys.stdout.flush()
        sys.stderr.flush()
    if code:
        os._exit(code)  # a group whose other ranks may be gone can neither be used nor taken down
    interrupt.end()
    sys.exit(0)
