"""`distrib scale`: predicts training on many GPUs, and compares the same model with published results."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from distrib.command_line import load_config
from distrib.config import Config, refuse_uneven
from distrib.errors import UserError
from distrib.scale.cluster import MEASURED, Cluster, Measured
from distrib.scale.network import Network, data_of, network_of
from distrib.scale.step import CALIBRATION, MLPERF, Published, Speed, Step, calibrated, mlperf_network, step_of

USAGE = """\
usage: distrib scale [CONFIG.yaml] [key=value ...] [options]
       --gpus 8..4096      from 8, doubling up to 4096; or a list, as in 8,96,2528
       --per-gpu N         images per GPU and step; default: an eighth of batch_size
       --global-batch      instead, divide batch_size among the GPUs, as training does
       --measured RATE@N   use your speed of one GPU: RATE images/s with N images a step
       distrib train --help lists the keys"""

FORMS = {"--gpus": "8..4096 or 8,96,2528", "--per-gpu": "128", "--measured": "2500@256"}
LIMIT = 10**9


@dataclass(frozen=True)
class Asked:
    """The options of a command line."""

    config: Config
    gpus: list[int]
    share: int | None  # images per GPU and step; None: batch_size is divided
    measured: tuple[int, int] | None  # images per second of one GPU, images per step

    def share_of(self, gpus: int) -> int:
        """Images per GPU and step. Raises UserError if batch_size does not divide."""
        if self.share is None:
            refuse_uneven(self.config.batch_size, gpus)
        return self.share or self.config.batch_size // gpus


def read(args: Sequence[str], cluster: Cluster) -> Asked:
    """Parse a command line. Raises UserError."""
    words, given, rest = iter(args), dict[str, str](), list[str]()
    for word in words:
        if word in FORMS:
            given[word] = next(words, "")
        else:
            rest.append(word)
    divided = "--global-batch" in rest
    config = load_config([word for word in rest if word != "--global-batch"])
    if divided and "--per-gpu" in given:
        raise UserError("--per-gpu and --global-batch both set the images per GPU: give one of them")
    per_gpu = given.get("--per-gpu", str(max(1, config.batch_size // cluster.node)))
    share = None if divided else number("--per-gpu", per_gpu)
    rate, _, images = given.get("--measured", "").partition("@")
    measured = (number("--measured", rate), number("--measured", images)) if "--measured" in given else None
    return Asked(config, numbers_of_gpus(given.get("--gpus", "8..4096"), cluster.node), share, measured)


def numbers_of_gpus(text: str, node: int) -> list[int]:
    """8..64 means 8, 16, 32, 64; 8,24 means 8 and 24. Raises UserError if a node would be used in part."""
    first, dots, last = text.partition("..")
    gpus = [number("--gpus", each) for each in first.split(",")]
    while dots and 2 * gpus[-1] <= number("--gpus", last):
        gpus.append(2 * gpus[-1])
    if dots and gpus[-1] > int(last):
        raise UserError(f"--gpus {text}: the end is below the start; write it as in --gpus {FORMS['--gpus']}")
    for each in gpus:
        spare = each % node
        if each > node and spare:
            raise UserError(f"{each} GPUs are not whole nodes of {node}: use {each - spare} or {each - spare + node}")
    return gpus


def number(option: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < int(text) < LIMIT):
        raise UserError(f"{option}: {text!r} is not a number from 1 to {LIMIT - 1:,}: write it as in {option} {FORMS[option]}")
    return int(text)


def report(asked: Asked, cluster: Cluster) -> Iterator[str]:
    """The lines of the report: the prediction, then the same model against published results. Raises UserError."""
    config, shares = asked.config, [asked.share_of(gpus) for gpus in asked.gpus]
    network, resnet50 = network_of(config, cluster), mlperf_network(cluster)
    mlperf = calibrated(resnet50, cluster)
    speed = mlperf.measured(network, *asked.measured) if asked.measured else mlperf
    alone = step_of(network, speed, 1, asked.share or config.batch_size, cluster)
    shape, sizes = data_of(config.data).shape, ", ".join(f"{bucket.size / 1e6:.1f}" for bucket in network.buckets)
    yield f"{config.model.name} on {'x'.join(map(str, shape))}: {network.weights:,} weights; gradients in buckets of {sizes} MB"
    source = "scaled from your measurement" if asked.measured else "if its code is as fast as MLPerf's"
    yield f"one GPU, {source}: {alone.rate:,.0f} images/s, {alone.share:,} a step"
    yield ""
    steps = [step_of(network, speed, gpus, share, cluster) for gpus, share in zip(asked.gpus, shares, strict=True)]
    yield from table([row(step, alone, network, config, cluster) for step in steps])
    yield ""
    yield "published: MLPerf Training, ResNet-50, H100, images/s of a GPU"
    yield from table([against_mlperf(each, resnet50, mlperf, cluster) for each in MLPERF])
    yield ""
    yield "measured: nccl-tests, all-reduce, milliseconds"
    yield from table([against_nccl(each, cluster) for each in MEASURED])


def row(step: Step, alone: Step, network: Network, config: Config, cluster: Cluster) -> dict[str, str]:
    interval, goodput = cluster.goodput(network.state / cluster.copying, step.gpus)
    per_epoch = data_of(config.data).images // (step.gpus * step.share)
    return {
        "GPUs": f"{step.gpus:,}",
        "images each": f"{step.share:,}",
        "compute ms": f"{1e3 * step.compute:.2f}",
        "exchange ms": f"{1e3 * step.exposed:.2f}",
        "jitter ms": f"{1e3 * step.waiting:.2f}",
        "step ms": f"{1e3 * step.seconds:.2f}",
        "images/s": f"{step.rate:,.0f}",
        "efficiency": f"{step.rate / alone.rate / step.gpus:.1%}",
        "save every": span(interval),
        "goodput": f"{goodput:.2%}",
        f"{config.epochs:g} epochs": span(round(config.epochs * per_epoch) * step.seconds / goodput) if per_epoch else "-",
    }


def against_mlperf(published: Published, resnet50: Network, speed: Speed, cluster: Cluster) -> dict[str, str]:
    gpus, share, rate, where = published
    predicted = step_of(resnet50, speed, gpus, share, cluster).rate / gpus
    return {
        "GPUs": f"{gpus:,}",
        "images each": f"{share}",
        "published": f"{rate:,.0f}",
        "predicted": f"{predicted:,.0f}",
        "error": "calibrated on" if published in CALIBRATION else f"{predicted / rate - 1:+.1%}",
        "of": where,
    }


def against_nccl(measured: Measured, cluster: Cluster) -> dict[str, str]:
    gpus, size, seconds, where = measured
    predicted = cluster.all_reduce(size, gpus)
    return {
        "GPUs": f"{gpus:,}",
        "bytes": f"{size:,}",
        "measured": f"{1e3 * seconds:.3f}",
        "predicted": f"{1e3 * predicted:.3f}",
        "error": f"{predicted / seconds - 1:+.0%}",
        "of": where,
    }


def span(seconds: float) -> str:
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"


def table(rows: Sequence[dict[str, str]]) -> Iterator[str]:
    """Rows as aligned columns with titles."""
    widths = {title: max(len(title), *(len(row[title]) for row in rows)) for title in rows[0]}
    for row in ({title: title for title in widths}, *rows):
        yield "  ".join(row[title].rjust(width) for title, width in widths.items())
