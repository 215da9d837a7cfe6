"""`evaluate`: the exact meters of a trained run on a validation set, on any number of ranks."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from torch import nn

from distrib.data.loaders import Loader
from distrib.data.sharing import load_shared
from distrib.data.source import Source
from distrib.data.steps import Steps
from distrib.data.workers import start_workers
from distrib.inference.classifier import (
    OTHER_DATA,
    config_of,
    find,
    refuse_another_network,
    refuse_damaged_weights,
    refuse_missing_objects,
    refuse_other_classes,
    with_data,
)
from distrib.models.build import NetworkOrBuilder, build_model
from distrib.models.weights import SHOWN_WITH
from distrib.runtime import disk, ranks
from distrib.runtime.environment import env_world_size
from distrib.training import evaluation
from distrib.training.objective import Objective, build_objective
from distrib.training.parallel import make_accelerator
from distrib.training.precision import agree_on_precision
from distrib.training.state import broadcast_file, shapes


class Evaluation(NamedTuple):
    """The meters of a checkpoint on a validation set, and for each class its images and how many of them were right."""

    checkpoint: Path
    values: dict[str, float]
    classes: tuple[str, ...]
    images: list[int]
    hits: list[int]
    notes: tuple[str, ...]  # on the data


def evaluate(
    run: str | Path,
    *,
    source: Source | None = None,
    network: NetworkOrBuilder | None = None,
    objective: Objective | None = None,
) -> dict[str, float]:
    """The meters of a run's weights on the validation images. Every rank must call this.

    `run` is a run folder, whose best checkpoint is used, a checkpoint, or an exported .safetensors file. The weights are the
    moving average if there is one. Objects that were passed to train() must be passed again; `source` may also be another data
    set with the same classes. Precision and test-time augmentation are those of the run. Raises UserError, and RunError if the
    checkpoint cannot be read.
    """
    return evaluate_classes(run, source=source, network=network, objective=objective).values


def evaluate_classes(
    run: str | Path,
    *,
    source: Source | None = None,
    network: NetworkOrBuilder | None = None,
    objective: Objective | None = None,
    keys: Mapping[str, str] = MappingProxyType({}),
) -> Evaluation:
    """What `evaluate` returns, and the result of each class. `keys` of data, such as data.root, replace those of the run."""
    folder, manifest, weights = find(Path(run))
    config = with_data(config_of(manifest), keys, (*OTHER_DATA, "workers", "resident", *SHOWN_WITH))
    disk.retries = disk.Retries(limit=config.limits.read)
    refuse_missing_objects(folder, config, "evaluate", data=source, model=network, objective=objective)
    with start_workers(config, source) as workers, ranks.connected(config) as channel:
        source = source or load_shared(config.data)
        mean, std = (tuple(manifest["image"][name]) for name in ("mean", "std"))
        source = replace(source, mean=mean, std=std)  # as in training
        refuse_other_classes(folder, manifest, source)
        agree_on_precision(config.precision, ranks.device())
        accelerator = make_accelerator(config)
        built = build_model(config.model, source.shape, len(source.classes), network, load=False).to(ranks.device())
        load_weights(built, folder, weights)
        # One image per rank and step: no step is run, and the data may have fewer images than a batch.
        world = env_world_size()
        steps = Steps(len(source.train), world, config.seed, channel.rank, world)
        loader = Loader(source, config, steps, ranks.device(), workers)
        objective, size = objective or build_objective(config), max(1, config.batch_size // world)
        totals = evaluation.measure(built, loader, objective, accelerator, size, config.tta)
    images, hits = totals.sums[evaluation.BY_CLASS].long().tolist()
    return Evaluation(
        folder, evaluation.values_of(totals, objective, len(source.val)), source.classes, images, hits, source.notes
    )


def report(found: Evaluation) -> Iterator[str]:
    """The lines of an evaluation: the meters, and a table of classes, the worst first."""
    yield from (f"data: {note}" for note in found.notes)
    shown = {name: value for name, value in found.values.items() if name not in (evaluation.IMAGES, evaluation.MISSED)}
    values = "  ".join(f"{name} {value:.4f}" for name, value in shown.items())
    yield f"{found.checkpoint}: {values}  of {sum(found.images):,} images"
    width = max(5, *map(len, found.classes))
    yield f"{'class':<{width}}  {'images':>8}  {'right':>8}  {'%':>6}"
    rows = zip(found.classes, found.images, found.hits, strict=True)
    for name, images, hits in sorted(rows, key=lambda row: row[2] / max(1, row[1])):
        yield f"{name:<{width}}  {images:>8,}  {hits:>8,}  {f'{100 * hits / images:.2f}' if images else '-':>6}"


def as_json(found: Evaluation) -> str:
    """An evaluation as one line of JSON."""
    classes = {
        name: {"images": images, "hits": hits}
        for name, images, hits in zip(found.classes, found.images, found.hits, strict=True)
    }
    return json.dumps({"checkpoint": str(found.checkpoint), "values": found.values, "classes": classes})


def load_weights(network: nn.Module, checkpoint: Path, file: Path) -> None:
    """Load the weights of a checkpoint. Every rank must call this. Raises UserError."""
    ranks.on_rank0(partial(refuse_damaged_weights, checkpoint))
    refuse_another_network(checkpoint, ranks.on_rank0(partial(shapes, file)), network)
    network.load_state_dict(dict(broadcast_file(file)))
