"""How a process ends: one message, printed by one rank, and an exit code. Imports no torch."""

import os
import signal
import sys
import time
import traceback
from contextlib import suppress
from typing import Any, NoReturn

from distrib.errors import RunError, UserError, lost_rank, one_line
from distrib.runtime import signals
from distrib.runtime.environment import env_rank

PATIENCE = 5.0  # seconds that the speaker has to print an error before another rank prints it


def print_once(text: str) -> int:
    """Print on rank 0; returns the exit code 0."""
    if env_rank() == 0:
        try:
            print(text, flush=True)
        except BrokenPipeError:  # the reader, such as `head`, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def report(error: Exception) -> int:
    """Print the error that ended a command; returns the exit code: 2 for a mistake of the user, else 1."""
    if isinstance(error, UserError):
        print_one_line(error, 0)
        return 2
    if isinstance(error, RunError):
        print_one_line(error, error.speaker)
    elif lost_rank(error):  # another rank names the one that exited
        print(f"distrib: rank {env_rank()} exits, since another rank has exited ({one_line(error)})", file=sys.stderr)
    else:
        traceback.print_exception(error)
    return 1


def print_one_line(error: Exception, speaker: int) -> None:
    """Rank `speaker` prints the error. If it has not done so after PATIENCE, this rank prints it."""
    rank = env_rank()
    if rank != speaker:
        give_up = time.monotonic() + PATIENCE
        while time.monotonic() < give_up:
            if signals.received() == signal.SIGTERM:  # from the launcher: the speaker has printed and exited
                return
            time.sleep(0.05)
    print(f"distrib: {f'rank {rank}: ' if rank != speaker else ''}{error}", file=sys.stderr, flush=True)


def leave(code: int) -> NoReturn:
    """Exit this process. Call it after the last reference to the model is gone."""
    ranks: Any = sys.modules.get("distrib.runtime.ranks")  # None if torch was not imported
    if code == 0 and ranks:
        ranks.destroy_process_group()
    with suppress(OSError):  # the output may be a file on a full disk
        sys.stdout.flush()
        sys.stderr.flush()
    if code:
        os._exit(code)  # other ranks may have exited: then the process group can be neither used nor destroyed
    signals.ignore_all()
    sys.exit(0)
