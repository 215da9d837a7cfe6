"""A run folder belongs to one config, and to one trainer at a time; status.json in it says how that one fares."""

import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from distrib import ranks
from distrib.config import Config, UserError, keys_of_result, read_config, to_yaml

PATIENCE = 10.0  # seconds that another trainer has to leave: one that was just stopped may be saving


@contextmanager
def held(config: Config, *, longer: bool = False) -> Iterator[Callable[..., None]]:
    """Hold the run folder while this lasts; gives a function that writes status.json. Every rank must call this.

    Raises UserError if the folder cannot be written, is in use, or was begun with another config.
    """
    run_dir = Path(config.run_dir)
    with ExitStack() as stack:

        def begin(leads: bool) -> None:
            if not leads:
                return
            refuse_another_run(config, longer=longer)
            try:
                stack.enter_context(occupied(run_dir))
                replace(run_dir / "config.yaml", to_yaml(config))
            except OSError as error:
                raise UserError(f"run_dir {run_dir} cannot be written: {error.strerror}; give another run_dir") from None

        def note(state: str, **facts: Any) -> None:
            if ranks.is_first():
                replace(run_dir / "status.json", json.dumps({"state": state, **facts, "attempts": attempts}, indent=2) + "\n")

        ranks.first(begin)
        attempts = noted(run_dir).get("attempts", 0) + 1
        try:
            yield note
        except BaseException as error:
            note("failed", cause=f"{type(error).__name__}: {' '.join(str(error).split())}")
            raise


@contextmanager
def occupied(run_dir: Path) -> Iterator[None]:
    """Make the folder, and keep other trainers out until this process leaves it or dies."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / "lock").open("a+") as lock:
        give_up = time.monotonic() + PATIENCE
        while not _locked(lock.fileno()):
            if time.monotonic() > give_up:
                lock.seek(0)
                holder = lock.read().strip() or "another trainer"
                raise UserError(f"run_dir {run_dir} is in use by {holder}: stop that, or give another run_dir")
            time.sleep(0.1)
        lock.truncate(0)
        job = os.environ.get("SLURM_JOB_ID")
        lock.write(f"process {os.getpid()} on {socket.gethostname()}{f', job {job}' if job else ''}\n")
        lock.flush()
        yield


def _locked(handle: int) -> bool:
    try:
        # A record lock: the kernel drops it when this process ends, however it does, and no loader worker inherits it.
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError:
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


def noted(run_dir: Path) -> dict[str, Any]:
    """What status.json says; nothing if it is not there or no JSON."""
    try:
        status: dict[str, Any] = json.loads((run_dir / "status.json").read_text())
        return status
    except (OSError, ValueError):
        return {}


def replace(path: Path, text: str) -> None:
    """Write a file that has its old content or the new one, whenever this is killed."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
