"""The image files of a data set, and the class of each: folders as people have them, and tables.

Names are compared in Unicode's composed form (NFC): macOS writes another one than Linux.
"""

import csv
import hashlib
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from unicodedata import normalize

from distrib.config import DataConfig
from distrib.data.pixels import SUFFIXES, is_image
from distrib.errors import UserError, one_line

VAL = ("val", "valid", "validation", "test")  # names of the validation images; the first one that exists is used
TRAIN = ("train", "training")  # names of the training images in a table
SYSTEM = {"@eadir", "__macosx", "thumbs.db", "desktop.ini", "$recycle.bin", "lost+found", "#recycle"}
# Names of a table's columns.
PATHS = {"path", "file", "filename", "file_name", "filepath", "file_path", "image", "image_path", "img", "name"}
LABELS = {"label", "class", "target", "category", "classname", "class_name", "y"}
SPLITS = {"split", "subset", "set", "partition", "fold"}


@dataclass
class Listing:
    """Paths and classes of the training and validation images, and lines for the user."""

    root: Path
    bases: tuple[Path, Path]  # the folders of the training and the validation images
    train: list[tuple[str, str]] = field(default_factory=list)
    val: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def classes(self) -> list[str]:
        """The classes, in order: by number if all are numbers, else by name.

        Raises UserError if there are fewer than two, or if one has no training images.
        """
        known, seen = {name for _, name in self.train}, {name for _, name in self.val}
        if seen - known:
            only = words(sorted(seen - known))
            raise UserError(f"data.root={self.root}: the class {only} has validation images, but no training images")
        if len(known) < 2:
            table = self.root.is_file()
            nothing = "no images to train on" if table else "no images in class folders"
            found = f"one class only, {words(sorted(known))}" if known else nothing
            way_out = "it needs a folder for each class; is it a folder too deep?"
            way_out = "; ".join(["a table needs two classes", *self.notes]) if table else way_out
            raise UserError(f"data.root={self.root} has {found}: {way_out}")
        if {name.lower() for name in known} <= {*TRAIN, *VAL, "testing"}:
            raise UserError(f"data.root={self.root}: the classes would be {words(sorted(known))}: call them train and val")
        if not self.val:
            raise UserError(
                f"data.root={self.root}: data.holdout holds out none of {len(self.train):,} images: give a larger one"
            )
        if known - seen:
            self.notes.append(f"no validation images of the class {words(sorted(known - seen))}")
        return sorted(known, key=lambda name: (0, int(name), name) if all(map(str.isdecimal, known)) else (1, 0, name))


def list_folder(root: Path, holdout: float) -> Listing:
    """The images in a folder: train/CLASS/ and val/CLASS/, or CLASS/, of which a fraction `holdout` is held out.

    Raises UserError, and OSError if a folder cannot be read.
    """
    if not root.is_dir():
        raise UserError(f"data.root={root} is not a folder")
    folders = [Path(each.path) for each in os.scandir(root) if each.is_dir() and not kind_of_junk(each.name)]
    splits = {normalize("NFC", folder.name).lower(): folder for folder in folders}
    beside = [folder.name for name, folder in splits.items() if name not in ("train", *VAL)]
    if "train" in splits and beside and not any(each.is_dir() for each in splits["train"].iterdir()):
        splits = {}  # it is the class of trains
    vals = [name for name in VAL if name in splits]
    if "train" not in splits and vals:
        name = splits[vals[0]].name
        raise UserError(
            f"data.root={root} has {name}/, but no train/: to evaluate all images in it, data.root={root / name} data.holdout=1"
        )
    train = splits.get("train", root)
    listing, left_out = Listing(root, (train, splits[vals[0]] if vals else train)), Counter[str]()
    listing.train = list_classes(train, listing, left_out)
    if vals:
        listing.val = list_classes(splits[vals[0]], listing, left_out)
        if vals[1:]:
            listing.notes.append(f"validation uses {vals[0]}/; {words(vals[1:])}/ is not used")
    hold_out(listing, holdout)
    if "train" in splits and beside:
        listing.notes.append(f"folders beside train/ are not used: {words(sorted(beside))}")
    if left_out:
        listing.notes.append(f"left out: {counted(left_out)}")
    return listing


def list_classes(split: Path, listing: Listing, left_out: Counter[str]) -> list[tuple[str, str]]:
    """The images in the class folders of a split, in order: each one's path and class."""
    found, empty = list[tuple[str, str]](), list[str]()
    for each in sorted(os.scandir(split), key=lambda each: normalize("NFC", each.name)):
        if kind := kind_of_junk(each.name):
            left_out[kind] += 1
        elif not each.is_dir():
            left_out["files outside of class folders"] += 1
        else:
            name = normalize("NFC", each.name)
            images = [(path, name) for path in images_in(each.path, left_out)]
            found += images
            empty += [] if images else [name]
    if empty:
        listing.notes.append(f"{split.name}/: no images in {words(empty)}, left out")
    return found


def images_in(folder: str, left_out: Counter[str]) -> list[str]:
    """The image files in a folder and its subfolders, in order; counts the others by kind."""
    found = list[tuple[str, str]]()
    visited = {(where.st_dev, where.st_ino) for where in map(os.stat, Path(folder).absolute().parents)}
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=fail):
        where = os.stat(parent)
        if (where.st_dev, where.st_ino) in visited:  # a link to a folder above
            folders.clear()
            continue
        visited.add((where.st_dev, where.st_ino))
        for name in [name for name in folders if kind_of_junk(name)]:
            left_out[kind_of_junk(name)] += sum(len(files) for _, _, files in os.walk(os.path.join(parent, name)))
            folders.remove(name)
        for name in names:
            path, suffix = os.path.join(parent, name), os.path.splitext(name)[1].lower()
            kind = kind_of_junk(name)
            if not kind and suffix not in SUFFIXES and not os.path.isfile(path):
                kind = "links to nothing, pipes and the like"
            elif not kind and suffix not in SUFFIXES and not is_image(path):
                kind = f"{suffix} files" if suffix else "files that are no images"
            if kind:
                left_out[kind] += 1
            else:
                found.append((parent, name))
    return [os.path.join(*each) for each in sorted(found)]


def counted(left_out: Counter[str]) -> str:
    return ", ".join(f"{count:,} {kind}" for kind, count in sorted(left_out.items()) if count)


def fail(error: OSError) -> None:
    raise error


def kind_of_junk(name: str) -> str:
    """Why a name is never that of an image or a class; empty if it may be."""
    return "hidden files" if name.startswith(".") else "files of the system" if name.lower() in SYSTEM else ""


def hold_out(listing: Listing, holdout: float) -> None:
    """If there are no validation images, move a fraction `holdout` of the training images there.

    Whether an image is held out depends on its path only, so another image moves none. A class keeps one to train on, unless
    `holdout` is 1: then every image is for validation, and none is moved.
    """
    if listing.val:
        if holdout != DataConfig.holdout:
            listing.notes.append(f"data.holdout={holdout:g} is not used, since there are validation images")
        return
    if holdout == 1:
        listing.val = [*listing.train]
        listing.notes.append(f"data.holdout=1: all {len(listing.val):,} images are for validation")
        return
    places = {path: place(path, listing.bases[0]) for path, _ in listing.train}
    last = {name: path for path, name in sorted(listing.train, key=lambda each: places[each[0]])}  # of each class
    held = [places[path] < holdout and last[name] != path for path, name in listing.train]
    listing.val = [each for each, out in zip(listing.train, held, strict=True) if out]
    listing.train = [each for each, out in zip(listing.train, held, strict=True) if not out]
    listing.notes.append(f"no validation images are given: {len(listing.val):,} of {len(held):,} images are held out for it")


def place(path: str, base: Path) -> float:
    """A number in [0, 1) that depends only on the path in `base`."""
    relative = normalize("NFC", PurePosixPath(os.path.relpath(path, base)).as_posix())
    return int.from_bytes(hashlib.sha256(relative.encode(errors="surrogateescape")).digest()[:7]) / 2**56


def list_table(file: Path, holdout: float) -> Listing:
    """The images in a table (CSV): path, label and maybe split. Paths are relative to the table. Raises UserError."""
    listing = Listing(file, (file.parent, file.parent))
    try:
        with file.open(newline="", encoding="utf-8-sig") as text:
            sample = text.read(1 << 16)
            text.seek(0)
            reader = csv.reader(text, delimiter=delimiter_of(sample))
            lines = [(reader.line_num, row) for row in reader if any(row)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError | IsADirectoryError | PermissionError):
            raise
        raise UserError(f"data.root={file} cannot be read as a table: {one_line(error)}") from None
    path, label, split = columns_of(lines, file)
    if split is not None and not any(len(row) > split and row[split].strip().lower() in TRAIN for _, row in lines):
        listing.notes.append(f"column {split + 1} is not used, since it says train nowhere")
        split = None
    of_split: dict[str, list[tuple[str, str]]] = {}
    for number, row in lines:
        if len(row) <= max(path, label, split or 0):
            raise UserError(f"data.root={file}: line {number} has {len(row)} columns: {row}")
        if not row[path].strip() or not row[label].strip():
            raise UserError(f"data.root={file}: line {number} lacks a path or a label: {row}")
        image = os.path.join(file.parent, os.path.expanduser(row[path].strip()))
        name = row[split].strip().lower() if split is not None else ""
        of_split.setdefault("train" if name in ("", *TRAIN) else name, []).append((image, normalize("NFC", row[label].strip())))
    listing.train = of_split.pop("train", [])
    vals = [name for name in VAL if name in of_split]
    if vals:
        listing.val = of_split.pop(vals[0])
    if of_split:
        counts = ", ".join(f"{len(images):,} of {name!r}" for name, images in of_split.items())
        listing.notes.append(f"images of other splits are not used: {counts}")
    hold_out(listing, holdout)
    return listing


def delimiter_of(sample: str) -> str:
    line = sample.partition("\n")[0]
    return max(",;\t", key=line.count)


def columns_of(lines: list[tuple[int, list[str]]], file: Path) -> tuple[int, int, int | None]:
    """The columns of path, label and split. Removes the line of titles, if there is one. Raises UserError."""
    if not lines or len(lines[0][1]) < 2:
        raise UserError(f"data.root={file} has no rows of path,label")
    titles = [cell.strip().lower() for cell in lines[0][1]]
    found = [next((i for i, title in enumerate(titles) if title in names), None) for names in (PATHS, LABELS, SPLITS)]
    if found[0] is None and found[1] is None:
        return 0, 1, 2 if len(titles) > 2 else None
    if found[0] is None or found[1] is None:
        raise UserError(f"data.root={file} has the columns {words(titles)}: name those of the files path and label")
    del lines[0]
    return found[0], found[1], found[2]


def words(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")
