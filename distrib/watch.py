"""What a rank's time goes to, and a watchdog: no phase of a run lasts longer than its limit.

A rank that hangs keeps the others waiting for as long as it is left. So each rank has a thread that looks at the clock; when
a phase is over its limit, it writes the stacks of all threads to the run folder, says who waits for whom, and ends the rank.
"""

import faulthandler
import linecache
import multiprocessing
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import NoReturn

from distrib import folder, ranks
from distrib.config import Config
from distrib.interrupt import SHOW_STACKS, add_stacks, stack_report

PERIOD = 1.0  # seconds between two looks at the clock
GATHER = 2.0  # seconds that the ranks have to report, and their loader workers

FOR_RANKS, FOR_WORKERS, FOR_DEVICE = "waits for other ranks", "waits for its loader workers", "waits for its device"
READS = re.compile(r"\.(item|tolist)\(\)")  # in a line of Python: it reads numbers that a device may have yet to compute


class Watch:
    """The phase that this rank is in (start, step, evaluation, save), the seconds spent in each, and its watchdog."""

    def __init__(self, config: Config) -> None:
        self.run_dir, self.limits = Path(config.run_dir), asdict(config.limits)
        self.rank, self.world = ranks.launched_rank(), ranks.launched_world()
        self.seconds = dict.fromkeys(self.limits, 0.0)
        self.current = "start", perf_counter()
        self.steps = self.lap_steps = 0
        self.lap_seconds = self.kept_seconds = 0.0
        self.turned = threading.Event()  # a phase has begun
        self.over = False
        self.thread = threading.Thread(target=self._look, name="watchdog", daemon=True)

    def __enter__(self) -> "Watch":
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.over = True
        self.turned.set()
        self.thread.join()
        faulthandler.cancel_dump_traceback_later()

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

    def _look(self) -> None:
        while True:
            self.turned.wait(PERIOD)
            self.turned.clear()
            if self.over:
                return
            phase, since = self.current
            spent = perf_counter() - since
            if spent > self.limits[phase]:
                self._end(phase, spent)
            # If something keeps the interpreter's lock, this thread cannot look: then faulthandler's does, which needs none.
            faulthandler.dump_traceback_later(self.limits[phase] - spent + 2 * GATHER, exit=True, file=2)
            if self.rank == 0 and phase != "start":  # until then the folder shows the end of the attempt before
                folder.alive(self.run_dir)

    def _end(self, phase: str, spent: float) -> NoReturn:
        faulthandler.dump_traceback_later(3 * GATHER, exit=True, file=2)  # a disk may hang too
        report, place = stack_report(self.run_dir, self.rank), whereabouts(several=self.world > 1)
        told = {self.rank: place}
        with suppress(OSError):
            report.parent.mkdir(parents=True, exist_ok=True)
            report.write_text(f"{place}\n")
            add_stacks(report, f"rank {self.rank}, {spent:.0f} s in the phase {phase!r}, process {os.getpid()}")
            for worker in multiprocessing.active_children():
                if worker.pid:
                    os.kill(worker.pid, SHOW_STACKS)
            told |= self._gathered(report)
        if self.rank == min(told):
            since = f"nothing has moved for {spent:.0f} s (limits.{phase}={self.limits[phase]:g})"
            what = f"{since}: {summary(told, self.world)}"
            print(f"train.py: {what}; stacks are in {report.parent}", file=sys.stderr, flush=True)
            folder.note(self.run_dir, "failed", cause=what, rank=next(iter(stuck(told, self.world)), None))
        os._exit(1)

    def _gathered(self, mine: Path) -> dict[int, str]:
        """What the ranks report that are able to, by rank. A report of an earlier hang is older by a limit at least."""
        told: dict[int, str] = {}
        give_up = time.monotonic() + GATHER
        while time.monotonic() < give_up:  # all of it: the loader workers need it too
            time.sleep(GATHER / 10)
            for rank in range(self.world):
                with suppress(OSError, IndexError):
                    path = stack_report(self.run_dir, rank)
                    if abs(path.stat().st_mtime - mine.stat().st_mtime) < min(self.limits.values()) + GATHER:
                        told[rank] = path.read_text().splitlines()[0]
        return told


def whereabouts(*, several: bool) -> str:
    """What the main thread is at, in words."""
    main = sys._current_frames()[threading.main_thread().ident or 0]
    calls = [(Path(frame.f_code.co_filename), line, frame.f_code.co_name) for frame, line in traceback.walk_stack(main)]
    innermost, line, name = calls[0]
    if READS.search(linecache.getline(str(innermost), line)):
        return FOR_DEVICE
    for path, _, function in calls:
        # DDP waits for the other ranks' gradients at the end of the backward pass.
        if several and ("/torch/distributed/" in path.as_posix() or name == "_engine_run_backward"):
            return FOR_RANKS
        if "/torch/utils/data/dataloader" in path.as_posix() and "get_data" in function:
            return FOR_WORKERS
    return f"is at {innermost.name}:{line} in {name}"


def stuck(told: dict[int, str], world: int) -> dict[int, str]:
    """The ranks that keep the others waiting, and what each is at: those that do not wait, or cannot tell.

    A GPU may wait for those of other ranks, and its rank for it: that one is to blame only if there is no other.
    """
    found = {rank: told.get(rank, "gives no sign of life") for rank in range(world) if told.get(rank, "") != FOR_RANKS}
    return {rank: what for rank, what in found.items() if what != FOR_DEVICE} or found


def summary(told: dict[int, str], world: int) -> str:
    """Who waits for whom, in words."""
    holding = stuck(told, world)
    parts = [f"rank {rank} {what}" for rank, what in holding.items()]
    for why in (FOR_DEVICE, FOR_RANKS):
        waiting = [str(rank) for rank, what in sorted(told.items()) if what == why and rank not in holding]
        parts += [f"rank {', '.join(waiting)} {why}"] * bool(waiting)
    return "; ".join(parts)
