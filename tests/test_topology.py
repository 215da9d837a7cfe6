"""The same config on 1, 2 and 3 ranks is the same run: 997 images to train on, 101 to validate, batches of 60."""

from pathlib import Path

import pytest
import torch
import uneven
from conftest import launch, points, weights
from sklearn.metrics import accuracy_score, log_loss, top_k_accuracy_score
from torch import Tensor

from distrib.config import ModelConfig
from distrib.data.augment import Normalize
from distrib.models.build import build_model

pytestmark = pytest.mark.slow

WORLDS = [1, 2, 3]
PER_EPOCH = uneven.TRAIN // 60


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every way of training on every number of ranks, one launch for each number."""
    root = tmp_path_factory.mktemp("topology")
    uneven.write_folder(root / "folder")
    for world in WORLDS:
        done = launch(world, Path(uneven.__file__), root / str(world))
        assert done.returncode == 0, done.stderr
    return root


def seen(runs: Path, world: int, way: str, what: str) -> list[Tensor]:
    """The ids, or the batches, of every global step: the ranks' shares, joined in the order of the ranks."""
    ranks = [torch.load(runs / str(world) / way / f"rank{rank}.pt")[what] for rank in range(world)]
    return [torch.cat(shares) for shares in zip(*ranks, strict=True)]


@pytest.mark.parametrize("way", uneven.WAYS)
@pytest.mark.parametrize("world", WORLDS)
def test_every_step_sees_the_same_images_with_the_same_noise(runs: Path, world: int, way: str) -> None:
    ids, batches = seen(runs, world, way, "ids"), seen(runs, world, way, "batches")
    assert len(ids) == 2 * PER_EPOCH
    assert all(map(torch.equal, ids, seen(runs, 1, "memory", "ids")))
    alone = "memory" if way in ("memory", "micro") else "files"
    assert all(map(torch.equal, batches, seen(runs, 1, alone, "batches")))


@pytest.mark.parametrize("way", uneven.WAYS)
@pytest.mark.parametrize("world", WORLDS)
def test_an_epoch_shows_no_image_twice_and_leaves_out_only_the_tail(runs: Path, world: int, way: str) -> None:
    ids = seen(runs, world, way, "ids")
    for epoch in (ids[:PER_EPOCH], ids[PER_EPOCH:]):
        assert len(torch.cat(epoch).unique()) == PER_EPOCH * 60


@pytest.mark.parametrize("way", uneven.WAYS)
@pytest.mark.parametrize("world", WORLDS)
def test_the_final_weights_are_those_of_one_rank(runs: Path, world: int, way: str) -> None:
    alone = weights(runs / "1" / ("memory" if way in ("memory", "micro") else "files"))
    got = weights(runs / str(world) / way)
    assert got.keys() == alone.keys()
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, alone[name], atol=1e-12, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("way", uneven.WAYS)
@pytest.mark.parametrize("world", [2, 3])
def test_a_step_exchanges_its_gradient_once_in_however_many_parts_it_is(runs: Path, world: int, way: str) -> None:
    rank = torch.load(runs / str(world) / way / "rank0.pt")
    weights = sum(each.numel() for each in rank["network"].values())
    assert rank["exchanged"] == [weights] * (2 * PER_EPOCH)


@pytest.mark.parametrize("world", WORLDS)
def test_all_ranks_end_with_the_same_bits(runs: Path, world: int) -> None:
    networks = [torch.load(runs / str(world) / "memory" / f"rank{rank}.pt")["network"] for rank in range(world)]
    for network in networks[1:]:
        assert all(map(torch.equal, network.values(), networks[0].values()))


@pytest.mark.parametrize("group", ["val", "val_ema"])
@pytest.mark.parametrize("way", ["memory", "micro"])
@pytest.mark.parametrize("world", WORLDS)
def test_logged_metrics_are_those_of_sklearn_in_one_process(runs: Path, world: int, way: str, group: str) -> None:
    run_dir = runs / str(world) / way
    source = uneven.uneven()
    network = build_model(ModelConfig(norm="group", width=16), source.shape, len(source.classes)).double()
    prefix = "model." if group == "val" else "ema."
    network.load_state_dict({k.removeprefix(prefix): v for k, v in weights(run_dir).items() if k.startswith(prefix)})
    normalize = Normalize(*(torch.tensor(each).double() for each in (source.mean, source.std)), source.shape[2])
    with torch.no_grad():
        logits = network.eval()(normalize(source.val.images))
    labels, scores = source.val.targets.numpy(), logits.double().softmax(1).numpy()

    logged = {name: points(run_dir)[f"{group}/{name}"][-1] for name in ("loss", "top1", "top5")}
    assert logged["top1"] == (2 * PER_EPOCH, pytest.approx(100 * accuracy_score(labels, scores.argmax(1)), rel=1e-6))
    assert logged["top5"] == (2 * PER_EPOCH, pytest.approx(100 * top_k_accuracy_score(labels, scores, k=5), rel=1e-6))
    assert logged["loss"] == (2 * PER_EPOCH, pytest.approx(log_loss(labels, scores), rel=1e-5))


@pytest.mark.parametrize("world", WORLDS)
def test_only_rank_0_writes_events_and_each_step_stands_once(runs: Path, world: int) -> None:
    run_dir = runs / str(world) / "memory"
    assert len(list(run_dir.glob("events.out.tfevents.*"))) == 1
    curves = points(run_dir)
    train = {f"train/{name}" for name in ("loss", "top1", "lr", "images_per_second")}
    assert train | {"val/loss", "val/top1", "val/top5"} <= curves.keys()
    for tag in train:
        assert [step for step, _ in curves[tag]] == [2 * PER_EPOCH]  # log_every is 50: one report, at the end
    assert [step for step, _ in curves["val/top1"]] == [PER_EPOCH, 2 * PER_EPOCH]
