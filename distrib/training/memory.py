"""Memory: as few micro-batches as fit, a clear error when memory runs out, and freed memory kept for the next step."""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from distrib.data.loaders import Batch
from distrib.errors import RunError, UserError, one_line
from distrib.runtime import ranks
from distrib.runtime.status import read_status
from distrib.schema import AUTO
from distrib.training.state import TrainState

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's mallopt
RAN_OUT = "can't allocate memory", "out of memory", "ALLOC_FAILED"  # messages of torch's CPU; CUDA; cuBLAS and cuDNN


def keep_freed_memory() -> None:
    """Keep freed memory in this process, for the next step: a step on a CPU gets up to 7 % shorter.

    glibc returns large tensors to the kernel, which has to clear their pages again. Without glibc this does nothing.
    """
    with suppress(AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def micro_batches_that_fit(
    asked: int | str, run_dir: Path, share: int, rehearse: Callable[[int], bool], refuse: Callable[[int], None]
) -> tuple[int, list[str]]:
    """The number of micro-batches for a share of `share` images: as `asked`, or as few as fit; and a line for the user if > 1.

    `rehearse(images)` tests whether so many images fit on this rank. It uses no collective, so no rank waits for one that
    fails. `refuse(count)` raises UserError if `count` is not allowed. Every rank must call this. Raises UserError if the share
    cannot be cut as asked, and RunError if a single image does not fit.
    """
    if isinstance(asked, int) and asked > share:
        few = f"micro_batches {asked} is more than the {share} images of a rank's share of a batch"
        raise UserError(f"{few}: use {share} or fewer")
    count, why = asked, "as asked"
    if not isinstance(count, int):
        count, why = min(ranks.broadcast_object(read_status(run_dir).get("micro_batches", 1)), share), "as in the last attempt"
    while True:
        refuse(count)
        largest, smallest = -(-share // count), share // count
        # The largest takes the most memory. With a single image, BatchNorm may have no statistics: an error on all ranks alike.
        sizes = (1, largest) if smallest == 1 < largest else (largest,)
        lacks = ranks.all_gather_object(not all(rehearse(size) for size in sizes))
        if not any(lacks):
            line = f"a rank's share of {share} images is cut into micro_batches={count}: {why}; the batch keeps its images"
            return count, [line] if count > 1 and asked == AUTO else []
        rank = lacks.index(True)
        if count == share:
            raise RunError(f"rank {rank} has too little memory for a step with a single image")
        if asked != AUTO:
            raise UserError(
                f"rank {rank} has too little memory for micro_batches={count}: use {min(2 * count, share)}, or auto"
            )
        count, why = min(2 * count, share), f"rank {rank} has too little memory for {largest} at once"


def refuse_graphs_of_parts(compiled: str, micro_batches: int, device: torch.device) -> None:
    """Raise UserError if torch.compile's CUDA graphs would overwrite the gradients of the previous micro-batch."""
    if micro_batches > 1 and compiled in ("reduce-overhead", "max-autotune") and device.type == "cuda":
        raise UserError(f"compile={compiled} does not work with micro_batches={micro_batches}: use compile=default")


def fits(state: TrainState, accelerator: Accelerator, loss: Callable[[Tensor, Tensor], Tensor], like: Batch) -> bool:
    """Whether a forward and backward pass of a batch like `like` fits in memory. The state is unchanged afterwards."""
    buffers = [(buffer, buffer.clone()) for buffer in state.network.buffers()]
    try:
        # Reserve two more numbers per weight: the state of Adam, or temporary memory of other optimizers.
        room = [torch.empty_like(weight) for weight in state.network.parameters() for _ in range(2)]
        with accelerator.no_sync(state.model):
            images, targets = (torch.zeros(each.shape, dtype=each.dtype, device=accelerator.device) for each in like)
            accelerator.backward(loss(state.model(images.contiguous(memory_format=torch.channels_last)), targets))
        del room
        return True
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
    except ValueError as error:  # BatchNorm over a single number
        raise UserError(f"{one_line(error)}: give a larger batch_size, or model.norm=group") from None
    finally:
        state.optimizer.zero_grad()
        for buffer, before in buffers:
            buffer.copy_(before)
    torch.cuda.empty_cache()  # smaller micro-batches need blocks of other sizes
    return False


@contextmanager
def memory_errors_explained(state: TrainState, rank: int, micro_batches: int, *, auto: bool) -> Iterator[None]:
    """If a rank runs out of memory, raise RunError, and have the next attempt start with twice as many micro-batches."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        more = 2 * micro_batches
        where = f"rank {rank} ran out of memory after step {state.step:,} with micro_batches={micro_batches}"
        way_out = f"run the same command, which tries {more}" if auto else f"give micro_batches={more}, or auto"
        raise RunError(f"{where}: {way_out}", cause=where, rank=rank, micro_batches=more) from None


def ran_out(error: Exception) -> bool:
    """Whether an error means that a device or the machine is out of memory."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(words in str(error) for words in RAN_OUT)
