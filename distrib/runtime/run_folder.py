"""A run folder belongs to one run, and one process group at a time trains in it."""

import errno
import os
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

from distrib.command_line import read_config, to_yaml
from distrib.config import Config
from distrib.errors import MAY_PASS, DiskError, UserError
from distrib.keys import KEYS, differences, keys_of
from distrib.runtime import ranks
from distrib.runtime.control_channel import ControlChannel, Failure
from distrib.runtime.disk import write_atomically
from distrib.runtime.lease import Lease
from distrib.runtime.status import Status
from distrib.runtime.stop_vote import StopVote

# Errors of a path that the user gave; others are failures of the disk, which may pass.
NAMES = "EACCES EPERM EROFS ENOENT ENOTDIR EISDIR EEXIST ENAMETOOLONG ELOOP EINVAL"
MISTAKES = {getattr(errno, name) for name in NAMES.split()}
PART_OF_START = 0.9  # of limits.start that waiting for a dead job's lock may take; at limits.start, the watchdog ends the run


@contextmanager
def open_run(config: Config, channel: ControlChannel, status: Status) -> Iterator[Lease | None]:
    """Take the lease on the run folder, on rank 0, and write the cause of a failure into its status. Every rank must call this.

    Raises UserError if the folder cannot be written or is in use, DiskError if its disk fails, and LostRankError if the process
    of another rank has ended.
    """
    with ExitStack() as stack:
        lease = ranks.rank0_first(lambda rank0: stack.enter_context(start_attempt(config, status)) if rank0 else None)
        channel.last_words = partial(write_failure, status)
        try:
            yield lease
        except Exception as error:
            found = channel.settle(error)
            if channel.speaks():
                write_failure(status, Failure.of(found, channel.rank))
            if found is error:
                raise
            raise found from None


@contextmanager
def start_attempt(config: Config, status: Status) -> Iterator[Lease]:
    """Create the folder, take the lease on it and begin its status; rank 0 does this. Raises UserError and DiskError."""
    run_dir = Path(config.run_dir)
    with ExitStack() as stack:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            lease = stack.enter_context(Lease(run_dir, status.seconds, PART_OF_START * config.limits.start))
            status.begin(lease.earlier)
        except OSError as error:
            raise cannot_be_written(run_dir, error) from None
        yield lease


def cannot_be_written(run_dir: str | Path, error: OSError) -> UserError | DiskError:
    """The error of a run whose folder cannot be written: the user's mistake, or the disk's failure."""
    words = f"run_dir {run_dir} cannot be written: {error.strerror}"
    return UserError(f"{words}; give another run_dir") if error.errno in MISTAKES else DiskError(words)


def write_failure(status: Status, failure: Failure) -> None:
    """Write a failure into the status of the run; ask for a requeue if the same command may succeed.

    Rank 0 calls this, or, if it has exited, another rank.
    """
    if not status.facts:
        status.take_over()
    status.write("failed", exit_code=failure.code, **{"cause": failure.text} | failure.facts)
    if failure.code in MAY_PASS:
        with suppress(OSError):
            write_requeue_file(f"failed with exit code {failure.code}: {failure.text}")


def write_config(config: Config) -> None:
    """Write config.yaml; call it after a restore has accepted the config. Raises UserError."""
    try:
        write_atomically(Path(config.run_dir, "config.yaml"), to_yaml(config))
    except OSError as error:
        raise cannot_be_written(config.run_dir, error) from None


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
