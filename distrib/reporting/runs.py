"""`distrib runs`: one line for each run in a folder. Imports no torch."""

from pathlib import Path

from distrib.errors import UserError
from distrib.runtime.status import FILE, read_status

TITLES = ("run", "state", "step", "last", "best", "seconds", "attempts", "cause")
OF_THE_RUN = {
    "state",
    "attempts",
    "seconds",
    "step",
    "kept_seconds",
    "goodput",
    "cause",
    "rank",
    "micro_batches",
    "exit_code",
    "best",
}


def table(folder: str) -> str:
    """The runs in a folder and its subfolders, as a table. Raises UserError if there are none."""
    found = sorted(path.parent for path in Path(folder).glob(f"**/{FILE}"))
    if not found:
        raise UserError(f"there are no runs in {folder}: give the folder that contains the run folders")
    rows = [TITLES, *(row(path, Path(folder)) for path in found)]
    widths = [max(len(each[column]) for each in rows) for column in range(len(TITLES))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(each, widths, strict=True)).rstrip() for each in rows)


def row(run_dir: Path, folder: Path) -> tuple[str, ...]:
    status = read_status(run_dir)
    values = "  ".join(f"{name} {value:.4g}" for name, value in status.items() if name not in OF_THE_RUN)
    best = dict(status.get("best") or {})
    at = f" at step {best.pop('step'):,}" if "step" in best else ""
    return (
        str(run_dir.relative_to(folder)) if run_dir != folder else run_dir.name,
        str(status.get("state", "?")),
        f"{status.get('step', 0):,}",
        values,
        "  ".join(f"{name} {value:.4g}" for name, value in best.items()) + at,
        f"{status.get('seconds', 0):,.0f}",
        str(status.get("attempts", "?")),
        str(status.get("cause") or ""),
    )
