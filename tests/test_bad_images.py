"""Images that cannot be used: skipped, counted and listed, the same on any number of ranks and workers."""

import io
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import launch
from PIL import Image

from distrib import evaluate
from distrib.cli import main
from distrib.config import Config, DataConfig
from distrib.data.datasets import load_source
from distrib.data.files import Reader
from distrib.data.loaders import Loader
from distrib.data.source import Files
from distrib.data.steps import Steps
from distrib.data.workers import Workers
from distrib.errors import UserError
from distrib.runtime.status import read_status

KEYS = ["data.name=folder", "data.size=16", "batch_size=6", "epochs=2", "precision=no", "model.width=8", "threads=1"]
BAD_TRAIN, BAD_VAL = (1, 7, 8, 20), (0, 5)


def pictures(root: Path, train: int = 24, val: int = 12) -> Path:
    """Pictures of two classes, whose colors tell the number of each."""
    for split, number in (("train", train), ("val", val)):
        for i in range(number):
            path = root / split / "ab"[i * 2 // number] / f"{i:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (20, 18), (10 * i, 100 * (i * 2 // number), len(split))).save(path)
    return root


def damaged(root: Path) -> Path:
    pictures(root)
    for split, numbers in (("train", BAD_TRAIN), ("val", BAD_VAL)):
        for path in (root / split).rglob("*.png"):
            if int(path.stem) in numbers:
                path.write_bytes(path.read_bytes()[:40])
    return root


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return damaged(tmp_path_factory.mktemp("damaged"))


def config_of(root: Path, **data: Any) -> Config:
    return Config(data=DataConfig(name="folder", root=str(root), size=16, bad_images="skip", **data))


def loader(root: Path, workers: Workers, rank: int = 0, world: int = 1) -> Loader:
    source = load_source(config_of(root).data, download=False)
    return Loader(source, config_of(root), Steps(len(source.train), 6, 3, rank, world), torch.device("cpu"), workers)


def test_a_bad_image_is_replaced_by_another_as_that_one_looks_in_this_epoch(root: Path) -> None:
    source = load_source(config_of(root).data, download=False)
    assert isinstance(source.train, Files)
    reader = Reader(source.train, seed=5, crop_area=0.3, skip=True)
    numbers = [*range(24)]
    for epoch in (0, 1):
        images = torch.empty(24, 3, 16, 16, dtype=torch.uint8)
        bad = reader.read(epoch, numbers, images)
        assert [each.number for each in bad.values()] == [*BAD_TRAIN]
        for place, each in bad.items():
            assert each.instead is not None
            assert each.instead not in BAD_TRAIN
            assert re.fullmatch(rf"{root}/train/a?b?/{place:03d}.png cannot be read as an image: .*", each.why)
            assert torch.equal(images[place], images[each.instead])
        again = reader.read(epoch, [8, 3, 1], torch.empty(3, 3, 16, 16, dtype=torch.uint8))
        assert (again[0], again[2]) == (bad[8], bad[1])
    assert len({each.instead for epoch in range(9) for each in reader.read(epoch, [7], images[:1]).values()}) > 3


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_batches_have_the_class_of_what_they_show_on_any_number_of_ranks_and_workers(root: Path, workers: int) -> None:
    with Workers() as alone, Workers(workers) as started:
        expected = list(loader(root, alone).train(range(8)))
        opened = [loader(root, started, rank, 2) for rank in range(2)]
        for batch, *shares in zip(expected, *(each.train(range(8)) for each in opened), strict=True):
            assert torch.equal(torch.cat([share.images for share in shares]), batch.images)
            assert torch.equal(torch.cat([share.targets for share in shares]), batch.targets)
            green = opened[0].source.std[1] * batch.images[:, 1].amax((1, 2)) + opened[0].source.mean[1]
            assert torch.equal((green * 255).round().long() // 100, batch.targets)
        found = [list(each.val(4)) for each in opened]
        assert [sum(len(batch.targets) for batch in each) for each in found] == [4, 6]  # of six each
        assert [each.left_out for each in opened] == [2, 0]
        found = [list(each.val(4)) for each in opened]
        assert [each.left_out for each in opened] == [2, 0]
        assert len({why for each in opened for why in each.bad_images()}) == len(BAD_TRAIN) + len(BAD_VAL)


def test_a_run_skips_counts_and_lists_them_and_every_number_tells_of_how_many_images_it_is(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = [*KEYS, f"data.root={root}", "data.workers=0", "data.crop_area=1", f"run_dir={tmp_path}"]
    assert main(["train", *keys]) == 2
    assert re.fullmatch(r"distrib: \S+\.png cannot be read as an image: .*\n", capsys.readouterr().err)
    assert main(["train", *keys, "data.bad_images=skip"]) == 0
    said = capsys.readouterr().out
    assert "of 10 images, without bad ones\n" in said
    assert f"warning: 6 images cannot be used, so others replace them; {tmp_path}/bad_images.txt lists them\n" in said
    assert read_status(tmp_path)["images"] == 10
    lines = (tmp_path / "bad_images.txt").read_text().splitlines()
    assert len(lines) == 6
    assert main(["train", *keys, "data.bad_images=skip", "epochs=3"]) == 0
    assert (tmp_path / "bad_images.txt").read_text().splitlines() == lines
    values = evaluate(tmp_path)
    assert values["images"] == 10
    assert read_status(tmp_path)["best"]["top1"] == pytest.approx(values["top1"])


def test_a_bad_file_whose_name_is_no_text_is_listed_too(tmp_path: Path) -> None:
    root = pictures(tmp_path / "pictures")
    Path(os.fsdecode(os.fsencode(root) + b"/train/a/\xff.png")).write_bytes(b"")
    keys = [*KEYS, f"data.root={root}", "data.workers=0", f"run_dir={tmp_path / 'run'}", "data.bad_images=skip"]
    assert main(["train", *keys]) == 0
    assert b"/train/a/\xff.png cannot be read" in (tmp_path / "run/bad_images.txt").read_bytes()


def test_a_set_that_is_all_bad_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = damaged(tmp_path / "all")
    for path in root.rglob("val/*/*.png"):
        path.write_bytes(b"")
    keys = [*KEYS, f"data.root={root}", "data.workers=0", f"run_dir={tmp_path / 'run'}", "data.bad_images=skip"]
    assert main(["train", *keys]) == 2
    assert "none of the 12 validation images can be used: run distrib scan" in capsys.readouterr().err
    for path in root.rglob("train/*/*.png"):
        path.write_bytes(b"")
    assert main(["train", *keys]) == 2
    assert "and 100 images to replace it cannot be used: run distrib scan" in capsys.readouterr().err


@pytest.mark.slow
def test_a_rank_whose_validation_images_are_all_bad_adds_nothing(tmp_path: Path) -> None:
    root = pictures(tmp_path / "pictures")
    for path in root.rglob("val/a/*.png"):
        path.write_bytes(b"")
    keys = [*KEYS, f"data.root={root}", "data.workers=1", "data.bad_images=skip"]
    for ranks in (1, 2):
        done = launch(ranks, "train.py", *keys, f"run_dir={tmp_path / str(ranks)}", "model.norm=group")
        assert done.returncode == 0, done.stderr
    found = [read_status(tmp_path / str(ranks)) for ranks in (1, 2)]
    assert found[0]["images"] == found[1]["images"] == 6
    assert found[0]["top1"] == pytest.approx(found[1]["top1"])


def test_a_picture_that_is_too_large_is_a_bad_image(tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.new("1", (300, 300)).save(file, "PNG")
    (tmp_path / "a.png").write_bytes(file.getvalue())
    source = load_source(config_of(pictures(tmp_path / "pictures"), max_pixels=400).data, download=False)
    assert isinstance(source.val, Files)
    Image.new("1", (300, 300)).save(source.val.name_of(2))
    with pytest.raises(UserError, match=r"002.png cannot be used: it has 300 x 300 pixels, more than data.max_pixels=400"):
        Reader(source.val).read(0, [2], torch.empty(1, 3, 16, 16, dtype=torch.uint8))


def test_a_row_of_a_table_without_its_file_is_skipped_too(tmp_path: Path) -> None:
    files = sorted(pictures(tmp_path / "pictures").rglob("*.png"))
    rows = [f"{path},{path.parent.name}\n" for path in files] + [f"{tmp_path}/gone{i}.png,a\n" for i in range(9)]
    (tmp_path / "labels.csv").write_text("".join(rows))
    keys = ["data.name=csv", f"data.root={tmp_path}/labels.csv", "data.bad_images=skip", f"run_dir={tmp_path}/run", *KEYS[1:]]
    assert main(["train", *keys]) == 0
    assert "gone" in (tmp_path / "run/bad_images.txt").read_text()
