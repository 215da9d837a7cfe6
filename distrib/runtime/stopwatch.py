"""What a rank's time goes to: the phase that it is in, and the seconds spent in each."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

PHASES = ("start", "step", "evaluation", "save")


class Stopwatch:
    """The phase that this rank is in, and the seconds spent in each."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.current = "start", perf_counter()
        self.steps = self.lap_steps = 0
        self.lap_seconds = self.kept_seconds = 0.0
        self.turned = threading.Event()  # another phase has begun

    def enter(self, phase: str) -> None:
        """A phase begins, and the one before ends; or the same one begins anew."""
        before, since = self.current
        now = perf_counter()
        self.seconds[before] += now - since
        self.current = phase, now
        if phase != before:
            self.turned.set()

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """A phase that interrupts another one."""
        before, _ = self.current
        self.enter(phase)
        yield
        self.enter(before)

    def stepped(self) -> None:
        """A step is done, and the next one begins."""
        self.enter("step")
        self.steps += 1

    def lap(self) -> float:
        """Steps per second since the last lap, in the time of steps."""
        self.enter("step")
        steps, seconds = self.steps - self.lap_steps, self.seconds["step"] - self.lap_seconds
        self.lap_steps, self.lap_seconds = self.steps, self.seconds["step"]
        return steps / seconds

    def overall(self) -> float:
        """Steps per second up to the last lap."""
        return self.lap_steps / self.lap_seconds if self.lap_steps else 0.0

    def taken(self) -> float:
        """Seconds of steps and evaluations since this was last asked: what a state that is saved now has cost."""
        earlier, self.kept_seconds = self.kept_seconds, self.seconds["step"] + self.seconds["evaluation"]
        return self.kept_seconds - earlier
