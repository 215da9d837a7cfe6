"""Every key of a config: default, range, unit, meaning, and when it applies. Imports no torch: typos are reported at once."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal, NamedTuple, cast, get_args

from distrib.errors import UserError
from distrib.schema import AUTO, Checked, key

OWN = "own:"  # prefix of the name of an object that was passed to train()

IN_MEMORY = "data.name=digits|mnist|fashion_mnist|cifar10|cifar100|own"
FROM_DISK = "data.name=mnist|fashion_mnist|cifar10|cifar100|folder|csv"
IMAGE_FILES = "data.name=folder|csv|own"
LISTED = "data.name=folder|csv"
OWN_NETWORKS = "model.name=cnn|airbench"

# Keys that had another name in run folders of format 1.
RENAMED = {
    "data.shift": "data.translate",
    "data.erase": "data.cutout",
    "optim.average_decay": "optim.ema_decay",
    "optim.label_smoothing": "objective.label_smoothing",
    "views": "tta",
}


@dataclass(frozen=True)
class DataConfig(Checked):
    name: str = key(
        "digits", "data set: digits, mnist, fashion_mnist, cifar10, cifar100, folder (image files), or csv (a table)"
    )
    root: str = key(
        "data",
        "folder of the data sets, where missing ones are downloaded to; for folder: that of train/ and val/, or of classes; "
        "for csv: the table, with the columns path, label and maybe split",
        free=True,
        only=FROM_DISK,
        path=True,
    )
    workers: int | str = key(
        AUTO,
        "processes per rank that read image files; auto: as many as the rank has cores, up to 16",
        "[0, inf)",
        free=True,
        only=IMAGE_FILES,
    )
    resident: Literal["auto", "device", "host"] = key(
        "auto", "where images in memory are kept; auto: on the device if they fit in a quarter of its free memory",
        free=True, only=IN_MEMORY,
    )  # fmt: skip
    size: int | str = key(224, "height and width of resized images, in pixels: a number, or HxW", only=LISTED)
    fit: Literal["crop", "pad", "stretch"] = key(
        "crop", "what becomes of an image of another shape: a part of it is shown, or all of it, with a margin or stretched",
        only=LISTED,
    )  # fmt: skip
    white: float = key(
        0.0, "value of white in grey images of more than 8 bits; 0: 65535 in those of 16 bits, 1 in floats", "[0, inf)",
        only=LISTED,
    )  # fmt: skip
    max_pixels: int = key(10**9, "largest number of pixels of an image", "[1, inf)", free=True, only=LISTED)
    holdout: float = key(
        0.2, "fraction of the images that is held out, by their paths, if there are no validation images", "(0, 1)",
        only=LISTED,
    )  # fmt: skip
    bad_images: Literal["stop", "skip"] = key(
        "stop", "what becomes of images that cannot be used; skip: others replace them, and validation leaves them out",
        free=True, only=IMAGE_FILES,
    )  # fmt: skip
    crop_area: float = key(0.25, "smallest fraction of an image that a random training crop shows", "(0, 1]", only=IMAGE_FILES)
    translate: int = key(1, "largest random shift of a training image, in pixels, vertically and horizontally", "[0, inf)")
    flip: Literal["none", "random", "alternating"] = key(
        "none", "swap left and right in half of the training images of an epoch; alternating: of each in every second epoch"
    )
    cutout: int = key(0, "side of the square that is blanked with the mean color (Cutout), in pixels; 0: none", "[0, inf)")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.height_and_width()

    def height_and_width(self) -> tuple[int, int]:
        """The size of resized images. Raises UserError if it is no size."""
        height, cross, width = str(self.size).lower().partition("x")
        sides = (height, width) if cross else (height, height)
        if not all(side.isdecimal() and int(side) for side in sides):
            raise UserError(f"data.size is {self.size}: give a number of pixels, or HxW, such as 64x96")
        return int(sides[0]), int(sides[1])


@dataclass(frozen=True)
class ModelConfig(Checked):
    name: str = key("cnn", "cnn, airbench, or a classification network of torchvision: resnet18, resnet50, convnext_tiny, ...")
    norm: Literal["batch", "group"] = key("batch", "normalization; group: results do not depend on the number of ranks")
    width: int = key(64, "channels of the first block; the next two have 2 and 4 times as many", "[1, inf)", only=OWN_NETWORKS)
    dropout: float = key(0.0, "fraction of the features that is dropped before the last layer", "[0, 1)", only=OWN_NETWORKS)
    whiten: int = key(0, "side of the patches that a fixed first layer whitens, in pixels; 0: no such layer", "[0, 7]")
    stem: Literal["auto", "small", "large"] = key(
        "auto",
        "first layers of a ResNet; auto: small for images of up to 64 pixels, large with weights",
        free=True,
    )
    weights: str = key("", "weights to start from: a name in torchvision (DEFAULT), a file, or a run folder", path=True)


@dataclass(frozen=True)
class ObjectiveConfig(Checked):
    name: str = key("cross_entropy", "the loss: cross_entropy")
    label_smoothing: float = key(
        0.1, "fraction of a label's weight that is spread over all classes", "[0, 1)", only="objective.name=cross_entropy"
    )


@dataclass(frozen=True)
class OptimConfig(Checked):
    name: Literal["sgd", "adamw", "muon"] = key("sgd", "sgd (Nesterov momentum), adamw, or muon (sgd with orthogonal steps)")
    lr: float = key(
        0.1, "peak learning rate, for the whole batch: the number of ranks does not scale it", "(0, inf)", midway=True
    )
    bias_lr: float = key(1.0, "learning rate of biases and norm weights, as a factor of lr", "[0, inf)")
    head_lr: float = key(1.0, "learning rate of the last layer's weights, as a factor of lr", "[0, inf)")
    momentum: float = key(0.9, "momentum of sgd and muon, first beta of adamw", "[0, 1)")
    weight_decay: float = key(
        5e-4, "weight decay, scaled by the learning rate; not applied to biases and norms", "[0, inf)", midway=True
    )
    warmup_epochs: float = key(1.0, "epochs in which the learning rate rises to its peak", "[0, inf)")
    schedule: Literal["cosine", "linear"] = key("cosine", "how the learning rate falls from its peak to 0 at the end")
    clip_norm: float = key(0.0, "largest norm of the gradient over all weights; 0: no limit", "[0, inf)", midway=True)
    ema_decay: float = key(
        0.0, "decay per step of a moving average of the weights, which is evaluated too; 0: no average", "[0, 1)"
    )


@dataclass(frozen=True)
class LimitsConfig(Checked):
    start: float = key(1800.0, "seconds until the first step", "(0, 1e9]", free=True)
    step: float = key(300.0, "seconds of a step, with loading its images and waiting for other ranks", "(0, 1e9]", free=True)
    evaluation: float = key(3600.0, "seconds of an evaluation", "(0, 1e9]", free=True)
    save: float = key(1800.0, "seconds that training waits for a checkpoint", "(0, 1e9]", free=True)
    read: float = key(
        240.0,
        "seconds for which a read is tried again after a temporary error of a disk; below step",
        "(0, 1e9]",
        free=True,
    )


@dataclass(frozen=True)
class Config(Checked):
    run_dir: str = key(
        "", "folder of the run: config, checkpoints, TensorBoard; runs/<config name> if not given", free=True, path=True
    )
    seed: int = key(0, "seed of the initial weights, the order of the images and their augmentation", "[0, 1e18]")
    epochs: float = key(20.0, "passes over the training set", "(0, inf)", midway=True)
    batch_size: int = key(128, "images per optimizer step, over all ranks together", "[1, inf)")
    micro_batches: int | str = key(
        AUTO,
        "number of parts of a rank's share that are computed in turn; auto: as few as fit in memory",
        "[1, inf)",
        free=True,
    )
    precision: Literal["auto", "no", "bf16", "fp16"] = key("auto", "mixed precision; auto: bf16 if it is fast and correct here")
    compile: Literal["auto", "no", "default", "reduce-overhead", "max-autotune"] = key(
        "auto", "mode of torch.compile; auto: as accelerate's settings say, else no. On a GPU, two runs may then differ in bits"
    )
    cuda_graph: bool = key(True, "record a step as a CUDA graph, on one GPU; the results are the same", free=True)
    tta: Literal[1, 2, 6] = key(
        1, "views of each image in an evaluation, whose logits are averaged: 2 adds its mirror image, 6 also shifts both"
    )
    comm_hook: Literal["no", "bf16", "fp16"] = key("no", "precision of the gradients that the ranks exchange")
    cudnn_benchmark: bool = key(False, "let cuDNN choose kernels by their time: two runs may differ in bits", free=True)
    nonfinite: Literal["stop", "skip"] = key("stop", "what to do when a loss or gradient is not finite", free=True)
    nonfinite_limit: int = key(5, "largest number of skipped steps in a row", "[1, inf)", free=True)
    log_every: int = key(50, "steps between two reports", "[1, inf)", free=True)
    eval_every: int = key(0, "steps between two evaluations; 0: one epoch", "[0, inf)", free=True)
    save_every: int = key(0, "steps between two checkpoints; 0: one epoch", "[0, inf)", free=True)
    keep: int = key(2, "number of newest checkpoints that are kept, beside the best one", "[2, inf)", free=True)
    threads: int = key(0, "CPU threads per rank; 0: the machine's cores divided by its ranks", "[0, inf)", free=True)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)


class Key(NamedTuple):
    """A key of a config: dotted name, type, value, and the metadata that `key` was given."""

    name: str
    type: Any
    value: Any
    meta: Any


def keys_of(config: Any, section: str = "") -> Iterator[Key]:
    """Every key of a config, in order."""
    for each in fields(config):
        value = getattr(config, each.name)
        if is_dataclass(value):
            yield from keys_of(value, f"{each.name}.")
        else:
            yield Key(section + each.name, each.type, value, each.metadata)


KEYS = {each.name: each for each in keys_of(Config())}  # with the defaults


def applies(config: Config, name: str) -> bool:
    """Whether a key has an effect, given the other keys of `config`."""
    condition = KEYS[name].meta["only"]
    if not condition:
        return True
    other, _, values = condition.partition("=")
    section, _, leaf = other.partition(".")
    value: str = getattr(getattr(config, section), leaf)
    return ("own" if value.startswith(OWN) else value) in values.split("|")


def refuse_keys_that_do_not_apply(config: Config, given: set[str]) -> None:
    """Raise UserError if one of the `given` keys would be ignored."""
    idle = [name for name in KEYS if name in given and not applies(config, name)]
    if idle:
        other, _, values = KEYS[idle[0]].meta["only"].partition("=")
        value = getattr(getattr(config, other.partition(".")[0]), other.partition(".")[2])
        raise UserError(
            f"{', '.join(idle)} would be ignored: {idle[0]} applies to {other}={values.replace('|own', '')} only, "
            f"and {other} is {value}; omit it"
        )


def keys_changed(config: Config) -> set[str]:
    """The keys that differ from their defaults."""
    return {each.name for each in keys_of(config) if each.value != KEYS[each.name].value}


def values_that_apply(config: Config) -> dict[str, Any]:
    """The value of each key that applies, under its dotted name."""
    return {each.name: each.value for each in keys_of(config) if applies(config, each.name)}


def nested(values: dict[str, Any]) -> dict[str, Any]:
    """Dotted names as nested sections, as in a config file."""
    tree: dict[str, Any] = {}
    for name, value in values.items():
        section, _, leaf = name.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[leaf] = value
    return tree


def differences(
    there: dict[str, Any], now: Config, chosen: dict[str, Any] | None = None, changes: Collection[str] = ()
) -> list[str]:
    """The keys that prevent a run that was started with the keys `there` from resuming with `now`, in words.

    A key that is missing there had its default. `chosen` holds what the run chose for keys that were auto. A key that is auto
    now keeps the value that the run has. `changes` names keys that may differ if they may be changed midway.
    """
    current, had, found = {each.name: each.value for each in keys_of(now)}, there | (chosen or {}), list[str]()
    for name, after in current.items():
        before = had.get(name, KEYS[name].value)
        keeps = after == AUTO == KEYS[name].value
        allowed = KEYS[name].meta["free"] or keeps or (KEYS[name].meta["midway"] and name in changes)
        if before != after and there.get(name) != after and not allowed:
            found.append(f"{name} ({before} there, {after} now)")
    return found + [f"{name} ({there[name]} there, which this version does not know)" for name in there if name not in KEYS]


def changed_midway(there: dict[str, Any], now: Config) -> dict[str, tuple[Any, Any]]:
    """The keys that may be changed midway and differ from the keys `there`: their values there and now."""
    pairs = {each.name: (there.get(each.name, KEYS[each.name].value), each.value) for each in keys_of(now)}
    return {name: pair for name, pair in pairs.items() if KEYS[name].meta["midway"] and pair[0] != pair[1]}


def type_in_words(kind: Any) -> str:
    """The type of a key, as --help shows it."""
    words = {bool: "true|false", str: "text", int | str: "a number or text"}
    return words.get(kind) or "|".join(map(str, get_args(kind))) or cast(str, kind.__name__)


def refuse_uneven(batch_size: int, ranks: int) -> None:
    """Raise UserError if a batch does not divide evenly among the ranks."""
    spare = batch_size % ranks
    if spare:
        fits = [size for size in (batch_size - spare, batch_size - spare + ranks) if size]
        raise UserError(f"batch_size {batch_size} does not divide among {ranks} ranks: use {' or '.join(map(str, fits))}")
