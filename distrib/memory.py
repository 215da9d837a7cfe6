"""Memory: kept for the next step, and if it is too little for a whole share, the share is cut into as few parts as fit."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator

from distrib import ranks
from distrib.config import AUTO, Config, RunError, UserError, one_line
from distrib.folder import note, noted
from distrib.models import Shape
from distrib.state import TrainState

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


def parts_that_fit(
    config: Config, state: TrainState, share: int, image: Shape, accelerator: Accelerator
) -> tuple[int, list[str]]:
    """The parts that a share of so many images is cut into, as asked or as few as fit; and a line for the user if it is cut.

    Each rank rehearses one part of a step, in which nothing is exchanged, so that none waits for one that failed. Every rank
    must call this. Raises UserError if it cannot be cut as asked, RunError if not even one image fits.
    """
    asked = config.micro_batches
    if isinstance(asked, int) and asked > share:
        few = f"micro_batches {asked} is more than the {share} images of a rank's share of a batch"
        raise UserError(f"{few}: use {share} or fewer")
    parts, why = asked, "as asked"
    if not isinstance(parts, int):
        parts, why = min(ranks.agreed(noted(Path(config.run_dir)).get("micro_batches", 1)), share), "as at the last attempt"
    while True:
        refuse_graphs_of_parts(config.compile, parts, accelerator.device)
        largest, smallest = -(-share // parts), share // parts
        # The largest part takes the most memory. One of a single image, which ranks come upon together, may have no statistics.
        sizes = (1, largest) if smallest == 1 < largest else (largest,)
        lacks = ranks.gathered(not all(fits(state, (size, *image), accelerator) for size in sizes))
        if not any(lacks):
            told = f"a rank's share of {share} images is cut into micro_batches={parts}: {why}; the batch is the same"
            return parts, [told] if parts > 1 and asked == AUTO else []
        rank = lacks.index(True)
        if parts == share:
            raise RunError(f"rank {rank} has not enough memory for a step with a single image")
        if asked != AUTO:
            raise UserError(f"rank {rank} has no memory for micro_batches={parts}: use {min(2 * parts, share)}, or auto")
        parts, why = min(2 * parts, share), f"rank {rank} has no memory for {largest} at once"


def refuse_graphs_of_parts(compiled: str, parts: int, device: torch.device) -> None:
    """Raise UserError if a CUDA graph would write a part's gradients over those of the part before."""
    if parts > 1 and compiled in ("reduce-overhead", "max-autotune") and device.type == "cuda":
        raise UserError(f"compile={compiled} does not go with micro_batches={parts}: use compile=default")


def fits(state: TrainState, shape: tuple[int, int, int, int], accelerator: Accelerator) -> bool:
    """Whether a forward and a backward pass over images of this shape fit in memory. They leave no trace."""
    buffers = [(buffer, buffer.clone()) for buffer in state.network.buffers()]
    try:
        # Room for the two numbers that Adam will remember of each weight, or for what else a step takes; momentum is there.
        room = [torch.empty_like(weight) for weight in state.network.parameters() for _ in range(2)]
        with accelerator.no_sync(state.model):
            images = torch.zeros(shape, device=accelerator.device).contiguous(memory_format=torch.channels_last)
            loss = F.cross_entropy(state.model(images), torch.zeros(len(images), dtype=torch.int64, device=accelerator.device))
            accelerator.backward(loss)
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
    torch.cuda.empty_cache()  # only here: what a smaller part needs may have another shape
    return False


@contextmanager
def out_of_memory_told(state: TrainState, config: Config, rank: int) -> Iterator[None]:
    """Tell in a line if a rank runs out of memory after all; the next attempt then begins with twice as many parts."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        more = 2 * state.micro_batches
        where = f"rank {rank} ran out of memory after step {state.step:,} with micro_batches={state.micro_batches}"
        note(Path(config.run_dir), "failed", cause=where, rank=rank, micro_batches=more)
        way_out = f"the same command tries {more}" if config.micro_batches == AUTO else f"give micro_batches={more}, or auto"
        raise RunError(f"{where}: {way_out}", speaker=rank) from None


def ran_out(error: Exception) -> bool:
    """Whether an error is that of a device, or of the machine, that has no more memory to give."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(words in str(error) for words in RAN_OUT)
