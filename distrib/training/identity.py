"""The identity of a run: what the manifest of a checkpoint says of it, and whether a checkpoint belongs to a run."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from distrib.command_line import dotted, read_config, with_values
from distrib.config import Config
from distrib.data.source import Source, data_differences
from distrib.errors import UserError
from distrib.keys import (
    applies,
    changed_midway,
    differences,
    keys_of,
    nested,
    refuse_keys_that_do_not_apply,
    values_that_apply,
)
from distrib.models.weights import SHOWN_WITH, shown_with
from distrib.runtime import ranks
from distrib.runtime.attempts import commit
from distrib.runtime.checkpoint import latest_manifest
from distrib.runtime.run_folder import refuse, refuse_another_config
from distrib.schema import AUTO
from distrib.training.objective import Objective
from distrib.training.optim import build_schedule
from distrib.training.precision import agree_on_precision

PACKAGES = ("distrib", "torch", "torchvision", "accelerate")


@dataclass(frozen=True)
class Identity:
    """What identifies a run, apart from its step and its weights."""

    config: Config
    source: Source
    data: dict[str, Any]  # the fingerprint
    objective: Objective
    changes: Collection[str] = ()  # keys that may be changed midway

    def refuse_another(self, manifest: Mapping[str, Any]) -> None:
        """Raise UserError, with the differences, if a checkpoint with this manifest belongs to another run."""
        differ = differences(dict(dotted(manifest["config"])), self.config, manifest["chosen"], self.changes)
        differ += data_differences(manifest["data"], self.data)
        if manifest["objective"] != self.objective.name:
            differ.append(f"objective ({manifest['objective']} there, {self.objective.name} now)")
        refuse(self.config.run_dir, differ)
        total = build_schedule(self.config, len(self.source.train) // self.config.batch_size).total
        if manifest["step"] > total:
            there = f"epoch {manifest['step'] * self.config.epochs / total:.2f}"
            raise UserError(f"{self.config.run_dir} is at {there}, past epochs={self.config.epochs:g}: give more epochs")

    def find_manifest(self) -> dict[str, Any]:
        """The manifest of this run's newest checkpoint; empty if the run starts now. Every rank must call this.

        Writes nothing. Raises UserError if the folder belongs to another run, and RunError if it cannot be read now.
        """

        def look() -> dict[str, Any]:
            manifest = latest_manifest(Path(self.config.run_dir))
            if manifest:
                self.refuse_another(manifest)
            else:
                refuse_another_config(self.config, self.changes)
            return manifest

        return ranks.on_rank0(look)

    def changed(self, manifest: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
        """The keys that are changed midway, compared with a manifest that may be empty: their values there and now."""
        return changed_midway(dict(dotted(manifest["config"])), self.config) if manifest else {}

    def about(self, chosen: Mapping[str, Any], ranks: int) -> dict[str, Any]:
        """The part of a manifest that describes the run."""
        return {
            "config": nested(values_that_apply(self.config)),
            "data": self.data,
            "image": {"shape": self.source.shape, "mean": self.source.mean, "std": self.source.std},
            "objective": self.objective.name,
            "chosen": chosen,
            "ranks": ranks,
            "versions": {name: found for name in PACKAGES if (found := installed(name))},
            "commit": commit(),
        }


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # distrib, if it is used from its folder without being installed
        return None


def choose(config: Config, earlier: Mapping[str, Any], device: torch.device) -> tuple[Config, str]:
    """`config` with precision and compile chosen if they are auto, and the precision in words. Every rank must call this.

    A run that resumes keeps what it chose when it started. Raises UserError if this device cannot do that.
    """
    try:
        found, why = agree_on_precision(earlier.get("precision", config.precision), device)
    except UserError as error:
        if not earlier:
            raise
        way_out = "resume it on the kind of machine where it started, or give another run_dir"
        raise UserError(f"{config.run_dir} was started with precision={earlier['precision']}: {way_out} ({error})") from None
    mode: Any = earlier.get("compile", "no" if config.compile == AUTO else config.compile)
    why = "as the run was started" if earlier and config.precision == AUTO else why
    return replace(config, precision=found, compile=mode), f"precision {found} ({why})"


def with_pixels_of_weights(config: Config, *, own: bool) -> tuple[Config, list[str]]:
    """`config` with images shown as those of `config.model.weights` were, for keys that are auto; and a line if the run starts.

    A run that resumes keeps what it has. If the data set is a program's `own`, it keeps its mean and std. Every rank must call
    this. Raises UserError if there are no such weights.
    """
    keys = [f"data.{name}" for name in SHOWN_WITH if applies(config, f"data.{name}")]
    keys += ["data.mean", "data.std"] if not own else []
    values = {each.name: each.value for each in keys_of(config)}

    def look() -> tuple[dict[str, Any], bool]:
        file, manifest = Path(config.run_dir, "config.yaml"), latest_manifest(Path(config.run_dir))
        if manifest:
            return dict(dotted(manifest["config"])), False
        if file.exists():
            return {each.name: each.value for each in keys_of(read_config(file))}, False
        return shown_with(config.model) if config.model.weights else {}, True

    if not any(values[key] == AUTO for key in keys):
        return config, []
    found, starts = ranks.on_rank0(look)
    new = {key: as_text(found[key]) for key in keys if values[key] == AUTO and found.get(key, AUTO) != AUTO}
    words = " ".join(f"{key}={value}" for key, value in new.items())
    shown = with_values(config, new, "")
    refuse_keys_that_do_not_apply(shown, {key for key in keys if values[key] != AUTO})
    return shown, [f"images as the weights were trained on: {words}"] if new and starts else []


def as_text(value: Any) -> str:
    """The value of a key, as it is typed."""
    return ",".join(map(repr, value)) if isinstance(value, list | tuple) else str(value)
