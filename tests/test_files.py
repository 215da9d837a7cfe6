"""Image files: what is read, what is refused, and the crop of each."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from distrib.data.files import Reader
from distrib.data.pixels import Box, ImageSpec, decode, pixels_of, reduce
from distrib.data.source import Files
from distrib.data.steps import Share
from distrib.data.workers import Stream, Workers
from distrib.errors import UserError

PIXELS = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)


def picture(path: Path, mode: str = "RGB", **options: object) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(PIXELS)
    if mode == "I;16":
        Image.fromarray(np.array(image.convert("L")).astype(np.uint16) * 257).save(path)
    else:
        image.convert(mode).save(path, **options)
    return str(path)


def reader(paths: list[str], crop_area: float | None = None, size: int = 32) -> Reader:
    return Reader(Files(paths, torch.arange(len(paths)), ImageSpec(size, size)), seed=3, crop_area=crop_area)


def read(
    paths: list[str], *shares: Share, crop_area: float | None = None, workers: int = 0
) -> list[tuple[Share, torch.Tensor]]:
    with Workers(workers) as started:
        return list(Stream(reader(paths, crop_area), started, pinned=False).read(shares))


def images_of(opened: Reader, epoch: int, numbers: list[int]) -> torch.Tensor:
    images = torch.empty(len(numbers), 3, opened.files.spec.height, opened.files.spec.width, dtype=torch.uint8)
    opened.read(epoch, numbers, images)
    return images


KINDS = {
    "a.jpg": "RGB",
    "grey.jpg": "L",
    "cmyk.jpg": "CMYK",
    "a.png": "RGBA",
    "palette.png": "P",
    "deep.png": "I;16",
    "a.gif": "P",
    "a.webp": "RGB",
    "bits.bmp": "1",
}


@pytest.mark.parametrize(("name", "mode"), KINDS.items())
def test_every_kind_of_picture_becomes_a_square_of_three_channels(tmp_path: Path, name: str, mode: str) -> None:
    [[_, images]] = read([picture(tmp_path / name, mode)], Share(0, torch.tensor([0])))
    assert (images.shape, images.dtype) == ((1, 3, 32, 32), torch.uint8)


def test_sixteen_bits_of_grey_are_scaled_to_eight(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    Image.fromarray((ramp >> 8).astype(np.uint8)).save(tmp_path / "plain.png")
    deep, plain = images_of(reader([str(tmp_path / "deep.png"), str(tmp_path / "plain.png")]), 0, [0, 1])
    assert torch.equal(deep, plain)
    assert 100 < deep.float().mean() < 155


def damaged(tmp_path: Path) -> dict[str, str]:
    whole = Path(picture(tmp_path / "whole.jpg")).read_bytes()
    files = {
        "truncated.jpg": whole[: len(whole) // 2],
        "empty.jpg": b"",
        "text.jpg": b"not an image",
        "header.png": b"\x89PNG\r\n\x1a\n" + bytes(40),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder.jpg").mkdir()
    return {name: str(tmp_path / name) for name in (*files, "folder.jpg", "gone.jpg")}


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_file_that_is_no_image_is_named(tmp_path: Path, workers: int) -> None:
    good = picture(tmp_path / "good.jpg")
    for path in damaged(tmp_path).values():
        with pytest.raises(UserError) as told:
            read([good, path], Share(0, torch.tensor([0, 1])), workers=workers)
        assert str(told.value).startswith(f"{path} cannot be read as an image: ")
        assert "\n" not in str(told.value)


four = st.lists(st.floats(0, 1, exclude_max=True), min_size=4, max_size=4)


@given(width=st.integers(1, 3000), height=st.integers(1, 3000), least=st.floats(0.01, 1), drawn=four)
def test_a_random_crop_lies_within_the_picture(width: int, height: int, least: float, drawn: list[float]) -> None:
    left, top, right, bottom = ImageSpec(32, 32).random(width, height, least, drawn)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    across, down, area = right - left, bottom - top, width * height * (least + (1 - least) * drawn[0])
    assert (across - 0.51) * (down - 0.51) <= area <= (across + 0.51) * (down + 0.51) or 1 in (across, down)  # whole pixels
    if 3 / 4 <= width / height <= 4 / 3 and area <= 9 / 16 * width * height and min(across, down) > 1:  # it has room for it
        assert 3 / 4 * (down - 0.51) <= across + 0.51
        assert 3 / 4 * (across - 0.51) <= down + 0.51


@given(width=st.integers(1, 900), height=st.integers(1, 900), drawn=four)
@settings(max_examples=50, deadline=None)
def test_a_large_jpeg_is_decoded_at_less_only_where_the_crop_keeps_its_pixels(
    width: int, height: int, drawn: list[float]
) -> None:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (200, 100, 50)).save(file, "JPEG")
    left, top, right, bottom = box = ImageSpec(32, 32).random(width, height, 0.08, drawn)
    with Image.open(file) as image:
        reduce(image, box, ImageSpec(32, 32))
        part = decode(image, ImageSpec(32, 32).random(*image.size, 0.08, drawn), ImageSpec(32, 32))
    for kept, side in zip(part.shape, (bottom - top, right - left), strict=False):
        assert kept >= min(side, 2 * 32)
    assert min(bottom - top, right - left) < 132 or len(part) < bottom - top
    assert (part.float().mean((0, 1)) - torch.tensor([200.0, 100.0, 50.0])).abs().max() < 3  # and none of it is black


@pytest.mark.parametrize(("width", "within"), [(150, 0.1), (1600, 0.6)])
def test_what_is_read_looks_as_pillow_would_show_it(tmp_path: Path, width: int, within: float) -> None:
    """Mean difference in levels of 256; of a smooth picture, since one that is decoded at less has lost its finest grain."""
    rows, columns = torch.meshgrid(torch.linspace(0, 3, width * 3 // 4), torch.linspace(0, 4, width), indexing="ij")
    waves = torch.stack([rows.sin() * columns.cos(), (rows + columns).sin(), (rows * 0.7).cos()], -1)
    Image.fromarray((127 + 120 * waves).byte().numpy()).save(tmp_path / "a.jpg", quality=95)

    def choose(width: int, height: int) -> Box:
        return ImageSpec(64, 64).random(width, height, 0.25, [0.5, 0.3, 0.2, 0.9])

    pixels, box = pixels_of(tmp_path / "a.jpg", ImageSpec(64, 64), choose), choose(width, width * 3 // 4)
    with Image.open(tmp_path / "a.jpg") as image:
        shown = np.array(image.resize((64, 64), Image.Resampling.BILINEAR, box))
    assert (pixels.permute(1, 2, 0).float() - torch.from_numpy(shown).float()).abs().mean() < within


def test_the_middle_is_centred_and_square() -> None:
    assert ImageSpec(32, 32).center(800, 400) == (225, 25, 575, 375)


def test_a_crop_follows_the_image_the_epoch_and_the_seed_and_not_the_batch(tmp_path: Path) -> None:
    paths = [picture(tmp_path / f"{i}.png") for i in range(6)]
    cropped = reader(paths, crop_area=0.3)
    whole = images_of(cropped, 2, [*range(6)])
    assert torch.equal(images_of(cropped, 2, [4, 1]), whole[[4, 1]])
    assert len({tuple(each.flatten().tolist()) for each in whole}) == 6  # the same picture, cropped six ways
    assert not torch.equal(images_of(cropped, 3, [*range(6)]), whole)
    assert torch.equal(images_of(reader(paths), 2, [*range(6)])[0], images_of(reader(paths), 3, [5])[0])


def test_workers_read_what_one_process_would(tmp_path: Path) -> None:
    paths = [picture(tmp_path / f"{i}.jpg") for i in range(9)]
    shares = [Share(epoch, torch.randperm(9)[:4]) for epoch in range(5)]
    alone, helped = (read(paths, *shares, crop_area=0.3, workers=workers) for workers in (0, 2))
    for (a, images_a), (b, images_b) in zip(alone, helped, strict=True):
        assert a.epoch == b.epoch
        assert torch.equal(a.images, b.images)
        assert torch.equal(images_a, images_b)
