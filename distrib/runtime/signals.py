"""Signals: one that comes is remembered and no more; the loop looks for it, and leaves with a checkpoint.

Nothing slow is imported here: `listen` is called before torch is, so that no signal is missed.
"""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from distrib.runtime.stacks import SHOW_STACKS, add_stacks

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
SAME_PRESS = 0.5  # seconds in which a second SIGINT comes from the same Ctrl-C: a launcher may pass on what a rank got too
ORPHANED = 60.0  # seconds in which a run whose launcher died has to be gone
PR_SET_PDEATHSIG = 1

_last: tuple[int, float] = 0, 0.0  # the last signal, and when it came
_listening = False


def listen() -> None:
    """From now on a signal asks the run to stop, and a second Ctrl-C ends this process at once."""
    global _listening
    _listening = True
    for number in SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # a lost terminal stops no run under nohup
            signal.signal(number, _remember)
    if {"TORCHELASTIC_RUN_ID", "ACCELERATE_DYNAMO_BACKEND"} & os.environ.keys():
        stop_with_launcher()


@contextmanager
def listening() -> Iterator[None]:
    """Listen while a run lasts, where the program does not yet, such as in a notebook; then its own handlers are back."""
    global _listening, _last
    if _listening or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    _last = 0, 0.0
    listen()
    try:
        yield
    finally:
        _listening = False
        for number, handler in before.items():
            if handler is not None:  # None: one that is not Python's, which stays replaced
                signal.signal(number, handler)


def _remember(number: int, frame: FrameType | None) -> None:
    global _last
    earlier, when = _last
    if number == earlier == signal.SIGINT and time.monotonic() - when > SAME_PRESS:
        os._exit(130)
    if number != earlier:
        _last = number, time.monotonic()


def ignore_all() -> None:
    """From now on no signal does anything: the run is done, and Python, as it ends, would make signals fatal again."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def received() -> int:
    """The number of the signal that came last; 0 if none did."""
    return _last[0]


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
