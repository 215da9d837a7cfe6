"""One run is one process: what it did, in its own words, and what it cost, in the kernel's.

The trainer is driven as a user drives it, through its command line, and is asked through what it leaves: TensorBoard's events,
status.json and its lines. Nothing here knows its code.
"""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
TIMEOUT = 3600.0  # seconds; the longest run is one of the cell `accuracy`
PATIENCE = 10.0  # seconds that a run has to end in when it is asked to

Record = dict[str, Any]


class RunError(RuntimeError):
    """A run ended with an error, or did not say what it did: its last words."""


@dataclass(frozen=True)
class Ran:
    """What a process left: its costs, those of its children included, and its output."""

    began: float  # time.time()
    wall: float  # seconds from its start to its end
    cpu: float  # seconds, user and system
    rss_mb: float  # the most memory that one process of it held, mapped files included
    stolen: float  # part of the machine's time that its host gave to others meanwhile
    out: str

    def cost(self) -> Record:
        return {"wall": self.wall, "cpu": self.cpu, "rss_mb": self.rss_mb, "stolen": self.stolen}


def run(command: Sequence[str], **environment: str) -> Ran:
    """Run a process to its end. Raises RunError."""
    bin_dir = Path(sys.executable).parent
    # On the CPU, also where there is a GPU, unless `environment` has one; with accelerate's own defaults, not its user's.
    settings = {
        "PATH": f"{bin_dir}{os.pathsep}{os.environ.get('PATH', '')}",
        "HF_HOME": "/nonexistent",
        "CUDA_VISIBLE_DEVICES": "",
    }
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "KMP_", "ACCELERATE_"))}
    with tempfile.TemporaryFile("w+") as out:
        ticks, began, clock = _ticks(), time.time(), time.perf_counter()
        process = subprocess.Popen(
            command, cwd=ROOT, env=clean | settings | environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
        memory = Memory(process.pid)
        try:
            code, usage = _waited(process.pid, TIMEOUT)
        except BaseException:
            _end(process)
            raise
        finally:
            memory.over.set()
        wall = time.perf_counter() - clock
        process.returncode = code
        total, stolen = (after - before for after, before in zip(_ticks(), ticks, strict=True))
        out.seek(0)
        said = out.read()
    if code:
        raise RunError(f"exit code {code}: {' '.join(said.splitlines()[-1:])[:200]}")
    return Ran(began, wall, usage.ru_utime + usage.ru_stime, memory.peak_kb / 1024, stolen / max(total, 1), said)


class Memory(threading.Thread):
    """Looks twice a second at the peak of each process, which the kernel keeps.

    wait4's is of no use here: what exit handlers map counts there, and so does the memory of the process that started this one.
    """

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid, self.peak_kb, self.over = pid, 0, threading.Event()
        self.start()

    def run(self) -> None:
        while not self.over.wait(0.5):
            self._look(self.pid)

    def _look(self, pid: int) -> None:
        try:
            found = re.search(r"VmHWM:\s*(\d+)", Path(f"/proc/{pid}/status").read_text())
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        except OSError:
            return
        self.peak_kb = max(self.peak_kb, int(found[1]) if found else 0)
        for child in children:
            self._look(int(child))


def _waited(pid: int, seconds: float) -> tuple[int, Any]:
    def late(number: int, frame: Any) -> None:
        raise RunError(f"not done after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        _, status, usage = os.wait4(pid, 0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    return os.waitstatus_to_exitcode(status), usage


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and what it started: politely, since only a launcher knows ranks that lead a session of their own."""
    os.killpg(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(PATIENCE)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _ticks() -> tuple[int, int]:
    """All ticks of all cores since the machine's start, and those that its host gave to others."""
    try:
        numbers = [int(each) for each in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        return sum(numbers), numbers[7]
    except (OSError, IndexError):
        return 0, 0


def peer(launcher: Sequence[str], keys: Sequence[str], **environment: str) -> Record:
    """Run a program of benchmarks/peers/ with the trainer's keys. Raises RunError."""
    ran = run([*launcher, *keys], **environment)
    lines = [line for line in ran.out.splitlines() if line.startswith('{"images"')]
    if not lines:
        raise RunError("it did not say what it did")
    told: Record = json.loads(lines[-1])
    return ran.cost() | told | {"start": told["stamps"][0] - ran.began}


def trainer(launcher: Sequence[str], keys: Sequence[str], **environment: str) -> Record:
    """Run the trainer with every feature on. Raises RunError.

    Its timed steps are those between its first and its last report, by the clock on TensorBoard's events: what it does
    between two reports counts, whatever it is. `train` and `val` are the times of its reports, and `began` that of its start.
    """
    with tempfile.TemporaryDirectory() as folder:
        ran = run([*launcher, *keys, f"run_dir={folder}/run"], **environment)
        status = json.loads(Path(folder, "run/status.json").read_text())
        train, val = (_points(Path(folder, "run"), tag) for tag in ("train/loss", "val/loss"))
    weights, seen = re.search(r"([\d,]+) weights", ran.out), re.search(r"([\d,]+) images seen", ran.out)
    if status["state"] != "completed" or not (train and weights and seen):
        raise RunError(f"not completed: {status}")
    (first, began, _), (last, ended, loss) = train[0], train[-1]
    return ran.cost() | {
        "images": int(seen[1].replace(",", "")),
        "updates": status["step"],
        "parameters": int(weights[1].replace(",", "")),
        "timed": last - first,
        "seconds": ended - began,
        "loss": loss,
        "top1": status["top1"],
        "start": began - ran.began,
        "ended": ran.began + ran.wall,
        "train": [(step, at) for step, at, _ in train],
        "val": [(step, at) for step, at, _ in val],
        "setup": next((line for line in ran.out.splitlines() if line.startswith("ranks ")), ""),
    }


def _points(run_dir: Path, tag: str) -> list[tuple[int, float, float]]:
    """(step, wall clock, value) of every point of a curve."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})
    events.Reload()
    found = tag in events.Tags()["scalars"]
    return [(each.step, each.wall_time, each.value) for each in events.Scalars(tag)] if found else []
