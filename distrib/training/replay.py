"""A step's work on a GPU, recorded once as a CUDA graph and then replayed: the host starts one thing in place of hundreds.

A small network's kernels take a GPU less time than it takes the host to start them, one by one. What is replayed are the same
kernels on the same memory, so that the numbers are the same, too.
"""

from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import torch

from distrib.config import Config
from distrib.data.loaders import Batch
from distrib.errors import one_line
from distrib.training.records import StepRecord

WARM_UP = 3  # steps before the recording: in the first ones, libraries and optimizers make what they keep

T = TypeVar("T")
Work = Callable[[Batch], StepRecord]  # all that a step has a device do with a batch, and what it leaves to be read


def can_replay(config: Config, device: torch.device, world: int, *, scaled: bool) -> bool:
    """Whether a step's work can be recorded: on one GPU, if the host waits for none of it and no part is a graph already.

    It waits for the scaler if gradients are `scaled`, as in fp16.
    """
    alone = device.type == "cuda" and world == 1
    return config.cuda_graph and alone and not scaled and config.compile in ("auto", "no", "default")


class Recording:
    """A CUDA graph of some work, the memory from which it takes a batch, and that in which it leaves its record."""

    def __init__(self, work: Work, like: Batch) -> None:
        self.batch, self.graph = Batch(*map(torch.empty_like, like)), torch.cuda.CUDAGraph()
        stream, pool = torch.cuda.current_stream(), torch.cuda.graph_pool_handle()
        try:
            # thread_local: what other threads do meanwhile, such as writing a checkpoint, is not part of it.
            with torch.cuda.graph(self.graph, pool, capture_error_mode="thread_local"):
                self.record = work(self.batch)
        except RuntimeError:
            abandon(stream, pool)
            raise

    def __call__(self, batch: Batch) -> StepRecord:
        for place, tensor in zip(self.batch, batch, strict=True):
            place.copy_(tensor)
        self.graph.replay()
        return self.record._replace(values=self.record.values.clone())


def abandon(stream: torch.cuda.Stream, pool: tuple[int, int]) -> None:
    """Undo what the beginning of a recording has done, where the recording failed: torch leaves some of it."""
    torch.cuda.set_stream(stream)
    device = torch.cuda.current_device()
    generator = torch.cuda.default_generators[device]
    generator.graphsafe_set_state(generator.clone_state())  # else dropout fails from now on
    names = "_cuda_endAllocateToPool", "_cuda_endAllocateCurrentStreamToPool"  # from torch 2.8 on, and before
    end = next(getattr(torch._C, name) for name in names if hasattr(torch._C, name))
    with suppress(RuntimeError):  # from torch 2.13 on it is done already
        end(device, pool)  # else memory that two streams have used is never free again
        torch._C._cuda_releasePool(device, pool)


class Replay:
    """Does the work of each step: the first few times as it is, then, if that is `wanted`, by replaying a recording of it.

    If it cannot be recorded, `undo` takes back what the attempt has left, `failure` says why, and all goes on without.
    """

    def __init__(self, *, wanted: bool = False, undo: Callable[[], None] = lambda: None) -> None:
        self.wanted, self.undo, self.steps, self.failure = wanted, undo, 0, ""
        self.recording: Recording | None = None

    def __call__(self, work: Work, batch: Batch) -> StepRecord:
        if self.recording:
            return self.recording(batch)
        self.steps += 1
        if not self.wanted or self.steps <= WARM_UP:
            return work(batch)
        try:
            self.recording = Recording(work, batch)  # nothing is computed yet
        except RuntimeError as error:  # something in it waits for the GPU, or there is no memory for it
            self.wanted, self.failure = False, f"a step cannot be recorded, so cuda_graph is off: {one_line(error)}"
            self.undo()
        return self.recording(batch) if self.recording else work(batch)  # here, where the error keeps nothing any more

    def beside(self, work: Callable[[], T]) -> T:
        """Do other work. If memory lacks for it, the recording is given up first, which holds on to that of a whole step."""
        try:
            return work()
        except torch.OutOfMemoryError:
            if not self.recording:
                raise
        self.wanted, self.recording = False, None
        self.failure = "there is no memory for an evaluation beside a recorded step, so cuda_graph is off"
        torch.cuda.empty_cache()
        return work()
