"""`evaluate`: what a run's weights are worth on a validation set, exactly, on any number of ranks."""

from pathlib import Path
from typing import Any

from distrib.command_line import dotted, with_values
from distrib.config import OWN, Config
from distrib.data.loaders import Loader
from distrib.data.sharing import load_shared
from distrib.data.source import Source, data_differences
from distrib.data.steps import Steps
from distrib.errors import UserError
from distrib.models.build import Handed, build_model
from distrib.runtime import ranks
from distrib.runtime.checkpoint import EMA, MODEL, best_checkpoint
from distrib.training import evaluation
from distrib.training.objective import Objective, build_objective
from distrib.training.parallel import make_accelerator
from distrib.training.precision import agree_on_precision
from distrib.training.state import read_tensors, shapes, tensor_differences


def evaluate(
    run: str | Path,
    *,
    source: Source | None = None,
    network: Handed | None = None,
    objective: Objective | None = None,
) -> dict[str, float]:
    """What the objective reports of the validation images, with the weights of a run. Every rank must call this.

    `run` is a run folder, of which the best checkpoint is taken, or a checkpoint; of its weights, the moving average if there
    is one. What was handed to train() is handed in again; a `source` may also be another data set of the same classes.
    Precision and views of an image are those of the run. Raises UserError, and RunError if the checkpoint cannot be read now.
    """
    folder, manifest = best_checkpoint(Path(run))
    config = config_of(manifest)
    for section, handed in (("data", source), ("model", network), ("objective", objective)):
        name = getattr(config, section).name
        if handed is None and name.startswith(OWN):
            raise UserError(f"{folder} was trained with {section}.name={name}, which train() was handed: hand it to evaluate()")
    state = ranks.join(config)
    source = source or load_shared(config.data)
    refuse_other_classes(folder, manifest, source)
    agree_on_precision(config.precision, state.device)
    accelerator = make_accelerator(config)
    built = ranks.rank0_first(lambda leads: build_model(config.model, source.shape, len(source.classes), network, load=False))
    file = folder / (EMA if (folder / EMA).exists() else MODEL)
    differ = tensor_differences(shapes(file), {name: (each.shape, each.dtype) for name, each in built.state_dict().items()})
    if differ:
        raise UserError(f"{folder} was saved with another network: {differ}")
    built.load_state_dict(read_tensors(file))
    # Steps of one image for each rank, since none of them is done: the data may have fewer images than a batch.
    steps = Steps(len(source.train), state.num_processes, config.seed, state.process_index, state.num_processes)
    loader = Loader(source, config, steps, state.device)
    size = max(1, config.batch_size // state.num_processes)
    objective = objective or build_objective(config)
    return evaluation.evaluate(built.to(state.device), loader, objective, accelerator, size, config.tta)


def config_of(manifest: dict[str, Any]) -> Config:
    """The config of a run, with what it chose."""
    values = dict(dotted(manifest["config"])) | {key: manifest["chosen"][key] for key in ("precision", "compile")}
    return with_values(Config(), values, "")


def refuse_other_classes(folder: Path, manifest: dict[str, Any], source: Source) -> None:
    """Raise UserError unless a data set has the classes that a run was trained on."""
    there, now = manifest["data"], {"classes": list(source.classes)}
    if there["classes"] != now["classes"]:
        raise UserError(f"{folder} has another {data_differences(there, there | now)[0]}")
