"""status.json in a run folder: the state of the run, why it ended, and which part of its time produced the saved state."""

import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from distrib.runtime.disk import write_atomically

FILE = "status.json"


def read_status(run_dir: Path) -> dict[str, Any]:
    """The content of status.json; empty if it does not exist or is not JSON."""
    try:
        status: dict[str, Any] = json.loads((run_dir / FILE).read_text())
        return status if isinstance(status, dict) else {}
    except (OSError, ValueError):
        return {}


def write_status(run_dir: Path, state: str = "", **facts: Any) -> None:
    """Update status.json. A state and facts that are not given stay as they are.

    `seconds` grows by the time since the last update; `goodput` is the fraction of it that went into the saved state.
    """
    with suppress(OSError):  # a full disk must not end the run
        path = run_dir / FILE
        known = read_status(run_dir)
        seconds = round(known.get("seconds", 0.0) + max(0.0, time.time() - path.stat().st_mtime), 3)
        status = known | ({"state": state} if state else {}) | {"seconds": seconds} | facts
        if seconds and status.get("kept_seconds") is not None:
            status["goodput"] = round(status["kept_seconds"] / seconds, 4)
        write_atomically(path, json.dumps(status, indent=2) + "\n")


def begin_status(run_dir: Path, seconds: float) -> None:
    """Write the status of a new attempt; `seconds` is the time that earlier attempts took. Raises OSError."""
    known = read_status(run_dir)
    status = {"state": "running", "attempts": known.get("attempts", 0) + 1, "seconds": seconds}
    remembered = {name: known[name] for name in ("micro_batches",) if name in known}
    write_atomically(run_dir / FILE, json.dumps(status | remembered))


def up_seconds(run_dir: Path) -> float:
    """The seconds that all attempts of a run took; the last one counts until it last touched its lock."""
    try:
        after = (run_dir / "lock").stat().st_mtime - (run_dir / FILE).stat().st_mtime
        return float(read_status(run_dir).get("seconds", 0.0)) + max(0.0, after)
    except (OSError, TypeError, ValueError):
        return 0.0
