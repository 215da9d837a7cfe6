"""The phases of a run, and the time that a rank spends in each."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

PHASES = ("start", "step", "evaluation", "save")


class Stopwatch:
    """The current phase of this rank, and the seconds spent in each phase."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.current = "start", perf_counter()
        self.steps = self.lap_steps = 0
        self.lap_seconds = self.kept_seconds = 0.0
        self.phase_changed = threading.Event()  # set when another phase starts

    def enter(self, phase: str) -> None:
        """End the current phase and start another, or start the same one again."""
        before, since = self.current
        now = perf_counter()
        self.seconds[before] += now - since
        self.current = phase, now
        if phase != before:
            self.phase_changed.set()

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """A phase that interrupts the current one."""
        before, _ = self.current
        self.enter(phase)
        try:
            yield
        finally:
            self.enter(before)

    def stepped(self) -> None:
        """A step has ended, and the next one starts."""
        self.enter("step")
        self.steps += 1

    def steps_per_second(self) -> float:
        """Steps per second since the last call; only the time of steps counts."""
        self.enter("step")
        steps, seconds = self.steps - self.lap_steps, self.seconds["step"] - self.lap_seconds
        self.lap_steps, self.lap_seconds = self.steps, self.seconds["step"]
        return steps / seconds

    def overall(self) -> float:
        """Steps per second up to the last call of `steps_per_second`."""
        return self.lap_steps / self.lap_seconds if self.lap_steps else 0.0

    def seconds_since_save(self) -> float:
        """Seconds spent in steps and evaluations since the last call: the cost of the state that is saved now."""
        earlier, self.kept_seconds = self.kept_seconds, self.seconds["step"] + self.seconds["evaluation"]
        return self.kept_seconds - earlier
