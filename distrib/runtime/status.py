"""status.json in a run folder: the state of the run, why it ended, and which part of its time produced the saved state."""

import json
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from distrib.runtime.disk import write_atomically

FILE = "status.json"
REMEMBERED = ("micro_batches",)  # facts that the next attempt needs


class Status:
    """Writes status.json. Rank 0 calls `begin`; the status of another rank writes nothing.

    `seconds` is the time of all attempts, by the clock of the machine of each; `goodput` is the fraction of it that went into
    the saved state.
    """

    def __init__(self, run_dir: Path, began: float) -> None:
        self.path, self.writing = run_dir / FILE, threading.Lock()
        self.earlier, self.began = 0.0, time.monotonic() - (time.time() - began)
        self.facts: dict[str, Any] = {}

    def seconds(self) -> float:
        """The time of all attempts until now."""
        return self.earlier + time.monotonic() - self.began

    def begin(self, earlier: float) -> None:
        """Begin the status of a new attempt; the earlier ones took at least so many seconds. Raises OSError."""
        known = read_status(self.path.parent)
        self.earlier = max(earlier, float(known.get("seconds", 0.0)))
        self.facts = {"attempts": known.get("attempts", 0) + 1} | {name: known[name] for name in REMEMBERED if name in known}
        self._write(state="running")

    def take_over(self) -> None:
        """Continue the status of rank 0, which has exited, on another rank."""
        self.facts = read_status(self.path.parent)
        self.earlier, self.began = float(self.facts.get("seconds", 0.0)), time.monotonic()

    def write(self, state: str = "", **facts: Any) -> None:
        """Update status.json. A state and facts that are not given stay as they are. Threads may call this at once."""
        if self.facts:
            with suppress(OSError):  # a full disk must not end the run
                self._write(**({"state": state} if state else {}), **facts)

    def _write(self, **facts: Any) -> None:
        with self.writing:
            self.facts |= facts | {"seconds": round(self.seconds(), 3)}
            if self.facts.get("kept_seconds") is not None:
                self.facts["goodput"] = round(self.facts["kept_seconds"] / self.facts["seconds"], 4)
            write_atomically(self.path, json.dumps(self.facts, indent=2) + "\n")


def read_status(run_dir: Path) -> dict[str, Any]:
    """The content of status.json; empty if it does not exist or is not JSON."""
    try:
        status: dict[str, Any] = json.loads((run_dir / FILE).read_text())
        return status if isinstance(status, dict) else {}
    except (OSError, ValueError):
        return {}
