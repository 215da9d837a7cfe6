"""Signals: a handler only remembers the signal; the loop notices it, saves a checkpoint and stops.

This module imports nothing slow: `listen` is called before torch is imported, so that no signal is missed.
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
SAME_PRESS = 0.5  # seconds in which a second SIGINT counts as the same Ctrl-C: a launcher may pass on what the rank got itself
ORPHANED = 60.0  # seconds that a rank has to exit after its launcher died
PR_SET_PDEATHSIG = 1

_last: tuple[int, float] = 0, 0.0  # the last signal and its time
_listening = False


def listen() -> None:
    """Install handlers: a signal requests a stop, and a second Ctrl-C ends this process at once."""
    global _listening
    _listening = True
    for number in SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP, and so do we then
            signal.signal(number, _remember)
    if {"TORCHELASTIC_RUN_ID", "ACCELERATE_DYNAMO_BACKEND"} & os.environ.keys():
        stop_with_launcher()


@contextmanager
def listening() -> Iterator[None]:
    """Install handlers for the time of a run, unless they are installed; then restore the program's own, as in a notebook."""
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
            if handler is not None:  # None: a handler that Python did not install and cannot restore
                signal.signal(number, handler)


def _remember(number: int, frame: FrameType | None) -> None:
    global _last
    earlier, when = _last
    if number == earlier == signal.SIGINT and time.monotonic() - when > SAME_PRESS:
        os._exit(130)
    if number != earlier:
        _last = number, time.monotonic()


def ignore_all() -> None:
    """Ignore signals from now on: the run has ended, and Python would make signals fatal again while it exits."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def received() -> int:
    """The number of the last signal; 0 if none came."""
    return _last[0]


def stop_with_launcher() -> None:
    """Treat the death of the launcher as a SIGTERM; otherwise ranks would continue with nobody to control them."""
    if sys.platform != "linux":
        return
    launcher = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(1)
        time.sleep(ORPHANED)
        os._exit(1)  # this rank hangs

    threading.Thread(target=watch, name="launcher watch", daemon=True).start()
    if os.getppid() != launcher:  # it died before prctl, so no signal will come
        os._exit(1)


@contextmanager
def blocked_in_workers() -> Iterator[None]:
    """Start loader workers in here: all of their threads inherit the block, also those that torch starts before `guard_worker`.

    Signals that come meanwhile reach this process at the end. Only Linux tells a worker later who sent a signal.
    """
    if sys.platform != "linux":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def guard_worker(worker: int, report: Path) -> None:
    """Let only its parent stop a loader worker: launchers and SLURM send signals to every process.

    Without its workers, a rank could not reach the step before which all ranks stop. On SHOW_STACKS from its parent, a worker
    adds the stacks of its threads to `report`. The worker was started in `blocked_in_workers`.
    """
    if sys.platform != "linux":
        return
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
