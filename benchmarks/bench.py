"""Side by side with what a user would pick instead:  make bench [ARGS="[CELL ...] [--quick] [--rounds N] [--into FILE]"]

Cells: throughput, tax, ranks, start, growth (these are run if none is named), accuracy, and gpu, which is throughput on the
first GPU, while all others use none. Or table, which only writes the page anew. Every run is a process of its own and one line
of FILE.jsonl; the page is FILE.md. Ends with 1 if a run failed, or if runs that are compared did not do the same work.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import astuple
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks import cells, machine, table
from benchmarks.cells import NEVER, PER_EPOCH, Cell, Recipe, steps
from benchmarks.runs import Record, RunError

DEFAULT = ["throughput", "tax", "ranks", "start", "growth"]
MISSING = "not installed"
SERIES = ("train", "val", "stamps")  # too long for a record


def chosen(name: str, *, quick: bool, folder: Path) -> Iterator[Cell]:
    """The cells that a word stands for. Each takes one to four minutes a round, quick ones a few seconds. Raises RunError."""
    cores = len(os.sched_getaffinity(0))
    size = 32 if quick else 256
    epoch = 60_000 // size
    if name == "throughput":
        total, log_every, save = (9, 3, 5) if quick else (24, 6, 18)
        root = f"data.root={cells.subset(60_000, folder)}"  # else each run of ours would end with 10,000 images of validation
        keys = [root, "model.name=cnn", f"batch_size={size}", f"save_every={save}", *steps(total, log_every, epoch)]
        yield cells.throughput("cnn", cores, 3.0, keys)
        # A checkpoint each epoch, as by default: none is in the timed steps, and `start` tells what one costs.
        total, log_every = 4, 1
        keys = [root, "model.name=resnet18", f"batch_size={size}", f"save_every={NEVER}", *steps(total, log_every, epoch)]
        yield cells.throughput("resnet18", cores, 1.8, keys)
    elif name == "gpu":
        if not machine.gpus():
            raise RunError("there is no GPU here: nvidia-smi names none")
        total, log_every = (9, 3) if quick else (351, 117)
        shared = [f"data.root={cells.subset(60_000, folder)}", f"batch_size={size}", *steps(total, log_every, epoch)]
        for network in ("cnn", "resnet18"):  # with a checkpoint after an epoch, as by default
            keys = [*shared, f"model.name={network}", f"save_every={epoch}"]
            yield cells.throughput(network, cores, 1.0, keys, **cells.FIRST_GPU)
    elif name == "tax":
        yield cells.tax(300, 100) if quick else cells.tax(2500, 500)
    elif name == "ranks":
        size = 64 if quick else 512
        total, log_every = (9, 3) if quick else (12, 4)
        root = f"data.root={cells.subset(60_000, folder)}"
        yield cells.ranks([root, f"batch_size={size}", *steps(total, log_every, 60_000 // size)])
    elif name == "start":
        total, every, evaluate = (8, 3, NEVER) if quick else (30, 4, 30)
        yield cells.start([*steps(total, 1, PER_EPOCH), f"save_every={every}", f"eval_every={evaluate}"])
    elif name == "growth":
        yield cells.growth(folder, 9, 3, 32) if quick else cells.growth(folder, 24, 6, 256)


class Book:
    """The records of a file: each run is written down when it ends."""

    def __init__(self, into: Path) -> None:
        self.file, self.page = into.with_suffix(".jsonl"), into.with_suffix(".md")
        into.parent.mkdir(parents=True, exist_ok=True)
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        self.records: list[Record] = [json.loads(line) for line in lines]

    def forget(self, cell: str) -> None:
        self.records = [each for each in self.records if each["cell"] != cell]
        self.file.write_text("".join(f"{json.dumps(each)}\n" for each in self.records))

    def add(self, record: Record) -> None:
        self.records.append(record)
        with self.file.open("a") as file:
            file.write(f"{json.dumps(record)}\n")

    def of(self, cell: str) -> list[Record]:
        return [each for each in self.records if each["cell"] == cell and "title" not in each]

    def write(self) -> None:
        self.page.write_text(table.page(self.records))


def opening(cell: str, title: str, keys: list[str], rounds: int) -> Record:
    date = time.strftime("%Y-%m-%d %H:%M")
    told = [key for key in keys if not key.startswith("data.root=")]  # a folder that is gone when somebody reads this
    about: Record = {"cell": cell, "title": title, "date": date, "rounds": rounds, "keys": told}
    return about | {"machine": machine.facts(), "before": machine.strain()}


def measure(cell: Cell, rounds: int, book: Book) -> bool:
    """Run a cell, round by round; returns whether all went well."""
    book.forget(cell.name)
    about = opening(cell.name, cell.title, cell.keys, rounds)
    about |= {"unit": cell.unit, "ratios": [astuple(each) for each in cell.ratios], "minus": cell.minus}
    for round_ in range(rounds):
        for entry in table.order(cell.entries, round_):
            record: Record = {"cell": cell.name, "name": entry.name, "round": round_}
            if entry.needs and not find_spec(entry.needs):
                record["failed"] = MISSING
            else:
                try:
                    ran = entry.run(cell.keys)
                    record |= {"value": cell.value(ran)} | {name: ran[name] for name in ran if name not in SERIES}
                except RunError as error:
                    record["failed"] = f"FAILED: {error}"
            book.add(record)
            what = record.get("failed") or f"{table.number(record['value'])} {cell.unit} ({record['wall']:.1f} s)"
            print(f"{cell.name}, round {round_ + 1} of {rounds}: {entry.name}: {what}", flush=True)
    runs = book.of(cell.name)
    about["unequal"] = table.unequal(runs, cell.equal, cell.tolerance)
    about["stolen"] = max(each.get("stolen", 0.0) for each in runs)
    book.add(about | {"after": machine.strain()})
    for why in about["unequal"]:
        print(f"UNEQUAL WORK in {cell.name}: {why}", file=sys.stderr)
    return not about["unequal"] and all(each.get("failed", MISSING) == MISSING for each in runs)


def accuracy(recipes: list[str], seeds: int, keys: list[str], book: Book) -> bool:
    """Train every recipe with every seed, seed by seed; what is in the book already is not done again."""
    title = f"Time to accuracy: Fashion-MNIST to {table.TARGET} %, and beyond"
    about = opening("accuracy", title, keys, seeds)
    done = {(each["name"], each["seed"]) for each in book.of("accuracy") if "failed" not in each}
    well = True
    for seed in range(seeds):
        for text in table.order(recipes, seed):
            name = " ".join([text, *keys]) if ":" in text else text
            if (name, seed) in done:
                continue
            record: Record = {"cell": "accuracy", "name": name, "seed": seed}
            try:
                ran = Recipe(text, keys).run(seed)
                record |= {each: ran[each] for each in ran if each not in SERIES}
                print(f"{name}, seed {seed}: {ran['top1']:.2f} % in {ran['wall']:.1f} s, {ran['cpu']:.1f} CPU s", flush=True)
            except RunError as error:
                record["failed"], well = str(error), False
                print(f"{name}, seed {seed}: FAILED: {error}", flush=True)
            book.add(record)
    book.add(about | {"after": machine.strain()})
    return well


def asked() -> Any:
    known = [*DEFAULT, "gpu", "accuracy", "table"]
    parser = argparse.ArgumentParser(prog="make bench ARGS=...", description=__doc__)
    parser.add_argument("cells", nargs="*", metavar="CELL", help=", ".join(known))
    parser.add_argument("--quick", action="store_true", help="one short round, to see that all of it runs")
    parser.add_argument("--rounds", type=int, default=0, help="rounds, of each cell; seeds of accuracy")
    parser.add_argument("--into", type=Path, help="where the records and the page go, without suffix")
    parser.add_argument(
        "--recipes", nargs="*", default=[], help='for accuracy: CONFIG.yaml, "CONFIG.yaml key=value", or PEER:EPOCHS'
    )
    parser.add_argument("--keys", nargs="*", default=[], help="for accuracy: more keys for PEER:EPOCHS, such as optim.lr=0.2")
    args = parser.parse_args()
    unknown = [name for name in args.cells if name not in known]
    if unknown:
        parser.error(f"there is no cell {unknown[0]!r}: use {', '.join(known)}")
    if "accuracy" in args.cells and not args.recipes:
        parser.error("accuracy wants --recipes, such as configs/fashion_mnist.yaml lightning:6")
    return args


def main() -> int:
    args = asked()
    results, name = machine.ROOT / "benchmarks/results", f"{machine.slug()}{'-quick' if args.quick else ''}"
    newest = max(results.glob(f"????-??-??-{name}.jsonl"), default=None) if args.cells == ["table"] else None
    book = Book(args.into or newest or results / f"{time.strftime('%Y-%m-%d')}-{name}")
    if args.cells == ["table"] and not book.records:
        sys.exit(f"bench: there are no records in {book.file}: give --into FILE")
    well = True
    try:
        with tempfile.TemporaryDirectory() as folder:
            for name in args.cells or DEFAULT:
                if name == "accuracy":
                    well &= accuracy(args.recipes, args.rounds or 5, args.keys, book)
                for cell in chosen(name, quick=args.quick, folder=Path(folder)):
                    well &= measure(cell, args.rounds or (1 if args.quick else 3), book)
                book.write()
    except RunError as error:
        sys.exit(f"bench: {error}")
    print(f"\n{book.page.read_text()}\n{book.page}")
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
