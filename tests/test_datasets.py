"""Data sets, read from small files in the true formats."""

import gzip
import hashlib
import http.server
import pickle
import threading
import urllib.request
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import requires
from PIL import Image
from sklearn.datasets import load_digits
from torchvision import datasets

from distrib.config import DataConfig
from distrib.data import datasets as named
from distrib.data.datasets import DEBIAN_FASHION_MNIST, load_source
from distrib.data.pixels import ImageSpec
from distrib.data.source import Arrays, Files
from distrib.errors import UserError

RANDOM = np.random.default_rng(0)


def idx(array: np.ndarray[Any, Any]) -> bytes:
    """The format of Yann LeCun's MNIST files: magic, sizes, bytes."""
    return bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape) + array.tobytes()


def write_mnist(folder: Path, *, zipped: bool) -> dict[str, np.ndarray[Any, Any]]:
    folder.mkdir(parents=True)
    arrays = {}
    for part, images in (("train", 30), ("t10k", 12)):
        arrays[f"{part}-images-idx3-ubyte"] = RANDOM.integers(0, 256, (images, 28, 28), dtype=np.uint8)
        arrays[f"{part}-labels-idx1-ubyte"] = RANDOM.integers(0, 10, images, dtype=np.uint8)
    for name, array in arrays.items():
        packed = gzip.compress(idx(array)) if zipped else idx(array)
        (folder / (f"{name}.gz" if zipped else name)).write_bytes(packed)
    return arrays


def write_cifar(root: Path, kind: Any, labels: str, names: str, classes: int, monkeypatch: pytest.MonkeyPatch) -> Arrays:
    """The pickled batches of the University of Toronto, with md5 sums to match; returns the training images."""
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    written: list[dict[str, Any]] = []

    def write(name: str, content: dict[str, Any]) -> list[str]:
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    def batch(name: str) -> list[str]:
        data = RANDOM.integers(0, 256, (20, 3072), dtype=np.uint8)
        written.append({"data": data, labels: RANDOM.integers(0, classes, 20).tolist()})
        return write(name, written[-1])

    monkeypatch.setattr(kind, "train_list", [batch(name) for name, _ in kind.train_list])
    trained = len(written)
    monkeypatch.setattr(kind, "test_list", [batch(name) for name, _ in kind.test_list])
    name, md5 = write(kind.meta["filename"], {names: [f"class {i}" for i in range(classes)]})
    monkeypatch.setattr(kind, "meta", kind.meta | {"filename": name, "md5": md5})
    images = np.concatenate([each["data"] for each in written[:trained]]).reshape(-1, 3, 32, 32)
    return Arrays(torch.from_numpy(images), torch.tensor([label for each in written[:trained] for label in each[labels]]))


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that refuses at once."""
    monkeypatch.setattr(urllib.request, "_opener", None)  # which would remember an earlier test's proxies
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")


def test_digits_need_no_download_and_are_split_once() -> None:
    source = load_source(DataConfig(), download=False)
    assert (len(source.train), len(source.val), source.shape) == (1437, 360, (1, 8, 8))
    pixels, labels = load_digits(return_X_y=True)  # scikit-learn's own reading, in 17 grey levels
    every_fifth = np.arange(len(labels)) % 5 == 0
    assert np.array_equal((source.val.images.flatten(1) * (16 / 255)).round(), pixels[every_fifth])
    assert np.array_equal(source.train.targets, labels[~every_fifth])
    pixels = source.train.images.double() / 255
    assert source.mean == pytest.approx((pixels.mean().item(),), abs=5e-4)
    assert source.std == pytest.approx((pixels.std().item(),), abs=5e-4)
    assert source.train.images.dtype == torch.uint8
    assert source.train.images.max() == 255
    assert len(source.train.targets.unique()) == len(source.val.targets.unique()) == len(source.classes) == 10


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_mnist_files_are_read(tmp_path: Path, name: str) -> None:
    folder = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST"}[name]
    written = write_mnist(tmp_path / folder / "raw", zipped=False)
    source = load_source(DataConfig(name=name, root=str(tmp_path)), download=True)
    assert torch.equal(source.train.images[:, 0], torch.from_numpy(written["train-images-idx3-ubyte"]))
    assert source.val.targets.tolist() == written["t10k-labels-idx1-ubyte"].tolist()
    assert (source.shape, len(source.classes)) == ((1, 28, 28), 10)


def test_debians_fashion_mnist_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = write_mnist(tmp_path / "debian", zipped=True)
    monkeypatch.setattr(named, "DEBIAN_FASHION_MNIST", tmp_path / "debian")
    source = load_source(DataConfig(name="fashion_mnist", root=str(tmp_path)), download=False)
    assert torch.equal(source.val.images[:, 0], torch.from_numpy(written["t10k-images-idx3-ubyte"]))
    assert source.train.targets.tolist() == written["train-labels-idx1-ubyte"].tolist()
    (tmp_path / "debian" / "train-labels-idx1-ubyte.gz").write_bytes(b"torn")
    with pytest.raises(UserError, match=r"is damaged .* apt-get install --reinstall dataset-fashion-mnist"):
        load_source(DataConfig(name="fashion_mnist", root=str(tmp_path)), download=False)


def test_the_real_fashion_mnist_is_whole_and_has_the_statistics_that_are_used(tmp_path: Path) -> None:
    requires(DEBIAN_FASHION_MNIST.is_dir(), "apt-get install dataset-fashion-mnist")
    source = load_source(DataConfig(name="fashion_mnist", root=str(tmp_path)), download=False)
    assert (len(source.train), len(source.val)) == (60_000, 10_000)
    assert source.train.targets.bincount().tolist() == [6000] * 10
    pixels = source.train.images.double() / 255
    assert source.mean == pytest.approx((pixels.mean().item(),), abs=1e-4)
    assert source.std == pytest.approx((pixels.std().item(),), abs=1e-4)


@pytest.mark.parametrize(
    ("name", "kind", "labels", "names", "classes"),
    [
        ("cifar10", datasets.CIFAR10, "labels", "label_names", 10),
        ("cifar100", datasets.CIFAR100, "fine_labels", "fine_label_names", 100),
    ],
)
def test_cifar_batches_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: Any, labels: str, names: str, classes: int
) -> None:
    written = write_cifar(tmp_path, kind, labels, names, classes, monkeypatch)
    source = load_source(DataConfig(name=name, root=str(tmp_path)), download=False)
    assert torch.equal(source.train.images, written.images)
    assert torch.equal(source.train.targets, written.targets)
    assert (len(source.val), source.shape, len(source.classes)) == (20, (3, 32, 32), classes)


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10", "cifar100"])
@pytest.mark.usefixtures("offline")
def test_without_a_network_an_absent_set_is_told_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(named, "DEBIAN_FASHION_MNIST", tmp_path / "absent")
    with pytest.raises(UserError) as told:
        load_source(DataConfig(name=name, root=str(tmp_path)), download=True)
    assert f"{name} is missing or incomplete in {tmp_path}" in str(told.value)
    assert "could not be downloaded" in str(told.value)
    assert "data.root=FOLDER" in str(told.value)
    assert ("apt-get install dataset-fashion-mnist" in str(told.value)) == (name == "fashion_mnist")
    assert "\n" not in str(told.value)


@pytest.mark.usefixtures("offline")
def test_a_set_that_a_full_disk_left_empty_is_told(tmp_path: Path) -> None:
    write_mnist(tmp_path / "MNIST" / "raw", zipped=False)
    next((tmp_path / "MNIST" / "raw").glob("train-images*")).write_bytes(b"")
    with pytest.raises(UserError, match=r"mnist is missing or incomplete in .* could not be downloaded: "):
        load_source(DataConfig(name="mnist", root=str(tmp_path)), download=True)


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        self.server.asked.append(self.path)


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A web server that has MNIST, and a torchvision that looks there; gives the paths that were asked for."""
    write_mnist(tmp_path / "mirror", zipped=True)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path / "mirror")) as server:
        server.asked = []
        monkeypatch.setattr(urllib.request, "_opener", None)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        files = sorted((tmp_path / "mirror").iterdir())
        monkeypatch.setattr(datasets.MNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
        monkeypatch.setattr(datasets.MNIST, "resources", [(f.name, hashlib.md5(f.read_bytes()).hexdigest()) for f in files])
        yield server.asked
        server.shutdown()


def test_an_absent_set_is_downloaded_once(tmp_path: Path, mirror: list[str]) -> None:
    config = DataConfig(name="mnist", root=str(tmp_path / "data"))
    with pytest.raises(UserError, match="mnist is missing or incomplete in"):
        load_source(config, download=False)
    assert mirror == []
    first = load_source(config, download=True)
    asked = len(mirror)
    assert len(set(mirror)) == 4
    again = load_source(config, download=True)
    assert len(mirror) == asked
    assert torch.equal(first.train.images, again.train.images)


def test_an_unknown_set_is_told_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"no data set 'cifar': use one of digits, mnist, .*, folder"):
        load_source(DataConfig(name="cifar"), download=False)


def test_a_folder_gives_its_classes_and_what_is_missing_is_told(tmp_path: Path) -> None:
    config = DataConfig(name="folder", root=str(tmp_path), size=16)
    with pytest.raises(UserError, match=r"has no images in class folders"):
        load_source(config, download=True)
    for part, name in (("train", "cat"), ("train", "dog"), ("val", "cat"), ("val", "fox")):
        (tmp_path / part / name).mkdir(parents=True)
        Image.new("RGB", (20, 30)).save(tmp_path / part / name / "a.jpg")
    with pytest.raises(UserError, match=r"the class fox has validation images, but no training images"):
        load_source(config, download=True)
    (tmp_path / "val" / "fox").rename(tmp_path / "val" / "dog")
    source = load_source(config, download=True)
    assert (source.classes, source.shape, len(source.train), len(source.val)) == (("cat", "dog"), (3, 16, 16), 2, 2)
    assert isinstance(source.train, Files)
    assert (source.name, source.train.root, source.train.spec) == ("folder", str(tmp_path / "train"), ImageSpec(16, 16))
