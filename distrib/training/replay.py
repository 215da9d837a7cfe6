"""A training step on one GPU is recorded once as a CUDA graph and then replayed: one launch instead of hundreds.

The kernels of a small network take less time than the host needs to launch them. A replay runs the same kernels on the same
memory, so its results are the same.
"""

from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import torch

from distrib.config import Config
from distrib.data.loaders import Batch
from distrib.errors import one_line
from distrib.training.records import StepRecord

WARM_UP = 3  # steps before the recording, in which libraries and optimizers allocate what they keep

T = TypeVar("T")
Work = Callable[[Batch], StepRecord]  # everything that a step computes on the device, and its record


def can_replay(config: Config, device: torch.device, world: int, *, scaled: bool) -> bool:
    """Whether a step can be recorded: on one GPU, if the host waits for nothing in it and no part of it is a graph already.

    If gradients are `scaled`, as in fp16, the host waits for the scaler.
    """
    alone = device.type == "cuda" and world == 1
    return config.cuda_graph and alone and not scaled and config.compile in ("auto", "no", "default")


class Recording:
    """A CUDA graph of a step, with the memory of its batch and of its record."""

    def __init__(self, work: Work, like: Batch) -> None:
        self.batch, self.graph = Batch(*map(torch.empty_like, like)), torch.cuda.CUDAGraph()
        stream, pool = torch.cuda.current_stream(), torch.cuda.graph_pool_handle()
        try:
            # thread_local: other threads, such as the one that writes a checkpoint, may use CUDA meanwhile.
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
    """Clean up after a recording that failed: torch leaves some of its state behind."""
    torch.cuda.set_stream(stream)
    device = torch.cuda.current_device()
    generator = torch.cuda.default_generators[device]
    generator.graphsafe_set_state(generator.clone_state())  # otherwise dropout fails from now on
    names = "_cuda_endAllocateToPool", "_cuda_endAllocateCurrentStreamToPool"  # from torch 2.8 on, and before
    end = next(getattr(torch._C, name) for name in names if hasattr(torch._C, name))
    with suppress(RuntimeError):  # from torch 2.13 on it is done already
        end(device, pool)  # otherwise memory that two streams used is never freed
        torch._C._cuda_releasePool(device, pool)


class Replay:
    """Runs the work of each step: the first few times directly, then, if `wanted`, by replaying a recording.

    If the recording fails, `undo` is called, `failure` says why, and steps run without a recording.
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
            self.recording = Recording(work, batch)  # this computes nothing yet
        except RuntimeError as error:  # a part of it waits for the GPU, or memory is too small
            self.wanted, self.failure = False, f"a step cannot be recorded, so cuda_graph is off: {one_line(error)}"
            self.undo()
        return self.recording(batch) if self.recording else work(batch)  # after the except block, where the error held memory

    def start_again(self) -> None:
        """Drop the recording, since the next steps do other work."""
        self.steps, self.recording = 0, None

    def run_other(self, work: Callable[[], T]) -> T:
        """Run other work. If it runs out of memory, drop the recording, which holds the memory of a step, and run it again."""
        try:
            return work()
        except torch.OutOfMemoryError:
            if not self.recording:
                raise
        self.wanted, self.recording = False, None
        self.failure = "too little memory for an evaluation beside a recorded step, so cuda_graph is off"
        torch.cuda.empty_cache()
        return work()
