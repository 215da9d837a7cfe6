"""How a process ends: one message, printed by one rank, and an exit code. Imports no torch."""

import os
import signal
import sys
import time
import traceback
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, NoReturn

from distrib.errors import RunError, UserError, exit_code
from distrib.runtime import signals
from distrib.runtime.environment import env_rank

PATIENCE = 5.0  # seconds that rank 0 has to print an error before another rank prints it


def print_once(text: str) -> int:
    """Print on rank 0; returns the exit code 0."""
    if env_rank() == 0:
        print_lines([text])
    return 0


def print_lines(lines: Iterable[str]) -> None:
    """Print lines until the reader, such as `head`, has seen enough."""
    for line in lines:
        try:
            print(line, flush=True)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return


def report(error: Exception) -> int:
    """Print the error that ended a command, unless another rank does; returns the exit code."""
    if isinstance(error, PermissionError) and error.filename:
        error = UserError(f"{error.filename}: permission denied")
    if not isinstance(error, UserError | RunError):
        traceback.print_exception(error)
    elif error.speaks or (error.speaks is None and not printed_by_rank0()):
        print(f"distrib: {error}", file=sys.stderr, flush=True)
    return exit_code(error)


def printed_by_rank0() -> bool:
    """Wait for rank 0 to print an error that each rank has met by itself; returns False if only this rank has met it."""
    give_up = time.monotonic() + (PATIENCE if env_rank() else 0)
    while time.monotonic() < give_up:
        if signals.received() == signal.SIGTERM:  # from the launcher, after rank 0 has exited
            return True
        time.sleep(0.05)
    return False


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
