"""The operations in a step of a config's network, found by one pass over tensors on torch's meta device."""

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
IMAGES = 8  # in the pass; BatchNorm needs more than one


class Data(NamedTuple):
    """The facts about a data set that a prediction needs; it is neither loaded nor downloaded."""

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
    """A data set by its name; image files count as ImageNet. Raises UserError if the name is unknown."""
    imagenet = Data((3, *config.height_and_width()), 1_000, 1_281_167)
    sets = SETS | {"folder": imagenet, "csv": imagenet}
    if config.name not in sets:
        raise UserError(f"there is no data set {config.name!r}: use one of {', '.join(sets)}")
    return sets[config.name]


class Bucket(NamedTuple):
    """Gradients that are exchanged together, after a fraction `ready` of the backward pass."""

    size: int  # bytes that are exchanged
    ready: float


@dataclass(frozen=True)
class Network:
    """The operations of a step. Seconds are those of the cluster's roofline."""

    weights: int
    state: int  # bytes of a checkpoint
    layers: int  # convolutions and matrix products
    image: float  # seconds per image, forward and backward
    forward: float  # fraction of these seconds
    update: float  # seconds of the optimizer
    buckets: tuple[Bucket, ...]


class Roofline(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the seconds and the number of the convolutions and matrix products that run under it.

    A step computes each of them three times: forward, and the gradients by input and by weight.
    """

    def __init__(self, cluster: Cluster) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.cluster, self.seconds, self.layers = cluster, 0.0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result, kind, aten = func(*args, **(kwargs or {})), func._overloadpacket, torch.ops.aten
        if kind is aten.convolution:
            self.convolution(result, args[1], passes=1)
        elif kind is aten.convolution_backward:  # torch's own formula counts grouped convolutions as dense
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
    """The network that training would build. Raises UserError if a name is unknown, or network and data do not fit."""
    data, wanted = data_of(config.data), replace(config.model, weights="")
    if config.precision == "no":  # TF32: half as many multiplications per second, and 4 bytes per number
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
        update=4 * weights * (3 + 2 * moments) / cluster.memory,  # reads everything, and writes all but the gradient
        buckets=in_buckets(
            [each for each, _ in ready],
            [(seconds - forward) / backward for _, seconds in ready],
            rounded=config.comm_hook != "no",
        ),
    )


def in_buckets(gradients: Sequence[Tensor], ready: Sequence[float], *, rounded: bool) -> tuple[Bucket, ...]:
    """DDP's buckets after its first step, computed by its own function, from gradients in the order of their arrival.

    If they are `rounded` to bf16 or fp16, half of the bytes are exchanged.
    """
    distributed: Any = torch.distributed
    parts, _ = distributed._compute_bucket_assignment_by_size(gradients, [FIRST_BUCKET, BUCKET], [False] * len(gradients))
    return tuple(Bucket(sum(gradients[i].nbytes for i in part) // (1 + rounded), max(ready[i] for i in part)) for part in parts)
