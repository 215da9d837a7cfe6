"""The images of each step, and their noise."""

import hashlib
import subprocess
import sys
from collections.abc import Sequence
from typing import Literal

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from distrib.config import DataConfig
from distrib.data.augment import Augment
from distrib.data.files import Reader
from distrib.data.pixels import ImageSpec
from distrib.data.source import Files
from distrib.data.steps import AUGMENT, CROP, DROPOUT, FLIP, ORDER, Share, Steps, fold, hashes, noise, order, val_shares
from distrib.errors import UserError

sizes = st.integers(1, 700)
worlds = st.integers(1, 9)
seeds = st.integers(0, 2**40)


@given(images=sizes, share=st.integers(1, 40), world=worlds, seed=seeds, epoch=st.integers(0, 3))
def test_an_epoch_has_every_image_at_most_once_and_leaves_out_less_than_a_batch(
    images: int, share: int, world: int, seed: int, epoch: int
) -> None:
    batch_size = share * world
    if batch_size > images:
        return
    ranks = [Steps(images, batch_size, seed, rank, world) for rank in range(world)]
    per_epoch = ranks[0].per_epoch
    seen = [steps(step) for step in range(epoch * per_epoch, (epoch + 1) * per_epoch) for steps in ranks]
    ids = torch.cat([each.images for each in seen])
    assert {each.epoch for each in seen} == {epoch}
    assert len(ids) == len(ids.unique()) == images - images % batch_size
    assert 0 <= ids.min() <= ids.max() < images


@given(images=sizes, share=st.integers(1, 40), world=worlds, seed=seeds, step=st.integers(0, 10_000))
def test_the_ranks_together_see_the_batch_that_one_rank_would(
    images: int, share: int, world: int, seed: int, step: int
) -> None:
    batch_size = share * world
    if batch_size > images:
        return
    shares = [Steps(images, batch_size, seed, rank, world)(step) for rank in range(world)]
    alone = Steps(images, batch_size, seed)(step)
    assert torch.equal(torch.cat([each.images for each in shares]), alone.images)
    assert {each.epoch for each in shares} == {alone.epoch}


@given(images=st.integers(0, 700), world=worlds, size=st.integers(1, 80))
def test_an_evaluation_has_every_image_exactly_once_in_order(images: int, world: int, size: int) -> None:
    shares = [share for rank in range(world) for share in val_shares(images, rank, world, size)]
    assert torch.equal(torch.cat([torch.empty(0).long(), *(each.images for each in shares)]), torch.arange(images))
    assert all(1 <= len(each.images) <= size for each in shares)


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ((100, 61, 0, 0, 2), "batch_size 61 does not divide among 2 ranks: use 60 or 62"),
        ((100, 2, 0, 0, 3), "batch_size 2 does not divide among 3 ranks: use 3"),
        ((100, 128, 0, 0, 1), "batch_size 128 is more than the 100 training images: use 100 or less"),
        ((3, 2, 0, 0, 4), "4 ranks are more than the 3 training images: use 3 or fewer"),
    ],
)
def test_a_batch_that_cannot_be_shared_is_refused(numbers: tuple[int, ...], words: str) -> None:
    with pytest.raises(UserError) as told:
        Steps(*numbers)
    assert str(told.value) == words


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = [order(1000, seed, epoch) for seed in range(3) for epoch in range(3)]
    for i, each in enumerate(orders):
        assert torch.equal(each.sort().values, torch.arange(1000))
        for other in orders[:i]:
            assert (each == other).float().mean() < 0.02


def test_noise_depends_on_the_image_and_not_on_its_place() -> None:
    images = torch.randperm(5000)
    drawn = noise(fold(7, 1, 3), images, draws=4)
    assert torch.equal(drawn[images.argsort()], noise(fold(7, 1, 3), torch.arange(5000), draws=4))
    assert torch.equal(drawn[100:200], noise(fold(7, 1, 3), images[100:200], draws=4))


def test_noise_is_uniform_and_unrelated_between_images_draws_epochs_and_seeds() -> None:
    n = 100_000
    drawn = torch.cat(
        [noise(fold(seed, 1, epoch), torch.arange(n), draws=2) for seed in (0, 1) for epoch in (0, 1)], 1
    ).double()
    assert 0 <= drawn.min() < drawn.max() < 1
    shares = torch.stack([column.histc(20, 0, 1) for column in drawn.unbind(1)]) / n
    assert (shares - 0.05).abs().max() < 0.004  # 5 sigma
    correlation = torch.corrcoef(torch.cat([drawn.T, drawn.roll(1, 0).T]))
    assert (correlation - torch.eye(16)).abs().max() < 0.016  # 5 sigma


def test_numbers_are_those_of_the_published_generator() -> None:
    # SplitMix64 from state 1234567, as given with the reference implementations of Java and of xoshiro's authors.
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert [each % 2**64 for each in hashes(1234567, torch.arange(1, 6)).tolist()] == published


@pytest.mark.slow
def test_an_order_is_the_same_in_another_process() -> None:
    code = "from distrib.data.steps import order; print(order(50, 3, 2).tolist())"
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert told.strip() == str(order(50, 3, 2).tolist())


def test_an_order_is_the_same_in_another_release() -> None:
    assert order(10, 0, 0).tolist() == [0, 8, 3, 4, 6, 2, 1, 9, 5, 7]  # if not, runs that are under way cannot go on


def digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()[:16]


ORDERS = {
    (0, 0): "72101dc3092088de",
    (0, 1): "4a7e1635c1d0289c",
    (7, 3): "9aa96a164e2abb99",
    (10**18, 12): "99c2250a3190a9fa",
}
# Of seed 3 and epoch 2: the hashes of a stream, and the noise of 1, 4 and 5 draws.
STREAMS = {
    ORDER: ("211f68904210c203", "7773b1350d96c487", "5ae7b163f83f2795", "1656ca527ce8cddb"),
    AUGMENT: ("42a03ad8987a4ef3", "bcfa478173547ad0", "407371d341dcc742", "add037386ad2cf39"),
    CROP: ("9a2901d0c574b698", "76e7b1d20adb1109", "83cb0a2cfec23e7c", "06b5de957c6beae0"),
    DROPOUT: ("9775f9ccd779f0c7", "bd3c91e78d3680ad", "18af3598e0c67a75", "328f1b3f52fba1e9"),
    FLIP: ("6814d0025c34d224", "da70aca01a3f9c83", "13b44f7d340075ff", "3e4549efbef3039e"),
}
# What epochs 0 and 1 make of the same images, by translate, flip and cutout.
AUGMENTED: dict[tuple[int, Literal["none", "random", "alternating", "both"], int], tuple[str, str]] = {
    (2, "random", 3): ("d1bb81ae20969239", "221717fabbeede23"),
    (2, "alternating", 3): ("b8642f4fd3cc4d7e", "3601301b8981e5bd"),
    (0, "random", 0): ("e14fb7d4a88ad43a", "58277bb4c643b172"),
    (0, "alternating", 4): ("94adc8b9122f6fd7", "aff6eb6f38fbb375"),
    (1, "both", 3): ("f777210b050f7b0e", "63a4c0621ae65870"),
}


def test_the_order_and_the_noise_are_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it is arithmetic of integers, the same everywhere. If it changes, runs that are under way cannot go on."""
    assert {key: digest(order(1000, *key)) for key in ORDERS} == ORDERS
    ids = torch.arange(1000)
    got = {key: [hashes(fold(3, key, 2), ids), *(noise(fold(3, key, 2), ids, draws) for draws in (1, 4, 5))] for key in STREAMS}
    assert {key: tuple(map(digest, each)) for key, each in got.items()} == STREAMS

    images = (hashes(0, torch.arange(100 * 3 * 12 * 10)) & 255).byte().view(100, 3, 12, 10)
    assert digest(images) == "4a4f6620535ded51"
    mean, ids = torch.tensor([51, 102, 0], dtype=torch.uint8), 7 * torch.arange(100) + 3
    for (translate, flip, cutout), expected in AUGMENTED.items():
        augment = Augment(DataConfig(translate=translate, flip=flip, cutout=cutout), seed=5, mean=mean)
        assert tuple(digest(augment(images, Share(epoch, ids))) for epoch in (0, 1)) == expected, (translate, flip, cutout)

    crops: list[Sequence[float]] = []
    monkeypatch.setattr(Reader, "_read", lambda self, path, drawn: crops.append(drawn) or torch.zeros(3, 1, 1))
    reader = Reader(Files(np.array([b"a.png"] * 1000), torch.zeros(1000), ImageSpec(1, 1)), seed=3, crop_area=0.25)
    reader.read(2, [*range(1000)], torch.empty(1000, 3, 1, 1))
    assert digest(torch.tensor(crops)) == STREAMS[CROP][2]
