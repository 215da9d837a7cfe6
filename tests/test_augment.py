"""Noise on batches: exact against a plain loop over images, and a function of (seed, epoch, image)."""

import pytest
import torch
from torch import Tensor

from distrib.config import DataConfig
from distrib.data.augment import Augment, Normalize, cutout, translate, tta_views
from distrib.data.steps import Share

IMAGES = torch.randint(1, 256, (200, 3, 9, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
MEAN = torch.tensor([51, 102, 0], dtype=torch.uint8)
ALL = DataConfig(translate=2, flip="random", cutout=3)


def test_moving_and_mirroring_is_what_it_says_pixel_by_pixel() -> None:
    down, right, mirror = torch.rand(3, 200, generator=torch.Generator().manual_seed(1)).unbind()
    got = translate(IMAGES, down, right, mirror < 0.5, most=2)
    for image, out, dy, dx, flip in zip(IMAGES, got, (down * 5).long(), (right * 5).long(), mirror < 0.5, strict=True):
        expected = torch.zeros_like(image)
        for row in range(9):
            for column in range(7):
                y, x = row + int(dy) - 2, (6 - column if flip else column) + int(dx) - 2
                if 0 <= y < 9 and 0 <= x < 7:
                    expected[:, row, column] = image[:, y, x]
        assert torch.equal(out, expected)


def test_a_cut_out_square_has_the_mean_and_the_rest_is_untouched() -> None:
    row, column = torch.rand(2, 200, generator=torch.Generator().manual_seed(1)).unbind()
    got = cutout(IMAGES, row, column, side=3, mean=MEAN)
    for image, out, y, x in zip(IMAGES, got, (row * 9).long() - 1, (column * 7).long() - 1, strict=True):
        expected = image.clone()
        expected[:, max(0, y) : y + 3, max(0, x) : x + 3] = MEAN[:, None, None]
        assert torch.equal(out, expected)


def test_every_translation_occurs_and_half_of_the_images_are_mirrored() -> None:
    dot = torch.zeros(9000, 1, 5, 5, dtype=torch.uint8)
    dot[:, :, 2, 2] = 1
    out = Augment(DataConfig(translate=1), seed=0, mean=MEAN)(dot, Share(0, torch.arange(9000)))
    counts = out.sum(0).view(25)
    assert counts.view(5, 5)[1:4, 1:4].min() > 900  # of 1000 each
    assert counts.sum() == 9000
    left = torch.zeros(9000, 1, 1, 2, dtype=torch.uint8)
    left[..., 0] = 1
    mirrored = Augment(DataConfig(translate=0, flip="random"), seed=0, mean=MEAN)(left, Share(0, torch.arange(9000)))[
        ..., 1
    ].sum()
    assert 4300 < mirrored < 4700


def test_with_flips_both_ways_each_of_the_four_sides_is_shown_as_often() -> None:
    corner = torch.tensor([[1, 0], [0, 0]], dtype=torch.uint8).expand(8000, 1, 2, 2)
    flipped = Augment(DataConfig(translate=0, flip="both"), seed=0, mean=MEAN)(corner, Share(0, torch.arange(8000)))
    assert torch.equal(flipped.sum((1, 2, 3)), torch.ones(8000))
    assert (flipped.sum(0) - 2000).abs().max() < 160  # four standard deviations


def test_noise_follows_the_image_whatever_batch_it_is_in() -> None:
    augment = Augment(ALL, seed=5, mean=MEAN)
    whole = augment(IMAGES, Share(3, torch.arange(200)))
    places = torch.randperm(200)[:50]
    assert torch.equal(augment(IMAGES[places], Share(3, places)), whole[places])


def test_each_epoch_and_seed_has_its_own_noise() -> None:
    def batch(seed: int, epoch: int) -> Tensor:
        return Augment(ALL, seed, mean=MEAN)(IMAGES, Share(epoch, torch.arange(200)))

    assert not torch.equal(batch(0, 0), batch(0, 1))
    assert not torch.equal(batch(0, 0), batch(1, 0))
    assert torch.equal(batch(1, 1), batch(1, 1))


def test_in_two_epochs_each_image_shows_both_sides() -> None:
    augment = Augment(DataConfig(translate=0, flip="alternating"), seed=0, mean=MEAN)
    epochs = [augment(IMAGES, Share(epoch, torch.arange(200))) for epoch in range(4)]
    mirrored = [(each == IMAGES.flip(3)).flatten(1).all(1) for each in epochs]
    assert 70 < mirrored[0].sum() < 130
    assert torch.equal(mirrored[0], ~mirrored[1])
    assert torch.equal(mirrored[0], mirrored[2])
    assert torch.equal(mirrored[1], mirrored[3])


def test_without_noise_nothing_changes() -> None:
    assert Augment(DataConfig(translate=0), seed=0, mean=MEAN)(IMAGES, Share(0, torch.arange(200))) is IMAGES


@pytest.mark.parametrize("count", [1, 2, 6])
def test_views_of_an_image_have_weights_that_add_up_to_1(count: int) -> None:
    images = torch.randn(2, 3, 9, 7)
    shown = list(tta_views(images, count))
    assert len(shown) == count
    assert sum(weight for weight, _ in shown) == 1
    assert all(each.shape == images.shape for _, each in shown)
    assert torch.equal(shown[0][1], images)
    if count > 1:
        assert torch.equal(shown[1][1], images.flip(3))
    if count == 6:
        (_, up_left), (_, mirrored), (_, down_right), _ = shown[2:]
        assert torch.equal(up_left[:, :, 1:, 1:], images[:, :, :-1, :-1])
        assert torch.equal(down_right[:, :, :-1, :-1], images[:, :, 1:, 1:])
        assert torch.equal(mirrored, up_left.flip(3))


def test_normalized_images_have_mean_0_and_variance_1_and_lie_channels_last() -> None:
    pixels = IMAGES.double() / 255
    mean, std = pixels.mean((0, 2, 3)), pixels.std((0, 2, 3))
    out = Normalize(mean.float(), std.float(), IMAGES.shape[3])(IMAGES)
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.std((0, 2, 3)), torch.ones(3), atol=1e-5, rtol=0)
