"""A run folder belongs to one run, and one process group at a time trains in it."""

import os
import time
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

from distrib.command_line import read_config, to_yaml
from distrib.config import KEYS, Config, differences, keys_of
from distrib.errors import MAY_PASS, DiskError, UserError
from distrib.runtime import ranks
from distrib.runtime.control_channel import ControlChannel, Failure
from distrib.runtime.disk import write_atomically
from distrib.runtime.lock import run_lock
from distrib.runtime.status import begin_status, up_seconds, write_status
from distrib.runtime.stop_vote import StopVote


@contextmanager
def open_run(config: Config, channel: ControlChannel, began: float) -> Iterator[None]:
    """Lock the run folder, and write the cause of a failure into its status. Every rank must call this.

    Raises UserError if the folder cannot be written or is in use, and LostRankError if the process of another rank has ended.
    """
    run_dir = Path(config.run_dir)
    with ExitStack() as stack:
        ranks.on_rank0(lambda: stack.enter_context(start_attempt(run_dir, began)))
        channel.last_words = partial(write_failure, run_dir)
        try:
            yield
        except Exception as error:
            found = channel.settle(error)
            if channel.speaks():
                write_failure(run_dir, Failure.of(found, channel.rank))
            if found is error:
                raise
            raise found from None


@contextmanager
def start_attempt(run_dir: Path, began: float) -> Iterator[None]:
    """Create the folder, lock it and begin its status; rank 0 does this. Raises UserError."""
    with ExitStack() as stack:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            seconds = up_seconds(run_dir) + time.time() - began  # before the lock is touched, which this reads
            stack.enter_context(run_lock(run_dir))
            begin_status(run_dir, seconds)
        except OSError as error:
            raise UserError(f"run_dir {run_dir} cannot be written: {error.strerror}; give another run_dir") from None
        yield


def write_failure(run_dir: Path, failure: Failure) -> None:
    """Write a failure into the status of the run; ask for a requeue if the same command may succeed."""
    write_status(run_dir, "failed", exit_code=failure.code, **{"cause": failure.text} | failure.facts)
    if failure.code in MAY_PASS:
        with suppress(OSError):
            write_requeue_file(f"failed with exit code {failure.code}: {failure.text}")


def write_config(config: Config) -> None:
    """Write config.yaml; call it after a restore has accepted the config. Raises UserError."""
    try:
        write_atomically(Path(config.run_dir, "config.yaml"), to_yaml(config))
    except OSError as error:
        raise UserError(f"run_dir {config.run_dir} cannot be written: {error.strerror}; give another run_dir") from None


def refuse_another_config(config: Config, changes: Collection[str] = ()) -> None:
    """Raise UserError, with the keys that differ, if the folder's config.yaml is that of another run."""
    path = Path(config.run_dir, "config.yaml")
    if path.exists():
        there = {each.name: each.value for each in keys_of(read_config(path))}
        refuse(config.run_dir, differences(there, config, changes=changes))


def refuse(run_dir: str | Path, differ: list[str]) -> None:
    """Raise UserError if the run in a folder differs from the run that was requested."""
    if differ:
        names = [each.partition(" (")[0] for each in differ]
        midway = all(name in KEYS and KEYS[name].meta["midway"] for name in names)
        more = (
            f", or {' '.join(f'{name}=...' for name in names)} on the command line to change it from here on" if midway else ""
        )
        raise UserError(f"{run_dir} was started with another {', '.join(differ)}: give another run_dir{more}")


def ask_for_requeue(stopped_by: str) -> None:
    """Ask for a requeue of a run that was stopped, unless a person stopped it, by the file STOP or Ctrl-C.

    Every rank must call this. Raises DiskError if the request cannot be written.
    """

    def ask() -> None:
        try:
            write_requeue_file(f"stopped by {stopped_by}")
        except OSError as error:
            raise DiskError(f"REQUEUE_FILE {error.filename} cannot be written: {error.strerror}") from None

    if stopped_by not in (StopVote.FILE, "SIGINT"):
        ranks.on_rank0(ask)


def write_requeue_file(why: str) -> None:
    """Write the file that REQUEUE_FILE names, if any: it tells a batch script to requeue this run. Raises OSError."""
    path = os.environ.get("REQUEUE_FILE")
    if path:
        Path(path).write_text(f"{why}\n")
