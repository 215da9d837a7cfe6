"""Pixels of pictures as people have them: turned, transparent, grey in many bits, of any shape and size."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from distrib.data.pixels import MARGIN, ORIENTATION, TURNS, ImageSpec, is_image, pixels_of, stored_box, upright
from distrib.errors import UserError

WHOLE = ImageSpec(16, 24, fit="stretch")


def show(path: Path, spec: ImageSpec = WHOLE) -> torch.Tensor:
    return pixels_of(path, spec, spec.center)


def corners(height: int = 48, width: int = 72) -> np.ndarray[Any, Any]:
    """A picture whose four quarters have other colors."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 2] = 250, 10, 10
    pixels[: height // 2, width // 2 :] = 10, 250, 10
    pixels[height // 2 :, : width // 2] = 10, 10, 250
    pixels[height // 2 :, width // 2 :] = 250, 250, 10
    return pixels


UNTURN = {  # how a picture is stored that these tags turn upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
@pytest.mark.parametrize("tag", UNTURN)
def test_a_picture_stands_as_its_camera_held_it(tmp_path: Path, tag: int, suffix: str) -> None:
    image, tags = Image.fromarray(corners()), Image.Exif()
    tags[ORIENTATION] = tag
    image.transpose(UNTURN[tag]).save(tmp_path / f"turned.{suffix}", exif=tags, **({"quality": 95} if suffix != "tiff" else {}))
    shown = show(tmp_path / f"turned.{suffix}").float()
    expected = torch.from_numpy(np.array(image.resize((24, 16), Image.Resampling.BILINEAR))).permute(2, 0, 1).float()
    assert (shown - expected).abs().mean() < 3


@given(tag=st.sampled_from([*TURNS]), width=st.integers(1, 40), height=st.integers(1, 40), data=st.data())
def test_a_crop_of_a_turned_picture_is_the_crop_of_the_upright_one(tag: int, width: int, height: int, data: Any) -> None:
    """`width` and `height` are those of the stored picture."""
    stored = torch.arange(width * height * 3).view(height, width, 3)
    turn = TURNS[tag]
    whole = upright(stored, turn)
    left, top = data.draw(st.integers(0, whole.shape[1] - 1)), data.draw(st.integers(0, whole.shape[0] - 1))
    right, bottom = data.draw(st.integers(left + 1, whole.shape[1])), data.draw(st.integers(top + 1, whole.shape[0]))
    x, y, to_x, to_y = stored_box((left, top, right, bottom), turn, (width, height))
    assert torch.equal(upright(stored[y:to_y, x:to_x], turn), whole[top:bottom, left:right])


def test_a_damaged_tag_is_no_damage_to_the_picture(tmp_path: Path) -> None:
    Image.fromarray(corners()).save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert show(tmp_path / "a.jpg").shape == (3, 16, 24)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P", "RGB", "L"])
def test_what_is_transparent_is_white(tmp_path: Path, mode: str) -> None:
    """The right half is transparent; its color is black."""
    pixels = np.zeros((48, 72, 4), np.uint8)
    pixels[:, :36] = 120, 120, 120, 255
    image = Image.fromarray(pixels)
    if mode in ("RGB", "L"):  # one value stands for what is transparent
        image.convert(mode).save(tmp_path / "a.png", transparency=0 if mode == "L" else (0, 0, 0))
    elif mode == "P":
        image.convert("RGB").quantize().save(
            tmp_path / "a.png", transparency=image.convert("RGB").quantize().getpixel((60, 10))
        )
    else:
        image.convert(mode if mode != "PA" else "RGBA").save(tmp_path / "a.png")
    shown = show(tmp_path / "a.png").float()
    assert (shown[:, :, :11] - 120).abs().max() < 3
    assert shown[:, :, 13:].min() > 252


GREYS = {"uint16": 65535, "int32": 10**6, "float32": 1.0}


@pytest.mark.parametrize("kind", GREYS)
def test_grey_of_many_bits_is_never_black(tmp_path: Path, kind: str) -> None:
    """Ramps of the full range, of a twelfth of it, and with the value of white given."""
    ramp = np.linspace(0, 1, 72)[None].repeat(48, 0)
    eight = torch.from_numpy((ramp * 255).round().astype(np.uint8))[None].float()
    for name, most in (("full", GREYS[kind]), ("dark", GREYS[kind] / 32)):
        Image.fromarray((ramp * most).astype(kind)).save(tmp_path / f"{name}.tif")
        shown = show(tmp_path / f"{name}.tif", ImageSpec(48, 72, "stretch", white=most)).float()
        assert (shown - eight).abs().max() <= 1.01
    if kind == "int32":  # the type does not tell its range
        with pytest.raises(UserError, match=r"it has grey values, from 0 to 1e\+06: set data.white to the value that is white"):
            show(tmp_path / "full.tif")
    else:
        assert (show(tmp_path / "full.tif", ImageSpec(48, 72, "stretch")).float() - eight).abs().max() <= 1.01
        with pytest.raises(UserError, match=r"it has grey values below 6% of the largest possible one, .*set data.white"):
            show(tmp_path / "dark.tif")


@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_sixteen_bits_are_read_in_both_orders_of_bytes(tmp_path: Path, order: str) -> None:
    values = np.arange(0, 64 * 1024, 1024, dtype=np.uint16).reshape(8, 8)
    pixels = values.astype(order).tobytes()
    tags = {256: 8, 257: 8, 258: 16, 259: 1, 262: 1, 273: 128, 277: 1, 278: 8, 279: 128}  # of TIFF; the pixels are at 128
    end = order[0]
    head = struct.pack(f"{end}2sHIH", b"II" if end == "<" else b"MM", 42, 8, len(tags))
    head += b"".join(struct.pack(f"{end}HHII", tag, 4, 1, value) for tag, value in tags.items())
    (tmp_path / "a.tif").write_bytes(head.ljust(128, b"\0") + pixels)
    [shown, *_] = show(tmp_path / "a.tif", ImageSpec(8, 8, "stretch"))
    assert torch.equal(shown, torch.from_numpy((values >> 8).astype(np.uint8)))


def test_an_error_of_any_kind_in_a_decoder_means_a_bad_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise NotImplementedError("a kind of DDS")

    Image.fromarray(corners()).save(tmp_path / "a.png")
    monkeypatch.setattr(Image.Image, "crop", fail)
    with pytest.raises(ValueError, match="NotImplementedError: a kind of DDS"):
        show(tmp_path / "a.png")


def test_twelve_bits_in_sixteen_are_as_bright_as_the_set_says(tmp_path: Path) -> None:
    Image.fromarray(np.full((8, 8), 2048, np.uint16)).save(tmp_path / "a.png")
    shown = show(tmp_path / "a.png", ImageSpec(8, 8, "stretch", white=4095))
    assert torch.equal(shown, torch.full((3, 8, 8), 128, dtype=torch.uint8))


@pytest.mark.parametrize(("fit", "left", "right"), [("crop", 0, 0), ("pad", 250, 10), ("stretch", 250, 10)])
def test_a_strip_is_cropped_padded_or_stretched(tmp_path: Path, fit: Any, left: int, right: int) -> None:
    """400 x 40: red at the left end, green at the right one."""
    pixels = np.zeros((40, 400, 3), np.uint8)
    pixels[:, :40], pixels[:, -40:] = (250, 0, 0), (10, 250, 0)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    spec = ImageSpec(40, 40, fit)
    shown = show(tmp_path / "a.png", spec)
    assert (shown[0, 20, 1], shown[0, 20, -2]) == (left, right)
    margin = torch.tensor(MARGIN, dtype=torch.uint8)
    assert torch.equal(shown[:, 0, 20], margin) == (fit == "pad")
    left, top, right, bottom = spec.random(400, 40, 0.25, [0.0, 0.7, 0.2, 0.9])
    assert (right - left, bottom - top) == ((100, 40) if fit == "crop" else (200, 20))  # a quarter of the area
    assert fit == "crop" or spec.random(400, 40, 1.0, [0.3, 0.7, 0.2, 0.9]) == (0, 0, 400, 40)


@given(
    width=st.integers(1, 2000), height=st.integers(1, 2000), fit=st.sampled_from(["crop", "pad", "stretch"]),
    size=st.tuples(st.integers(1, 64), st.integers(1, 64)), least=st.floats(0.01, 1),
    drawn=st.lists(st.floats(0, 1, exclude_max=True), min_size=4, max_size=4),
)  # fmt: skip
def test_every_box_lies_within_its_picture(
    width: int, height: int, fit: Any, size: tuple[int, int], least: float, drawn: list[float]
) -> None:
    spec = ImageSpec(*size, fit)
    for left, top, right, bottom in (spec.center(width, height), spec.random(width, height, least, drawn)):
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (7, 5)])
def test_a_picture_of_any_shape_has_the_size_that_was_asked_for(tmp_path: Path, size: tuple[int, int], fit: Any) -> None:
    for suffix in ("png", "jpg"):
        Image.new("RGB", size, (200, 100, 50)).save(tmp_path / f"a.{suffix}")
        assert show(tmp_path / f"a.{suffix}", ImageSpec(16, 24, fit)).shape == (3, 16, 24)


@pytest.mark.slow
def test_huge_pictures_and_long_texts_are_read_up_to_max_pixels(tmp_path: Path) -> None:
    """Pillow refuses both; the first has 196 million pixels."""
    Image.new("1", (14000, 14000), 1).save(tmp_path / "huge.png")
    text = PngInfo()
    text.add_text("k", "x" * 3_000_000, zip=True)
    Image.fromarray(corners()).save(tmp_path / "text.png", pnginfo=text)
    assert show(tmp_path / "huge.png").min() == 255
    assert show(tmp_path / "text.png").shape == (3, 16, 24)
    with pytest.raises(UserError, match=r"it has 14,000 x 14,000 pixels, more than data.max_pixels=100,000,000"):
        show(tmp_path / "huge.png", ImageSpec(16, 24, max_pixels=10**8))


def test_an_image_is_known_by_its_bytes(tmp_path: Path) -> None:
    Image.fromarray(corners()).save(tmp_path / "picture", "JPEG")
    (tmp_path / "text").write_text("no picture")
    (tmp_path / "empty").write_bytes(b"")
    assert [is_image(str(tmp_path / name)) for name in ("picture", "text", "empty")] == [True, False, False]
