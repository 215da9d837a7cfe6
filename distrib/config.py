"""Every key of a config: default, range, unit, meaning, and when it applies. Imports no torch: typos are reported at once."""

from dataclasses import dataclass, field
from typing import Literal

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
    size: int | str = key(
        AUTO, "height and width of resized images, in pixels: a number, or HxW; auto: as for the weights, else 224",
        only=LISTED,
    )  # fmt: skip
    fit: Literal["auto", "crop", "pad", "stretch"] = key(
        "auto",
        "what becomes of an image of another shape: a part of it is shown, or all of it, with a margin or stretched; "
        "auto: as for the weights, else crop",
        only=LISTED,
    )
    center_crop: float | str = key(
        AUTO, "fraction of the largest crop that validation shows; auto: as for the weights, else 0.875",
        "(0, 1]", only="data.fit=auto|crop",
    )  # fmt: skip
    filter: Literal["auto", "bilinear", "bicubic"] = key(
        "auto", "how images are resized; auto: as for the weights, else bilinear", only=LISTED
    )
    mean: str = key(
        AUTO,
        "mean of the pixels in [0, 1]: a number, or three, 0.5,0.5,0.5, whose average is used for grey images; auto: as "
        "for the weights, else that of the data set",
    )
    std: str = key(AUTO, "standard deviation of the pixels, in the same form")
    white: float = key(
        0.0, "value of white in grey images of more than 8 bits; 0: 65535 in those of 16 bits, 1 in floats", "[0, inf)",
        only=LISTED,
    )  # fmt: skip
    max_pixels: int = key(10**9, "largest number of pixels of an image", "[1, inf)", free=True, only=LISTED)
    holdout: float = key(
        0.2,
        "fraction of the images that is held out, by their paths, if there are no validation images; 1: all, which can be "
        "evaluated only",
        "(0, 1]",
        only=LISTED,
    )  # fmt: skip
    bad_images: Literal["stop", "skip"] = key(
        "stop", "what becomes of images that cannot be used; skip: others replace them, and validation leaves them out",
        free=True, only=IMAGE_FILES,
    )  # fmt: skip
    crop_area: float = key(0.25, "smallest fraction of an image that a random training crop shows", "(0, 1]", only=IMAGE_FILES)
    translate: int = key(1, "largest random shift of a training image, in pixels, vertically and horizontally", "[0, inf)")
    flip: Literal["none", "random", "alternating", "both"] = key(
        "none",
        "swap left and right in half of the training images of an epoch; alternating: of each in every second epoch; both: "
        "top and bottom too, in half of them",
    )
    cutout: int = key(0, "side of the square that is blanked with the mean color (Cutout), in pixels; 0: none", "[0, inf)")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.height_and_width()
        self.mean_and_std()

    def height_and_width(self) -> tuple[int, int]:
        """The size of resized images. Raises UserError if it is no size."""
        height, cross, width = ("224" if self.size == AUTO else str(self.size)).lower().partition("x")
        sides = (height, width) if cross else (height, height)
        if not all(side.isdecimal() and int(side) for side in sides):
            raise UserError(f"data.size is {self.size}: give a number of pixels, or HxW, such as 64x96")
        return int(sides[0]), int(sides[1])

    def mean_and_std(self) -> tuple[list[float] | None, list[float] | None]:
        """The mean and std, one number or one per channel; None for those that are auto. Raises UserError."""
        return numbers("data.mean", self.mean, 0.0), numbers("data.std", self.std, 1e-6)


def numbers(name: str, text: str, least: float) -> list[float] | None:
    """Numbers from `least` to 1, separated by commas; None for auto. Raises UserError."""
    if text == AUTO:
        return None
    try:
        found = [float(word) for word in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(least <= each <= 1 for each in found):
        raise UserError(f"{name} is {text}: give a number in [{least:g}, 1], or one per channel, such as 0.5,0.5,0.5")
    return found


@dataclass(frozen=True)
class ModelConfig(Checked):
    name: str = key(
        "cnn", "cnn, airbench, a classification network of torchvision: resnet18, convnext_tiny, ..., or of timm: timm:NAME"
    )
    norm: Literal["batch", "group"] = key("batch", "normalization; group: results do not depend on the number of ranks")
    width: int = key(64, "channels of the first block; the next two have 2 and 4 times as many", "[1, inf)", only=OWN_NETWORKS)
    dropout: float = key(0.0, "fraction of the features that is dropped before the last layer", "[0, 1)", only=OWN_NETWORKS)
    whiten: int = key(0, "side of the patches that a fixed first layer whitens, in pixels; 0: no such layer", "[0, 7]")
    stem: Literal["auto", "small", "large"] = key(
        "auto",
        "first layers of a ResNet; auto: small for images of up to 64 pixels, large with weights",
        free=True,
    )
    freeze: float = key(
        0.0, "epochs in which only the last layer learns; the others keep their weights and batch statistics", "[0, inf)"
    )
    weights: str = key(
        "", "weights to start from: DEFAULT or another name of the network's package, a file, or a run folder", path=True
    )


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
    layer_decay: float = key(
        1.0, "learning rate of a layer, as a factor of that of the next layer; 1: the same in all", "(0, 1]"
    )
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


def refuse_all_held_out(config: DataConfig) -> None:
    """Raise UserError if no image is left to train on."""
    if config.holdout == 1:
        raise UserError("data.holdout=1 leaves no images to train on: it is for distrib evaluate; give a smaller one")


def refuse_uneven(batch_size: int, ranks: int) -> None:
    """Raise UserError if a batch does not divide evenly among the ranks."""
    spare = batch_size % ranks
    if spare:
        fits = [size for size in (batch_size - spare, batch_size - spare + ranks) if size]
        raise UserError(f"batch_size {batch_size} does not divide among {ranks} ranks: use {' or '.join(map(str, fits))}")
