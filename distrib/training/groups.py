"""Parameter groups: weight decay, orthogonal steps and learning rate by kind of weight."""

from itertools import product
from typing import Any

from torch import nn

from distrib.config import OptimConfig
from distrib.models.depth import depths
from distrib.models.weights import first_and_last

# Parts of a name that mark a weight as an offset or a scale, whatever its shape. It does not decay, as in torchvision's
# references and timm: class tokens, position embeddings, tables of relative positions, layer scale, Swin V2's logit scale and
# the network that computes its table. The first row has torchvision's names, the second timm's.
OFFSETS = {
    "class_token", "pos_embedding", "relative_position_bias_table", "layer_scale", "logit_scale", "cpb_mlp",
    "cls_token", "dist_token", "pos_embed", "absolute_pos_embed", "attention_biases",
}  # fmt: skip


def group_names(model: nn.Module) -> dict[str, list[str]]:
    """The names of the trainable weights by group, in the order of the network.

    matrices: weights of convolutions and linear layers, which decay. head: that of the last layer, or layers. vectors: biases
    and the weights of norms. offsets: see OFFSETS, and those that the network itself exempts from weight decay, as timm's do.
    """
    exempt = OFFSETS | {*(model.no_weight_decay() if hasattr(model, "no_weight_decay") else ())}  # type: ignore[operator]
    names: dict[str, list[str]] = {"matrices": [], "head": [], "vectors": [], "offsets": []}
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            vector, offset = weight.dim() < 2, not exempt.isdisjoint([name, *name.split(".")])
            names["vectors" if vector else "offsets" if offset else "matrices"].append(name)
    last = {*first_and_last(model)[1]}
    names["head"] = [name for name in names["matrices"] if name in last] or names["matrices"][-1:]
    names["matrices"] = [name for name in names["matrices"] if name not in names["head"]]
    return names


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Groups for an optimizer, each with a learning rate of `scale` times that of the step.

    Muon makes the steps of matrices orthogonal, but not those of the head, where each class has a row of its own. With
    `layer_decay`, each layer has groups of its own (Clark et al., "ELECTRA", 2020).
    """
    names = group_names(model)
    muon, decays = config.name == "muon", {"weight_decay": config.weight_decay}
    if not muon and config.head_lr == 1:  # a group costs about 25 us per step
        names["matrices"], names["head"] = [*names["matrices"], *names["head"]], []
    kinds: dict[str, dict[str, Any]] = {
        "matrices": {"scale": 1.0, **decays, **({"inertia": config.momentum} if muon else {})},
        "head": {"scale": config.head_lr, **decays},
        "vectors": {"scale": config.bias_lr, "weight_decay": 0.0},
        "offsets": {"scale": 1.0, "weight_decay": 0.0},
    }
    if config.layer_decay == 1:
        return [of_weights(model, names[kind]) | kinds[kind] | {"name": kind} for kind in kinds if names[kind]]
    depth = depths(model)
    top, groups = max(depth.values()), []
    for layer, kind in product(range(top + 1), kinds):
        own = [name for name in names[kind] if depth.get(name, top) == layer]
        scale = kinds[kind]["scale"] * config.layer_decay ** (top - layer)
        groups += [of_weights(model, own) | kinds[kind] | {"scale": scale, "name": f"layer {layer}"}] if own else []
    return groups


def of_weights(model: nn.Module, names: list[str]) -> dict[str, Any]:
    return {"params": [model.get_parameter(name) for name in names]}


def table(groups: list[dict[str, Any]], rate: float) -> list[str]:
    """What learns at which rate, as lines; `rate` is the peak of the learning rate."""
    rows: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for group in groups:
        rows.setdefault((group["name"], group["scale"]), []).append(group)
    lines = [f"{'weights':<10}{'tensors':>8}{'numbers':>13}{'peak lr':>11}  decay"]
    for (name, scale), found in rows.items():
        weights = [weight for group in found for weight in group["params"]]
        exempt = sum(len(group["params"]) for group in found if not group["weight_decay"])
        decay = max(group["weight_decay"] for group in found)
        words = f"{decay:g}" + (f", none for {exempt}" if exempt < len(weights) and exempt else "")
        numbers = sum(each.numel() for each in weights)
        lines.append(f"{name:<10}{len(weights):>8,}{numbers:>13,}{rate * scale:>11.3g}  {words}")
    return lines
