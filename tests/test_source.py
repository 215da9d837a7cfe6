"""What a data set is, and what tells it from another."""

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from distrib.config import DataConfig
from distrib.data.datasets import load_source
from distrib.data.pixels import ImageSpec
from distrib.data.source import Arrays, Files, Source, data_differences
from distrib.errors import UserError

CLASSES = ("cat", "dog", "fox")


def split(images: int, seed: int = 0, size: tuple[int, ...] = (2, 5, 4)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randint(256, (images, *size), dtype=torch.uint8, generator=generator),
        torch.randint(3, (images,), generator=generator),
    )


def own(train: tuple[Any, Any] | None = None, val: tuple[Any, Any] | None = None, classes: tuple[str, ...] = CLASSES) -> Source:
    return Source.from_arrays(train or split(30), val or split(12, seed=1), classes)


def test_arrays_become_a_data_set_with_the_mean_and_std_of_its_channels() -> None:
    train, val = split(30), split(12, seed=1)
    source = Source.from_arrays(train, val, [*CLASSES], "animals")
    assert (source.name, source.classes, source.shape, len(source.train), len(source.val)) == (
        "animals",
        CLASSES,
        (2, 5, 4),
        30,
        12,
    )
    pixels = train[0].double() / 255
    assert source.mean == pytest.approx(pixels.mean((0, 2, 3)).tolist())
    assert source.std == pytest.approx(pixels.std((0, 2, 3), correction=0).tolist())
    assert isinstance(source.train, Arrays)
    assert torch.equal(source.train.images, train[0])
    assert torch.equal(source.train.targets, train[1])


def test_arrays_of_numpy_and_ids_of_any_integers_are_taken() -> None:
    train, val = split(30), split(12, seed=1)
    of_numpy = own((train[0].numpy(), train[1].numpy().astype(np.uint8)), (val[0].numpy(), val[1].int().numpy()))
    assert of_numpy.fingerprint() == own(train, val).fingerprint()
    assert isinstance(of_numpy.train, Arrays)
    assert of_numpy.train.targets.dtype == torch.int64


def test_targets_may_be_floats_of_each_class() -> None:
    images, ids = split(30)
    soft = torch.nn.functional.one_hot(ids, 3).double() * 0.8 + 0.2 / 3
    source = own((images, soft))
    assert isinstance(source.train, Arrays)
    assert (source.train.targets.dtype, source.train.targets.shape) == (torch.float32, (30, 3))
    torch.testing.assert_close(source.train.targets, soft.float())


def test_a_channel_that_is_always_the_same_has_a_std_to_divide_by() -> None:
    images, ids = split(30)
    images[:, 1] = 51
    source = own((images, ids))
    assert source.mean[1] == pytest.approx(0.2)
    assert source.std[1] == 1e-3


IMAGES, IDS = split(30)


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ((IMAGES.float(), IDS), r"train: images are torch.float32 \[30, 2, 5, 4\], not uint8 \(n, channels, height, width\)"),
        ((IMAGES[:, 0], IDS), r"train: images are torch.uint8 \[30, 5, 4\], not uint8 \(n, channels, height, width\)"),
        ((IMAGES, IDS[:29]), r"train: targets are torch.int64 \[29\], not ids \(30,\) or floats \(30, 3\)"),
        ((IMAGES, IDS.float()), r"train: targets are torch.float32 \[30\], not ids \(30,\) or floats \(30, 3\)"),
        ((IMAGES, torch.zeros(30, 4)), r"train: targets are torch.float32 \[30, 4\], not ids \(30,\) or floats \(30, 3\)"),
        ((IMAGES, torch.zeros(29, 3)), r"train: targets are torch.float32 \[29, 3\], not ids \(30,\) or floats \(30, 3\)"),
        ((IMAGES, IDS + 1), r"train: targets are 1 to 3, but there are 3 classes"),
        ((IMAGES, IDS - 1), r"train: targets are -1 to 1, but there are 3 classes"),
        (split(30, size=(2, 5, 5)), r"training images are \[2, 5, 5\], but validation images \[2, 5, 4\]"),
        (split(30, size=(1, 5, 4)), r"training images are \[1, 5, 4\], but validation images \[2, 5, 4\]"),
    ],
)
def test_what_does_not_belong_together_is_refused(train: tuple[Tensor, Tensor], words: str) -> None:
    with pytest.raises(UserError, match=f"^{words}$"):
        own(train)


def test_it_is_said_which_split_is_wrong() -> None:
    with pytest.raises(UserError, match=r"^val: targets are torch.int64 \[29\], not ids"):
        own(val=(IMAGES, IDS[:29]))


def changed(source: Source, other: Source) -> str:
    there, now = source.fingerprint(), other.fingerprint()
    assert there != now
    (line,) = data_differences(there, now)
    return line


CONTENT = "content of the data (as many images of the same classes, but other names, sizes or pixels)"


def test_each_change_of_arrays_is_another_data_set_and_is_told() -> None:
    source = own()
    assert data_differences(source.fingerprint(), own().fingerprint()) == []
    assert replace(source, name="other", mean=(0.0, 0.0)).fingerprint() == source.fingerprint()
    renamed = own(classes=("cat", "dog", "wolf"))
    assert changed(source, renamed) == "set of classes (3 there, 3 now: fox only there, wolf only now)"
    assert changed(source, own(classes=("cat", "fox", "dog"))) == "set of classes (3 there, 3 now: in another order)"
    more = own(classes=(*CLASSES, "owl"))
    assert changed(source, more) == "set of classes (3 there, 4 now: none only there, owl only now)"
    images, ids = split(30)
    one_more = own((torch.cat([images, images[:1]]), torch.cat([ids, ids[:1]])))
    assert changed(source, one_more) == "number of train images (30 there, 31 now)"
    val = split(12, seed=1)
    assert changed(source, own(val=(val[0][:11], val[1][:11]))) == "number of val images (12 there, 11 now)"
    for place in ((0, 0, 0, 0), (29, 1, 4, 3)):
        pixel = images.clone()
        pixel[place] ^= 1
        assert changed(source, own((pixel, ids))) == CONTENT
    label = ids.clone()
    label[29] = (label[29] + 1) % 3
    assert changed(source, own((images, label))) == CONTENT
    pixel = val[0].clone()
    pixel[11, 1, 4, 3] ^= 1
    assert changed(source, own(val=(pixel, val[1]))) == CONTENT
    assert changed(own(split(12, seed=1), split(12)), own(split(12), split(12, seed=1))) == CONTENT
    order = torch.arange(30).flip(0)
    assert changed(source, own((images[order], ids[order]))) == CONTENT
    soft = torch.nn.functional.one_hot(ids, 3).float()
    assert changed(source, own((images, soft))) == CONTENT


def test_how_a_tensor_lies_in_memory_is_no_change() -> None:
    images, ids = split(30)
    last = images.to(memory_format=torch.channels_last)
    assert own((last, ids)).fingerprint() == own((images, ids)).fingerprint()


def test_several_differences_are_told_at_once_and_of_whom_they_are() -> None:
    there = own().fingerprint()
    now = own(split(31), split(13, seed=1), ("cat", "dog", "owl")).fingerprint()
    assert data_differences(there, now, ("on rank 0", "on rank 3")) == [
        "set of classes (3 on rank 0, 3 on rank 3: fox only on rank 0, owl only on rank 3)",
        "number of train images (30 on rank 0, 31 on rank 3)",
        "number of val images (12 on rank 0, 13 on rank 3)",
    ]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Five pictures to train on, of two classes, and two to validate."""
    for name in (
        "train/cat/a.png",
        "train/cat/b.png",
        "train/dog/a.png",
        "train/dog/b.png",
        "train/dog/c.png",
        "val/cat/a.png",
        "val/dog/b.png",
    ):
        path = tmp_path / "here" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)
    return tmp_path / "here"


def of_folder(root: Path) -> Source:
    return load_source(DataConfig(name="folder", root=str(root), size=16), download=False)


def test_a_folder_that_is_moved_is_the_same_data_set(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = of_folder(pictures).fingerprint()
    moved = pictures.parent / "a" / "deeper folder" / "thére"
    shutil.copytree(pictures, moved)
    shutil.rmtree(pictures)
    assert of_folder(moved).fingerprint() == before
    monkeypatch.chdir(moved.parent)
    assert of_folder(Path("thére")).fingerprint() == before
    (moved / "val" / "cat" / "a.png").touch()
    assert of_folder(moved).fingerprint() == before


def test_each_change_of_files_is_another_data_set_and_is_told(pictures: Path) -> None:
    source = of_folder(pictures)
    before = source.fingerprint()

    def told() -> list[str]:
        return data_differences(before, of_folder(pictures).fingerprint())

    assert told() == []
    file = pictures / "val" / "dog" / "b.png"
    content = file.read_bytes()
    file.write_bytes(content + b"\0")
    assert told() == [CONTENT]
    file.write_bytes(content)
    assert told() == []
    file.rename(file.with_name("c.png"))
    assert told() == [CONTENT]
    file.with_name("c.png").rename(file)
    other = pictures / "train" / "cat" / "c.png"
    (pictures / "train" / "dog" / "c.png").rename(other)  # it has another label
    assert told() == [CONTENT]
    other.rename(pictures / "train" / "dog" / "c.png")
    shutil.copy(file, other)
    assert told() == ["number of train images (5 there, 6 now)"]
    other.unlink()
    assert told() == []
    for part in ("train", "val"):
        (pictures / part / "cat").rename(pictures / part / "cow")
    assert told() == ["set of classes (2 there, 2 now: cat only there, cow only now)"]


def test_names_that_are_no_text_are_told_apart(pictures: Path) -> None:
    odd = os.fsencode(pictures / "train" / "cat") + b"/\xff.png"
    shutil.copy(os.fsencode(pictures / "train" / "cat" / "a.png"), odd)
    before = of_folder(pictures).fingerprint()
    os.rename(odd, odd.replace(b"\xff", b"\xfe"))
    assert data_differences(before, of_folder(pictures).fingerprint()) == [CONTENT]


def test_messages_name_an_image_by_its_path_or_its_number() -> None:
    files = Files(np.array([b"/photos/a b.jpg", b"/photos/\xff.jpg"]), torch.tensor([0, 1]), ImageSpec(8, 8))
    assert [files.name_of(0), os.fsencode(files.name_of(1))] == ["/photos/a b.jpg", b"/photos/\xff.jpg"]
    assert Arrays(torch.zeros(9, 1, 2, 2, dtype=torch.uint8), torch.zeros(9)).name_of(7) == "7"
