"""A step on paper: as fast to compute as MLPerf's ResNet-50 was, while its gradients are exchanged bucket by bucket."""

from dataclasses import dataclass, replace
from typing import NamedTuple

from distrib.config import Config, DataConfig, ModelConfig
from distrib.errors import UserError
from distrib.scale.cluster import Cluster
from distrib.scale.network import Bucket, Network, network_of

RESNET50 = Config(data=DataConfig(name="folder", size=224), model=ModelConfig(name="resnet50"))


class Published(NamedTuple):
    """A result of MLPerf Training: ResNet-50 in fp16, on H100."""

    gpus: int
    share: int  # images of a GPU in each step
    rate: float  # images per second of a GPU: the median of its log files
    where: str  # in github.com/mlcommons/training_results_<round>, under NVIDIA/results


MLPERF = (  # the first two are calibrated on, the others are predicted
    Published(8, 400, 7_162, "v4.0 eos_ngc24.04_mxnet"),
    Published(64, 50, 4_908, "v4.0 eos_n8_ngc24.04_mxnet"),
    Published(512, 40, 4_406, "v3.0 dgxh100_n64_ngc23.04_mxnet"),
    Published(768, 42, 4_445, "v3.0 dgxh100_n96_ngc23.04_mxnet"),
    Published(2_528, 16, 2_724, "v4.0 eos_n316_ngc24.04_mxnet"),
    Published(3_584, 16, 2_819, "v4.0 coreweave_hgxh100_n448_ngc23.04_mxnet"),
)
CALIBRATION = MLPERF[:2]


@dataclass(frozen=True)
class Speed:
    """How fast a program computes: seconds of a layer in each step, whatever the batch; and the roofline's, times `image`."""

    layer: float
    image: float

    def compute(self, network: Network, share: int) -> float:
        """Seconds of a step of one GPU."""
        return self.layer * network.layers + self.image * network.image * share + network.update

    def measured(self, network: Network, rate: float, share: int) -> "Speed":
        """This speed, scaled so that one GPU trains `rate` images per second, `share` in each step. Raises UserError."""
        factor = (share / rate - network.update) / (self.compute(network, share) - network.update)
        if factor <= 0:
            fastest = share / network.update
            raise UserError(f"--measured {rate}@{share} is more than the optimizer leaves time for: {fastest:,.0f} images/s")
        return Speed(self.layer * factor, self.image * factor)


@dataclass(frozen=True)
class Step:
    """A step on so many GPUs, in seconds."""

    gpus: int
    share: int
    compute: float
    exposed: float  # of the exchange: what is not hidden behind the backward pass
    waiting: float  # for the slowest rank

    @property
    def seconds(self) -> float:
        return self.compute + self.exposed + self.waiting

    @property
    def rate(self) -> float:
        """Images per second, of all GPUs."""
        return self.gpus * self.share / self.seconds


def step_of(network: Network, speed: Speed, gpus: int, share: int, cluster: Cluster) -> Step:
    """One stream exchanges the buckets: each when it is ready and the one before is done. Then the optimizer steps."""
    compute, done = speed.compute(network, share), 0.0
    passes = compute - network.update
    for size, ready in network.buckets:
        begins = passes * (network.forward + (1 - network.forward) * ready)
        done = max(begins, done) + cluster.all_reduce(size, gpus)
    return Step(gpus, share, compute, max(0.0, done - passes), compute * cluster.waiting(gpus))


def mlperf_network(cluster: Cluster) -> Network:
    """ResNet-50 as MLPerf's code trains it: one exchange of all gradients, in fp16, after the backward pass."""
    network = network_of(RESNET50, cluster)
    return replace(network, buckets=(Bucket(2 * network.weights, ready=1.0),))


def calibrated(resnet50: Network, cluster: Cluster) -> Speed:
    """The speed with which CALIBRATION comes out as published."""
    large, small = CALIBRATION
    passes = []
    for gpus, share, rate, _ in CALIBRATION:
        exchange = sum(cluster.all_reduce(bucket.size, gpus) for bucket in resnet50.buckets)
        passes.append((share / rate - exchange) / (1 + cluster.waiting(gpus)) - resnet50.update)
    image = (passes[0] - passes[1]) / (large.share - small.share)
    return Speed((passes[1] - image * small.share) / resnet50.layers, image / resnet50.image)
