"""Folders and tables of pictures as people have them."""

import os
import shutil
from pathlib import Path
from unicodedata import normalize

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from distrib.config import DataConfig
from distrib.data.datasets import load_source
from distrib.data.listing import Listing, list_folder, list_table, place
from distrib.data.source import Files
from distrib.errors import UserError


def pictures(*folders: Path, number: int = 8, suffix: str = "jpg") -> None:
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(number):
            Image.new("RGB", (12, 10), (i, 0, 0)).save(folder / f"{i:03d}.{suffix}")


def listed(root: Path, holdout: float = 0.2) -> Listing:
    return list_folder(root, holdout)


def names(images: list[tuple[str, str]], root: Path) -> set[str]:
    return {str(Path(path).relative_to(root)) for path, _ in images}


@pytest.mark.parametrize("val", ["val", "valid", "validation", "test", "Val"])
def test_the_folder_of_validation_images_has_any_of_its_usual_names(tmp_path: Path, val: str) -> None:
    pictures(*(tmp_path / split / name for split in ("train", val) for name in "ab"))
    found = listed(tmp_path)
    assert (len(found.train), len(found.val), found.notes) == (16, 16, [])
    assert found.classes() == ["a", "b"]
    pictures(tmp_path / "zest")  # another folder beside them
    assert len(listed(tmp_path).train) == 16


def test_of_two_folders_of_validation_images_one_is_used_and_that_is_told(tmp_path: Path) -> None:
    pictures(*(tmp_path / split / name for split in ("train", "val", "test") for name in "ab"))
    assert listed(tmp_path).notes == ["validation uses val/; test/ is not used"]


@pytest.mark.parametrize("inside", ["", "train"])
def test_a_part_is_held_out_if_there_are_no_validation_images_and_another_image_moves_none(tmp_path: Path, inside: str) -> None:
    root = tmp_path / inside
    pictures(root / "a", root / "b", number=200)
    before = listed(tmp_path)
    assert 50 < len(before.val) < 110
    assert len(before.train) + len(before.val) == 400
    assert f"no validation images are given: {len(before.val)} of 400 images are held out for it" in before.notes
    for i in range(200, 260):
        shutil.copy(root / "a/000.jpg", root / f"a/{i}.jpg")
    after = listed(tmp_path)
    assert names(before.train, root) <= names(after.train, root)
    assert names(before.val, root) <= names(after.val, root)
    shutil.move(tmp_path, tmp_path.with_name("moved"))
    moved = listed(tmp_path.with_name("moved"))
    assert names(moved.val, tmp_path.with_name("moved") / inside) == names(after.val, root)
    shutil.move(tmp_path.with_name("moved"), tmp_path)


def test_a_class_keeps_an_image_to_train_on(tmp_path: Path) -> None:
    pictures(tmp_path / "a", tmp_path / "b", number=5)
    pictures(tmp_path / "c", number=1)
    found = listed(tmp_path, holdout=0.999)
    assert sorted(name for _, name in found.train) == ["a", "b", "c"]
    assert found.classes() == ["a", "b", "c"]
    assert "no validation images of the class c" in found.notes


def test_a_holdout_that_is_not_used_is_told(tmp_path: Path) -> None:
    pictures(*(tmp_path / split / name for split in ("train", "val") for name in "ab"))
    assert "data.holdout=0.3 is not used, since there are validation images" in listed(tmp_path, holdout=0.3).notes
    assert not listed(tmp_path).notes


def test_junk_is_left_out_and_counted_by_its_kind(tmp_path: Path) -> None:
    pictures(*(tmp_path / split / name for split in ("train", "val") for name in "ab"))
    pictures(tmp_path / "train/a/.ipynb_checkpoints", tmp_path / "train/.ipynb_checkpoints", tmp_path / "train/a/@eaDir/x.jpg")
    for name in ("train/a/._000.jpg", "train/a/Thumbs.db", "train/b/notes.txt", "train/b/README", "train/list.csv"):
        (tmp_path / name).write_bytes(b"\0\5\26\7junk")
    found = listed(tmp_path)
    assert (len(found.train), len(found.val)) == (16, 16)
    assert found.notes == [
        "left out: 1 .txt files, 9 files of the system, 1 files outside of class folders, 1 files that are no images, "
        "10 hidden files"
    ]


def test_images_of_all_suffixes_are_read_and_of_none(tmp_path: Path) -> None:
    pictures(*(tmp_path / split / name for split in ("train", "val") for name in "ab"), number=1)
    kinds = {
        "x.jfif": "JPEG",
        "y": "JPEG",
        "z.gif": "GIF",
        "z.JPG": "JPEG",
        "z.webp": "WEBP",
        "z.tiff": "TIFF",
        "z.jpg_large": "JPEG",
    }
    for name, kind in kinds.items():
        Image.new("RGB", (12, 10)).save(tmp_path / "train/a" / name, kind)
    found = listed(tmp_path)
    assert names(found.train, tmp_path / "train") == {"a/000.jpg", "b/000.jpg", *(f"a/{name}" for name in kinds)}
    assert found.notes == []
    (tmp_path / "train/a/data.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(99))
    (tmp_path / "train/a/film.mpg").write_bytes(b"\x00\x00\x01\xb3" + bytes(99))
    assert listed(tmp_path).notes == ["left out: 1 .h5 files, 1 .mpg files"]


def test_the_order_of_images_is_that_of_their_names_and_deeper_folders_belong_to_the_class(tmp_path: Path) -> None:
    pictures(*(tmp_path / name for name in ("train/b", "train/a/z", "train/a/k/deep", "train/a", "val/a", "val/b")), number=2)
    (tmp_path / "train/a/loop").symlink_to(tmp_path / "train/a")
    (tmp_path / "train/a/up").symlink_to(tmp_path / "train")
    found = [(str(Path(path).relative_to(tmp_path)), name) for path, name in listed(tmp_path).train]
    folders = ["train/a", "train/a/k/deep", "train/a/z", "train/b"]
    assert found == [(f"{folder}/{i:03d}.jpg", folder[6]) for folder in folders for i in range(2)]


def test_names_in_another_unicode_form_are_the_same_class(tmp_path: Path) -> None:
    pictures(*(tmp_path / "train" / name for name in ("a", normalize("NFC", "café"))))
    pictures(*(tmp_path / "val" / name for name in ("a", normalize("NFD", "café"))))
    assert listed(tmp_path).classes() == ["a", normalize("NFC", "café")]
    assert place(normalize("NFC", "/x/é.jpg"), Path("/x")) == place(normalize("NFD", "/x/é.jpg"), Path("/x"))


def test_classes_that_do_not_fit_are_told_or_refused(tmp_path: Path) -> None:
    pictures(*(tmp_path / name for name in ("train/a", "train/b", "train/c", "val/a", "val/b")))
    (tmp_path / "train/empty").mkdir()
    (tmp_path / "val/c").mkdir()
    found = listed(tmp_path)
    assert found.classes() == ["a", "b", "c"]
    assert found.notes == [
        "train/: no images in empty, left out", "val/: no images in c, left out", "no validation images of the class c"
    ]  # fmt: skip
    pictures(tmp_path / "val/d")
    with pytest.raises(UserError, match="the class d has validation images, but no training images"):
        listed(tmp_path).classes()
    pictures(tmp_path / "alone" / "a")
    with pytest.raises(UserError, match=r"has one class only, a: it needs a folder for each class; is it a folder too deep\?"):
        listed(tmp_path / "alone").classes()
    with pytest.raises(UserError, match="has no images in class folders"):
        listed(tmp_path / "train/a").classes()
    with pytest.raises(UserError, match="is not a folder"):
        listed(tmp_path / "nowhere")
    shutil.rmtree(tmp_path / "train")
    with pytest.raises(UserError, match=r"val/, but no train/: to evaluate all images in it, data.root=.*/val data.holdout=1$"):
        listed(tmp_path)


def test_names_of_splits_that_are_not_known_are_no_classes(tmp_path: Path) -> None:
    pictures(tmp_path / "Training/a", tmp_path / "Training/b", tmp_path / "Testing/a", tmp_path / "Testing/b")
    with pytest.raises(UserError, match=r"the classes would be Testing, Training: call them train and val$"):
        listed(tmp_path).classes()


def test_numbers_as_classes_are_in_the_order_of_numbers(tmp_path: Path) -> None:
    pictures(*(tmp_path / str(number) for number in (10, 9, 2)))
    assert listed(tmp_path).classes() == ["2", "9", "10"]


@given(st.text(min_size=1).filter(lambda text: "\0" not in text and not set(text) & set("/\ud800") and text not in (".", "..")))
def test_the_place_of_a_path_is_a_number_from_0_to_1(name: str) -> None:
    assert 0 <= place(f"/root/{name}", Path("/root")) < 1


@pytest.mark.parametrize(
    ("head", "line"),
    [
        ("path,label,split\n", "{path},{label},{split}"),
        ("\ufeffLabel;File;Set\r\n", "{label};{path};{split}\r"),
        ("", "{path},{label},{split}"),
        ("image\tclass\tsubset\n", "{path}\t{label}\t{split}"),
        ('id,"file name",filename,category,split\n', '7,"a, b",{path},"{label}",{split}'),
    ],
)
def test_a_table_lists_images_labels_and_splits(tmp_path: Path, head: str, line: str) -> None:
    pictures(tmp_path / "images")
    rows = [
        line.format(path=f"images/{i:03d}.jpg", label="xy"[i % 2], split="train" if i < 4 else "val" if i < 6 else "extra")
        for i in range(8)
    ]
    (tmp_path / "labels.csv").write_text(head + "\n".join(rows) + "\n\n", encoding="utf-8")
    found = list_table(tmp_path / "labels.csv", 0.2)
    assert [(Path(path).name, name) for path, name in found.train] == [(f"{i:03d}.jpg", "xy"[i % 2]) for i in range(4)]
    assert [Path(path).name for path, _ in found.val] == ["004.jpg", "005.jpg"]
    assert found.notes == ["images of other splits are not used: 2 of 'extra'"]
    source = load_source(DataConfig(name="csv", root=str(tmp_path / "labels.csv"), size="8x12"), download=False)
    assert (source.classes, source.shape, source.name) == (("x", "y"), (3, 8, 12), "csv")
    assert isinstance(source.train, Files)
    assert source.fingerprint()["train"] == 4


def test_the_same_images_are_held_out_of_a_table_as_of_a_folder(tmp_path: Path) -> None:
    pictures(tmp_path / "a", tmp_path / "b", number=100)
    rows = [f"{name}/{i:03d}.jpg,{name}" for name in "ab" for i in range(100)]
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    table = list_table(tmp_path / "labels.csv", 0.2)
    assert table.val == listed(tmp_path).val


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", r"has no rows of path,label"),
        ("a.jpg\nb.jpg\n", r"has no rows of path,label"),
        ("path,colour\na.jpg,x\n", r"has the columns path, colour: name those of the files path and label"),
        ("path,label\na.jpg,x\n\nb.jpg\n", r"line 4 has 1 columns: \['b.jpg'\]"),
        ("path,label\na.jpg,x\nb.jpg, \n", r"line 3 lacks a path or a label: \['b.jpg', ' '\]"),
        ("path,label\na.jpg,x\nb.jpg,x\n", r"has one class only, x: a table needs two classes; no validation"),
        ("a.jpg,x,1\nb.jpg,x,0\n", r"a table needs two classes; column 3 is not used, since it says train nowhere; no val"),
        ("path,label\nnowhere.jpg,x\na.jpg,y\n0.jpg,x\n1.jpg,y\n2.jpg,x\n", r".jpg cannot be read: No such file or directory"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused_in_a_line(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(UserError, match=words):
        load_source(DataConfig(name="csv", root=str(tmp_path / "labels.csv"), holdout=0.9), download=False).fingerprint()


def test_a_class_may_be_named_train_and_folders_beside_the_split_of_that_name_are_told(tmp_path: Path) -> None:
    pictures(*(tmp_path / name for name in ("bus", "car", "train")), number=9)
    found = listed(tmp_path)
    assert found.classes() == ["bus", "car", "train"]
    assert len(found.train) + len(found.val) == 27
    pictures(tmp_path / "train/diesel", tmp_path / "train/steam", number=9)
    (tmp_path / ".git").mkdir()
    found = listed(tmp_path)
    assert found.classes() == ["diesel", "steam"]
    assert "folders beside train/ are not used: bus, car" in found.notes


def test_what_is_no_file_or_half_of_one_is_left_out_and_counted(tmp_path: Path) -> None:
    pictures(tmp_path / "a", tmp_path / "b", number=9)
    os.mkfifo(tmp_path / "a/pipe")
    (tmp_path / "a/link").symlink_to(tmp_path / "nowhere")
    Image.effect_noise((200, 200), 50).save(tmp_path / "whole.jpg")
    (tmp_path / "b/x.jpg.part").write_bytes((tmp_path / "whole.jpg").read_bytes()[:100])
    (tmp_path / "b/half").write_bytes((tmp_path / "whole.jpg").read_bytes()[:100])
    assert any(
        note.startswith("left out: ") and "2 links to nothing, pipes and the like" in note and "1 .part files" in note
        for note in listed(tmp_path).notes
    )
