"""The predicted time of a step: computation at the speed of MLPerf's ResNet-50, and the exchange of gradients by buckets."""

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
    share: int  # images per GPU and step
    rate: float  # images per second and GPU: the median of its log files
    where: str  # in github.com/mlcommons/training_results_<round>, under NVIDIA/results


MLPERF = (  # the first two calibrate the model, the others test it
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
    """The speed of a program: `layer` seconds per layer and step, and `image` times the roofline's seconds."""

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
            raise UserError(f"--measured {rate}@{share} is faster than the optimizer alone allows: {fastest:,.0f} images/s")
        return Speed(self.layer * factor, self.image * factor)


@dataclass(frozen=True)
class Step:
    """The times of a step on `gpus` GPUs, in seconds."""

    gpus: int
    share: int
    compute: float
    exposed: float  # the part of the exchange that the backward pass does not hide
    waiting: float  # for the slowest rank

    @property
    def seconds(self) -> float:
        return self.compute + self.exposed + self.waiting

    @property
    def rate(self) -> float:
        """Images per second of all GPUs together."""
        return self.gpus * self.share / self.seconds


def step_of(network: Network, speed: Speed, gpus: int, share: int, cluster: Cluster) -> Step:
    """A step: one stream exchanges each bucket when it is ready and the previous one is done; then the optimizer steps."""
    compute, done = speed.compute(network, share), 0.0
    passes = compute - network.update
    for size, ready in network.buckets:
        begins = passes * (network.forward + (1 - network.forward) * ready)
        done = max(begins, done) + cluster.all_reduce(size, gpus)
    return Step(gpus, share, compute, max(0.0, done - passes), compute * cluster.waiting(gpus))


def mlperf_network(cluster: Cluster) -> Network:
    """ResNet-50 in MLPerf's code: it exchanges all gradients at once, in fp16, after the backward pass."""
    network = network_of(RESNET50, cluster)
    return replace(network, buckets=(Bucket(2 * network.weights, ready=1.0),))


def calibrated(resnet50: Network, cluster: Cluster) -> Speed:
    """The speed at which the predictions for CALIBRATION equal the published results."""
    large, small = CALIBRATION
    passes = []
    for gpus, share, rate, _ in CALIBRATION:
        exchange = sum(cluster.all_reduce(bucket.size, gpus) for bucket in resnet50.buckets)
        passes.append((share / rate - exchange) / (1 + cluster.waiting(gpus)) - resnet50.update)
    image = (passes[0] - passes[1]) / (large.share - small.share)
    return Speed((passes[1] - image * small.share) / resnet50.layers, image / resnet50.image)
