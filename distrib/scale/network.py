"""What a step of a config's network is made of: found by one pass over tensors that have a shape and no numbers."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from distrib.config import Config, DataConfig
from distrib.errors import UserError
from distrib.models.build import build_model
from distrib.models.layers import Shape
from distrib.scale.cluster import Cluster

FIRST_BUCKET, BUCKET = 1 << 20, 25 << 20  # bytes: DDP's defaults
IMAGES = 8  # in the pass; a single one may have no batch statistics


class Data(NamedTuple):
    """What a prediction needs to know of a data set, which is neither loaded nor downloaded."""

    shape: Shape
    classes: int
    images: int  # to train on


SETS = {
    "digits": Data((1, 8, 8), 10, 1_437),
    "mnist": Data((1, 28, 28), 10, 60_000),
    "fashion_mnist": Data((1, 28, 28), 10, 60_000),
    "cifar10": Data((3, 32, 32), 10, 50_000),
    "cifar100": Data((3, 32, 32), 100, 50_000),
}


def data_of(config: DataConfig) -> Data:
    """A data set by its name; a folder is taken for ImageNet. Raises UserError if there is none of that name."""
    sets = SETS | {"folder": Data((3, config.size, config.size), 1_000, 1_281_167)}
    if config.name not in sets:
        raise UserError(f"there is no data set {config.name!r}: use one of {', '.join(sets)}")
    return sets[config.name]


class Bucket(NamedTuple):
    """Gradients that are exchanged together, once a part `ready` of the backward pass is over."""

    size: int  # bytes that travel
    ready: float


@dataclass(frozen=True)
class Network:
    """What a step is made of. Seconds are those of the cluster's roofline."""

    weights: int
    state: int  # bytes of a checkpoint
    layers: int  # convolutions and matrix products
    image: float  # seconds for each image, forward and backward
    forward: float  # part of these
    update: float  # seconds of the optimizer
    buckets: tuple[Bucket, ...]


class Roofline(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the seconds of the convolutions and matrix products that run under it, and how many they are.

    A step passes each of them three times: forward, and for the gradients by input and by weight.
    """

    def __init__(self, cluster: Cluster) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.cluster, self.seconds, self.layers = cluster, 0.0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result, kind, aten = func(*args, **(kwargs or {})), func._overloadpacket, torch.ops.aten
        if kind is aten.convolution:
            self.convolution(result, args[1], passes=1)
        elif kind is aten.convolution_backward:  # torch's own formula takes grouped ones for dense
            self.convolution(args[0], args[2], passes=sum(args[-1][:2]))
        elif kind in flop_registry:
            self.layers += 1
            self.seconds += flop_registry[kind](*args, **(kwargs or {}), out_val=result) / self.cluster.flops
        return result

    def convolution(self, output: Tensor, weight: Tensor, passes: int) -> None:
        self.layers += 1
        self.seconds += passes * 2 * output.numel() * weight[0].numel() / self.cluster.flops
        self.seconds += passes * 2 * output.numel() * self.cluster.accesses / 3 / self.cluster.memory


def network_of(config: Config, cluster: Cluster) -> Network:
    """The network that the trainer would build. Raises UserError if its name or the data's is unknown, or they do not fit."""
    data, wanted = data_of(config.data), replace(config.model, weights="")
    if config.precision == "no":  # TF32, with half of the multiplications in a second, and numbers of 4 bytes
        cluster = replace(cluster, flops=cluster.flops / 2, accesses=2 * cluster.accesses)
    try:
        with torch.device("meta"):
            model = build_model(wanted, data.shape, data.classes)
    except NotImplementedError:  # a RegNet computes its widths with tensors
        model = build_model(wanted, data.shape, data.classes).to("meta")
    roofline, ready = Roofline(cluster), list[tuple[nn.Parameter, float]]()
    for parameter in filter(lambda each: each.requires_grad, model.parameters()):
        hooked: Any = parameter
        hooked.register_post_accumulate_grad_hook(lambda each: ready.append((each, roofline.seconds)))
    with roofline:
        logits = model(torch.zeros(IMAGES, *data.shape, device="meta"))
        forward, layers = roofline.seconds, roofline.layers
        logits.sum().backward()

    backward = roofline.seconds - forward
    weights = sum(parameter.numel() for parameter, _ in ready)
    moments = 2 if config.optim.name == "adamw" else 1
    copies = 1 + moments + bool(config.optim.ema_decay)
    return Network(
        weights,
        state=4 * weights * copies + sum(buffer.nbytes for buffer in model.buffers()),
        layers=layers,
        image=roofline.seconds / IMAGES,
        forward=forward / roofline.seconds,
        update=4 * weights * (3 + 2 * moments) / cluster.memory,  # all is read, and all but the gradient written
        buckets=in_buckets(
            [each for each, _ in ready],
            [(seconds - forward) / backward for _, seconds in ready],
            rounded=config.comm_hook != "no",
        ),
    )


def in_buckets(gradients: Sequence[Tensor], ready: Sequence[float], *, rounded: bool) -> tuple[Bucket, ...]:
    """The buckets that DDP makes after its first step, by its own function: of gradients in the order in which they come.

    If they are `rounded`, to bf16 or fp16, half of their bytes travel.
    """
    distributed: Any = torch.distributed
    parts, _ = distributed._compute_bucket_assignment_by_size(gradients, [FIRST_BUCKET, BUCKET], [False] * len(gradients))
    return tuple(Bucket(sum(gradients[i].nbytes for i in part) // (1 + rounded), max(ready[i] for i in part)) for part in parts)
