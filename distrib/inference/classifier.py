"""A trained run as a classifier: its network, its classes, and the function from an image file to its pixels."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from distrib.command_line import dotted, with_values
from distrib.config import LISTED, OWN, Config
from distrib.data.augment import Normalize, mean_logits
from distrib.data.pixels import ImageSpec, pixels_of
from distrib.data.source import Source, data_differences
from distrib.errors import UserError
from distrib.keys import refuse_keys_that_do_not_apply
from distrib.models.build import NetworkOrBuilder, build_model
from distrib.models.weight_files import description_in
from distrib.runtime.checkpoint import best_checkpoint, refuse_damaged, weights_of
from distrib.training.precision import choose_precision
from distrib.training.state import shapes, tensor_differences

OTHER_DATA = ("name", "root", "holdout", "bad_images", "white", "max_pixels")  # keys that may differ from those of the run
ARGUMENTS = {"data": "source", "model": "network", "objective": "objective"}  # names of an object by its section
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Classifier:
    """A network, in evaluation mode, with what it needs to classify images as the evaluation of its run does."""

    checkpoint: Path
    manifest: dict[str, Any]
    config: Config
    network: nn.Module
    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    spec: ImageSpec
    normalize: Normalize
    device: torch.device

    def pixels(self, file: str | Path | IO[bytes]) -> Tensor:
        """The pixels of an image file, (channels, height, width) uint8. Raises OSError and UserError."""
        return self.with_channels(pixels_of(file, self.spec, self.spec.center)[None])[0]

    def with_channels(self, images: Tensor) -> Tensor:
        """Images (n, 3, height, width) uint8 with the channels of the network: three, or one of grey."""
        if self.shape[0] == 3:
            return images
        red, green, blue = images.int().unbind(1)
        return ((19595 * red + 38470 * green + 7471 * blue + (1 << 15)) >> 16).to(torch.uint8)[:, None]  # as Pillow's L

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """The logits, (n, classes), of images (n, channels, height, width) uint8, averaged over the run's `tta` views.

        Raises UserError for other tensors.
        """
        if images.dtype != torch.uint8 or images.shape[1:] != self.shape:
            wanted = ", ".join(map(str, self.shape))
            raise UserError(f"images are {images.dtype} {list(images.shape)}, not uint8 (n, {wanted})")
        dtype, precision = DTYPES.get(self.config.precision), self.config.precision
        floats = self.normalize(images.to(self.device))
        with torch.autocast(self.device.type, dtype=dtype, enabled=precision != "no"):
            return mean_logits(self.network, floats, self.config.tta)


def config_of(manifest: dict[str, Any]) -> Config:
    """The config of a run, with what it chose for auto."""
    values = dict(dotted(manifest["config"])) | {key: manifest["chosen"][key] for key in ("precision", "compile")}
    return with_values(Config(), values, "")


def refuse_another_network(folder: Path, there: dict[str, Any], network: nn.Module) -> None:
    """Raise UserError unless the tensors of a checkpoint, by their `shapes`, are those of a network."""
    differ = tensor_differences(there, {name: (each.shape, each.dtype) for name, each in network.state_dict().items()})
    if differ:
        raise UserError(f"{folder} was saved with another network: {differ}")


def refuse_other_classes(folder: Path, manifest: dict[str, Any], source: Source) -> None:
    """Raise UserError if a data set has other classes than those that a run was trained on."""
    there, now = manifest["data"], {"classes": list(source.classes)}
    if there["classes"] != now["classes"]:
        raise UserError(f"{folder} has another {data_differences(there, there | now)[0]}")


def with_data(config: Config, keys: Mapping[str, str], used: Collection[str]) -> Config:
    """`config` with other `keys` of data. Raises UserError if one is not among those that are `used`."""
    found = with_values(config, keys, "")
    refuse_keys_that_do_not_apply(found, {*keys})
    idle = [key for key in keys if key.removeprefix("data.") not in used]
    if idle:
        raise UserError(f"{', '.join(idle)} would be ignored: give {', '.join(used)} of data only")
    return found


def refuse_missing_objects(folder: Path, config: Config, function: str, **given: object) -> None:
    """Raise UserError if a run was trained with an object that was not passed to `function`. `given`: objects by section."""
    for section, each in given.items():
        name = getattr(config, section).name
        if each is None and name.startswith(OWN):
            call = f"distrib.{function}(..., {ARGUMENTS[section]}=...)"
            raise UserError(f"{folder} was trained with {section}.name={name}, an object: pass it in Python, {call}")


def find(run: Path) -> tuple[Path, dict[str, Any], Path]:
    """A checkpoint, its manifest, and the file of its weights: of a run folder the best one; or an exported .safetensors file.

    Raises UserError, and RunError if it cannot be read.
    """
    if run.is_file():
        manifest = description_in(run).get("manifest")
        if not manifest:
            raise UserError(f"{run} is no .safetensors file of distrib export: give such a file, a run folder or a checkpoint")
        return run, manifest, run
    folder, manifest = best_checkpoint(run)
    return folder, manifest, weights_of(folder, manifest)


def refuse_damaged_weights(checkpoint: Path) -> None:
    """Raise UserError if the files of a checkpoint differ from what was written."""
    if checkpoint.is_dir():
        refuse_damaged(checkpoint)


def load(run: str | Path, *, network: NetworkOrBuilder | None = None, device: str | torch.device | None = None) -> Classifier:
    """The best checkpoint of a run folder, or a checkpoint, as a classifier: on this machine's first GPU, or the CPU.

    `run` may also be a .safetensors file that was exported. A `network` that was passed to train() must be passed again.
    Raises UserError, and RunError if a file cannot be read.
    """
    folder, manifest, weights = find(Path(run))
    refuse_damaged_weights(folder)
    config = config_of(manifest)
    refuse_missing_objects(folder, config, "load", model=network)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    choose_precision(config.precision, device)
    channels, height, width = manifest["image"]["shape"]
    if channels not in (1, 3):
        raise UserError(f"{folder} was trained on images of {channels} channels: image files have 1 or 3")
    classes = tuple(manifest["data"]["classes"])
    built = build_model(config.model, (channels, height, width), len(classes), network, load=False)
    refuse_another_network(folder, shapes(weights), built)
    built.load_state_dict(load_file(weights))
    mean, std = (torch.tensor(manifest["image"][name], device=device) for name in ("mean", "std"))
    files = config.data.name in LISTED.partition("=")[2].split("|")
    return Classifier(
        checkpoint=folder,
        manifest=manifest,
        config=config,
        network=built.to(device).eval(),
        classes=classes,
        shape=(channels, height, width),
        spec=ImageSpec.of(config.data)
        if files
        else ImageSpec(height, width, fit="crop" if config.data.name.startswith(OWN) else "stretch"),
        normalize=Normalize(mean, std, width),
        device=device,
    )
