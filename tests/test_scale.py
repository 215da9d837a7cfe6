"""The model on paper: what it predicts of what is published, and that it moves as it should."""

import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest
import torch
from conftest import ROOT, launch
from torch import nn

from distrib import cli
from distrib.command_line import load_config
from distrib.config import DataConfig
from distrib.data import SOURCES
from distrib.data.datasets import load_source
from distrib.scale.cluster import MEASURED, Cluster
from distrib.scale.network import SETS, Bucket, Network, Roofline, data_of, network_of
from distrib.scale.step import CALIBRATION, MLPERF, RESNET50, Speed, calibrated, mlperf_network, step_of

CLUSTER = Cluster()
GPUS = [8 << power for power in range(10)]


@pytest.fixture(scope="module")
def resnet50() -> Network:
    return network_of(RESNET50, CLUSTER)


@pytest.fixture(scope="module")
def speed() -> Speed:
    return calibrated(mlperf_network(CLUSTER), CLUSTER)


def rows(told: str) -> list[list[str]]:
    """The cells of the first table that is printed."""
    return [line.split() for line in told.split("\n\n")[1].splitlines()[1:]]


@pytest.mark.parametrize("jitter", [0.0, 0.01, 0.02])
def test_mlperfs_results_are_predicted_within_five_percent_whatever_jitter_is_assumed(jitter: float) -> None:
    cluster = Cluster(jitter=jitter)
    network = mlperf_network(cluster)
    mlperf = calibrated(network, cluster)
    errors = [step_of(network, mlperf, gpus, share, cluster).rate / gpus / rate - 1 for gpus, share, rate, _ in MLPERF]
    assert errors[: len(CALIBRATION)] == pytest.approx([0, 0], abs=1e-9)
    assert max(map(abs, errors[len(CALIBRATION) :])) < 0.05


def test_measured_all_reduces_are_predicted_within_forty_percent() -> None:
    for gpus, size, seconds, _ in MEASURED:
        assert CLUSTER.all_reduce(size, gpus) == pytest.approx(seconds, rel=0.4)


def test_an_all_reduce_takes_longer_with_more_bytes_and_with_more_nodes() -> None:
    sizes = [10**power for power in range(2, 10)]
    for gpus in (2, *GPUS):
        assert all(a < b for a, b in pairwise(CLUSTER.all_reduce(size, gpus) for size in sizes)), gpus
    for size in sizes:
        assert all(a < b for a, b in pairwise(CLUSTER.all_reduce(size, gpus) for gpus in GPUS)), size
    assert CLUSTER.all_reduce(10**9, 1) == 0


def test_an_all_reduce_comes_to_the_bandwidth_of_the_links() -> None:
    size = 1e12
    assert 2 * 7 / 8 * size / CLUSTER.all_reduce(size, 8) == pytest.approx(CLUSTER.nvls, rel=1e-3)
    assert 2 * 63 / 64 * size / CLUSTER.all_reduce(size, 64) == pytest.approx(CLUSTER.network, rel=1e-3)


def test_efficiency_falls_with_more_gpus_and_rises_with_more_images_each(resnet50: Network, speed: Speed) -> None:
    def efficiency(gpus: int, share: int) -> float:
        return step_of(resnet50, speed, gpus, share, CLUSTER).rate / gpus / step_of(resnet50, speed, 1, share, CLUSTER).rate

    assert efficiency(1, 64) == 1
    assert all(a > b for a, b in pairwise(efficiency(gpus, 64) for gpus in (1, *GPUS)))
    assert all(a < b for a, b in pairwise(efficiency(512, share) for share in (8, 16, 32, 64, 128, 256)))


def test_an_exchange_is_hidden_behind_the_backward_pass_as_far_as_that_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    network = Network(
        1, 0, layers=1, image=0.0, forward=0.25, update=1.0, buckets=(Bucket(0, 0.0), Bucket(0, 0.5), Bucket(0, 1.0))
    )
    seconds = {"each": 0.0}
    monkeypatch.setattr(Cluster, "all_reduce", lambda *_: seconds["each"])
    for seconds["each"], exposed in ((1.0, 1.0), (3.0, 3.0), (4.0, 6.0)):  # passes: 8 s, of which backward is from 2 to 8
        step = step_of(network, Speed(layer=8.0, image=1.0), 8, 1, Cluster(jitter=0))
        assert (step.compute, step.exposed, step.seconds) == (9, exposed, 9 + exposed)


@pytest.mark.slow
def test_the_buckets_are_those_that_ddp_makes() -> None:
    configs = ["configs/fashion_mnist.yaml", "configs/cifar10.yaml"]
    done = launch(2, "tests/bucketed.py", *configs)
    assert done.returncode == 0, done.stderr
    for config, told in zip(configs, done.stdout.splitlines(), strict=True):
        buckets = network_of(load_config([config]), CLUSTER).buckets
        assert told.split() == [str(bucket.size) for bucket in buckets]
        assert [bucket.ready for bucket in buckets] == sorted(bucket.ready for bucket in buckets)
        assert buckets[-1].ready == pytest.approx(1)


@pytest.mark.parametrize("groups", [1, 4])
def test_a_convolution_costs_its_multiplications_and_its_traffic_forward_and_twice_that_backward(groups: int) -> None:
    with torch.device("meta"):
        layer, images = nn.Conv2d(8, 16, 3, groups=groups), torch.zeros(2, 8, 12, 12, requires_grad=True)
    outputs = 2 * 16 * 10 * 10
    forward = 2 * outputs * 9 * 8 / groups / CLUSTER.flops + 2 * outputs * CLUSTER.accesses / 3 / CLUSTER.memory
    with Roofline(CLUSTER) as roofline:
        result = layer(images)
        assert (roofline.seconds, roofline.layers) == (pytest.approx(forward), 1)
        result.sum().backward()
    assert roofline.seconds == pytest.approx(3 * forward)


def test_a_networks_facts_are_those_that_are_known_of_it(resnet50: Network) -> None:
    assert (resnet50.weights, resnet50.layers) == (25_557_032, 54)
    assert resnet50.update == pytest.approx(5 * 4 * resnet50.weights / CLUSTER.memory)
    multiplications = Cluster(accesses=0)
    assert network_of(RESNET50, multiplications).image * multiplications.flops == pytest.approx(6 * 4.09e9, rel=0.02)
    adamw = replace(RESNET50, optim=replace(RESNET50.optim, name="adamw", ema_decay=0.9))
    assert network_of(adamw, CLUSTER).state - resnet50.state == 4 * 2 * resnet50.weights


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "regnet_y_400mf", "vit_b_16"])
def test_torchvisions_other_networks_are_gone_through_too(name: str) -> None:
    network = network_of(load_config(["configs/imagenet.yaml", f"model.name={name}"]), CLUSTER)
    assert sum(bucket.size for bucket in network.buckets) == 4 * network.weights
    assert 0.32 < network.forward < 0.36


def test_gradients_that_a_hook_rounds_are_half_as_large() -> None:
    whole, rounded = (network_of(replace(RESNET50, comm_hook=hook), CLUSTER).buckets for hook in ("no", "bf16"))
    assert [2 * bucket.size for bucket in rounded] == [bucket.size for bucket in whole]


def test_every_data_set_is_known_without_being_loaded() -> None:
    assert {*SETS, "folder", "csv"} == SOURCES.keys()
    digits = load_source(DataConfig(), download=False)
    assert data_of(DataConfig()) == (digits.shape, len(digits.classes), len(digits.train))


def test_float32_takes_twice_as_long_for_each_image() -> None:
    exact = network_of(replace(RESNET50, precision="no"), CLUSTER)
    mixed = network_of(RESNET50, CLUSTER)
    assert (exact.image, exact.update) == (pytest.approx(2 * mixed.image), mixed.update)


@pytest.mark.parametrize("gpus", [1, 8, 512])
def test_a_step_waits_for_the_slowest_rank_as_the_largest_of_random_numbers_has_it(gpus: int) -> None:
    draws = torch.randn(20_000, gpus, generator=torch.Generator().manual_seed(0)).amax(1)
    assert CLUSTER.waiting(gpus) == pytest.approx(CLUSTER.jitter * draws.mean().item(), rel=0.02, abs=0.02 * CLUSTER.jitter)


def survived(stall: float, interval: float, gpus: int) -> float:
    """The part of the time that is not lost in a long run whose failures come at random."""
    rate, chance = CLUSTER.failures * gpus / 86_400, Random(0)
    clock = useful = 0.0
    while clock < 20_000 / rate:
        lasts = chance.expovariate(rate)
        useful += lasts // (interval + stall) * interval
        clock += lasts + CLUSTER.restart
    return useful / clock


def test_goodput_is_that_of_a_run_whose_failures_come_at_random_and_the_interval_the_best_one() -> None:
    stall, gpus = 2.0, 16_384
    interval, goodput = CLUSTER.goodput(stall, gpus)
    assert goodput == pytest.approx(survived(stall, interval, gpus), abs=0.002)
    assert survived(stall, interval, gpus) > max(survived(stall, factor * interval, gpus) for factor in (0.5, 2.0))
    assert CLUSTER.goodput(stall, 8)[1] > goodput


@pytest.mark.parametrize("config", sorted(ROOT.glob("configs/*.yaml")), ids=lambda path: path.stem)
def test_each_config_is_predicted(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["scale", str(config), "--gpus", "8,96,4096"]) == 0
    assert [row[0] for row in rows(capsys.readouterr().out)] == ["8", "96", "4,096"]


@pytest.mark.slow
def test_the_page_shows_what_the_command_prints() -> None:
    command = [sys.executable, "-m", "distrib", "scale", "configs/imagenet.yaml"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout in (ROOT / "docs/scale.md").read_text()


def test_one_gpu_is_as_fast_as_it_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["scale", "--gpus", "1,8", "--per-gpu", "32", "--measured", "2500@32"]) == 0
    alone, eight = rows(capsys.readouterr().out)
    assert (alone[0], alone[1], alone[6], alone[7]) == ("1", "32", "2,500", "100.0%")
    assert float(eight[5]) > float(alone[5])


def test_a_batch_that_is_divided_stays_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["scale", "batch_size=512", "--global-batch", "--gpus", "8..64"]) == 0
    assert [row[:2] for row in rows(capsys.readouterr().out)] == [["8", "64"], ["16", "32"], ["32", "16"], ["64", "8"]]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--gpus"], "--gpus: '' is not a number from 1 to 999,999,999: write it as in --gpus 8..4096 or 8,96,2528"),
        (["--gpus", "8..many"], "--gpus: 'many' is not a number"),
        (["--gpus", "64..8"], "--gpus 64..8: the end is below the start"),
        (["--gpus", "8,12"], "12 GPUs are not whole nodes of 8: use 8 or 16"),
        (["--per-gpu", "0"], "--per-gpu: '0' is not a number"),
        (["--per-gpu", "4", "--global-batch"], "give one of them"),
        (["--measured", "2500"], "--measured: '' is not a number from 1 to 999,999,999: write it as in --measured 2500@256"),
        (["--measured", "999999999@1"], "--measured 999999999@1 is faster than the optimizer alone allows"),
        (["--global-batch", "batch_size=96", "--gpus", "64"], "batch_size 96 does not divide among 64 ranks: use 64 or 128"),
        (["--gpu", "8"], "unexpected argument '--gpu': "),
        (["data.name=svhn"], "there is no data set 'svhn': use one of digits, mnist"),
        (["model.name=resnet5"], "there is no model 'resnet5'"),
        (["model.name=alexnet"], "model alexnet does not accept images of 1x8x8"),
        (["optim.lrr=1"], "there is no key optim.lrr: did you mean optim.lr?"),
    ],
)
def test_a_mistake_on_the_command_line_is_told_in_one_line(
    args: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["scale", *args]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("distrib: ")
    assert words in told.err
    assert told.err.count("\n") == 1
