"""Which weights decay and which are made orthogonal, in networks of torchvision."""

import pytest
import timm
import torch
from torch import nn
from torchvision import models

from distrib.config import OptimConfig
from distrib.training.groups import group_names, parameter_groups
from distrib.training.optim import build_optimizer


def blocks(**depths: int) -> list[str]:
    """features.1.0, features.1.1 and so on, of stages with so many blocks."""
    return [f"features.{stage.removeprefix('_')}.{block}" for stage, depth in depths.items() for block in range(depth)]


SWIN_T, SWIN_S = blocks(_1=2, _3=2, _5=6, _7=2), blocks(_1=2, _3=2, _5=18, _7=2)
TABLE = "attn.relative_position_bias_table"
MAXVIT = [
    f"blocks.{stage}.layers.{layer}.layers.{kind}_attention.attn_layer.1.relative_position_bias_table"
    for stage, depth in enumerate((2, 2, 5, 2))
    for layer in range(depth)
    for kind in ("window", "grid")
]
# What neither decays nor is made orthogonal although it has several dimensions, the last layer, and how many matrices and
# vectors there are: torchvision's references exempt the tables, tokens and embeddings, timm these and what else is here.
EXPECTED: dict[str, tuple[list[str], str, int, int]] = {
    "vit_b_16": (["class_token", "encoder.pos_embedding"], "heads.head", 49, 100),
    "vit_l_32": (["class_token", "encoder.pos_embedding"], "heads.head", 97, 196),
    "swin_t": ([f"{block}.{TABLE}" for block in SWIN_T], "head", 52, 108),
    "swin_s": ([f"{block}.{TABLE}" for block in SWIN_S], "head", 100, 204),
    "swin_v2_t": (
        [f"{block}.attn.{name}" for block in SWIN_T for name in ("logit_scale", "cpb_mlp.0.weight", "cpb_mlp.2.weight")],
        "head",
        52,
        120,
    ),
    "maxvit_t": (MAXVIT, "classifier.5", 150, 285),
    "convnext_tiny": ([f"{block}.layer_scale" for block in blocks(_1=3, _3=3, _5=9, _7=3)], "classifier.2", 58, 105),
    "convnext_base": ([f"{block}.layer_scale" for block in blocks(_1=3, _3=3, _5=27, _7=3)], "classifier.2", 112, 195),
    "resnet50": ([], "fc", 53, 107),
    "efficientnet_v2_s": ([], "classifier.1", 170, 281),
    "mobilenet_v3_small": ([], "classifier.3", 53, 88),
    "regnet_y_400mf": ([], "fc", 85, 139),
    "densenet121": ([], "classifier", 120, 243),
}


@pytest.mark.parametrize("name", EXPECTED)
@pytest.mark.filterwarnings("ignore:The default weight initialization")
def test_the_groups_of_a_network_are_those_of_its_authors(name: str) -> None:
    with torch.device("cpu" if name.startswith("regnet") else "meta"):  # a RegNet computes its widths with tensors
        network = models.get_model(name, weights=None, num_classes=10)
    groups, weights = group_names(network), dict(network.named_parameters())
    offsets, head, matrices, vectors = EXPECTED[name]
    assert groups["offsets"] == offsets
    assert groups["head"] == [f"{head}.weight"]
    assert (len(groups["matrices"]), len(groups["vectors"])) == (matrices, vectors)
    assert sorted(name for group in groups.values() for name in group) == sorted(weights)
    assert [
        name for name in groups["matrices"] if weights[name].numel() == max(weights[name].shape)
    ] == []  # no vector in disguise


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
def test_offsets_neither_decay_nor_become_orthogonal_and_learn_at_the_rate_of_matrices(optimizer: str) -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pos_embedding = nn.Parameter(torch.ones(1, 5, 4))
            self.middle, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    network = Network()
    config = OptimConfig(name=optimizer, lr=0.1, weight_decay=0.5, bias_lr=3, head_lr=5)
    groups = {
        name: group
        for group in parameter_groups(network, config)
        for name, each in network.named_parameters()
        if any(each is weight for weight in group["params"])
    }
    assert {name: (group["scale"], group["weight_decay"], "inertia" in group) for name, group in groups.items()} == {
        "pos_embedding": (1.0, 0.0, False),
        "middle.weight": (1.0, 0.5, optimizer == "muon"),
        "middle.bias": (3, 0.0, False),
        "head.weight": (5, 0.5, False),
        "head.bias": (3, 0.0, False),
    }
    step = build_optimizer(network, config)
    for each in network.parameters():
        each.grad = torch.zeros_like(each)
    step.step()
    assert torch.equal(network.pos_embedding, torch.ones(1, 5, 4))


def test_a_frozen_weight_is_in_no_group() -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    network[0].requires_grad_(False)
    assert group_names(network) == {"matrices": [], "head": ["1.weight"], "vectors": ["1.bias"], "offsets": []}


def test_each_of_several_last_layers_learns_as_the_head() -> None:
    network = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=3)
    assert group_names(network)["head"] == ["head.weight", "head_dist.weight"]
