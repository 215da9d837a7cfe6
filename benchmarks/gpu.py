"""What a GPU gives, and what the trainer leaves of it:  python benchmarks/gpu.py [FOLDER] [--into PAGE.md] [--quick]

FOLDER has Fashion-MNIST as torchvision or as Debian keeps it; without it, the trainer looks where it always does. Prints a page
and writes it, line by line, to benchmarks/results/. Meant for under 8 minutes on one GPU: after LATE seconds, what is left is
left out. On several GPUs, the networks are also trained on all of them. Every line is a run in a process of its own. Without a
GPU, --quick tries it all out on the CPU, in sizes that say nothing.
"""

import argparse
import gzip
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, median, stdev
from time import perf_counter
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
LATE = 400.0  # seconds after which no other line is begun
PATIENCE = 120.0  # seconds for a line
# For 93, 94 and 94.5 %, with seeds; a GPU has the time for wider networks than a CPU (docs/speed.md).
RECIPES = [("epochs=4", 4), ("epochs=8 model.width=64 tta=6", 4), ("epochs=14 model.width=64 tta=6 data.translate=1", 2)]
WITHOUT = "cuda_graph=false"  # the steps are not recorded: the host starts each of their kernels
Record = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python benchmarks/gpu.py", description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, metavar="FOLDER")
    parser.add_argument("--into", type=Path, metavar="PAGE.md")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    gpus = torch.cuda.device_count()
    if not gpus and not args.quick:
        sys.exit("benchmarks/gpu.py: there is no GPU; --quick tries it out on the CPU")
    device = torch.cuda.get_device_name() if gpus else "no GPU, quick"
    name = f"{time.strftime('%Y-%m-%d')}-{max(gpus, 1)}x{device.replace(' ', '-')}.md"
    into = args.into or (ROOT / "benchmarks/results" / name if gpus else Path(os.devnull))
    with tempfile.TemporaryDirectory() as scratch, into.open("w") as file:
        for line in page(device, gpus, args.quick, found(args.folder, Path(scratch)), Path(scratch)):
            print(line, flush=True)
            print(line, file=file, flush=True)


def found(folder: Path | None, scratch: Path) -> list[str]:
    """The key that says where Fashion-MNIST is."""
    packed = list(folder.glob("*-ubyte.gz")) if folder else []
    for each in packed:
        raw = scratch / "FashionMNIST/raw" / each.stem
        raw.parent.mkdir(parents=True, exist_ok=True)
        raw.write_bytes(gzip.decompress(each.read_bytes()))
    return [f"data.root={scratch if packed else folder}"] if folder else []


def page(device: str, gpus: int, quick: bool, data: list[str], scratch: Path) -> Iterator[str]:
    began = perf_counter()
    versions = f"torch {torch.__version__}, Python {sys.version.split()[0]}, {time.strftime('%Y-%m-%d')}"
    yield f"# {device}\n\n`python benchmarks/gpu.py`, {max(gpus, 1)} GPU, {versions}\n"
    yield "| ceiling | |\n|---|---|"
    yield ceilings(child("ceilings", quick=quick))
    for how, keys in (("", []), (f", {WITHOUT}", [WITHOUT])):
        yield f"| a step of a linear layer on 8x8 pixels{how} | {tax(child('tax', *keys, quick=quick))} |"
    yield f"| import torch, torchvision, accelerate | {importing()} |"
    yield "\n| recipe | seeds | top-1 | seconds of steps and evaluation | from process start to end |\n|---|---|---|---|---|"
    for changed, seeds in RECIPES:
        yield recipe(changed, data, seeds=1 if quick else seeds, scratch=scratch, quick=quick)
    yield "\n| network, images | GPUs | batch | with | images/s | GPU idle | host syncs |\n|---|---|---|---|---|---|---|"
    for name, size, batch, count, key in trained(quick):
        for ranks in sorted({1, max(gpus, 1)}) if not key else (1,):
            late = perf_counter() - began > LATE
            words = ("steps", name, str(size), str(batch * ranks), str(count), *key.split())
            said = {"failed": "left out, since it was late"} if late else child(*words, quick=quick, ranks=ranks)
            yield row(name, size, batch * ranks, ranks, key, said)
    yield f"\nAll of this took {(perf_counter() - began) / 60:.1f} minutes."


def ceilings(said: Record) -> str:
    if "failed" in said:
        return f"| ceilings | {said['failed']} |"
    return (
        f"| product of two matrices of {said['side']}, bf16 | {said['flops'] / 1e12:.3g} TFLOP/s |\n"
        f"| copy of {said['bytes'] / 2**20:.0f} MiB, read and written | {said['copied'] / 1e12:.3g} TB/s |\n"
        f"| launch of a kernel | {1e6 * said['launch']:.1f} us |"
    )


def tax(said: Record) -> str:
    if "failed" in said:
        return str(said["failed"])
    told = ", ".join(f"{name} {1e6 * seconds:.0f} us" for name, seconds in said.items())
    return f"{told}: tax {1e6 * (said['the trainer'] - said['bare loop']):.0f} us"


def importing() -> str:
    """How long it takes, which is part of every run's start."""
    began = perf_counter()
    failure, _ = ended([sys.executable, "-c", "import torch, torchvision, accelerate"])
    return failure or f"{perf_counter() - began:.1f} s"


def trained(quick: bool) -> list[tuple[str, int, int, int, str]]:
    """Name, pixels, images of a GPU in each step, steps, and a key."""
    if quick:
        return [("airbench", 28, 8, 0, "")]
    large, middle, small = ("resnet50", 224, 256, 60), ("resnet18", 28, 1024, 150), ("airbench", 28, 1000, 300)
    rows = [(*each, key) for key in ("", WITHOUT) for each in (large, middle, small, ("cnn", 28, 128, 300))]
    return [*rows, (*large, "cudnn_benchmark=true"), *((*each, "compile=default") for each in (large, small, middle))]


def row(name: str, size: int, batch: int, ranks: int, key: str, record: Record) -> str:
    if "failed" in record:
        return f"| {name}, {size} px | {ranks} | {batch} | {key} | {record['failed']} | | |"
    idle = f"{max(0.0, 1 - record['busy'] / record['step']):.1%}" if record["busy"] else "-"
    rate = f"{batch / record['step']:,.0f}"
    return f"| {name}, {size} px | {ranks} | {batch} | {key} | {rate} | {idle} | {record['syncs']:g} a step |"


def recipe(keys: str, data: list[str], seeds: int, scratch: Path, *, quick: bool) -> str:
    """Train configs/fashion_mnist_fast.yaml with each seed."""
    top1, kept, walls = list[float](), list[float](), list[float]()
    for seed in range(seeds):
        run_dir, began = scratch / f"{keys.replace(' ', '-')}-{seed}", perf_counter()
        own = [f"run_dir={run_dir}", f"seed={seed}", *(["epochs=0.02"] if quick else [])]
        command = [sys.executable, "train.py", "configs/fashion_mnist_fast.yaml", *keys.split(), *data, *own]
        failure, _ = ended(command)
        if failure:
            return f"| fashion_mnist_fast {keys} | {seeds} | {failure} | | |"
        status = json.loads((run_dir / "status.json").read_text())
        walls.append(perf_counter() - began)
        top1.append(status["top1"])
        kept.append(status["kept_seconds"])
    spread = f" +- {stdev(top1):.2f}" if seeds > 1 else ""
    return (
        f"| fashion_mnist_fast {keys} | {seeds} | {mean(top1):.2f}{spread} % | {mean(kept):.1f} | {mean(walls):.1f} s, "
        f"median {median(walls):.1f} |"
    )


def child(part: str, *args: str, quick: bool, ranks: int = 1) -> Record:
    """What a part says, which runs in a process of its own, or in several."""
    several = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *several, "-m", "benchmarks.gpu_parts", part, str(int(quick)), *args]
    failure, said = ended(command)
    if failure:
        return {"failed": failure}
    told: Record = json.loads(next(line for line in said.splitlines() if line.startswith("{")))
    return told


def ended(command: list[str]) -> tuple[str, str]:
    """Why a program failed, or "" if it did not; and what it said. What went wrong is told on the console, whole."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        return f"failed: not done after {PATIENCE:.0f} s", ""
    if not done.returncode:
        return "", done.stdout
    print(done.stderr, file=sys.stderr, flush=True)
    lines = done.stderr.strip().splitlines() or ["no word"]
    return "failed: " + next((line for line in reversed(lines) if "Error" in line), lines[-1])[:200], ""


if __name__ == "__main__":
    main()
