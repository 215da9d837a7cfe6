"""Where a rank that hangs is: the stacks of its threads in a file, and in words who waits for whom. Imports no torch."""

import faulthandler
import linecache
import re
import signal
import sys
import threading
import traceback
from pathlib import Path

SHOW_STACKS = signal.SIGUSR2  # to a loader worker, from its parent
FOR_RANKS, FOR_WORKERS, FOR_DEVICE = "waits for other ranks", "waits for its loader workers", "waits for its device"
READS = re.compile(r"\.(item|tolist)\(\)")  # in a line of Python: it reads numbers that a device may have yet to compute


def stack_report(run_dir: str | Path, rank: int) -> Path:
    """Where the stacks of a rank that hangs, and of its loader workers, are written."""
    return Path(run_dir, "hang", f"rank_{rank}.txt")


def add_stacks(report: Path, title: str) -> None:
    """Add the stacks of all threads of this process to a file."""
    with report.open("a") as file:
        print(f"\n{title}:", file=file, flush=True)
        faulthandler.dump_traceback(file)


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


def stuck(reports: dict[int, str], world: int) -> dict[int, str]:
    """The ranks that keep the others waiting, and what each is at: those that do not wait, or cannot tell.

    A GPU may wait for those of other ranks, and its rank for it: that one is to blame only if there is no other.
    """
    found = {rank: reports.get(rank, "gives no sign of life") for rank in range(world) if reports.get(rank, "") != FOR_RANKS}
    return {rank: what for rank, what in found.items() if what != FOR_DEVICE} or found


def summary(reports: dict[int, str], world: int) -> str:
    """Who waits for whom, in words."""
    holding = stuck(reports, world)
    parts = [f"rank {rank} {what}" for rank, what in holding.items()]
    for why in (FOR_DEVICE, FOR_RANKS):
        waiting = [str(rank) for rank, what in sorted(reports.items()) if what == why and rank not in holding]
        parts += [f"rank {', '.join(waiting)} {why}"] * bool(waiting)
    return "; ".join(parts)
