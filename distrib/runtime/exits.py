"""How a process ends: what is printed, once and by one rank, and its exit code. Imports no torch."""

import os
import signal
import sys
import time
import traceback
from contextlib import suppress
from typing import Any, NoReturn

from distrib.errors import RunError, UserError, lost_rank, one_line
from distrib.runtime import signals
from distrib.runtime.environment import launched_rank

PATIENCE = 5.0  # seconds that one rank has to report a mistake, before another rank that met it does


def print_once(text: str) -> int:
    """Print on rank 0; returns the exit code 0."""
    if launched_rank() == 0:
        print(text)
    return 0


def report(error: Exception) -> int:
    """Print what ended a command, and return its exit code: 2 for a mistake of the user's, else 1."""
    if isinstance(error, UserError):
        print_one_line(error, 0)
        return 2
    if isinstance(error, RunError):
        print_one_line(error, error.speaker)
    elif lost_rank(error):  # the rank that is gone is named by another one
        print(f"distrib: rank {launched_rank()} leaves, since another rank is gone ({one_line(error)})", file=sys.stderr)
    else:
        traceback.print_exception(error)
    return 1


def print_one_line(error: Exception, speaker: int) -> None:
    """Print an error on rank `speaker`. If it has not after PATIENCE, it has not met the error, and this rank prints it."""
    rank = launched_rank()
    if rank != speaker:
        give_up = time.monotonic() + PATIENCE
        while time.monotonic() < give_up:
            if signals.received() == signal.SIGTERM:  # the launcher's: a rank has spoken and left
                return
            time.sleep(0.05)
    print(f"distrib: {f'rank {rank}: ' if rank != speaker else ''}{error}", file=sys.stderr, flush=True)


def leave(code: int) -> NoReturn:
    """End this process. Call it where nothing refers to the model any more."""
    ranks: Any = sys.modules.get("distrib.runtime.ranks")  # else there was no need to import torch
    if code == 0 and ranks:
        ranks.part()
    with suppress(OSError):  # it may be a file on a disk that is full
        sys.stdout.flush()
        sys.stderr.flush()
    if code:
        os._exit(code)  # a group whose other ranks may be gone can neither be used nor taken down
    signals.ignore_all()
    sys.exit(0)
