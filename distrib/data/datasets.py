"""The data sets by name: how each is found, downloaded and loaded."""

import gzip
import os
import socket
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torchvision import datasets

from distrib.config import DataConfig
from distrib.data import SOURCES
from distrib.data.listing import Listing, list_folder, list_table
from distrib.data.pixels import ImageSpec
from distrib.data.source import Arrays, Files, Source
from distrib.errors import DiskError, UserError
from distrib.registry import lookup, refuse_unknown
from distrib.runtime.disk import read_from

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
DOWNLOAD_TIMEOUT = 30.0  # seconds without an answer


def load_source(config: DataConfig, *, download: bool) -> Source:
    """Load the data set `config.name`. Raises UserError if it is unknown, missing and cannot be downloaded, or damaged."""
    refuse_unknown(SOURCES, config.name, "data.name", "data set")
    source: Source = lookup(SOURCES, config.name)(config, download)
    return replace(source, name=config.name)


def digits(config: DataConfig, download: bool) -> Source:
    """scikit-learn's 1,797 digits of 8x8 pixels; every fifth is for validation, since they are sorted by writer."""
    package: Any = find_spec("sklearn")  # importing it takes a second, and only one of its files is needed
    file = Path(package.origin).parent / "datasets/data/digits.csv.gz"
    rows = torch.from_numpy(np.loadtxt(file, np.uint8, delimiter=","))
    images = (rows[:, :64] * (255 / 16)).round().byte().view(-1, 1, 8, 8)
    labels = rows[:, 64].long()
    is_val = torch.arange(len(images)) % 5 == 0
    train, val = Arrays(images[~is_val], labels[~is_val]), Arrays(images[is_val], labels[is_val])
    return Source(train, val, tuple("0123456789"), (1, 8, 8), mean=(0.3053,), std=(0.3760,))


def of_torchvision(kind: Any, mean: tuple[float, ...], std: tuple[float, ...], config: DataConfig, download: bool) -> Source:
    """A small data set that torchvision finds, verifies and downloads."""
    train, val = (find_or_download(kind, config, train, download) for train in (True, False))
    arrays = [Arrays(channels_first(each.data), torch.as_tensor(each.targets).long()) for each in (train, val)]
    shape = arrays[0].images.shape
    return Source(arrays[0], arrays[1], tuple(train.classes), (shape[1], shape[2], shape[3]), mean, std)


def find_or_download(kind: Any, config: DataConfig, train: bool, download: bool) -> Any:
    waited = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        return read_from(config.root, lambda: kind(config.root, train=train, download=download))
    except DiskError:
        raise
    except (RuntimeError, OSError, EOFError, ValueError, AssertionError) as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{config.name} is missing or incomplete in {Path(config.root).absolute()}, and could not be downloaded: {why}. "
            f"Give data.root=FOLDER with the files of torchvision's {kind.__name__}"
            + (f", or apt-get install dataset-fashion-mnist ({DEBIAN_FASHION_MNIST})" if kind is datasets.FashionMNIST else "")
        ) from None
    finally:
        socket.setdefaulttimeout(waited)


def channels_first(data: Tensor | np.ndarray[Any, Any]) -> Tensor:
    images = torch.as_tensor(data)
    return images.unsqueeze(1) if images.dim() == 3 else images.permute(0, 3, 1, 2).contiguous()


def fashion_mnist(config: DataConfig, download: bool) -> Source:
    """Zalando's 70,000 articles of clothing, from Debian's package dataset-fashion-mnist if it is installed."""
    mean, std = (0.2860,), (0.3530,)
    if not DEBIAN_FASHION_MNIST.is_dir() or Path(config.root, "FashionMNIST").is_dir():
        return of_torchvision(datasets.FashionMNIST, mean, std, config, download)
    train, val = read_debian("train"), read_debian("t10k")
    return Source(train, val, tuple(datasets.FashionMNIST.classes), (1, 28, 28), mean, std)


def read_debian(prefix: Literal["train", "t10k"]) -> Arrays:
    """Read gzipped IDX files, whose headers are 16 bytes for images and 8 for labels."""
    try:
        images = gzip.decompress((DEBIAN_FASHION_MNIST / f"{prefix}-images-idx3-ubyte.gz").read_bytes())[16:]
        labels = gzip.decompress((DEBIAN_FASHION_MNIST / f"{prefix}-labels-idx1-ubyte.gz").read_bytes())[8:]
    except (OSError, EOFError) as error:
        raise UserError(
            f"{DEBIAN_FASHION_MNIST} is damaged ({error}): apt-get install --reinstall dataset-fashion-mnist"
        ) from None
    pixels = torch.frombuffer(bytearray(images), dtype=torch.uint8).view(-1, 1, 28, 28)
    return Arrays(pixels, torch.frombuffer(bytearray(labels), dtype=torch.uint8).long())


def folder(config: DataConfig, download: bool) -> Source:
    """Image files in train/CLASS/ and val/CLASS/, or in CLASS/, normalised with the mean and std of ImageNet."""
    return of_files(list_folder, config)


def table(config: DataConfig, download: bool) -> Source:
    """Image files that a table (CSV) lists: path, label and maybe split."""
    return of_files(list_table, config)


def of_files(list_images: Callable[..., Listing], config: DataConfig) -> Source:
    root = Path(config.root)
    try:
        listing = read_from(root, lambda: list_images(root, config.holdout))
    except OSError as error:
        raise UserError(f"data.root={root} cannot be read: {error.strerror} ({error.filename})") from None
    classes = listing.classes()
    numbers = {name: number for number, name in enumerate(classes)}
    spec = ImageSpec.of(config)

    def files(images: list[tuple[str, str]], base: str) -> Files:
        return Files(paths_of([path for path, _ in images]), torch.tensor([numbers[name] for _, name in images]), spec, base)

    train, val = files(listing.train, str(listing.bases[0])), files(listing.val, str(listing.bases[1]))
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return Source(train, val, tuple(classes), (3, spec.height, spec.width), mean, std, notes=tuple(listing.notes))


def paths_of(paths: list[str]) -> np.ndarray[Any, Any]:
    """Paths as an array: millions of Python strings would be copied into each worker that touches them."""
    return np.array([os.fsencode(path) for path in paths])


mnist = partial(of_torchvision, datasets.MNIST, (0.1307,), (0.3081,))
cifar10 = partial(of_torchvision, datasets.CIFAR10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
cifar100 = partial(of_torchvision, datasets.CIFAR100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))
