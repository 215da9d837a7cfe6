"""A run folder belongs to one config, and to one trainer at a time; status.json in it says how that one fares."""

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import IO, Any

from distrib import ranks
from distrib.config import Config, RunError, UserError, keys_of_result, one_line, read_config, to_yaml
from distrib.interrupt import BEGAN
from distrib.vote import StopVote

PATIENCE = 10.0  # seconds that another trainer has to leave: one that was just stopped may be saving
LINGER = 1.0  # seconds in which ranks that lost one see which it was, before they leave too


@contextmanager
def held(config: Config, *, longer: bool = False) -> Iterator[Callable[..., None]]:
    """Hold the run folder while this lasts; gives rank 0's `note`. If it fails, why is noted. Every rank must call this.

    Raises UserError if the folder cannot be written, is in use, or was begun with another config; and RunError, naming the
    rank, if another one has gone.
    """
    run_dir, rank = Path(config.run_dir), ranks.launched_rank()
    with ExitStack() as stack:
        lock = ranks.first(lambda leads: stack.enter_context(begun(config, rank, longer=longer)))
        try:
            yield partial(note, run_dir) if rank == 0 else lambda *state, **facts: None
        except (UserError, RunError) as error:
            if rank == 0 or noted(run_dir).get("state") == "running":  # else rank 0 has met the same
                note(run_dir, "failed", cause=one_line(error))
            raise
        except Exception as error:
            if ranks.lost(error):
                raise without_others(run_dir, lock, rank, error) from None
            note(run_dir, "failed", cause=f"{type(error).__name__}: {one_line(error)}", rank=rank)
            raise


@contextmanager
def begun(config: Config, rank: int, *, longer: bool) -> Iterator[IO[str]]:
    """Begin an attempt: rank 0 makes the folder and what is in it, and each rank locks its byte. Raises UserError."""
    run_dir = Path(config.run_dir)
    with ExitStack() as stack:
        try:
            if rank == 0:
                refuse_another_run(config, longer=longer)
                run_dir.mkdir(parents=True, exist_ok=True)
                seconds = up_seconds(run_dir) + time.time() - BEGAN
            lock = stack.enter_context(occupied(run_dir, rank))
            if rank == 0:
                replace(run_dir / "config.yaml", to_yaml(config))
                known = noted(run_dir)
                status = {"state": "running", "attempts": known.get("attempts", 0) + 1, "seconds": seconds}
                learned = {name: known[name] for name in ("micro_batches",) if name in known}
                replace(run_dir / "status.json", json.dumps(status | learned))
        except OSError as error:
            raise UserError(f"run_dir {run_dir} cannot be written: {error.strerror}; give another run_dir") from None
        yield lock


def without_others(run_dir: Path, lock: IO[str], rank: int, error: Exception) -> RunError:
    """What a rank has to say that lost others: it names those whose locks are free. The lowest one that is left notes it."""
    others = set(range(ranks.launched_world())) - {rank}
    gone = sorted(other for other in others if free(lock, other))
    time.sleep(LINGER)
    speaker = min({rank, *others} - {*gone})
    names = f"rank {', '.join(map(str, gone))}" if gone else "another rank"
    if rank == speaker and noted(run_dir).get("state") != "failed":
        note(run_dir, "failed", cause=f"{names} is gone", rank=gone[0] if gone else None)
    told = f"{names} is gone, so that the others leave too; the same command goes on from the last checkpoint"
    return RunError(f"{told} ({one_line(error).partition('. ')[0]})", speaker)


@contextmanager
def occupied(run_dir: Path, rank: int) -> Iterator[IO[str]]:
    """Keep other trainers out until this process leaves the folder or dies: each rank locks a byte of the file `lock`."""
    with (run_dir / "lock").open("a+") as lock:
        give_up = time.monotonic() + PATIENCE
        while not free(lock, rank, fcntl.LOCK_EX):
            if time.monotonic() > give_up:
                lock.seek(0)
                holder = lock.read().strip() or "another trainer"
                raise UserError(f"run_dir {run_dir} is in use by {holder}: stop that, or give another run_dir")
            time.sleep(0.1)
        if rank == 0:
            lock.truncate(0)
            job = os.environ.get("SLURM_JOB_ID")
            lock.write(f"process {os.getpid()} on {socket.gethostname()}{f', job {job}' if job else ''}\n")
            lock.flush()
        yield lock


def free(lock: IO[str], rank: int, kind: int = fcntl.LOCK_SH) -> bool:
    """Whether the byte of a rank is not locked, which tells that this rank is not there; then it is locked from here on.

    Several may look, since a lock of LOCK_SH keeps out only the LOCK_EX of a rank that begins.
    """
    try:
        # A record lock: the kernel drops it when this process ends, however it does, and no loader worker inherits it.
        fcntl.lockf(lock, kind | fcntl.LOCK_NB, 1, rank)
        return True
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise  # a file system that knows no locks
        return False


def refuse_another_run(config: Config, *, longer: bool = False) -> None:
    """Raise UserError if another config has begun the run folder, naming the keys that differ, but for `free` ones.

    If `longer`, there may be more epochs: the learning rate follows the longer schedule from there on.
    """
    path = Path(config.run_dir, "config.yaml")
    if not path.exists():
        return
    there, now = keys_of_result(read_config(path)), keys_of_result(config)
    differ = {name: f"{name} ({there[name]} there, {now[name]} now)" for name in now if there[name] != now[name]}
    if longer and now["epochs"] > there["epochs"]:
        differ.pop("epochs")
    if differ:
        more = "; to train on, give epochs=N with a larger N" if "epochs" in differ else ""
        raise UserError(f"{config.run_dir} was begun with another {', '.join(differ.values())}: give another run_dir{more}")


def note(run_dir: Path, state: str = "", **facts: Any) -> None:
    """Bring status.json up to date; a state and facts that are not given stay as they were.

    `seconds` grows by the time since the last note, and `goodput` is the part of it that went into the saved state.
    """
    with suppress(OSError):  # what there is to tell is told elsewhere too, and a full disk ends no run
        path = run_dir / "status.json"
        known = noted(run_dir)
        seconds = known.get("seconds", 0.0) + max(0.0, time.time() - path.stat().st_mtime)
        told = known | ({"state": state} if state else {}) | {"seconds": round(seconds, 3)} | facts
        if told.get("kept_seconds") is not None:
            told["goodput"] = round(told["kept_seconds"] / seconds, 4)
        replace(path, json.dumps(told, indent=2) + "\n")


def ask_for_requeue(stopped_by: str) -> None:
    """Make the file that REQUEUE_FILE names, if it does: a batch script's sign that this run is to go on later.

    Not if a person stopped it, by the file STOP or Ctrl-C: it would come back. Every rank must call this. Raises RunError if
    the file cannot be made.
    """
    path, failure = os.environ.get("REQUEUE_FILE"), ""
    if path and ranks.is_first() and stopped_by not in (StopVote.FILE, "SIGINT"):
        try:
            Path(path).touch()
        except OSError as error:
            failure = f"REQUEUE_FILE {path} cannot be made: {error.strerror}"
    failure = ranks.agreed(failure)
    if failure:
        raise RunError(failure)


def noted(run_dir: Path) -> dict[str, Any]:
    """What status.json says; nothing if it is not there or no JSON."""
    try:
        status: dict[str, Any] = json.loads((run_dir / "status.json").read_text())
        return status
    except (OSError, ValueError):
        return {}


def alive(run_dir: Path) -> None:
    """Show that the run is: a sign that outlives it."""
    with suppress(OSError):
        os.utime(run_dir / "lock")


def up_seconds(run_dir: Path) -> float:
    """Seconds that a run was up in all its attempts, the last one until its last sign of life."""
    try:
        after = (run_dir / "lock").stat().st_mtime - (run_dir / "status.json").stat().st_mtime
        return float(noted(run_dir).get("seconds", 0.0)) + max(0.0, after)
    except (OSError, TypeError, ValueError):
        return 0.0


def replace(path: Path, text: str) -> None:
    """Write a file that has its old content or the new one, whenever this is killed."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
