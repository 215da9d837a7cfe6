"""Stopping: a signal is noted and no more; the loop asks for it, and leaves with a checkpoint.

Nothing slow is imported here: `listen` is called before torch is, so that no signal goes unheard.
"""

import ctypes
import os
import signal
import sys
import threading
import time
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
SAME_PRESS = 0.5  # seconds in which a second SIGINT comes from the same Ctrl-C: a launcher may pass on what a rank got too
ORPHANED = 60.0  # seconds in which a run whose launcher died has to be gone
PR_SET_PDEATHSIG = 1

_noted: tuple[int, float] = 0, 0.0  # the last signal, and when it came


def listen() -> None:
    """From now on a signal asks the run to stop, and a second Ctrl-C ends this process at once."""
    for number in SIGNALS:
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


def guard_worker(worker: int) -> None:
    """Let only its parent end a loader worker: launchers and SLURM signal every process of a run.

    With a dead worker its rank could not go on to the step on which all of them stop.
    """
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    parent = os.getppid()

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
