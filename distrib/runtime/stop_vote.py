"""All ranks agree on the step before which they stop; otherwise they would wait for each other."""

import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from distrib.config import Config
from distrib.runtime import ranks, signals
from distrib.runtime.environment import env_world_size


class StopVote:
    """Decides before each step whether to stop. About twice a second, the ranks vote.

    A vote is one small all-reduce between CPUs (gloo), so it does not wait for a GPU.
    """

    PERIOD = 0.5  # seconds
    BY_FILE, FILE = 100, "the file STOP"  # larger than any signal number, so that it wins the maximum

    def __init__(self, config: Config) -> None:
        self.file = Path(config.run_dir, "STOP")
        self.several = env_world_size() > 1
        self.group: Any = (
            torch.distributed.new_group(backend="gloo", timeout=ranks.collective_timeout(config)) if self.several else None
        )
        self.next = 0  # the step before which the ranks vote next
        self.last: tuple[int, float] | None = None  # the step and time of the last vote

    def __call__(self, step: int) -> str:
        """Who requested to stop before `step`: the name of a signal, or the file; "" if nobody did."""
        if step < self.next:
            return ""
        wish = signals.received() or (self.BY_FILE if ranks.is_rank0() and os.path.exists(self.file) else 0)
        vote = torch.tensor([wish, self._pace(step) if ranks.is_rank0() else 0])
        if self.several:
            torch.distributed.all_reduce(vote, op=torch.distributed.ReduceOp.MAX, group=self.group)
        wish, steps = vote.tolist()
        self.next = step + steps
        if wish == self.BY_FILE and ranks.is_rank0():
            with suppress(OSError):
                self.file.unlink()  # the request is served
        return self.FILE if wish == self.BY_FILE else signal.Signals(wish).name if wish else ""

    def _pace(self, step: int) -> int:
        """Steps until the next vote: about PERIOD seconds' worth, at most double the last interval."""
        earlier, self.last = self.last, (step, time.perf_counter())
        if earlier is None:
            return 1
        steps, seconds = step - earlier[0], self.last[1] - earlier[1]
        return max(1, min(2 * steps, round(steps * self.PERIOD / seconds)))
