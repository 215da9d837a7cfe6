"""Meters and losses against sklearn's and torch's."""

import math
from collections.abc import Mapping
from functools import cached_property

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import log_loss, recall_score, top_k_accuracy_score
from torch import Tensor

from distrib.training.meters import METERS, Meter, Totals, class_ids, hits
from distrib.training.objective import CrossEntropy, Objective


def per_class(logits: Tensor, targets: Tensor) -> Tensor:
    """Hits, and images, of each class: (2, classes)."""
    classes, ids = logits.shape[1], class_ids(targets)
    return torch.stack([F.one_hot(ids[logits.argmax(1) == ids], classes).sum(0), F.one_hot(ids, classes).sum(0)])


def mean_recall(total: Tensor, images: float) -> float:
    found, there = total
    recalls = found[there > 0] / there[there > 0]
    return 100 * recalls.mean().item() if len(recalls) else math.nan


class Balanced(CrossEntropy):
    main = "balanced"

    @cached_property
    def meters(self) -> Mapping[str, Meter]:
        return {**super().meters, "balanced": Meter(per_class, mean_recall)}


def measured(objective: Objective, logits: Tensor, targets: Tensor, parts: int = 1) -> Totals:
    totals = Totals.zero()
    for x, y in zip(logits.tensor_split(parts), targets.tensor_split(parts), strict=True):
        totals = totals.plus(objective.measure(x, y), len(y)) if len(y) else totals
    return totals


@given(images=st.integers(2, 60), classes=st.integers(6, 12), parts=st.integers(1, 7), seed=st.integers(0, 1000))
def test_sums_of_parts_give_the_metrics_of_the_whole(images: int, classes: int, parts: int, seed: int) -> None:
    generator, objective = torch.Generator().manual_seed(seed), CrossEntropy()
    logits = torch.randn(images, classes, generator=generator)
    labels = torch.randint(classes, (images,), generator=generator)
    totals = measured(objective, logits, labels, parts)
    got, scores, known = totals.values(objective.meters), logits.double().softmax(1).numpy(), list(range(classes))
    assert totals.images == images
    assert got["loss"] == pytest.approx(log_loss(labels, scores, labels=known), rel=1e-5)
    assert got["top1"] == pytest.approx(100 * top_k_accuracy_score(labels, scores, k=1, labels=known))
    assert got["top5"] == pytest.approx(100 * top_k_accuracy_score(labels, scores, k=5, labels=known))


def test_the_top_five_are_reported_where_there_are_more_classes_than_that() -> None:
    logits, objective = torch.tensor([[0.5, 0.4, 0.3, 0.2, 0.1, 0.0]]), CrossEntropy()
    five = measured(objective, logits[:, :5], torch.tensor([4])).values(objective.meters)
    assert list(five) == ["loss", "top1"]
    for label, top5 in ((4, 100), (5, 0)):
        six = measured(objective, logits, torch.tensor([label])).values(objective.meters)
        assert list(six) == ["loss", "top1", "top5"]
        assert six["top5"] == top5


def test_counts_stay_exact_beyond_what_float32_holds() -> None:
    totals = Totals.zero().plus({"top1": torch.tensor(2**24)}, 2**24).plus({"top1": torch.tensor(1)}, 1)
    assert totals.flat().tolist() == [2**24 + 1, 2**24 + 1]
    many = totals.with_values(torch.tensor([2.0**53 - 1, 2.0**53 - 1], dtype=torch.float64))
    assert many.plus({"top1": torch.tensor(1.0)}, 1).flat().tolist() == [2**53, 2**53]


def test_a_logit_that_is_no_number_is_not_taken_for_a_hit() -> None:
    assert hits(torch.full((4, 3), float("nan")), torch.tensor([1, 1, 2, 2])) == 0


def test_the_means_of_no_images_are_no_numbers() -> None:
    nothing, objective = (torch.empty(0, 10), torch.empty(0, dtype=torch.int64)), Balanced()
    got = Totals.zero().plus(objective.measure(*nothing), 0).values(objective.meters)
    assert list(got) == ["loss", "top1", "top5", "balanced"]
    assert all(math.isnan(value) for value in got.values())
    assert Totals.zero().values(objective.meters) == {}


@given(
    images=st.integers(1, 40), classes=st.integers(2, 9), seed=st.integers(0, 1000), smoothing=st.sampled_from([0.0, 0.1, 0.6])
)
@settings(deadline=None)  # the first backward pass of a process takes a second
def test_the_loss_is_torchs_for_ids_and_for_soft_targets(images: int, classes: int, seed: int, smoothing: float) -> None:
    generator, objective = torch.Generator().manual_seed(seed), CrossEntropy(smoothing)
    logits = 3 * torch.randn(images, classes, generator=generator)
    ids = torch.randint(classes, (images,), generator=generator)
    soft = torch.rand(images, classes, generator=generator).softmax(1)
    for targets in (ids, soft, F.one_hot(ids, classes).float()):
        of_ours, of_torch = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        expected = F.cross_entropy(of_torch, targets, label_smoothing=smoothing)
        loss, sums = objective.loss_and_sums(of_ours, targets)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(objective.loss(logits, targets), expected.detach())
        torch.testing.assert_close(*(torch.autograd.grad(*pair) for pair in ((loss, of_ours), (expected, of_torch))))
        # What is reported is the plain loss, while training and in an evaluation, whatever the smoothing is.
        plain = F.cross_entropy(logits, targets).double() * images
        assert list(sums) == ["loss", "top1"]
        assert not sums["loss"].requires_grad
        torch.testing.assert_close(sums["loss"], plain, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(objective.measure(logits, targets)["loss"].double(), plain, rtol=1e-5, atol=1e-5)


def test_the_class_of_a_soft_target_is_that_of_the_most_weight() -> None:
    ids = torch.tensor([2, 0, 1])
    assert class_ids(ids) is ids
    soft = torch.tensor([[0.1, 0.3, 0.6], [0.5, 0.3, 0.2], [0.2, 0.5, 0.3]])
    assert torch.equal(class_ids(soft), ids)
    logits = torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    assert hits(logits, soft) == hits(logits, ids) == 2
    wide = F.pad(soft, (0, 5))
    assert METERS["top5"].sums(torch.arange(8.0).expand(3, 8), wide) == METERS["top5"].sums(torch.arange(8.0).expand(3, 8), ids)


@given(images=st.integers(1, 60), classes=st.integers(2, 12), parts=st.integers(1, 7), seed=st.integers(0, 1000))
def test_a_meter_may_sum_up_many_numbers(images: int, classes: int, parts: int, seed: int) -> None:
    generator, objective = torch.Generator().manual_seed(seed), Balanced()
    logits = torch.randn(images, classes, generator=generator)
    labels = torch.randint(classes, (images,), generator=generator)
    totals = measured(objective, logits, labels, parts)
    assert totals.sums["balanced"].shape == (2, classes)
    assert totals.flat().shape == (2 + (classes > 5) + 2 * classes + 1,)
    assert totals.flat().dtype == torch.float64
    again = totals.with_values(totals.flat())
    assert list(again.sums) == list(totals.sums)
    assert all(torch.equal(again.sums[name], each) for name, each in totals.sums.items())
    assert again.images == totals.images == images
    doubled = totals.with_values(2 * totals.flat())  # as two ranks with the same images would add up
    expected = 100 * recall_score(labels, logits.argmax(1), labels=labels.unique(), average="macro")
    for each in (totals, again, doubled):
        got = each.values(objective.meters)
        assert got["balanced"] == pytest.approx(expected)
        assert objective.score(got) == got["balanced"]


def test_a_meter_that_is_better_lower_scores_so() -> None:
    class ByLoss(CrossEntropy):
        main = "loss"

    assert ByLoss().score({"loss": 0.5, "top1": 10.0}) > ByLoss().score({"loss": 0.6, "top1": 90.0})
    assert CrossEntropy().score({"loss": 0.5, "top1": 10.0}) < CrossEntropy().score({"loss": 0.6, "top1": 90.0})


def test_an_objective_of_ones_own_needs_no_more_than_a_loss() -> None:
    class Squared(Objective):
        def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
            return (logits.softmax(1) - targets).square().sum(1).mean()

    torch.manual_seed(0)
    logits, targets, objective = torch.randn(7, 4), torch.rand(7, 4), Squared()
    loss, sums = objective.loss_and_sums(logits, targets)
    got = measured(objective, logits, targets, parts=3).values(objective.meters)
    assert list(got) == ["loss", "top1"]
    assert got["loss"] == pytest.approx(loss.item()) == pytest.approx(sums["loss"].item() / 7)
    assert got["top1"] == pytest.approx(100 * (logits.argmax(1) == targets.argmax(1)).float().mean().item())
    assert objective.name == "Squared"
