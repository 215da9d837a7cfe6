"""The depth of a network's weights: in which of its layers each is, counted from the images."""

from collections import Counter
from collections.abc import Iterator

from torch import nn

CONTAINERS = nn.Sequential, nn.ModuleList, nn.ModuleDict


def depths(network: nn.Module) -> dict[str, int]:
    """The layer of each parameter, by its name; the first layer is 0.

    timm's networks say which they are. In others, each block of a stack of blocks is a layer, and so is each convolution or
    linear layer outside of these; norms, biases and tokens belong to the layer before them.
    """
    if hasattr(network, "group_matcher"):
        from distrib.models import of_timm

        return of_timm.depths(network)
    found, depth = dict[str, int](), -1
    for names, alone in pieces(network):
        depth += alone
        found |= dict.fromkeys(names, max(0, depth))
    return found


def pieces(module: nn.Module, prefix: str = "", root: bool = True) -> Iterator[tuple[list[str], bool]]:
    """The parameters of a network in pieces, by name, and whether it starts a layer."""
    if not (root or is_divided(module)):
        yield [f"{prefix}{name}" for name, _ in module.named_parameters()], bool(matrices(module))
        return
    yield [f"{prefix}{name}" for name, _ in module.named_parameters(recurse=False)], False
    for name, child in module.named_children():
        yield from pieces(child, f"{prefix}{name}.", root=False)


def is_divided(module: nn.Module) -> bool:
    """Whether a part of a network is several layers: a container of several, or a module that has a stack of blocks."""
    children = [*module.children()]
    if isinstance(module, CONTAINERS) and (sum(map(bool, map(matrices, children))) > 1 or any(map(is_block, children))):
        return True
    kinds = (
        Counter(type(each) for each in part.children() if is_block(each))
        for part in module.modules()
        if isinstance(part, CONTAINERS)
    )
    return any(count > 1 for kind in kinds for count in kind.values())


def is_block(module: nn.Module) -> bool:
    return matrices(module) > 1


def matrices(module: nn.Module) -> int:
    """The number of parameters that are no vectors."""
    return sum(each.dim() > 1 for each in module.parameters())
