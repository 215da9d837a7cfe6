"""Parameter groups: weight decay, orthogonal steps and learning rate by kind of weight."""

from typing import Any

from torch import nn

from distrib.config import OptimConfig

# Parts of a name that mark a weight as an offset or a scale, whatever its shape. It does not decay, as in torchvision's
# references and timm: class tokens, position embeddings, tables of relative positions, layer scale, Swin V2's logit scale and
# the network that computes its table. The first row has torchvision's names, the second timm's.
OFFSETS = {
    "class_token", "pos_embedding", "relative_position_bias_table", "layer_scale", "logit_scale", "cpb_mlp",
    "cls_token", "dist_token", "pos_embed", "absolute_pos_embed",
}  # fmt: skip


def group_names(model: nn.Module) -> dict[str, list[str]]:
    """The names of the trainable weights by group, in the order of the network.

    matrices: weights of convolutions and linear layers, which decay. head: the last of these. vectors: biases and the weights
    of norms. offsets: see OFFSETS.
    """
    names: dict[str, list[str]] = {"matrices": [], "head": [], "vectors": [], "offsets": []}
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            vector, offset = weight.dim() < 2, not OFFSETS.isdisjoint(name.split("."))
            names["vectors" if vector else "offsets" if offset else "matrices"].append(name)
    names["head"] = [names["matrices"].pop()] if names["matrices"] else []
    return names


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Groups for an optimizer, each with a learning rate of `scale` times that of the step.

    Muon makes the steps of matrices orthogonal, but not those of the head, where each class has a row of its own.
    """
    weights, names = dict(model.named_parameters()), group_names(model)
    muon, decays = config.name == "muon", {"weight_decay": config.weight_decay}
    matrices, head = names["matrices"], names["head"]
    if not muon and config.head_lr == 1:  # a group costs about 25 us per step
        matrices, head = [*matrices, *head], []
    groups: list[dict[str, Any]] = [
        {"params": matrices, "scale": 1.0, **decays, **({"inertia": config.momentum} if muon else {})},
        {"params": head, "scale": config.head_lr, **decays},
        {"params": names["vectors"], "scale": config.bias_lr, "weight_decay": 0.0},
        {"params": names["offsets"], "scale": 1.0, "weight_decay": 0.0},
    ]
    return [group | {"params": [weights[name] for name in group["params"]]} for group in groups if group["params"]]
