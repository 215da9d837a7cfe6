"""`distrib scan`: what it tells of a data set, and its exit code."""

import shutil
from pathlib import Path

import pytest
from PIL import Image
from test_bad_images import damaged, pictures

from distrib.cli import main


def scanned(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, list[str]]:
    code = main(["scan", *map(str, args)])
    out, _ = capsys.readouterr()
    return code, out.splitlines()


def test_a_sound_set_is_described(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = pictures(tmp_path, train=20, val=6)
    Image.new("L", (400, 300)).save(root / "train/b/large.jpg")
    for name in ("train/b/.x.png", "train/notes.txt"):
        (root / name).write_text("")
    assert scanned(capsys, root) == (
        0,
        [
            "21 images to train on and 6 to validate, 2 classes:",
            "  b        11 train         3 val",
            "  a        10 train         3 val",
            "kinds: 26 PNG RGB, 1 JPEG L",
            "sizes: smallest 20 x 18, median 20 x 18, largest 400 x 300 pixels",
            "left out: 1 files outside of class folders, 1 hidden files",
            "nothing is wrong",
        ],
    )


def test_bad_images_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, lines = scanned(capsys, damaged(tmp_path), "data.max_pixels=1000")
    assert code == 1
    at = lines.index("4 of 24 images in train cannot be used (data.bad_images=skip trains without them):")
    for line, name in zip(lines[at + 1 : at + 5], ("a/001", "a/007", "a/008", "b/020"), strict=True):
        assert line.startswith(f"  {tmp_path}/train/{name}.png: ")
    assert lines[at + 5] == "2 of 12 images in val cannot be used (data.bad_images=skip trains without them):"
    Image.new("1", (50, 50)).save(tmp_path / "val/b/011.png")
    code, lines = scanned(capsys, tmp_path, "data.max_pixels=1000")
    assert f"  {tmp_path}/val/b/011.png: it has 50 x 50 pixels, more than data.max_pixels=1,000" in lines


def test_images_to_train_on_that_are_validated_too_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = pictures(tmp_path)
    assert scanned(capsys, root)[0] == 0
    shutil.copy(root / "train/a/003.png", root / "val/b/copy.png")
    code, lines = scanned(capsys, root)
    assert code == 1
    assert lines[-2:] == [
        "1 validation images are also training images, so their accuracy means nothing:",
        f"  {root}/val/b/copy.png = {root}/train/a/003.png",
    ]


def test_a_file_that_is_missing_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures(tmp_path)
    rows = [f"{path.relative_to(tmp_path)},{path.parent.name}" for path in sorted(tmp_path.rglob("*.png"))]
    (tmp_path / "labels.csv").write_text("\n".join([*rows, "gone.png,a"]))
    code, lines = scanned(capsys, tmp_path / "labels.csv")
    assert code == 1
    assert f"  {tmp_path}/gone.png: No such file or directory" in lines


def test_a_table_is_scanned_too_and_a_long_list_of_classes_is_shortened(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures(tmp_path)
    rows = [f"{path.relative_to(tmp_path)},{i % 24:02d}" for i, path in enumerate(sorted(tmp_path.rglob("*.png")))]
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    code, lines = scanned(capsys, tmp_path / "labels.csv")
    assert code == 0
    assert "  ... 4 more classes between these" in lines
    assert sum(line.endswith(" val") for line in lines) == 20


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "give the folder or the table of images: distrib scan DATA"),
        (["data.size=3"], "give the folder or the table of images"),
        (["/nowhere"], "there is no folder or table /nowhere"),
        (
            [".", "data.holdout=1"],
            "data.holdout=1 leaves no images to train on: it is for distrib evaluate; give a smaller one",
        ),
        ([".", "optim.lr=3"], "unexpected argument 'optim.lr=3': give keys of data only"),
        ([".", "data.sise=3"], "there is no key data.sise: did you mean data.size?"),
    ],
)
def test_a_mistake_is_told_in_a_line(args: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scan", *args]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"distrib: {words}")
    assert err.count("\n") == 1


def test_a_file_whose_decoder_fails_in_its_own_way_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = pictures(tmp_path)
    (root / "train/a/odd.dds").write_bytes(b"DDS " + (124).to_bytes(4, "little") + bytes(200))
    code, lines = scanned(capsys, root)
    assert code == 1
    assert any(line.startswith(f"  {root}/train/a/odd.dds: ") for line in lines)
