"""`distrib export`: a trained network as one file, which is compared with the checkpoint before it is written."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor
from tqdm import tqdm

from distrib.data.datasets import load_source
from distrib.data.files import read_image
from distrib.data.pixels import ImageSpec, center_of, picture_of
from distrib.data.source import Arrays, Files, Source
from distrib.errors import DiskError, RunError, UserError
from distrib.inference.card import card, facts_of
from distrib.inference.classifier import OTHER_DATA, Classifier, load, refuse_missing_objects, refuse_other_classes, with_data
from distrib.inference.graph import FORMATS, Answers, Format
from distrib.models.build import NetworkOrBuilder
from distrib.runtime import disk

USAGE = """\
usage: distrib export RUN OUT.safetensors|OUT.pt2|OUT.onnx [data.KEY=value ...]

Writes the best checkpoint of the run folder RUN, or the checkpoint RUN, as one file, with a model card beside it, which
has the same name and .md:

  .onnx          for onnxruntime and others; needs pip install distrib[onnx]
  .pt2           for torch.export.load, without distrib
  .safetensors   the weights, for distrib.load, evaluate and predict, and as model.weights

.onnx and .pt2 take decoded pictures of any size, uint8 (n, height, width, 3); preprocessing and class names are inside. The
file runs in its own runtime on all validation images of the run, which data.root=FOLDER may name anew. It is written only if
its answers are those of the checkpoint."""

TOLERANCE = 1e-4  # of logits, absolute, and relative where they are larger than 1
PIXELS = 1 << 21  # in a batch of pictures


class Comparison:
    """How the answers of an artifact compare with those of the checkpoint, in float32."""

    def __init__(self) -> None:
        self.images = self.hits = self.left_out = self.other = 0
        self.largest = 0.0  # difference between two logits

    def add(self, got: Tensor, expected: Tensor, targets: Tensor) -> None:
        apart = (got - expected).abs()
        scale = expected.abs().amax(1, keepdim=True).clamp_min(1)
        self.largest = max(self.largest, apart.max().item())
        answers = got.argmax(1)
        # Where two classes are as likely, either may be the answer.
        behind = expected.amax(1) - expected.gather(1, answers[:, None])[:, 0]
        self.other += int(((behind > TOLERANCE * scale[:, 0]) | (apart > TOLERANCE * scale).any(1)).sum())
        self.images += len(targets)
        self.hits += int((answers == (targets if targets.dim() == 1 else targets.argmax(1))).sum())

    def __str__(self) -> str:
        share = f"{self.hits:,} of {self.images:,} validation images right ({self.hits / max(1, self.images):.2%})"
        bad = f", {self.left_out:,} bad images left out" if self.left_out else ""
        return f"{share}, as the checkpoint in float32{bad}; logits differ by {self.largest:.1e} at most"


def export(
    run: str | Path,
    out: str | Path,
    *,
    source: Source | None = None,
    network: NetworkOrBuilder | None = None,
    keys: Mapping[str, str] = MappingProxyType({}),
) -> Comparison:
    """Write a trained network to the file `out`, with its model card beside it, if its answers are those of the checkpoint.

    Objects that were passed to train() must be passed again. `keys` of data, such as data.root, replace those of the run.
    Raises UserError, and RunError if the answers differ. After a kill at any time, `out` is complete, or is not there.
    """
    out = Path(out)
    form = format_of(out)
    classifier = load(run, network=network, device="cpu")
    config = with_data(classifier.config, keys, OTHER_DATA)
    spec = replace(classifier.spec, white=config.data.white, max_pixels=config.data.max_pixels)
    classifier = replace(classifier, spec=spec)
    refuse_missing_objects(classifier.checkpoint, config, "export", data=source)
    disk.retries = disk.Retries(limit=config.limits.read)
    source = source or load_source(config.data, download=True)
    refuse_other_classes(classifier.checkpoint, classifier.manifest, source)
    with tempfile.TemporaryDirectory(prefix="distrib-export-") as room:
        made = Path(room, out.name)
        form.write(classifier, facts_of(classifier), made)
        found = compared(form.run(made, classifier), classifier, source.val, skip=config.data.bad_images == "skip")
        text = Path(room, "card.md")
        text.write_text(card(classifier, out.name, str(found)), encoding="utf-8")
        try:
            place(text, out.with_name(f"{out.name}.md"))
            place(made, out)
        except OSError as error:
            raise DiskError(f"{out} cannot be written: {error.strerror}") from None
    return found


def format_of(out: Path) -> Format:
    """The format of a file that is to be written. Raises UserError if it cannot be."""
    form = FORMATS.get(out.suffix)
    if not form:
        raise UserError(f"{out} has no known suffix: give {', '.join(FORMATS)}")
    missing = [package for package in form.needs if not find_spec(package)]
    if missing:
        raise UserError(f"{out.suffix} needs {', '.join(missing)}: pip install {' '.join(missing)}")
    if not out.parent.is_dir():
        raise UserError(f"the folder {out.parent} does not exist")
    if not os.access(out.parent, os.W_OK):
        raise UserError(f"the folder {out.parent} cannot be written to: give another one")
    there = [path for path in (out, out.with_name(f"{out.name}.md")) if path.exists()]
    if there:
        raise UserError(f"{there[0]} exists: give another name, or delete it")
    return form


def compared(artifact: Answers, classifier: Classifier, split: Arrays | Files, *, skip: bool) -> Comparison:
    """Run an artifact and the checkpoint on the same pictures. Raises RunError if their answers differ."""
    found = Comparison()
    exact = replace(classifier, config=replace(classifier.config, precision="no"))
    with torch.no_grad(), tqdm(total=len(split), unit=" images", leave=False, disable=None) as bar:
        for pictures, targets in batches(split, classifier.spec, found, skip=skip):
            pixels = torch.stack([center_of(picture, classifier.spec) for picture in pictures])
            found.add(artifact(pictures), exact.logits(exact.with_channels(pixels)), targets)
            bar.update(found.images + found.left_out - bar.n)
    if found.other or not found.images:
        raise RunError(
            f"{found.other:,} of {found.images:,} answers differ from those of {classifier.checkpoint}, by up to "
            f"{found.largest:.1e}, where {TOLERANCE:g} is allowed: nothing was written"
        )
    return found


def batches(split: Arrays | Files, spec: ImageSpec, found: Comparison, *, skip: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Decoded pictures of one size, (n, height, width, 3) uint8, and their targets, in order. Raises UserError for bad ones."""
    if isinstance(split, Arrays):
        size = max(1, PIXELS // (split.images.shape[2] * split.images.shape[3]))
        for first in range(0, len(split), size):
            images = split.images[first : first + size].permute(0, 2, 3, 1)
            yield images.expand(-1, -1, -1, 3).contiguous(), split.targets[first : first + size]
        return
    pictures, numbers = list[Tensor](), list[int]()
    for number in range(len(split)):
        path = split.name_of(number)
        try:
            picture = read_image(path, partial(picture_of, path, spec))
        except UserError:
            if not skip:
                raise
            found.left_out += 1
            continue
        full = len(pictures) * picture.shape[0] * picture.shape[1] >= PIXELS
        if pictures and (full or picture.shape != pictures[0].shape):
            yield torch.stack(pictures), split.targets[numbers]
            pictures, numbers = [], []
        pictures.append(picture)
        numbers.append(number)
    if pictures:
        yield torch.stack(pictures), split.targets[numbers]


def place(made: Path, target: Path) -> None:
    """Copy a file to its place. After a kill at any time, it is there as it was, or complete, and nothing else is there.

    The copy has no name until it is complete, where the file system can do that. Raises OSError.
    """
    with suppress(FileNotFoundError):
        target.unlink()
    try:
        handle = os.open(target.parent, os.O_TMPFILE | os.O_WRONLY, 0o666)
    except (AttributeError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT):
            raise
        partial = target.with_name(f".{target.name}.partial")
        shutil.copyfile(made, partial)
        disk.to_disk(partial)
        partial.replace(target)
        return
    with open(handle, "wb") as copy, made.open("rb") as content:
        shutil.copyfileobj(content, copy)
        copy.flush()
        os.fsync(handle)
        os.link(f"/proc/self/fd/{handle}", target, src_dir_fd=handle)  # which has it follow the link
    disk.to_disk(target.parent)


def lines(run: str, out: str, keys: Mapping[str, str]) -> Iterator[str]:
    """The output of the command. Raises UserError and RunError."""
    yield f"{out}: {export(run, out, keys=keys)}"
    yield f"{out}.md: its model card"
