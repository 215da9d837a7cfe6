"""What saving costs: python benchmarks/saving.py [ROUNDS]

Trains Fashion-MNIST's CNN with a checkpoint every 100 steps, each round in a process of its own, and compares the 50 steps that
follow a save, with the save, to the 50 steps that follow none; then the same without any save, which is the control. Then
a network of 200 MB of state. Prints ratios of medians, and how long training waited for a save.
"""

import json
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

ROOT = Path(__file__).parent.parent
NEVER = 10**9
SMALL = ["configs/fashion_mnist.yaml", "epochs=3", "log_every=50", f"eval_every={NEVER}"]
LARGE = ["data.name=digits", "model.width=300", "batch_size=64", "epochs=3", f"eval_every={NEVER}", "precision=no"]


def measure(run_dir: str, *keys: str) -> None:
    """One run, in this process; prints the seconds of each 50 steps and of each stall."""
    sys.path.insert(0, str(ROOT))
    from distrib import train
    from distrib.command_line import load_config
    from distrib.runtime import exits
    from distrib.runtime.checkpoint import checkpoints
    from distrib.training import loop

    reports, stalls = [], []
    save, report = loop.save, loop.report

    def timed_save(*args: Any) -> int:
        began = perf_counter()
        step = save(*args)
        stalls.append(perf_counter() - began)
        return step

    def timed_report(*args: Any) -> None:
        report(*args)
        reports.append(perf_counter())

    loop.save, loop.report = timed_save, timed_report
    train(load_config([*keys, f"run_dir={run_dir}"]))
    spans = [after - before for before, after in pairwise(reports)]
    size = sum(file.stat().st_size for file in checkpoints(Path(run_dir))[-1].iterdir()) / 1e6
    print(json.dumps({"spans": spans, "stalls": stalls[:-1], "megabytes": size}))  # the last one is the run's end
    exits.leave(0)


def run(*keys: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "measure", f"{folder}/run", *keys]
        said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        found: dict[str, Any] = json.loads(said.splitlines()[-1])
        return found


def main(rounds: int) -> None:
    for name, every in (("a save", 100), ("none, twice (the control)", NEVER)):
        found = [run(*SMALL, f"save_every={every}") for _ in range(rounds)]
        # Report 0 is of step 50, span 0 of steps 50 to 100; the save after step 100 is in span 1.
        after_none = [span for each in found for span in each["spans"][2:-1:2]]
        after_save = [span for each in found for span in each["spans"][1:-1:2]]
        ratio = median(after_save) / median(after_none)
        print(
            f"50 steps with {name} / without: {ratio:.4f} ({len(after_save)} and {len(after_none)} times 50 steps)", flush=True
        )
        if every == 100:
            tell("small", [stall for each in found for stall in each["stalls"]], found[0]["megabytes"])
    large = [run(*LARGE, "save_every=15") for _ in range(rounds)]
    tell("large", [stall for each in large for stall in each["stalls"][1:]], large[0]["megabytes"])
    print(f"the first save of the large one: {1000 * median(each['stalls'][0] for each in large):.1f} ms")


def tell(name: str, stalls: list[float], megabytes: float) -> None:
    middle = 1000 * median(stalls)
    span = f"{1000 * min(stalls):.1f} to {1000 * max(stalls):.1f}"
    print(
        f"{name}: {middle:.1f} ms a save ({span}), {megabytes:.1f} MB, {middle / megabytes:.3f} ms per MB, {len(stalls)} saves"
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        measure(*sys.argv[2:])
    else:
        main(int(sys.argv[1]) if sys.argv[1:] else 3)
