"""Metrics against sklearn's."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import log_loss, top_k_accuracy_score

from distrib.metrics import means, totals, zeros

CPU = torch.device("cpu")


@given(images=st.integers(2, 60), classes=st.integers(6, 12), parts=st.integers(1, 7), seed=st.integers(0, 1000))
def test_sums_of_parts_give_the_metrics_of_the_whole(images: int, classes: int, parts: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(images, classes, generator=generator)
    labels = torch.randint(classes, (images,), generator=generator)
    sums = zeros(CPU)
    for x, y in zip(logits.tensor_split(parts), labels.tensor_split(parts), strict=True):
        sums += totals(x, y) if len(y) else 0
    got, scores, known = means(sums), logits.double().softmax(1).numpy(), list(range(classes))
    assert sums[-1] == images
    assert got["loss"] == pytest.approx(log_loss(labels, scores, labels=known), rel=1e-5)
    assert got["top1"] == pytest.approx(100 * top_k_accuracy_score(labels, scores, k=1, labels=known))
    assert got["top5"] == pytest.approx(100 * top_k_accuracy_score(labels, scores, k=5, labels=known))


def test_fewer_than_five_classes_are_all_in_the_top_five() -> None:
    assert means(totals(torch.tensor([[0.1, 0.9, 0.0]]), torch.tensor([2])))["top5"] == 100


def test_counts_stay_exact_beyond_what_float32_holds() -> None:
    sums = zeros(CPU) + torch.tensor([0.0, 2**24, 2**24, 2**24], dtype=torch.float64)
    assert (sums + totals(torch.tensor([[1.0, 0.0]]), torch.tensor([0])))[-1] == 2**24 + 1


def test_a_logit_that_is_no_number_is_not_taken_for_a_hit() -> None:
    got = totals(torch.full((4, 3), float("nan")), torch.tensor([1, 1, 2, 2]))
    assert got[1] == 0


def test_the_means_of_no_images_are_no_numbers() -> None:
    assert all(math.isnan(value) for value in means(zeros(torch.device("cpu"))).values())
