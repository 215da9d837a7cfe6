"""An `Objective` computes the loss and the meters from logits and targets. Nothing else knows what a target means."""

from collections.abc import Mapping
from functools import cached_property

import torch.nn.functional as F
from torch import Tensor

from distrib.config import Config, ObjectiveConfig
from distrib.registry import lookup, refuse_unknown
from distrib.training import OBJECTIVES, meters
from distrib.training.meters import METERS, Meter, Sums, mean


class Objective:
    """A loss and its meters. A subclass must override `loss`; it may override the rest. If the loss has settings, override also
    `losses` and `loss_sum` to report a loss without them, so that runs with other settings can be compared.

    Logits are (n, classes) floats; targets are class ids, (n,) int64, or (n, classes) floats.
    """

    main = "top1"  # the meter that decides which checkpoint is best
    while_training = ("top1",)  # the meters, beside the loss, that each training step measures

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss that is trained on: the mean over the images, a scalar."""
        raise NotImplementedError

    @cached_property
    def meters(self) -> Mapping[str, Meter]:
        """The meters of an evaluation by name, in the order in which they are printed."""
        return {"loss": Meter(self.loss_sum, mean, "{:.4f}", higher_is_better=False), **METERS}

    def loss_sum(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss that an evaluation reports, summed over the images."""
        return self.loss(logits.float(), targets) * len(targets)

    def loss_and_sums(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Sums]:
        """The loss, and the sums of the meters of a training step."""
        loss, reported = self.losses(logits, targets)
        return loss, {
            "loss": reported.detach().double() * len(targets),
            **self.measure(logits.detach(), targets, self.while_training),
        }

    def losses(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The loss that is trained on and the loss that is reported, both as means."""
        loss = self.loss(logits, targets)
        return loss, loss

    def measure(self, logits: Tensor, targets: Tensor, names: tuple[str, ...] | None = None) -> Sums:
        """The sums of the meters `names`, or of all; they stay on the device."""
        classes = logits.shape[1]
        return {
            name: meter.sums(logits, targets)
            for name, meter in self.meters.items()
            if classes >= meter.least_classes and (names is None or name in names)
        }

    def score(self, values: Mapping[str, float]) -> float:
        """The quality of an evaluation, from its reported values: higher is better."""
        return values[self.main] if self.meters[self.main].higher_is_better else -values[self.main]

    @property
    def name(self) -> str:
        """The name in the manifest: a run resumes only with an objective of the same name."""
        return type(self).__name__


class CrossEntropy(Objective):
    """Softmax cross-entropy in nats, with label smoothing: a fraction `smoothing` of the weight is spread over all classes.

    Szegedy et al., "Rethinking the Inception architecture for computer vision", 2016, section 7. The reported loss is without
    smoothing, so that runs with different smoothing, and training and validation, can be compared.
    """

    def __init__(self, smoothing: float = 0.0) -> None:
        self.smoothing = smoothing

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return self.losses(logits, targets)[0]

    def loss_sum(self, logits: Tensor, targets: Tensor) -> Tensor:
        return meters.cross_entropy(logits, targets)

    def losses(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The loss with and without smoothing, from one softmax."""
        logs = F.log_softmax(logits, dim=1)
        plain = F.nll_loss(logs, targets) if targets.dim() == 1 else -(targets * logs).sum(1).mean()
        return (1 - self.smoothing) * plain - self.smoothing * logs.mean() if self.smoothing else plain, plain


def cross_entropy(config: ObjectiveConfig) -> Objective:
    return CrossEntropy(config.label_smoothing)


def build_objective(config: Config) -> Objective:
    """The objective `config.objective.name`. Raises UserError if it is unknown."""
    refuse_unknown(OBJECTIVES, config.objective.name, "objective.name", "objective")
    objective: Objective = lookup(OBJECTIVES, config.objective.name)(config.objective)
    return objective
