"""attempts.jsonl in the run folder: for each attempt, its first step, job, machines and commit."""

import json
import os
import socket
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from distrib.config import Config
from distrib.runtime import ranks
from distrib.runtime.environment import from_environment


def record(config: Config, step: int, changed: Mapping[str, tuple[Any, Any]]) -> None:
    """Add a line for this attempt, which starts after `step`, with the keys that are `changed` from there on.

    Every rank must call this.
    """
    hosts = ranks.all_gather_object(socket.gethostname())
    if not ranks.is_rank0():
        return
    line: dict[str, Any] = {
        "after_step": step,
        "began": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "ranks": len(hosts),
        "hosts": list(dict.fromkeys(hosts)),  # in the order of their ranks
        "job": os.environ.get("SLURM_JOB_ID"),
        "restarts": from_environment("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT", default=0),
    }
    if changed:
        line["changed"] = {name: {"from": before, "to": after} for name, (before, after) in changed.items()}
    with suppress(OSError), Path(config.run_dir, "attempts.jsonl").open("a") as file:  # a full disk must not end the run
        file.write(json.dumps(line) + "\n")


def commit() -> str | None:
    """The commit of this code, with the suffix -dirty if files were changed since; None outside of a repository."""
    describe = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(describe, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
