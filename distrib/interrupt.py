"""Stopping: a signal is noted and no more; the loop asks for it, and leaves with a checkpoint.

Nothing slow is imported here: `listen` is called before torch is, so that no signal goes unheard.
"""

import ctypes
import faulthandler
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
SAME_PRESS = 0.5  # seconds in which a second SIGINT comes from the same Ctrl-C: a launcher may pass on what a rank got too
ORPHANED = 60.0  # seconds in which a run whose launcher died has to be gone
PR_SET_PDEATHSIG = 1
BEGAN = time.time()  # of this process, nearly: the imports that take long come after
SHOW_STACKS = signal.SIGUSR2  # to a loader worker, from its parent

_noted: tuple[int, float] = 0, 0.0  # the last signal, and when it came


def listen() -> None:
    """From now on a signal asks the run to stop, and a second Ctrl-C ends this process at once."""
    for number in SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # a lost terminal stops no run under nohup
            signal.signal(number, _note)
    if {"TORCHELASTIC_RUN_ID", "ACCELERATE_DYNAMO_BACKEND"} & os.environ.keys():
        stop_with_launcher()


def _note(number: int, frame: FrameType | None) -> None:
    global _noted
    earlier, when = _noted
    if number == earlier == signal.SIGINT and time.monotonic() - when > SAME_PRESS:
        os._exit(130)
    if number != earlier:
        _noted = number, time.monotonic()


def end() -> None:
    """From now on no signal does anything: what there was to do is done, and Python, as it ends, makes signals fatal again."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def asked() -> int:
    """The number of the signal that came last; 0 if none did."""
    return _noted[0]


def stop_with_launcher() -> None:
    """Take the launcher's death for a SIGTERM: ranks would go on with nobody to watch or to stop them."""
    if sys.platform != "linux":
        return
    launcher = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(1)
        time.sleep(ORPHANED)
        os._exit(1)  # it hangs

    threading.Thread(target=watch, name="launcher watch", daemon=True).start()
    if os.getppid() != launcher:  # it died just before, and no signal came
        os._exit(1)


def guard_worker(worker: int, report: Path) -> None:
    """Let a loader worker end with its parent or by its hand, and by no other: launchers and SLURM signal every process.

    With a dead worker its rank could not go on to the step on which all of them stop. On SHOW_STACKS from its parent it
    adds the stacks of its threads to `report`. Elsewhere than on Linux, signals cannot be told apart like this.
    """
    if sys.platform != "linux":
        return
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, SHOW_STACKS})
    parent = os.getppid()

    def wait() -> None:
        while os.getppid() == parent:
            heard = signal.sigtimedwait({signal.SIGTERM, SHOW_STACKS}, 1)
            if heard and heard.si_pid == parent and heard.si_signo == SHOW_STACKS:
                add_stacks(report, f"loader worker {worker}, process {os.getpid()}")
            elif heard and heard.si_pid == parent:
                break
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def stack_report(run_dir: str | Path, rank: int) -> Path:
    """Where the stacks of a rank that hangs, and of its loader workers, are written."""
    return Path(run_dir, "hang", f"rank_{rank}.txt")


def add_stacks(report: Path, title: str) -> None:
    """Add the stacks of all threads of this process to a file."""
    with report.open("a") as file:
        print(f"\n{title}:", file=file, flush=True)
        faulthandler.dump_traceback(file)
