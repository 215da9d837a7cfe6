"""Every choice that can change a result, with its unit: defaults, then a YAML file, then key=value, the last one wins."""

import hashlib
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError

T = TypeVar("T")

AUTO = "auto"

USAGE = """\
usage: accelerate launch train.py [CONFIG.yaml] [key=value ...]
       --print-config shows the whole config that would be used, --help all keys"""


class UserError(ValueError):
    """A mistake that the user can mend: told in one line, without a traceback, and the run ends with exit code 2."""


class RunError(RuntimeError):
    """What ends a run and is no mistake of the user's: told in one line by rank `speaker`; the run ends with exit code 1."""

    def __init__(self, text: str, speaker: int = 0) -> None:
        super().__init__(text)
        self.speaker = speaker


def key(default: T, meaning: str, within: str = "", *, free: bool = False) -> T:
    """A key of the config.

    `within` is an interval such as "[0, 1)". A `free` key does not change what is learned, so a run that has begun may go
    on with another value of it.
    """
    return field(default=default, metadata={"meaning": meaning, "within": within, "free": free})


class Checked:
    """Refuses values that are not `within` the interval of their key."""

    def __post_init__(self) -> None:
        for each in fields(cast(Any, self)):
            value, within = getattr(self, each.name), each.metadata.get("within")
            if within and value != AUTO and not (isinstance(value, int | float) and lies_within(value, within)):
                section = type(self).__name__.removesuffix("Config").lower()
                name = f"{section}.{each.name}" if section else each.name
                raise UserError(f"{name} is {value}, not in {within}: {each.metadata['meaning']}")


def lies_within(value: float, interval: str) -> bool:
    low, high = (float(end) for end in interval[1:-1].split(","))
    return (low <= value if interval[0] == "[" else low < value) and (value <= high if interval[-1] == "]" else value < high)


@dataclass(frozen=True)
class DataConfig(Checked):
    name: str = key("digits", "digits, mnist, fashion_mnist, cifar10, cifar100, or folder: train/CLASS/* and val/CLASS/*")
    root: str = key("data", "where data sets are or are downloaded to; for folder, what holds train/ and val/", free=True)
    workers: int = key(2, "processes per rank that read image files, so many for train and for val", "[0, inf)", free=True)
    resident: Literal["auto", "device", "host"] = key(
        "auto", "where sets in memory are kept; auto: the device, if that takes a quarter of its free memory at most", free=True
    )
    size: int = key(224, "pixels: height and width that the images of folder are brought to", "[1, inf)")
    crop_area: float = key(0.25, "folder: least part of a training image's area that its random crop shows", "(0, 1]")
    shift: int = key(1, "pixels: training images move by up to so many, up or down and left or right", "[0, inf)")
    flip: Literal["none", "random", "alternating"] = key(
        "none", "mirror half of the training images: random ones, or in turn, so that two epochs show both sides of each"
    )
    erase: int = key(0, "pixels: side of a square that gets the mean color in each training image (Cutout)", "[0, inf)")


@dataclass(frozen=True)
class ModelConfig(Checked):
    name: str = key("cnn", "cnn, airbench, or a classification model of torchvision: resnet18, resnet50, convnext_tiny, ...")
    norm: Literal["batch", "group"] = key("batch", "batch, or group: without statistics of the batch, hence of the ranks")
    width: int = key(64, "cnn and airbench: channels of the first block; the next ones have 2 and 4 times as many", "[1, inf)")
    dropout: float = key(0.0, "cnn and airbench: part of the features that is dropped before the last layer", "[0, 1)")
    whiten: int = key(
        0, "pixels: side of the patches that a first layer, which is not learned, decorrelates; 0: none", "[0, 7]"
    )
    weights: str = key("", "pretrained weights: a name of torchvision's (DEFAULT), or a .safetensors or .pth file")


@dataclass(frozen=True)
class OptimConfig(Checked):
    name: Literal["sgd", "adamw", "muon"] = key("sgd", "sgd with Nesterov's momentum, adamw, or muon: sgd by orthogonal steps")
    lr: float = key(0.1, "learning rate at its peak, for the whole batch_size: ranks do not scale it", "(0, inf)")
    bias_lr: float = key(1.0, "times lr: the learning rate of biases, and of the weights of norms", "[0, inf)")
    head_lr: float = key(1.0, "times lr: the learning rate of the last layer's weights", "[0, inf)")
    momentum: float = key(0.9, "momentum of sgd and muon, first beta of adamw", "[0, 1)")
    weight_decay: float = key(5e-4, "pull of weights towards 0, per learning rate; none on biases and norms", "[0, inf)")
    warmup_epochs: float = key(1.0, "epochs in which the learning rate rises to its peak", "[0, inf)")
    schedule: Literal["cosine", "linear"] = key("cosine", "how the learning rate falls from its peak to 0 at the end")
    label_smoothing: float = key(0.1, "part of a label's weight that is spread over all classes", "[0, 1)")
    clip_norm: float = key(0.0, "a longer gradient (2-norm, over all weights) is cut to this; 0: no limit", "[0, inf)")
    average_decay: float = key(0.0, "per step: decay of a moving average of the weights, evaluated too; 0: none", "[0, 1)")


@dataclass(frozen=True)
class LimitsConfig(Checked):
    start: float = key(1800.0, "seconds that a rank may take until its first step", "(0, 1e9]", free=True)
    step: float = key(300.0, "seconds of a step, its images and its exchange with other ranks included", "(0, 1e9]", free=True)
    evaluation: float = key(3600.0, "seconds of an evaluation", "(0, 1e9]", free=True)
    save: float = key(1800.0, "seconds that training may wait for a checkpoint", "(0, 1e9]", free=True)


@dataclass(frozen=True)
class Config(Checked):
    run_dir: str = key("", "folder of this run: config, checkpoints, TensorBoard; runs/<config name> if not given", free=True)
    seed: int = key(0, "of the initial weights, the order of the images and the noise in them", "[0, 1e18]")
    epochs: float = key(20.0, "times that the training set is gone through", "(0, inf)")
    batch_size: int = key(128, "images per optimizer step, over all ranks together", "[1, inf)")
    micro_batches: int | str = key(
        AUTO, "parts that a rank's share of a batch is cut into; auto: as few as fit in memory", "[1, inf)", free=True
    )
    precision: Literal["auto", "no", "bf16", "fp16"] = key("auto", "mixed precision; auto: bf16 where the device is good at it")
    compile: Literal["no", "default", "reduce-overhead", "max-autotune"] = key(
        "no", "torch.compile's mode for the network, faster on a GPU; there, two runs may then differ in bits"
    )
    cuda_graph: bool = key(True, "on one GPU: record a step's work once, then replay it; the numbers are the same", free=True)
    views: Literal[1, 2, 6] = key(1, "of an image in an evaluation: 2 mirrors it too, 6 also moves it; logits are averaged")
    comm_hook: Literal["no", "bf16", "fp16"] = key("no", "what gradients are rounded to while the ranks exchange them")
    cudnn_benchmark: bool = key(False, "on a GPU, time cuDNN's ways to convolve: then two runs may differ in bits", free=True)
    nonfinite: Literal["stop", "skip"] = key("stop", "what follows a step whose loss or gradient is not finite", free=True)
    nonfinite_limit: int = key(5, "such steps in a row that are skipped; one more ends the run", "[1, inf)", free=True)
    log_every: int = key(50, "steps between two reports", "[1, inf)", free=True)
    eval_every: int = key(0, "steps between two evaluations; 0: an epoch", "[0, inf)", free=True)
    save_every: int = key(0, "steps between two checkpoints; 0: an epoch", "[0, inf)", free=True)
    keep: int = key(2, "checkpoints that are kept, the newest; one may turn out to be damaged", "[2, inf)", free=True)
    threads: int = key(0, "CPU threads of a rank; 0: all cores, divided among this machine's ranks", "[0, inf)", free=True)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)


def refuse_uneven(batch_size: int, ranks: int) -> None:
    """Raise UserError if a batch does not divide among the ranks."""
    spare = batch_size % ranks
    if spare:
        fits = [size for size in (batch_size - spare, batch_size - spare + ranks) if size]
        raise UserError(f"batch_size {batch_size} does not divide among {ranks} ranks: use {' or '.join(map(str, fits))}")


def load_config(args: Sequence[str]) -> Config:
    """The config that a command line asks for: `[CONFIG.yaml] [key=value ...]`. Raises UserError."""
    pairs = [arg for arg in args if "=" in arg and not arg.startswith("-")]
    files = [arg for arg in args if arg not in pairs]
    odd = [arg for arg in args if arg.startswith("-")] or files[1:]
    if odd:
        raise UserError(f"what is {odd[0]!r}? Give at most one CONFIG.yaml, then key=value pairs; --help lists the keys")
    config = read_config(Path(files[0])) if files else Config(run_dir="runs/digits")
    merged = OmegaConf.structured(config)
    for pair in pairs:
        merged = _merged(merged, _parse(pair), "")
    return cast(Config, OmegaConf.to_object(merged))


def read_config(path: Path) -> Config:
    """The config in a file: what it does not say has its default. Raises UserError."""
    default = OmegaConf.structured(Config(run_dir=f"runs/{path.stem}"))
    return cast(Config, OmegaConf.to_object(_merged(default, _read(path), f"{path}: ")))


def _read(path: Path) -> DictConfig:
    try:
        keys = OmegaConf.load(path)
    except FileNotFoundError:
        raise UserError(f"there is no config file {path} (looked in {Path.cwd()})") from None
    except (OSError, UnicodeDecodeError, YAMLError) as error:
        raise UserError(f"{path} is no YAML file that can be read: {one_line(error)}") from None
    if not isinstance(keys, DictConfig):
        raise UserError(f"{path} is a list, not a config: write it as 'key: value' lines")
    return keys


def _parse(pair: str) -> DictConfig:
    try:
        return OmegaConf.from_dotlist([pair])
    except (YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{pair!r} is not key=value: {one_line(error)}") from None


def _merged(config: DictConfig, keys: DictConfig, where: str) -> DictConfig:
    for each in fields(Config):
        if "no" in get_args(each.type) and keys.get(each.name) is False:  # YAML's reading of a bare `no`
            keys[each.name] = "no"
    try:
        config = cast(DictConfig, OmegaConf.merge(config, keys))
        OmegaConf.to_object(config)  # checks the ranges
        return config
    except ConfigKeyError as error:
        raise UserError(f"{where}there is no key {error.full_key}: {_hint(str(error.full_key))}") from None
    except OmegaConfBaseException as error:
        name = error.full_key or ", ".join(keys)
        raise UserError(f"{where}{name}: {str(error).splitlines()[0]}") from None
    except UserError as error:
        raise UserError(f"{where}{error}") from None


def _hint(unknown: str) -> str:
    names = [name for name, *_ in _keys(Config())]
    same_leaf = [name for name in names if name.rpartition(".")[2] == unknown.rpartition(".")[2]]
    near = same_leaf or get_close_matches(unknown, names, n=1)
    return f"did you mean {' or '.join(near)}?" if near else "--help lists the keys"


def one_line(error: BaseException) -> str:
    """What an error says, without line breaks."""
    return " ".join(str(error).split())


def to_yaml(config: Config) -> str:
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def help_text() -> str:
    """Every key with its type, default and meaning."""
    width = min(shutil.get_terminal_size().columns, 140)
    lines = [USAGE, ""]
    for name, kind, default, meta in _keys(Config()):
        head = f"{name:<22}{kind:<22}{default!s:<9}"
        limits = f" {meta['within']}" if meta["within"] else ""
        lines += textwrap.wrap(head + meta["meaning"] + limits, width, subsequent_indent=" " * 53, break_on_hyphens=False)
    return "\n".join(lines)


def _keys(config: Any, section: str = "") -> Iterator[tuple[str, str, Any, Any]]:
    for each in fields(config):
        value = getattr(config, each.name)
        if is_dataclass(value):
            yield from _keys(value, f"{each.name}.")
        else:
            choices = "|".join(getattr(choice, "__name__", str(choice)) for choice in get_args(each.type))
            yield section + each.name, choices or cast(type, each.type).__name__, value, each.metadata


def keys_of_result(config: Config) -> dict[str, Any]:
    """The keys that decide what is learned: all but the `free` ones."""
    return {name: value for name, _, value, meta in _keys(config) if not meta["free"]}


def digest(config: Config) -> str:
    """What two configs have in common if a run of one can go on with the other; one of them may have more epochs."""
    keys = keys_of_result(config)
    del keys["epochs"]
    return hashlib.sha256(repr(sorted(keys.items())).encode()).hexdigest()
