"""`distrib predict`: the classes of image files."""

import csv
import io
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch

from distrib.data.files import Reader
from distrib.data.listing import counted, images_in
from distrib.data.source import Files
from distrib.data.steps import Share
from distrib.data.workers import MOST, Stream, Workers
from distrib.errors import UserError
from distrib.inference.classifier import Classifier, load
from distrib.runtime.environment import cores_of_a_rank

USAGE = """\
usage: distrib predict RUN PATH... [--top K] [--json]

Classifies images with the best checkpoint of the run folder RUN, or with the checkpoint RUN. A PATH is an image, a folder of
images, or -, which reads such paths from the standard input, one in each line. Writes CSV: the path, the K most likely classes
(default 1), each with its probability, and the error of a file that cannot be used; with --json, an object in each line."""

FEW = 16  # images for which a worker process is started


class Prediction(NamedTuple):
    """An image's most likely classes, each with its probability; or why it cannot be used."""

    path: str
    top: list[tuple[str, float]]
    error: str = ""


def predict(classifier: Classifier, paths: list[str], top: int = 1, workers: Workers | None = None) -> Iterator[Prediction]:
    """Classify image files, in their order. A file that cannot be used has an error."""
    if not paths:
        return
    files = Files(np.array([os.fsencode(path) for path in paths]), torch.zeros(len(paths)), classifier.spec)
    stream = Stream(Reader(files, skip=True), workers or Workers(), pinned=classifier.device.type == "cuda")
    for share, images in stream.read(batches(len(paths), classifier.config.batch_size)):
        found = dict[int, list[tuple[str, float]]]()
        if len(images):
            logits = classifier.logits(classifier.with_channels(images))
            # The first of equal logits is the answer, as in an evaluation; in bf16, logits are often equal.
            order = logits.argsort(dim=1, descending=True, stable=True)[:, :top]
            values, classes = logits.softmax(1).gather(1, order).tolist(), order.tolist()
            for number, *row in zip(share.images.tolist(), classes, values, strict=True):
                found[number] = [(classifier.classes[i], value) for i, value in zip(*row, strict=True)]
        for number in range(share.epoch, min(share.epoch + classifier.config.batch_size, len(paths))):
            why = stream.bad.get(number, "").removeprefix(f"{paths[number]} ")
            yield Prediction(paths[number], found.get(number, []), why)


def batches(images: int, size: int) -> Iterator[Share]:
    """All images, `size` at a time. Instead of an epoch, which nothing here depends on, a share has its first image."""
    for first in range(0, images, size):
        yield Share(first, torch.arange(first, min(first + size, images)))


def paths_of(args: Iterable[str]) -> list[str]:
    """The image files that the arguments name. Raises UserError if there are none, or if an argument is not there."""
    names, found, left_out = list[str](), list[str](), Counter[str]()
    for arg in args:
        if arg != "-" and not os.path.lexists(arg):
            raise UserError(f"there is no file or folder {arg}")
        names += [line.rstrip("\r\n") for line in sys.stdin if line.strip()] if arg == "-" else [arg]
    for name in names:
        images = images_in(name, left_out) if os.path.isdir(name) else [name]
        found += images
        left_out["empty folders"] += not images
    if not found:
        raise UserError("there are no images: give files, folders, or - for paths in the standard input")
    if +left_out:
        print(f"left out: {counted(left_out)}", file=sys.stderr)
    return found


def lines(run: str, args: list[str], top: int, *, as_json: bool) -> Iterator[str]:
    """The output of the command. Raises UserError."""
    paths = paths_of(args)
    number = min(MOST, cores_of_a_rank(1), len(paths) // FEW) if sys.platform == "linux" else 0
    with Workers(number) as workers:  # before CUDA starts
        classifier = load(run)
        top = min(top, len(classifier.classes))
        if not as_json:
            numbers = ["", *range(2, top + 1)]
            yield row(["path", *(f"{title}{i}" for i in numbers for title in ("class", "probability")), "error"])
        bad = 0
        for each in predict(classifier, paths, top, workers):
            bad += bool(each.error)
            if as_json:
                answers = [{"class": name, "probability": value} for name, value in each.top]
                yield json.dumps({"path": each.path} | ({"error": each.error} if each.error else {"top": answers}))
            else:
                cells = [cell for name, value in each.top for cell in (name, f"{value:.6f}")]
                yield row([each.path, *(cells or [""] * (2 * top)), each.error])
        if bad:
            print(f"{bad:,} of {len(paths):,} images cannot be used", file=sys.stderr)


def row(cells: list[str]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow(cells)
    return text.getvalue()
