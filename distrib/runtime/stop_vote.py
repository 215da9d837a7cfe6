"""All ranks stop before the same step, which rank 0 decides; otherwise they would wait for each other."""

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

from distrib.config import Config
from distrib.runtime import signals
from distrib.runtime.control_channel import ControlChannel


class StopVote:
    """Decides before each step whether to stop. Rank 0 decides about twice a second, and the others wait for its decision."""

    PERIOD = 0.5  # seconds
    BY_FILE, FILE = 100, "the file STOP"  # larger than any signal number, so that the file wins

    def __init__(self, config: Config, channel: ControlChannel) -> None:
        self.file, self.channel = Path(config.run_dir, "STOP"), channel
        self.next = 0  # the step before which rank 0 decides next
        self.last: tuple[int, float] | None = None  # the step and time of the last decision

    def __call__(self, step: int) -> str:
        """Who requested to stop before `step`: the name of a signal, or the file; "" if nobody did."""
        if step < self.next:
            return ""
        self.channel.ask_to_stop(signals.received())
        decision = self._decide(step) if self.channel.rank == 0 else self.channel.decision()
        assert decision["step"] == step, decision
        self.next, asked = decision["next"], decision["asked"]
        return self.FILE if asked == self.BY_FILE else signal.Signals(asked).name if asked else ""

    def _decide(self, step: int) -> dict[str, int]:
        asked = self.BY_FILE if os.path.exists(self.file) else self.channel.asked
        decision = {"step": step, "asked": asked, "next": step + self._pace(step)}
        self.channel.decide(**decision)
        if asked == self.BY_FILE:
            with suppress(OSError):
                self.file.unlink()  # the request is served
        return decision

    def _pace(self, step: int) -> int:
        """Steps until the next decision: about PERIOD seconds' worth, at most double the last interval."""
        earlier, self.last = self.last, (step, time.perf_counter())
        if earlier is None:
            return 1
        steps, seconds = step - earlier[0], self.last[1] - earlier[1]
        return max(1, min(2 * steps, round(steps * self.PERIOD / seconds)))
