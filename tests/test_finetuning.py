"""Fine-tuning: a part of the network that learns later, and layers that learn at rates of their own."""

from collections import defaultdict
from pathlib import Path

import pytest
import timm
import torch
from conftest import SMALL, assert_same, launch, weights
from test_loop import run, run_killed
from timm.optim import param_groups_layer_decay
from torch import nn
from torchvision import models

from distrib.config import OptimConfig
from distrib.errors import UserError
from distrib.models.depth import depths
from distrib.training.groups import parameter_groups, table

KEYS = ["epochs=2", "save_every=1", "keep=99", "optim.ema_decay=0.5"]  # 23 steps an epoch
FROZEN = 9  # steps
FREEZE = f"model.freeze={FROZEN / 23}"
BATCH = "batch_size=60"


def at(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(run_dir / f"checkpoints/step_{step:08d}/model.safetensors")


def moved(run_dir: Path, step: int, later: int) -> set[str]:
    """The tensors of the network that differ between two steps."""
    before, after = at(run_dir, step), at(run_dir, later)
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_only_the_last_layer_learns_until_the_thaw_and_then_all_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = run(tmp_path, *KEYS, BATCH, FREEZE)
    assert f"until step {FROZEN} (epoch 0.391304), only the last layer learns" in capsys.readouterr().out
    assert moved(tmp_path, 1, FROZEN) == {"head.weight", "head.bias"}
    assert moved(tmp_path, FROZEN, FROZEN + 1) == at(tmp_path, 1).keys()  # batch statistics too
    assert all(each.requires_grad for each in state.network.parameters())
    assert all(each.training for each in state.network.modules())


def test_a_network_may_stay_frozen_and_is_given_back_as_it_was(tmp_path: Path) -> None:
    class Network(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 10))
            self[1].requires_grad_(False).eval()  # the user's own

    network = Network()
    state = run(tmp_path, *KEYS, BATCH, "model.freeze=9", network=network)
    assert moved(tmp_path, 1, state.step) == {"4.weight", "4.bias"}
    assert [each.requires_grad for each in network.parameters()] == [True, True, False, False, True, True, True, True]
    assert [each.training for each in network] == [True, False, True, True, True]


def test_a_network_without_a_last_layer_cannot_be_frozen(tmp_path: Path) -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(64, 10))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.flatten(1) @ self.weight

    with pytest.raises(UserError, match=r"^model.freeze needs a network whose last layer is a linear layer or a conv"):
        run(tmp_path, *KEYS, BATCH, FREEZE, network=Network)


@pytest.mark.parametrize(("optimizer", "kills"), [("sgd", [1, FROZEN - 1, FROZEN]), ("adamw", [FROZEN, 12]), ("muon", [7, 10])])
def test_a_run_that_is_killed_across_the_thaw_ends_as_if_it_had_not_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str, kills: list[int]
) -> None:
    keys = ["epochs=1", "save_every=4", BATCH, FREEZE, f"optim.name={optimizer}", "optim.lr=0.01", "optim.layer_decay=0.7"]
    run(tmp_path / "whole", *keys)
    for step in kills:
        run_killed(monkeypatch, step, tmp_path / "killed", *keys)
    run(tmp_path / "killed", *keys)
    assert_same(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.slow
def test_two_ranks_freeze_and_thaw_together_and_exchange_what_learns(tmp_path: Path) -> None:
    keys = [*SMALL, *KEYS, BATCH, FREEZE, "precision=no", "model.norm=group"]
    for name, world, more in (("one", 1, "micro_batches=2"), ("two", 2, "micro_batches=1"), ("cut", 2, "micro_batches=3")):
        done = launch(world, "train.py", *keys, more, "threads=1", f"run_dir={tmp_path / name}")
        assert done.returncode == 0, done.stderr
        assert moved(tmp_path / name, 1, FROZEN) == {"head.weight", "head.bias"}
        assert moved(tmp_path / name, FROZEN, FROZEN + 1) == at(tmp_path / name, 1).keys()
    one = weights(tmp_path / "one")
    for name in ("two", "cut"):
        other = weights(tmp_path / name)
        assert max((one[key].double() - other[key].double()).abs().max().item() for key in one if "sums." not in key) < 1e-3


TIMMS = [
    "resnet50",
    "vit_small_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "convnext_tiny",
    "tf_efficientnet_lite0",
    "swin_tiny_patch4_window7_224",
    "swinv2_tiny_window8_256",
    "mobilenetv3_small_100",
    "regnety_002",
    "mixer_s16_224",
    "eva02_tiny_patch14_224",
    "levit_128",
]


@pytest.mark.parametrize("name", TIMMS)
def test_groups_of_layer_decay_are_those_of_timm(name: str) -> None:
    network = timm.create_model(name, num_classes=7)
    names = {id(each): key for key, each in network.named_parameters()}
    exempt = network.no_weight_decay() if hasattr(network, "no_weight_decay") else ()
    theirs = param_groups_layer_decay(network, 0.05, no_weight_decay_list=exempt, layer_decay=0.6)
    ours = parameter_groups(network, OptimConfig(name="adamw", weight_decay=0.05, layer_decay=0.6))

    def sets(groups: list, scale: str) -> dict[tuple[float, float], set[str]]:
        found = defaultdict(set)
        for group in groups:
            found[round(group[scale], 12), group["weight_decay"]] |= {names[id(each)] for each in group["params"]}
        return found

    assert sets(ours, "scale") == sets(theirs, "lr_scale")


# The first weight of some layers, by their number.
LAYERS = {
    "resnet18": (10, {0: "conv1.weight", 1: "layer1.0.conv1.weight", 8: "layer4.1.conv1.weight", 9: "fc.weight"}),
    "vit_b_16": (14, {0: "class_token", 1: "encoder.layers.encoder_layer_0.ln_1.weight", 13: "heads.head.weight"}),
    "convnext_tiny": (23, {0: "features.0.0.weight", 4: "features.2.0.weight", 22: "classifier.0.weight"}),
    "efficientnet_b0": (19, {1: "features.1.0.block.0.0.weight", 17: "features.8.0.weight", 18: "classifier.1.weight"}),
    "vgg11": (11, {0: "features.0.weight", 8: "classifier.0.weight", 10: "classifier.6.weight"}),
    "densenet121": (63, {1: "features.denseblock1.denselayer1.norm1.weight", 62: "classifier.weight"}),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_layers_of_other_networks_are_their_blocks(name: str) -> None:
    with torch.device("meta"):
        network = models.get_model(name, weights=None)
    found = depths(network)
    count, firsts = LAYERS[name]
    assert [*found] == [key for key, _ in network.named_parameters()]
    assert {*found.values()} == {*range(count)}
    assert {layer: next(key for key in found if found[key] == layer) for layer in firsts} == firsts


def test_the_generic_rule_gives_the_layers_that_timm_names_by_hand() -> None:
    for name in ("resnet50", "resnetv2_50", "mixer_s16_224"):
        with torch.device("meta"):
            network = timm.create_model(name)
        said = depths(network)
        plain = nn.Module()
        for key, child in network.named_children():
            plain.add_module(key, child)
        assert depths(plain) == {key: said[key] for key, _ in plain.named_parameters()}, name


def test_the_table_of_rates_has_a_row_for_each_layer() -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Linear(4, 2))
    lines = table(parameter_groups(network, OptimConfig(lr=0.1, layer_decay=0.5, weight_decay=0.01)), 0.1)
    assert [line.split() for line in lines] == [
        ["weights", "tensors", "numbers", "peak", "lr", "decay"],
        ["layer", "0", "2", "40", "0.05", "0.01,", "none", "for", "1"],
        ["layer", "1", "2", "10", "0.1", "0.01,", "none", "for", "1"],
    ]
