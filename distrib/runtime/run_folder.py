"""A run folder belongs to one run, and one process group at a time trains in it."""

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from distrib.command_line import read_config, to_yaml
from distrib.config import Config, differences, keys_of
from distrib.errors import RunError, UserError, lost_rank, one_line
from distrib.runtime import ranks
from distrib.runtime.disk import write_atomically
from distrib.runtime.environment import env_rank, env_world_size
from distrib.runtime.lock import run_lock, try_lock
from distrib.runtime.status import begin_status, read_status, up_seconds, write_status
from distrib.runtime.stop_vote import StopVote

LINGER = 1.0  # seconds for which a rank keeps its lock after it lost another rank, so that all can see which one that was


@contextmanager
def open_run(config: Config, began: float) -> Iterator[None]:
    """Lock the run folder, and write the cause of a failure into its status. Every rank must call this.

    Raises UserError if the folder cannot be written or is in use, and RunError with the name of the rank if one has exited.
    """
    run_dir, rank = Path(config.run_dir), env_rank()
    with ExitStack() as stack:
        lock = ranks.rank0_first(lambda rank0: stack.enter_context(start_attempt(run_dir, rank, began)))
        try:
            yield
        except (UserError, RunError) as error:
            if rank == 0 or read_status(run_dir).get("state") == "running":  # otherwise rank 0 had the same error
                write_status(run_dir, "failed", cause=one_line(error))
            raise
        except Exception as error:
            if lost_rank(error):
                raise without_others(run_dir, lock, rank, error) from None
            write_status(run_dir, "failed", cause=f"{type(error).__name__}: {one_line(error)}", rank=rank)
            raise


@contextmanager
def start_attempt(run_dir: Path, rank: int, began: float) -> Iterator[IO[str]]:
    """Create the folder and its status, on rank 0, and lock this rank's byte. Raises UserError."""
    with ExitStack() as stack:
        try:
            if rank == 0:
                run_dir.mkdir(parents=True, exist_ok=True)
                seconds = up_seconds(run_dir) + time.time() - began  # before the lock is touched, which this reads
            lock = stack.enter_context(run_lock(run_dir, rank))
            if rank == 0:
                begin_status(run_dir, seconds)
        except OSError as error:
            raise UserError(f"run_dir {run_dir} cannot be written: {error.strerror}; give another run_dir") from None
        yield lock


def write_config(config: Config) -> None:
    """Write config.yaml; call it after a restore has accepted the config. Raises UserError."""
    try:
        write_atomically(Path(config.run_dir, "config.yaml"), to_yaml(config))
    except OSError as error:
        raise UserError(f"run_dir {config.run_dir} cannot be written: {error.strerror}; give another run_dir") from None


def refuse_another_config(config: Config, *, longer: bool = False) -> None:
    """Raise UserError, with the keys that differ, if the folder's config.yaml is that of another run."""
    path = Path(config.run_dir, "config.yaml")
    if path.exists():
        there = {each.name: each.value for each in keys_of(read_config(path))}
        refuse(config.run_dir, differences(there, config, longer=longer))


def refuse(run_dir: str | Path, differ: list[str]) -> None:
    """Raise UserError if the run in a folder differs from the run that was requested."""
    if differ:
        more = "; to train longer, give epochs=N with a larger N" if any(each.startswith("epochs (") for each in differ) else ""
        raise UserError(f"{run_dir} was started with another {', '.join(differ)}: give another run_dir{more}")


def without_others(run_dir: Path, lock: IO[str], rank: int, error: Exception) -> RunError:
    """The error of a rank that lost others: it names the ranks that hold no lock. The lowest remaining rank writes it."""
    others = set(range(env_world_size())) - {rank}
    gone = sorted(other for other in others if try_lock(lock, other))
    time.sleep(LINGER)
    speaker = min({rank, *others} - {*gone})
    names = f"rank {', '.join(map(str, gone))}" if gone else "another rank"
    if rank == speaker and read_status(run_dir).get("state") != "failed":
        write_status(run_dir, "failed", cause=f"{names} has exited", rank=gone[0] if gone else None)
    text = f"{names} has exited, so the other ranks exit too; the same command resumes from the last checkpoint"
    return RunError(f"{text} ({one_line(error).partition('. ')[0]})", speaker)


def ask_for_requeue(stopped_by: str) -> None:
    """Create the file that REQUEUE_FILE names, if any: it tells a batch script to requeue this run.

    A run that a person stopped, by the file STOP or Ctrl-C, is not requeued. Every rank must call this. Raises RunError if the
    file cannot be created.
    """
    path, failure = os.environ.get("REQUEUE_FILE"), ""
    if path and ranks.is_rank0() and stopped_by not in (StopVote.FILE, "SIGINT"):
        try:
            Path(path).touch()
        except OSError as error:
            failure = f"REQUEUE_FILE {path} cannot be created: {error.strerror}"
    failure = ranks.broadcast_object(failure)
    if failure:
        raise RunError(failure)
