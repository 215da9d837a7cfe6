"""Diagnosis of a hang: the stacks of all threads in a file, and which rank waits for which. Imports no torch."""

import faulthandler
import linecache
import re
import signal
import sys
import threading
import traceback
from pathlib import Path

SHOW_STACKS = signal.SIGUSR2  # sent to a loader worker by its parent
FOR_RANKS, FOR_WORKERS, FOR_DEVICE = "waits for other ranks", "waits for its loader workers", "waits for its device"
WAITING, BACKWARD, READING = "distrib/runtime/control_channel.py", "_engine_run_backward", "distrib/data/workers.py"
READS = re.compile(r"\.(item|tolist)\(\)")  # a line of Python with one of these waits for the device


def stack_report(run_dir: str | Path, rank: int) -> Path:
    """The file for the stacks of a rank and its loader workers."""
    return Path(run_dir, "hang", f"rank_{rank}.txt")


def add_stacks(report: Path, title: str) -> None:
    """Append the stacks of all threads of this process to a file."""
    with report.open("a") as file:
        print(f"\n{title}:", file=file, flush=True)
        faulthandler.dump_traceback(file)


def current_call(*, several: bool) -> str:
    """What the main thread is doing, in words."""
    main = sys._current_frames()[threading.main_thread().ident or 0]
    calls = [(Path(frame.f_code.co_filename), line, frame.f_code.co_name) for frame, line in traceback.walk_stack(main)]
    innermost, line, name = calls[0]
    if READS.search(linecache.getline(str(innermost), line)):
        return FOR_DEVICE
    for path, _, function in calls:
        # DDP waits for the gradients of other ranks at the end of the backward pass.
        if several and (path.as_posix().endswith(WAITING) or "/torch/distributed/" in path.as_posix() or name == BACKWARD):
            return FOR_RANKS
        if path.as_posix().endswith(READING) and function == "receive":
            return FOR_WORKERS
    return f"is at {innermost.name}:{line} in {name}"


def blocking_ranks(reports: dict[int, str], world: int) -> dict[int, str]:
    """The ranks that make the others wait, and what each is doing: those that do not wait themselves, or did not report.

    A rank that waits for its device may in fact wait for other ranks: it counts only if no other rank does.
    """
    found = {rank: reports.get(rank, "gives no sign of life") for rank in range(world) if reports.get(rank, "") != FOR_RANKS}
    return {rank: what for rank, what in found.items() if what != FOR_DEVICE} or found


def summary(reports: dict[int, str], world: int) -> str:
    """Which rank waits for which, in words."""
    holding = blocking_ranks(reports, world)
    parts = [f"rank {rank} {what}" for rank, what in holding.items()]
    for why in (FOR_DEVICE, FOR_RANKS):
        waiting = [str(rank) for rank, what in sorted(reports.items()) if what == why and rank not in holding]
        parts += [f"rank {', '.join(waiting)} {why}"] * bool(waiting)
    return "; ".join(parts)
