"""What a run is, as the manifest of each of its checkpoints says, and whether it is the run that is asked for."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from distrib.command_line import dotted
from distrib.config import AUTO, Config, differences, nested, values_that_apply
from distrib.data.source import Source, data_differences
from distrib.errors import UserError
from distrib.runtime import ranks
from distrib.runtime.attempts import commit
from distrib.runtime.checkpoint import latest_manifest
from distrib.runtime.run_folder import refuse, refuse_another_config
from distrib.training.objective import Objective
from distrib.training.precision import agree_on_precision

PACKAGES = ("distrib", "torch", "torchvision", "accelerate")


@dataclass(frozen=True)
class Identity:
    """What makes a run the run that it is, apart from its step and its weights."""

    config: Config
    source: Source
    data: dict[str, Any]  # the fingerprint
    objective: Objective
    longer: bool = False  # whether there may be more epochs than when it was begun

    def refuse_another(self, manifest: Mapping[str, Any]) -> None:
        """Raise UserError if a checkpoint with this manifest is of another run, with what differs."""
        differ = differences(dict(dotted(manifest["config"])), self.config, manifest["chosen"], longer=self.longer)
        differ += data_differences(manifest["data"], self.data)
        if manifest["objective"] != self.objective.name:
            differ.append(f"objective ({manifest['objective']} there, {self.objective.name} now)")
        refuse(self.config.run_dir, differ)

    def find_begun(self) -> dict[str, Any]:
        """What this run has chosen when it was begun; nothing if it begins now. Every rank must call this.

        Nothing is written. Raises UserError if another run is in the folder, and RunError if that cannot be read now.
        """

        def look() -> dict[str, Any]:
            manifest = latest_manifest(Path(self.config.run_dir))
            if manifest:
                self.refuse_another(manifest)
            else:
                refuse_another_config(self.config, longer=self.longer)
            chosen: dict[str, Any] = manifest.get("chosen", {})
            return chosen

        return ranks.on_rank0(look)

    def about(self, chosen: Mapping[str, Any], ranks: int) -> dict[str, Any]:
        """What a manifest says of the run."""
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
    except PackageNotFoundError:  # distrib, where it is a folder that was not installed
        return None


def choose(config: Config, begun: Mapping[str, Any], device: torch.device) -> tuple[Config, str]:
    """`config` without auto in precision and compile, and in words which precision and why. Every rank must call this.

    A run that was begun keeps what it chose. Raises UserError if it cannot.
    """
    try:
        found, why = agree_on_precision(begun.get("precision", config.precision), device)
    except UserError as error:
        if not begun:
            raise
        way_out = "go on where it began, or give another run_dir"
        raise UserError(f"{config.run_dir} was begun with precision={begun['precision']}: {way_out} ({error})") from None
    mode: Any = begun.get("compile", "no" if config.compile == AUTO else config.compile)
    why = "as the run began" if begun and config.precision == AUTO else why
    return replace(config, precision=found, compile=mode), f"precision {found} ({why})"
