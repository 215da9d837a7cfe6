"""Reading JPEG files, ours beside torchvision's reference: python benchmarks/jpeg.py [ROUNDS]

Writes photographs that are none, of 500x375, smooth shapes under a grain, then reads them all in either way, to batches of 32
normalised float32 images of 224 pixels, randomly cropped and mirrored. The reference is the pipeline of torchvision's
references/classification: ImageFolder, RandomResizedCrop, RandomHorizontalFlip, PILToTensor, ConvertImageDtype, Normalize, and
a DataLoader. In each round every side has its turn, the reference twice: the second is the control. Each side has one core for
itself and its worker, and two cores for two workers. CPU seconds are those of all its processes.
"""

import os
import resource
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import datasets, transforms
from torchvision.transforms import functional

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from distrib.config import Config, DataConfig
from distrib.data.datasets import load_source
from distrib.data.loaders import Loader
from distrib.data.pixels import ImageSpec, pixels_of
from distrib.data.source import Source
from distrib.data.steps import Steps
from distrib.data.workers import Workers

IMAGES, BATCH, SIZE, LEAST_AREA = 512, 32, 224, 0.08
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CORES = sorted(os.sched_getaffinity(0))


def photograph(number: int, width: int, height: int) -> Image.Image:
    random = np.random.default_rng(number)

    def layer(detail: int, contrast: float) -> Any:
        coarse = random.normal(0, contrast, (detail * height // width, detail, 3)).astype(np.float32)
        planes = [Image.fromarray(each).resize((width, height), Image.Resampling.BICUBIC) for each in coarse.transpose(2, 0, 1)]
        return np.stack([np.asarray(plane) for plane in planes], -1)

    shapes = 128 + layer(4, 40) + layer(16, 20).mean(2, keepdims=True) + layer(width // 8, 14) + layer(width // 3, 8)
    grain = random.normal(0, random.uniform(5, 12), (height, width, 1))
    return Image.fromarray(np.clip(shapes + grain, 0, 255).astype(np.uint8))


def write(folder: Path) -> float:
    """IMAGES training images of two classes, a few to validate; returns their mean size in bytes."""
    for part, images in (("train", IMAGES), ("val", 2)):
        for number in range(images):
            path = folder / part / f"class{number % 2}" / f"{number:04d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            photograph(number, 500, 375).save(path, quality=90)
    return sum(path.stat().st_size for path in folder.glob("train/*/*")) / IMAGES


def ours(config: Config, source: Source, workers: int) -> Iterator[Any]:
    steps = Steps(IMAGES, BATCH, seed=0)
    with Workers(workers) as started:
        yield from Loader(source, config, steps, torch.device("cpu"), started).train(range(steps.per_epoch))


def reference(folder: Path, workers: int) -> Iterator[Any]:
    pipeline = transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE, scale=(LEAST_AREA, 1.0), antialias=True),
            transforms.RandomHorizontalFlip(),
            transforms.PILToTensor(),
            transforms.ConvertImageDtype(torch.float),
            transforms.Normalize(MEAN, STD),
        ]
    )
    images = datasets.ImageFolder(str(folder / "train"), pipeline)
    return iter(DataLoader(images, BATCH, shuffle=True, num_workers=workers))


def cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def timed(side: Callable[[int], Iterator[Any]], workers: int) -> tuple[float, float]:
    """Wall and CPU seconds of a core for 1,000 images, workers' start and end included."""
    began, used, seen = perf_counter(), cpu_seconds(), 0
    for images, _ in side(workers):
        assert images.shape == (BATCH, 3, SIZE, SIZE)
        assert images.dtype == torch.float32
        seen += len(images)
    assert seen == IMAGES
    return tuple(1000 / seen * each for each in (perf_counter() - began, cpu_seconds() - used))  # type: ignore[return-value]


def difference(paths: list[Path]) -> str:
    """How far our pixels are from the reference's, in levels of 256, in the crops that we would draw."""
    apart, spec = [], ImageSpec(SIZE, SIZE)
    for path, drawn in zip(paths, torch.rand(len(paths), 4).tolist(), strict=True):
        pixels = pixels_of(path, spec, lambda width, height, drawn=drawn: spec.random(width, height, LEAST_AREA, drawn))
        with Image.open(path) as image:
            left, top, right, bottom = spec.random(*image.size, LEAST_AREA, drawn)
            expected = functional.resized_crop(image.convert("RGB"), top, left, bottom - top, right - left, [SIZE, SIZE])
        apart.append((pixels.int() - functional.pil_to_tensor(expected).int()).abs().double().mean().item())
    return f"{np.mean(apart):.3f} of 255 on average, {max(apart):.3f} in the worst of {len(apart)} images"


def compare(config: Config, source: Source, folder: Path, workers: int, rounds: int) -> None:
    os.sched_setaffinity(0, CORES[: max(1, workers)])
    sides = {
        "reference": partial(reference, folder),
        "again": partial(reference, folder),
        "ours": partial(ours, config, source),
    }
    found = [{name: timed(side, workers) for name, side in sides.items()} for _ in range(rounds)]
    for clock, what in enumerate(("wall", "CPU")):
        times = {name: [each[name][clock] for each in found] for name in sides}
        told = [f"{name} {median(each):.2f} s ({min(each):.2f} to {max(each):.2f})" for name, each in times.items()]
        ratio, control = (median(times["reference"]) / median(times[name]) for name in ("ours", "again"))
        print(f"workers {workers}, {what}: {', '.join(told)}; reference / ours {ratio:.2f}, control {control:.2f}", flush=True)


def main(rounds: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print(f"{IMAGES} photographs of 500x375, {write(folder) / 1000:.0f} kB each")
        large = [folder / f"{number}.jpg" for number in range(16)]
        for number, path in enumerate(large):
            photograph(number, 2000, 1500).save(path, quality=90)
        print(f"pixels that differ: {difference(sorted(folder.glob('train/*/*'))[:128])}")
        print(f"  of 2000x1500, decoded at less where that is enough: {difference(large)}")

        keys = DataConfig(name="folder", root=name, size=SIZE, crop_area=LEAST_AREA, translate=0, flip="random")
        config, source = Config(run_dir=name, data=keys), load_source(keys, download=False)
        print("seconds for 1,000 images:")
        for workers in (0, 1, 2):
            if workers <= len(CORES):
                compare(config, source, folder, workers, rounds)


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 5)
