"""Memory: kept for the next step; and if it is too little for a whole share, as few micro-batches as fit."""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import Module

from distrib.config import AUTO
from distrib.data.loaders import Batch
from distrib.errors import RunError, UserError, one_line
from distrib.runtime import ranks
from distrib.runtime.status import read_status, write_status
from distrib.training.state import TrainState

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's mallopt
RAN_OUT = "can't allocate memory", "out of memory", "ALLOC_FAILED"  # in words of torch's CPU, of CUDA, and of cuBLAS and cuDNN


def keep_freed_memory() -> None:
    """Have this process keep what it frees, for its next step: a CPU's step is then up to 7 % shorter.

    glibc hands large tensors back to the kernel, which has to give and to clear every page of them anew. Elsewhere this does
    nothing.
    """
    with suppress(AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def micro_batches_that_fit(
    asked: int | str, run_dir: Path, share: int, rehearse: Callable[[int], bool], refuse: Callable[[int], None]
) -> tuple[int, list[str]]:
    """The micro-batches that a share of so many images is cut into, as asked or as few as fit; and a line if it is cut.

    Each rank rehearses one of them: `rehearse(images)` tells whether it fits, and exchanges nothing, so that none waits for one
    that failed. `refuse(count)` raises UserError if there may not be so many. Every rank must call this. Raises UserError if
    the share cannot be cut as asked, RunError if not even one image fits.
    """
    if isinstance(asked, int) and asked > share:
        few = f"micro_batches {asked} is more than the {share} images of a rank's share of a batch"
        raise UserError(f"{few}: use {share} or fewer")
    count, why = asked, "as asked"
    if not isinstance(count, int):
        count, why = min(ranks.broadcast_object(read_status(run_dir).get("micro_batches", 1)), share), "as at the last attempt"
    while True:
        refuse(count)
        largest, smallest = -(-share // count), share // count
        # The largest takes the most memory. One of a single image, which ranks come upon together, may have no statistics.
        sizes = (1, largest) if smallest == 1 < largest else (largest,)
        lacks = ranks.all_gather_object(not all(rehearse(size) for size in sizes))
        if not any(lacks):
            line = f"a rank's share of {share} images is cut into micro_batches={count}: {why}; the batch is the same"
            return count, [line] if count > 1 and asked == AUTO else []
        rank = lacks.index(True)
        if count == share:
            raise RunError(f"rank {rank} has not enough memory for a step with a single image")
        if asked != AUTO:
            raise UserError(f"rank {rank} has no memory for micro_batches={count}: use {min(2 * count, share)}, or auto")
        count, why = min(2 * count, share), f"rank {rank} has no memory for {largest} at once"


def refuse_graphs_of_parts(compiled: str, micro_batches: int, device: torch.device) -> None:
    """Raise UserError if a CUDA graph would write a micro-batch's gradients over those of the one before."""
    if micro_batches > 1 and compiled in ("reduce-overhead", "max-autotune") and device.type == "cuda":
        raise UserError(f"compile={compiled} does not go with micro_batches={micro_batches}: use compile=default")


def fits(
    state: TrainState, model: Module, accelerator: Accelerator, loss: Callable[[Tensor, Tensor], Tensor], like: Batch
) -> bool:
    """Whether a forward and a backward pass over a batch of this form fit in memory. They leave no trace."""
    buffers = [(buffer, buffer.clone()) for buffer in state.network.buffers()]
    try:
        # Room for two more numbers of each weight: for what Adam will remember of it, or for what else a step takes.
        room = [torch.empty_like(weight) for weight in state.network.parameters() for _ in range(2)]
        with accelerator.no_sync(model):
            images, targets = (torch.zeros(each.shape, dtype=each.dtype, device=accelerator.device) for each in like)
            accelerator.backward(loss(model(images.contiguous(memory_format=torch.channels_last)), targets))
        del room
        return True
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
    except ValueError as error:  # batch statistics of a single number
        raise UserError(f"{one_line(error)}: give a larger batch_size, or model.norm=group") from None
    finally:
        state.optimizer.zero_grad()
        for buffer, before in buffers:
            buffer.copy_(before)
    torch.cuda.empty_cache()  # only here: what a smaller one needs may have another shape
    return False


@contextmanager
def memory_errors_explained(state: TrainState, run_dir: Path, rank: int, micro_batches: int, *, auto: bool) -> Iterator[None]:
    """Report in a line that a rank ran out of memory after all; the next attempt begins with twice as many micro-batches."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        more = 2 * micro_batches
        where = f"rank {rank} ran out of memory after step {state.step:,} with micro_batches={micro_batches}"
        write_status(run_dir, "failed", cause=where, rank=rank, micro_batches=more)
        way_out = f"the same command tries {more}" if auto else f"give micro_batches={more}, or auto"
        raise RunError(f"{where}: {way_out}", speaker=rank) from None


def ran_out(error: Exception) -> bool:
    """Whether an error is that of a device, or of the machine, that has no more memory to give."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(words in str(error) for words in RAN_OUT)
