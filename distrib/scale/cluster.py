"""A model of a cluster: GPUs, links and failures. Every constant has its unit and its source."""

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

DAY = 86_400.0  # seconds

# NCCL's own estimates, by which it chooses an algorithm: src/graph/tuning.cc of NVIDIA/nccl at 5067397, for Hopper and Intel
# hosts. Microseconds to start, per hop inside a node, and per hop between nodes.
LATENCY = {
    ("ring", "LL"): (6.6, 0.6, 2.7),
    ("ring", "LL128"): (14.0, 1.9, 4.0),
    ("ring", "Simple"): (8.4, 3.4, 14.0),
    ("tree", "LL"): (6.8, 0.6, 5.0),
    ("tree", "LL128"): (14.0, 1.25, 8.5),
    ("tree", "Simple"): (8.4, 4.0, 14.0),
    ("NVLS", "Simple"): (0.0, 25.0, 0.0),
    ("NVLSTree", "Simple"): (0.0, 25.0, 20.9),
}
PLATEAU = 1.4  # factor on the latency of a ring between nodes, in protocol Simple
LL_LIMIT = (141e9, 39e9, 20.4e9)  # bytes/s in protocol LL: on one node, two nodes, more
# The fraction of its bandwidth that a tree reaches with 64 bytes, 128, 256, and so on.
TREE_REACHES = {
    "LL": (1, 1, 1, 1, 0.9, 0.8, 0.7, 0.7, 0.7, 0.7, 0.6, 0.5, 0.4, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
    "LL128": (1, 1, 1, 1, 1, 0.9, 0.8, 0.8, 0.8, 0.7, 0.6, 0.6, 0.6, 0.6, 0.6, 0.6, 0.8, 0.9, 0.9, 0.9, 0.9),
    "Simple": (0.9,) * 7 + (0.8, 0.7, 0.6, 0.6, 0.5, 0.5, 0.5, 0.5, 0.6, 0.7, 0.8, 0.7, 0.7, 0.8, 0.9, 0.9),
}


class Measured(NamedTuple):
    """A published measurement of an all-reduce with nccl-tests."""

    gpus: int
    size: int  # bytes
    seconds: float
    where: str


MEASURED = (  # larger sizes are published as bus bandwidth: 2 (gpus - 1) / gpus times the size, per second
    Measured(128, 64, 62e-6, "NVIDIA/nccl#1469, H100"),
    Measured(128, 64 << 20, 2 * 127 / 128 * (64 << 20) / 150e9, "the same, in its better runs"),
    Measured(1_984, 512 << 20, 2 * 1983 / 1984 * (512 << 20) / 350e9, "NVIDIA/nccl-tests#283, H200"),
)


@dataclass(frozen=True)
class Cluster:
    """Nodes of 8 H100 (SXM), connected by NVLink, each with a network adapter of 400 Gb/s."""

    node: int = 8  # GPUs
    flops: float = 0.62 * 989e12  # per second, in bf16: NVIDIA's data sheet, and the fraction that is reached (docs/scale.md)
    memory: float = 3.35e12  # bytes/s: NVIDIA's data sheet
    accesses: float = 17.0  # memory accesses per step to each output of a convolution, of 2 bytes (docs/scale.md)
    nvlink: float = 370e9  # bytes/s of a ring inside a node: 18 links of 20.6 GB/s (NCCL's src/graph/topo.h; nccl-tests#212)
    nvls: float = 476e9  # bytes/s if the switch inside a node adds, as nccl-tests counts: measured (nccl-tests#290)
    network: float = 8 * 48e9  # bytes/s between nodes: 46 to 48 GB/s of an adapter (nccl-tests#290)
    jitter: float = 0.01  # relative standard deviation of the ranks' compute times: assumed
    failures: float = 419 / 54 / 16_384  # per GPU and day: unexpected interruptions of Llama 3 (Dubey et al., 2024, 3.3.4)
    restart: float = 600.0  # seconds, assumed: 5 minutes until SLURM considers a node dead, 2 in its queue, 3 to start
    copying: float = 204e6 / 5.3e-3  # bytes/s of state at which a save is copied: measured (docs/surviving.md)

    def all_reduce(self, size: float, gpus: int) -> float:
        """Seconds of an all-reduce of `size` bytes over `gpus`: the minimum over NCCL's algorithms and protocols."""
        if gpus == 1:
            return 0.0
        nodes = -(-gpus // self.node)
        doublings = int(math.log2(nodes))
        hops = {  # inside a node, between nodes
            "ring": (2 * (gpus - nodes), 2 * (nodes - 1)),
            "tree": (2 * (min(gpus, self.node) - 1), 2 * doublings),
            "NVLSTree" if nodes > 1 else "NVLS": (1, 2 * doublings),
        }
        times = []
        for (algorithm, protocol), (begin, inside, between) in LATENCY.items():
            if algorithm in hops:
                latency = begin + inside * hops[algorithm][0] + between * hops[algorithm][1]
                latency *= PLATEAU if (algorithm, protocol) == ("ring", "Simple") and nodes > 1 else 1
                times.append(latency * 1e-6 + size / self.bandwidth(algorithm, protocol, size, gpus))
        return min(times)

    def bandwidth(self, algorithm: str, protocol: str, size: float, gpus: int) -> float:
        """The bytes of the tensor that are reduced per second."""
        nodes = -(-gpus // self.node)
        link = self.network if nodes > 1 else self.nvls if algorithm == "NVLS" else self.nvlink
        limit = LL_LIMIT[min(nodes, 3) - 1]
        if algorithm == "tree":
            link *= 0.92
            if protocol != "Simple":
                link = min(link / 3.8, limit) if protocol == "LL" else link * (7 / 9 if nodes == 1 else 120 / 128)
            power, reaches = int(size / 64).bit_length() - 1, TREE_REACHES[protocol]
            return link * 0.85 * (reaches[power] if 0 <= power < len(reaches) else 1) / 2  # each byte goes up and comes down
        if protocol != "Simple":
            link = min(link / 2, limit) if protocol == "LL" else link * 0.92
        return link * gpus / (2 * (gpus - 1))

    def waiting(self, gpus: int) -> float:
        """How much longer a step takes because of its slowest rank, as a fraction of the compute time.

        This is the expected maximum of `gpus` normal numbers, within 1 % from 8 on (Blom, 1958).
        """
        return self.jitter * NormalDist().inv_cdf((gpus - 0.375) / (gpus + 0.25))

    def goodput(self, stall: float, gpus: int) -> tuple[float, float]:
        """The best interval between saves in seconds, and the fraction of all time that is not lost.

        A save stalls training for `stall` seconds. The interval minimises the loss (Young, 1974; Daly, 2006): a failure costs
        half of it and a restart, in which nothing fails.
        """
        between_failures = DAY / (self.failures * gpus)
        interval = math.sqrt(2 * stall * between_failures)
        done_again, saves = interval / 2 / between_failures, stall / interval
        return interval, (1 - done_again) / (1 + saves) / (1 + self.restart / between_failures)
