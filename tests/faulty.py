"""train.py with one fault in it, once. usage: faulty.py FAULT RANK STEP MARK [train.py's arguments]

MARK is a file that is made when the fault strikes, and which keeps it from striking again.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from distrib.runtime import signals

if __name__ == "__main__":
    signals.listen()

import torch
from paced import blocked

from distrib import cli, run
from distrib.data.files import Reader
from distrib.runtime import exits, watchdog
from distrib.runtime.environment import env_rank
from distrib.training import loop
from distrib.training.loop import train_step
from distrib.training.state import TrainState

fault, rank, step, mark = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
read = Reader.read
FITS = 8  # images, where memory is short


def strikes(state: TrainState) -> bool:
    if env_rank() != rank or state.step < step or mark.exists():
        return False
    mark.touch()
    return True


def steps_aside(state: TrainState, *rest: Any) -> None:
    """A training step in which something goes wrong."""
    if strikes(state):
        if fault == "sleep":
            time.sleep(1000)
        if fault == "lock":  # a call that keeps the interpreter's lock, and waits for itself
            mutex = ctypes.create_string_buffer(64)
            ctypes.PyDLL(None).pthread_mutex_lock(mutex)
            ctypes.PyDLL(None).pthread_mutex_lock(mutex)
        if fault in ("SIGSTOP", "SIGKILL"):
            os.kill(os.getpid(), getattr(signal, fault))
        if fault == "orphan":
            for worker in multiprocessing.active_children():
                assert worker.pid
                os.kill(worker.pid, signal.SIGSTOP)
                mark.write_text(f"{worker.pid}")
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "bit":
            with torch.no_grad():
                next(state.network.parameters()).view(torch.int32).view(-1)[0] ^= 1
        if fault == "late memory":
            raise torch.OutOfMemoryError("out of memory")
    train_step(state, *rest)


def with_loss_of_nan(state: TrainState, *rest: Any) -> None:
    """The loss of one rank is not a number in step `step`, or, if RANK is negative, from there on."""
    mine = env_rank() == abs(rank) and (state.step == step or (rank < 0 and state.step > step))
    hook = state.network.register_forward_hook(lambda module, images, logits: logits * (torch.nan if mine else 1))
    train_step(state, *rest)
    hook.remove()


def stuck(reader: Reader, *request: Any) -> Any:
    if multiprocessing.parent_process() and env_rank() == rank and not mark.exists():
        mark.touch()
        time.sleep(1000)
    return read(reader, *request)


def with_little_memory(build: Any) -> Any:
    """A network that needs more memory for more than FITS images than one rank has."""

    def built(*args: Any, **options: Any) -> torch.nn.Module:
        def check(module: torch.nn.Module, images: tuple[torch.Tensor]) -> None:
            if env_rank() == rank and module.training and len(images[0]) > FITS:
                raise torch.OutOfMemoryError("out of memory")

        network: torch.nn.Module = build(*args, **options)
        network.register_forward_pre_hook(check)
        return network

    return built


if __name__ == "__main__":
    loop.train_step = with_loss_of_nan if fault == "nan" else steps_aside
    if fault == "worker":
        Reader.read = stuck
    if fault == "memory":
        run.build_model = with_little_memory(run.build_model)
    if "BLOCK" in os.environ:
        run.fit = blocked
    watchdog.GATHER = 6.0  # a busy machine may take longer than usual to write stacks
    exits.leave(cli.main(["train", *sys.argv[5:]]))
