"""The images of each step, and their noise."""

import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from distrib.config import UserError
from distrib.data.steps import Steps, contiguous, fold, hashes, noise, order

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
    shares = [share for rank in range(world) for share in contiguous(images, rank, world, size)]
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


def test_an_order_is_the_same_in_another_process() -> None:
    code = "from distrib.data.steps import order; print(order(50, 3, 2).tolist())"
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert told.strip() == str(order(50, 3, 2).tolist())


def test_an_order_is_the_same_in_another_release() -> None:
    assert order(10, 0, 0).tolist() == [0, 8, 3, 4, 6, 2, 1, 9, 5, 7]  # if not, runs that are under way cannot go on
