"""What a figure was taken on."""

import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("torch", "torchvision", "accelerate", "lightning", "timm")
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def cpu() -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", _read("/proc/cpuinfo"), re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def slug() -> str:
    """A file's name for this machine: amd-epyc-2-cores."""
    words = re.sub(r"\((r|tm)\)|\bcpu\b|@.*", "", cpu().lower())
    return re.sub(r"[^a-z0-9]+", "-", f"{words} {_cores()} cores").strip("-")


def gpus() -> list[str]:
    """NVIDIA's, by name."""
    return _said("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").splitlines()


def facts() -> list[str]:
    """Lines about the machine and what is installed on it; they hold as long as the bench runs."""
    info = _read("/proc/cpuinfo")
    family = " ".join(f"{name} {found[1]}" for name in ("cpu family", "model") if (found := _field(info, name)))
    words = _field(info, "flags")
    known = set(words[1].split()) if words else set()
    has = [f"{'' if flag in known else 'no '}{flag}" for flag in FLAGS]
    versions = [f"{name} {_version(name)}" for name in PACKAGES]
    return [
        f"CPU: {cpu()} ({family}), {_cores()} cores to use; {', '.join(has)}",
        *(f"GPU: {each}" for each in gpus()),
        f"Python {platform.python_version()}, {', '.join(versions)}; {platform.system()} {platform.release()}",
        f"commit {_commit()}",
    ]


def strain() -> str:
    """How busy the machine is: its load, and the part of the time in which someone waited for a core."""
    pressure = _read("/proc/pressure/cpu").splitlines()[:1]
    return f"load {', '.join(f'{each:.2f}' for each in os.getloadavg())}; pressure {' '.join(pressure) or 'unknown'}"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _field(info: str, name: str) -> re.Match[str] | None:
    return re.search(rf"^{name}\s*:\s*(.+)$", info, re.MULTILINE)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    changed = _said("git", "status", "--porcelain", "--untracked-files=no")
    commit = _said("git", "rev-parse", "--short", "HEAD") or "unknown"
    return commit + (", with changes that are not committed" if changed else "")


def _said(*command: str) -> str:
    """What a program says, or nothing if it is not there or fails."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
