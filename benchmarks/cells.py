"""What is measured: each cell is who takes part, what all of them do, and which ratios are asked of the result."""

import gzip
import math
import struct
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median

from benchmarks.runs import ROOT, Record, RunError, peer, run, trainer

NEVER = 10**9
FIRST_GPU = {"CUDA_VISIBLE_DEVICES": "0"}  # for an environment; without it there is none
PER_EPOCH = 60_000 // 256
PEERS = {  # a package, and the program of benchmarks/peers/ that uses it
    "lightning": "lightning_trainer",
    "accelerate": "accelerate_example",
    "torchvision": "torchvision_reference",
    "timm": "timm_train",
}
UNSMOOTHED = "objective.label_smoothing=0"
FASHION = ["data.name=fashion_mnist", "data.translate=1", "data.flip=random", f"eval_every={NEVER}", UNSMOOTHED]
# From its peak to 0 in a straight line, or under OneCycleLR: the losses after as many steps are alike.
PLAIN = ["optim.lr=0.02", "optim.warmup_epochs=0", "optim.schedule=linear"]


@dataclass(frozen=True)
class Entry:
    """One that takes part, under a name of its own; `needs` is a package that may be missing."""

    name: str
    run: Callable[[Sequence[str]], Record]
    needs: str = ""


@dataclass(frozen=True)
class Ratio:
    """A quotient of two medians, and the interval that it should be in."""

    what: str
    over: str
    low: float = 0.0
    high: float = float("inf")
    note: str = ""


@dataclass(frozen=True)
class Cell:
    name: str
    title: str
    unit: str
    entries: list[Entry]
    keys: list[str]
    ratios: list[Ratio]
    value: Callable[[Record], float]
    equal: tuple[str, ...] = ("images", "updates", "timed", "parameters")  # what must be the same in all runs of a cell
    tolerance: float = 0.0  # of the losses, as a part of the trainer's; 0: they are not compared
    minus: tuple[tuple[str, str], ...] = ()  # differences of medians that are told, (what, minus what)


def rate(record: Record) -> float:
    """Images per second in the timed steps."""
    return float(record["images"] / record["updates"] * record["timed"] / record["seconds"])


def microseconds(record: Record) -> float:
    return float(1e6 * record["seconds"] / record["timed"])


def program(
    name: str, *flags: str, launcher: Sequence[str] = (sys.executable, "-m"), **environment: str
) -> Callable[[Sequence[str]], Record]:
    return partial(peer, [*launcher, f"benchmarks.peers.{name}", *flags], **environment)


def package(name: str, *flags: str, cores: int = 0, **environment: str) -> Callable[[Sequence[str]], Record]:
    """A package of PEERS as it ships, or tuned for so many cores."""
    if cores:
        flags = ("--tuned", *flags)
    if name != "accelerate":
        return program(PEERS[name], *flags, **environment)
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    if cores:
        told = "--num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no --num_cpu_threads_per_process"
        launcher += [*([] if environment else ["--cpu"]), *told.split(), str(cores)]
    return program(PEERS[name], *flags, launcher=[*launcher, "-m"], **environment)


OURS = partial(trainer, [sys.executable, "train.py"])
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
CONTROL = Ratio("ours, again", "ours", 0.98, 1.02, "control: one program under two names")


def steps(total: int, log_every: int, per_epoch: float = PER_EPOCH) -> list[str]:
    """Keys for so many steps, of which those after the first `log_every` are timed."""
    return [f"epochs={total / per_epoch:.6f}", f"log_every={log_every}"]


def throughput(network: str, cores: int, goal: float, keys: list[str], **environment: str) -> Cell:
    ours = partial(OURS, **environment)
    entries = [Entry("raw", program("raw", **environment)), Entry("ours", ours), Entry("ours, again", ours)]
    ratios = [CONTROL, Ratio("ours", "raw", 0.98, note="the ceiling")]
    for style, tuned, low in (("as shipped", 0, goal), ("tuned", cores, 1.0)):
        for name in PEERS:
            entries.append(Entry(f"{name}, {style}", package(name, cores=tuned, **environment), name))
            ratios.append(Ratio("ours", f"{name}, {style}", low))
    where = "gpu" if environment else "throughput"
    title = f"Throughput{' on a GPU' if environment else ''}: {network} on Fashion-MNIST"
    return Cell(f"{where} {network}", title, "images/s", entries, [*FASHION, *PLAIN, *keys], ratios, rate, tolerance=0.25)


def tax(total: int, log_every: int) -> Cell:
    keys = ["data.name=digits", "data.translate=0", "model.name=cnn", "model.width=1", "batch_size=8", "precision=no"]
    keys += ["threads=1", *PLAIN, UNSMOOTHED, f"eval_every={NEVER}", "save_every=1000"]
    ready = "raw, ready batches"
    entries = [
        Entry("raw", program("raw")),
        Entry("ours", OURS),
        Entry("ours, again", OURS),
        Entry(ready, program("raw", "--ready")),
        Entry("lightning, as shipped", package("lightning", "--ready"), "lightning"),
        Entry("lightning, barebones", package("lightning", "--ready", cores=1), "lightning"),
        Entry("accelerate, tuned", package("accelerate", "--ready", cores=1)),
    ]
    minus = (("ours", "raw"), ("ours, again", "raw"), *((entry.name, ready) for entry in entries[4:]))
    keys += steps(total, log_every, 1437 // 8)
    title = "Tax: the smallest network that the trainer knows, 8 digits a step, one thread"
    return Cell("tax", title, "us/step", entries, keys, [CONTROL], microseconds, minus=minus)


def ranks(keys: list[str]) -> Cell:
    ours_twice = partial(trainer, ["launch/local.sh"], RANKS="2")
    entries = [
        Entry("raw, 1 rank", program("raw")),
        Entry("ours, 1 rank", OURS),
        Entry("raw, 2 ranks", program("raw", launcher=TORCHRUN)),
        Entry("ours, 2 ranks", ours_twice),
    ]
    ratios = [
        Ratio("ours, 2 ranks", "ours, 1 rank", 1.9),
        Ratio("raw, 2 ranks", "raw, 1 rank", note="what this machine allows"),
        Ratio("ours, 1 rank", "raw, 1 rank", 0.98),
        Ratio("ours, 2 ranks", "raw, 2 ranks", 0.98),
    ]
    title = "Ranks: cnn on Fashion-MNIST, each rank on one thread"
    keys = [*FASHION, *PLAIN, "model.name=cnn", "threads=1", f"save_every={NEVER}", *keys]
    return Cell("ranks", title, "images/s", entries, keys, ratios, rate, tolerance=0.25)


def imports(keys: Sequence[str]) -> Record:
    return run([sys.executable, "-c", "import torch, torchvision, accelerate"]).cost()


def first_step(keys: Sequence[str]) -> Record:
    """The trainer with a report after each step; what evaluations and checkpoints cost is seen between two of them."""
    record = trainer([sys.executable, "train.py"], keys)
    train, val = dict(record["train"]), dict(record["val"])
    every = int(next(key for key in keys if key.startswith("save_every=")).partition("=")[2])
    gaps = {step: train[step + 1] - at for step, at in train.items() if step + 1 in train}
    plain = median(gap for step, gap in gaps.items() if step % every and step not in val)
    evaluations = [at - train[step] for step, at in val.items()]
    saves = [gap - plain for step, gap in gaps.items() if step % every == 0 and step not in val]
    last = max([*train.values(), *val.values()])
    also = {
        "an evaluation of 10,000 images, s": median(evaluations),
        "a checkpoint: what it adds to the step after it, s": median(saves),
        "from the last line to the end of the process, the last checkpoint included, s": record["ended"] - last,
        "a step, s": plain,
    }
    return record | {"also": also}


def start(keys: list[str]) -> Cell:
    what, over = "ours, until its first step is done", "import torch, torchvision, accelerate"
    entries = [Entry(over, imports), Entry(what, first_step)]
    ratios = [Ratio(what, over, 0, 1.5)]
    keys = [*FASHION[:-2], "model.name=cnn", "batch_size=256", *keys]
    title = "Start: from the start of the process; cnn on Fashion-MNIST, batch 256"
    return Cell(
        "start", title, "s", entries, keys, ratios, lambda record: float(record.get("start") or record["wall"]), equal=()
    )


def subset(images: int, folder: Path) -> Path:
    """A data.root with the first so many training images of Fashion-MNIST and 500 to validate, as torchvision keeps them.

    Raises RunError if there is no Fashion-MNIST.
    """
    raw = folder / str(images) / "FashionMNIST/raw"
    if not raw.is_dir():
        raw.mkdir(parents=True)
        for part, count in (("train", images), ("t10k", 500)):
            for kind, shape in (("images-idx3", (28, 28)), ("labels-idx1", ())):
                name, header = f"{part}-{kind}-ubyte", 8 + 4 * len(shape)
                content = original(name)
                magic, sizes = content[:4], struct.pack(f">{1 + len(shape)}i", count, *shape)
                (raw / name).write_bytes(magic + sizes + content[header : header + count * math.prod(shape)])
    return folder / str(images)


def original(name: str) -> bytes:
    for folder in (Path("/usr/share/datasets/fashion-mnist"), ROOT / "data/FashionMNIST/raw"):
        if (folder / f"{name}.gz").exists():
            return gzip.decompress((folder / f"{name}.gz").read_bytes())
    raise RunError("there is no Fashion-MNIST: apt-get install dataset-fashion-mnist, or train on it once, which downloads it")


def growth(folder: Path, total: int, log_every: int, batch: int) -> Cell:
    entries = []
    for images in (1_000, 10_000, 60_000):
        own = [f"data.root={subset(images, folder)}", *steps(total, log_every, images // batch)]
        entries.append(Entry(f"{images:,} images", partial(grown, own)))
    ratios = [Ratio(f"{images} images", "60,000 images", 0.95, 1.05) for images in ("1,000", "10,000")]
    keys = [*FASHION, *PLAIN, "model.name=cnn", f"batch_size={batch}", f"save_every={NEVER}"]
    title = "Growth: as many steps over training sets of different sizes, cnn, the same batch"
    return Cell("growth", title, "images/s", entries, keys, ratios, rate)


def grown(own: list[str], keys: Sequence[str]) -> Record:
    return OURS([*keys, *own])


@dataclass(frozen=True)
class Recipe:
    """A way to an accuracy: ours, a CONFIG.yaml; or a peer's, PEER:EPOCHS, as it ships, one cycle of SGD."""

    text: str
    keys: list[str] = field(default_factory=list)  # more keys, for all recipes of peers

    def run(self, seed: int) -> Record:
        """Train once. Raises RunError."""
        name, _, epochs = self.text.partition(":")
        if not epochs:
            return OURS([*name.split(), f"seed={seed}"])
        if name not in PEERS:
            raise RunError(f"{self.text} is neither CONFIG.yaml nor PEER:EPOCHS with a peer of {', '.join(PEERS)}")
        keys = ["data.name=fashion_mnist", "data.translate=1", "data.flip=random", "model.name=cnn", "batch_size=256"]
        keys += [f"epochs={epochs}", "objective.label_smoothing=0.1", "optim.lr=0.1", *self.keys, f"seed={seed}"]
        record = package(name, "--validate")(keys)
        if record["top1"] is None:
            raise RunError("it did not evaluate: give it whole epochs")
        return record
