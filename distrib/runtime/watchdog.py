"""A watchdog ends a run if a phase of it exceeds its limit.

A rank that hangs makes the others wait for ever. So each rank has a thread that looks at the clock. When a phase exceeds its
limit, the thread writes the stacks of all threads to the run folder, reports which rank waits for which, and ends the process.
"""

import faulthandler
import multiprocessing
import os
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from time import perf_counter
from typing import Any, NoReturn

from distrib.config import Config
from distrib.errors import HANG, RunError
from distrib.runtime import ranks
from distrib.runtime.control_channel import ControlChannel, Failure
from distrib.runtime.environment import env_rank, env_world_size
from distrib.runtime.lease import Lease
from distrib.runtime.stacks import (
    FOR_DEVICE,
    FOR_RANKS,
    FOR_WORKERS,
    SHOW_STACKS,
    add_stacks,
    blocking_ranks,
    current_call,
    stack_report,
    summary,
)
from distrib.runtime.stopwatch import PHASES, Stopwatch

PERIOD = 1.0  # seconds between two looks at the clock
GATHER = 2.0  # seconds that the ranks and their loader workers have to write their stacks


def device_is_busy() -> bool:
    """Whether this rank's GPU has work to do. Then the main thread may wait in any call that launches a kernel.

    If a GPU waits for another rank, its queue fills up, after about a thousand kernels.
    """
    cuda: Any = sys.modules["torch"].cuda if "torch" in sys.modules else None
    if cuda is None or not cuda.is_initialized():
        return False
    done: list[bool] = []
    asking = threading.Thread(target=lambda: done.append(cuda.default_stream(ranks.device()).query()), daemon=True)
    asking.start()  # a thread of its own, since the driver may not answer
    asking.join(PERIOD)
    return done != [True]


class Watchdog:
    """A thread that ends this process when a phase of its stopwatch exceeds its limit."""

    def __init__(self, config: Config) -> None:
        self.run_dir, self.limits = Path(config.run_dir), {phase: float(getattr(config.limits, phase)) for phase in PHASES}
        self.rank, self.world = env_rank(), env_world_size()
        self.stopwatch, self.over = Stopwatch(), False
        self.channel = ControlChannel(self.rank, {})  # until the ranks are connected
        self.lease: Lease | None = None  # of rank 0, once it has opened the run folder
        self.thread = threading.Thread(target=self._look, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.over = True
        self.stopwatch.phase_changed.set()
        self.thread.join()
        faulthandler.cancel_dump_traceback_later()

    def _look(self) -> None:
        while True:
            self.stopwatch.phase_changed.wait(PERIOD)
            self.stopwatch.phase_changed.clear()
            if self.over:
                return
            phase, since = self.stopwatch.current
            spent = perf_counter() - since
            if spent > self.limits[phase]:
                self._end(phase, spent)
            # If a call holds the interpreter lock, this thread cannot run. faulthandler's thread can, and ends the process.
            faulthandler.dump_traceback_later(self.limits[phase] - spent + 2 * GATHER, exit=True, file=2)
            if self.lease:
                self._renew(self.lease)

    def _renew(self, lease: Lease) -> None:
        try:
            lease.renew()
        except RunError as error:
            self.channel.last_words = lambda failure: None  # the run folder is another job's now
            self.channel.fail(Failure.of(error, self.rank))
            self.channel.end_process()

    def _end(self, phase: str, spent: float) -> NoReturn:
        faulthandler.dump_traceback_later(3 * GATHER, exit=True, file=2)  # in case the disk hangs too
        report, place = stack_report(self.run_dir, self.rank), current_call(several=self.world > 1)
        if place not in (FOR_RANKS, FOR_WORKERS) and device_is_busy():
            place = FOR_DEVICE
        reports = {self.rank: place}
        with suppress(OSError):
            report.parent.mkdir(parents=True, exist_ok=True)
            report.write_text(f"{place}\n")
            add_stacks(report, f"rank {self.rank}, {spent:.0f} s in the phase {phase!r}, process {os.getpid()}")
            for worker in multiprocessing.active_children():
                if worker.pid:
                    os.kill(worker.pid, SHOW_STACKS)
            reports |= self._collect_reports(report)
        what = f"no progress for {spent:.0f} s (limits.{phase}={self.limits[phase]:g}): {summary(reports, self.world)}"
        facts = {"cause": what, "rank": next(iter(blocking_ranks(reports, self.world)), None)}
        self.channel.fail(Failure(f"{what}; stacks are in {report.parent}", HANG, facts=facts))
        if self.channel.rank0_answers or self.rank == min(reports):
            self.channel.end_process()
        os._exit(HANG)

    def _collect_reports(self, mine: Path) -> dict[int, str]:
        """The reports of all ranks that can write one, by rank. A report of an earlier hang is older by at least a limit."""
        reports: dict[int, str] = {}
        give_up = time.monotonic() + GATHER
        while time.monotonic() < give_up:  # until the end, since the loader workers need this time too
            time.sleep(GATHER / 10)
            for rank in range(self.world):
                with suppress(OSError, IndexError):
                    path = stack_report(self.run_dir, rank)
                    if abs(path.stat().st_mtime - mine.stat().st_mtime) < min(self.limits.values()) + GATHER:
                        reports[rank] = path.read_text().splitlines()[0]
        return reports
