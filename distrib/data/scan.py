"""`distrib scan`: decodes all images of a data set and tells what is wrong with them."""

import hashlib
import os
import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median

from PIL import Image
from tqdm import tqdm

from distrib.command_line import load_config
from distrib.config import Config, refuse_all_held_out
from distrib.data.datasets import load_source
from distrib.data.pixels import ImageSpec, pixels_of
from distrib.data.source import Files, Source
from distrib.errors import UserError, one_line
from distrib.runtime.environment import cores_of_a_rank

USAGE = """\
usage: distrib scan DATA [data.KEY=value ...]

Decodes all images of DATA, a folder or a table (CSV) of images. Lists those that cannot be used, and validation images that
are also training images. Shows the classes, kinds and sizes of the images. Exits with 1 if something is wrong."""

MOST = 20  # lines of each list


@dataclass(frozen=True)
class Look:
    """What an image file is; `why` it cannot be used, if so."""

    size: tuple[int, int] = (0, 0)
    kind: str = ""
    why: str = ""


def look_at(path: str, spec: ImageSpec) -> Look:
    """Decode an image as training does."""
    size, kind = (0, 0), ""
    try:
        with Image.open(path) as image:
            size, kind = image.size, f"{image.format} {image.mode}"
        pixels_of(path, spec, lambda width, height: (0, 0, width, height))
        return Look(size, kind)
    except Exception as error:  # decoders raise errors of many kinds
        return Look(size, kind, getattr(error, "strerror", None) or one_line(error).replace(f" {path!r}", ""))


def scan(args: Sequence[str]) -> tuple[list[str], bool]:
    """The lines of a report on a data set, and whether nothing is wrong. Raises UserError."""
    config = config_of(args)
    source = load_source(config.data, download=False)
    splits = {name: files for name, files in (("train", source.train), ("val", source.val)) if isinstance(files, Files)}
    looks: dict[str, list[Look]] = {}
    with (
        ProcessPoolExecutor(cores_of_a_rank(1), get_context("fork"), signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool,
        tqdm(total=len(source.train) + len(source.val), unit=" images", leave=False, disable=None) as bar,
    ):
        for split, files in splits.items():
            paths = [files.name_of(number) for number in range(len(files))]
            looks[split] = []
            for look in pool.map(look_at, paths, [files.spec] * len(paths), chunksize=16):
                looks[split].append(look)
                bar.update()
    wrong = [*bad_images(splits, looks), *in_both(splits, looks)]
    return [*summary(source, looks), *source.notes, *(wrong or ["nothing is wrong"])], not wrong


def config_of(args: Sequence[str]) -> Config:
    """The config of the command line. Raises UserError."""
    if not args or "=" in args[0]:
        raise UserError("give the folder or the table of images: distrib scan DATA")
    odd = [arg for arg in args[1:] if not arg.startswith("data.")]
    if odd:
        raise UserError(f"unexpected argument {odd[0]!r}: give keys of data only, such as data.size=224")
    data = Path(args[0]).expanduser()
    if not data.exists():
        raise UserError(f"there is no folder or table {data}")
    config = load_config([f"data.name={'folder' if data.is_dir() else 'csv'}", f"data.root={data}", *args[1:]])
    refuse_all_held_out(config.data)
    return config


def summary(source: Source, looks: dict[str, list[Look]]) -> Iterator[str]:
    """Classes, kinds and sizes."""
    counts = {split: Counter(targets.targets.tolist()) for split, targets in (("train", source.train), ("val", source.val))}
    yield f"{len(source.train):,} images to train on and {len(source.val):,} to validate, {len(source.classes)} classes:"
    order = sorted(range(len(source.classes)), key=lambda number: -counts["train"][number])
    width = max(map(len, source.classes))
    for number in shorten(order):
        yield f"  {source.classes[number]:<{width}}  {counts['train'][number]:>8,} train  {counts['val'][number]:>8,} val"
    if len(order) > MOST:
        yield f"  ... {len(order) - MOST:,} more classes between these"
    usable = [look for each in looks.values() for look in each if not look.why]
    kinds = Counter(look.kind for look in usable)
    yield "kinds: " + ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common(8))
    if usable:
        areas = sorted((look.size for look in usable), key=lambda size: size[0] * size[1])
        middle = f"{median(width for width, _ in areas):g} x {median(height for _, height in areas):g}"
        smallest, largest = (f"{width} x {height}" for width, height in (areas[0], areas[-1]))
        yield f"sizes: smallest {smallest}, median {middle}, largest {largest} pixels"


def shorten(order: list[int]) -> list[int]:
    """The first and the last numbers of a long list."""
    return order if len(order) <= MOST else [*order[: MOST // 2], *order[-MOST // 2 :]]


def bad_images(splits: dict[str, Files], looks: dict[str, list[Look]]) -> Iterator[str]:
    for split, files in splits.items():
        bad = [(number, look) for number, look in enumerate(looks[split]) if look.why]
        if bad:
            yield f"{len(bad):,} of {len(files):,} images in {split} cannot be used (data.bad_images=skip trains without them):"
            yield from (f"  {files.name_of(number)}: {look.why}" for number, look in bad)


def in_both(splits: dict[str, Files], looks: dict[str, list[Look]]) -> Iterator[str]:
    """Usable files of the validation set that have the bytes of a file of the training set."""
    train, val = (
        [splits[name].name_of(number) for number, look in enumerate(looks[name]) if not look.why] for name in ("train", "val")
    )
    by_size: dict[int, list[str]] = {}
    for path in train:
        by_size.setdefault(os.path.getsize(path), []).append(path)
    found, hashes = list[str](), dict[int, dict[str, str]]()  # of the training files of a size
    for path in val:
        size = os.path.getsize(path)
        if size in by_size and size not in hashes:
            hashes[size] = {sha256(each): each for each in by_size[size]}
        twin = hashes[size].get(sha256(path)) if size in by_size else None
        found += [f"  {path} = {twin}"] if twin else []
    if found:
        yield f"{len(found):,} validation images are also training images, so their accuracy means nothing:"
        yield from found


def sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
