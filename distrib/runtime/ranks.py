"""The ranks of a run, one process per device: how they connect, and the collectives that they use."""

import atexit
import gc
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, broadcast_object_list, gather_object
from torch import nn

from distrib.config import Config
from distrib.errors import RunError, UserError
from distrib.runtime.connection import interface_to
from distrib.runtime.control_channel import ControlChannel, open_channel
from distrib.runtime.environment import (
    env_local_world_size,
    env_rank,
    env_world_size,
    refuse_unconnected_processes,
    threads_of_a_rank,
    variable,
)

T = TypeVar("T")

store: Any = None  # the launcher's, for this attempt; None if there is one rank


@contextmanager
def connected(config: Config) -> Iterator[ControlChannel]:
    """Connect this rank with the others, also by a control channel, for the time of a run. Every rank must call this.

    If a rank leaves with an exception, the others leave with it too.
    """
    connect(config)
    channel = open_channel(store, env_rank(), env_world_size())
    finished = False
    try:
        yield channel
        finished = True
    except Exception as error:
        found = channel.settle(error)
        if found is error:
            raise
        raise found from None
    finally:
        channel.close(finished=finished)


def connect(config: Config) -> PartialState:
    """Set this rank's threads and device, and connect it with the other ranks. Every rank must call this.

    Raises UserError if the launcher did not set the variables that connect the processes.
    """
    threads = config.threads or threads_of_a_rank(env_local_world_size())
    torch.set_num_threads(threads)  # launchers export OMP_NUM_THREADS=1, which leaves most cores idle
    gpus = torch.cuda.device_count()  # NVIDIA's, and AMD's under ROCm; with other GPUs, such as a Mac's, the CPU is used
    refuse_unconnected_processes()
    if 0 < gpus < env_local_world_size():
        way_out = f"start {gpus} ranks, or export CUDA_VISIBLE_DEVICES= to train on the CPU"
        raise UserError(f"{env_local_world_size()} ranks on this machine are more than its {gpus} GPUs: {way_out}")
    if gpus:
        torch.backends.cudnn.benchmark = config.cudnn_benchmark
        torch.backends.cudnn.deterministic = not config.cudnn_benchmark  # without it, cuDNN may use nondeterministic kernels
        torch.set_float32_matmul_precision("high")  # TF32, which is the default of convolutions
    init_process_group("cuda" if gpus else "cpu", config)
    with variable("OMP_NUM_THREADS", str(threads)):  # if it is not set, accelerate sets another number of threads
        state = PartialState(cpu=not gpus)  # on a machine without GPUs, accelerate needs cpu=True to see the other ranks
    assert state.num_processes == env_world_size(), state.num_processes
    return state


def init_process_group(device: str, config: Config) -> None:
    """Create torch's process group, if there are several ranks; `collective_timeout` is the timeout of its collectives."""
    if env_world_size() == 1 or torch.distributed.is_initialized():
        return
    global store
    limit, distributed = collective_timeout(config), cast(Any, torch.distributed)
    launchers, rank, world = next(distributed.rendezvous("env://", timeout=limit))
    store = distributed.PrefixStore(agree_on_attempt_name(launchers, rank, world), launchers)
    backend = distributed.get_default_backend_for_device(device)
    several_machines = env_world_size() > env_local_world_size()
    if backend == "gloo" and several_machines and (interface := interface_to(os.environ["MASTER_ADDR"])):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)  # gloo would take that of this machine's name
    distributed.init_process_group(backend, timeout=limit, store=store, rank=rank, world_size=world)
    atexit.register(destroy_process_group)  # programs that use distrib as a library do not call it


def destroy_process_group() -> None:
    """Destroy the process group at the end of a program. Every rank must call this, after it has released its DDP model.

    Otherwise gloo may abort the process at its exit: this happened in 3 to 27 of 100 successful runs.
    """
    failed = hasattr(sys, "last_value")  # the program ends with an exception: the other ranks may have exited already
    if torch.distributed.is_initialized() and not failed:
        gc.collect()
        PartialState().wait_for_everyone()
        torch.distributed.destroy_process_group()


def agree_on_attempt_name(store: Any, rank: int, world: int) -> str:
    """Agree on a new name for this attempt, the prefix of its keys in the store; returns it. Every rank must call this.

    A launcher that restarts the ranks keeps the store, and the keys of the previous attempt with it. With these keys, two of
    three restarts failed or hung. The number of the restart cannot be the name, because each machine counts separately. So each
    rank writes a random token, and rank 0 answers with the token of rank 0, which is the name. Rank 0 repeats this until every
    rank has acknowledged an answer; a token that the previous attempt left gets an answer, but nobody acknowledges it.
    """
    token = secrets.token_hex(8)
    if rank:
        store.set(f"rank {rank}", token)
        name: str = store.get(f"answer to {token}").decode()
        store.set(f"{token} acknowledges {name}", "")
        return name
    missing = dict.fromkeys(range(1, world), "")  # the ranks that have not acknowledged yet, and their tokens
    while missing:
        for other, seen in [*missing.items()]:
            if seen and store.check([f"{seen} acknowledges {token}"]):
                del missing[other]
            elif store.check([f"rank {other}"]):
                missing[other] = store.get(f"rank {other}").decode()
                store.set(f"answer to {missing[other]}", token)
        time.sleep(0.01)
    return token


def collective_timeout(config: Config) -> timedelta:
    """The timeout of collectives: longer than every limit, so that the watchdog reports a hang first."""
    return timedelta(seconds=max(asdict(config.limits).values()) + 30)


def device() -> torch.device:
    """This rank's device; call it after `connect`."""
    found: torch.device = PartialState().device
    return found


def is_rank0() -> bool:
    """Whether this process is rank 0; call it after `connect`."""
    main: bool = PartialState().is_main_process
    return main


def rank0_first(action: Callable[[bool], T]) -> T:
    """Run `action(True)` on rank 0 and then `action(False)` on the other ranks. Every rank must call this.

    If rank 0 raises a UserError or a RunError, all ranks raise it, so that none waits for the others.
    """
    error: UserError | RunError | None = None
    if is_rank0():
        try:
            result = action(True)
        except (UserError, RunError) as raised:
            error = raised
    error = broadcast_object(error)
    if error is not None:
        raise error from None
    return result if is_rank0() else action(False)


def on_rank0(action: Callable[[], T]) -> T:
    """Run `action` on rank 0; returns its result, or raises its error, on all ranks. Every rank must call this."""
    return broadcast_object(rank0_first(lambda rank0: action() if rank0 else cast(T, None)))


def broadcast_object(value: T) -> T:
    """Returns rank 0's value on all ranks. Every rank must call this."""
    shared: list[T] = broadcast_object_list([value])
    return shared[0]


def all_gather_object(value: T) -> list[T]:
    """Returns the values of all ranks, in the order of the ranks, on all ranks. Every rank must call this."""
    shared: list[T] = gather_object([value])
    return shared


def raise_on_all(error: UserError | RunError | None) -> None:
    """If some ranks have an error, all ranks raise the error of the lowest of them. Every rank must call this."""
    first = next((each for each in all_gather_object(error) if each), None)
    if first:
        raise first from None


def broadcast_tensors(tensors: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Send rank 0's tensors to all ranks, one after the other, to their devices. Every rank must call this."""
    for name, shape, dtype in broadcast_object([(name, each.shape, each.dtype) for name, each in tensors.items()]):
        tensor = tensors[name].to(device()).contiguous() if is_rank0() else torch.empty(shape, dtype=dtype, device=device())
        broadcast(tensor.view(-1).view(torch.uint8))  # as bytes: gloo does not know all types
        yield name, tensor


def broadcast_buffers(network: nn.Module) -> None:
    """Copy rank 0's buffers to all ranks. Every rank must call this."""
    for buffer in network.buffers():
        broadcast(buffer)


def broadcast_network(network: nn.Module) -> None:
    """Copy rank 0's weights and buffers to all ranks. Every rank must call this."""
    for each in network.state_dict().values():
        broadcast(each)
