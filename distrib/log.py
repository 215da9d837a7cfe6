"""What a run says: on the console, as lines or a progress bar, and to TensorBoard. Only rank 0 speaks."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from distrib.config import Config, to_yaml
from distrib.data.sources import Source
from distrib.data.steps import Steps
from distrib.state import TrainState


class Log:
    """Console and TensorBoard of a run that goes on after step `first` and ends with step `total`.

    Points that an interrupted run wrote after step `first` are purged, so that a curve has each step once. The Log of a rank
    that is `silent` takes the same calls and does nothing.
    """

    def __init__(self, config: Config, first: int, total: int, steps: Steps, *, silent: bool) -> None:
        self.config, self.first, self.total, self.steps, self.silent = config, first, total, steps, silent
        self.writer = None if silent else SummaryWriter(config.run_dir, purge_step=first + 1)
        # disable=None is tqdm's word for "only on a terminal": elsewhere there are lines instead.
        self.bar = tqdm(total=total, initial=first, unit="step", dynamic_ncols=True, disable=True if silent else None)

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.close()
        self._record(SummaryWriter.close)

    def opening(self, setup: str, source: Source, network: nn.Module, warnings: Sequence[str]) -> None:
        """What is about to be trained, on what; and what was wrong with what was found."""
        weights = sum(each.numel() for each in network.parameters())
        shape = "x".join(map(str, source.shape))
        images = f"{len(source.train):,} images to train on and {len(source.val):,} to validate, {shape}"
        idle = self.steps.images % self.steps.batch_size
        for warning in warnings:
            self.warn(warning)
        self._say(setup)
        self._say(
            f"{self.config.data.name}: {images}, {len(source.classes)} classes; {self.config.model.name}: {weights:,} weights"
        )
        self._say(
            f"{self.config.run_dir}: {self.total:,} steps of {self.steps.batch_size} images, {self.steps.per_epoch:,} an epoch"
            + (f" ({idle} images sit out, others each time)" if idle else "")
            + (f"; goes on after step {self.first:,}" if self.first else "")
        )
        if not self.first:
            self._record(lambda writer: writer.add_text("config", f"```yaml\n{to_yaml(self.config)}```"))

    def tick(self, step: int) -> None:
        """A step is done: the bar moves."""
        self.bar.update(step - self.bar.n)

    def training(self, step: int, values: dict[str, float]) -> None:
        """Report `loss`, `top1`, `lr` and `images_per_second` since the last report."""
        self._scalars(step, "train", values)
        numbers = f"loss {values['loss']:.4f}  top1 {values['top1']:.2f} %  {values['images_per_second']:,.0f} images/s"
        if self.bar.disable:
            seconds = (self.total - step) * self.steps.batch_size / values["images_per_second"]
            self._say(f"{self._place(step)}  train: {numbers}  {tqdm.format_interval(round(seconds))} left")
        else:
            self.bar.set_description_str(f"epoch {step / self.steps.per_epoch:.2f}", refresh=False)
            self.bar.set_postfix_str(numbers)

    def validation(self, step: int, group: str, values: dict[str, float]) -> None:
        """Report `loss`, `top1` and `top5` of the weights that `group` names: val, or val_average."""
        self._scalars(step, group, values)
        numbers = f"loss {values['loss']:.4f}  top1 {values['top1']:.2f} %  top5 {values['top5']:.2f} %"
        self._say(f"{self._place(step)}  {group}: {numbers}")

    def warn(self, text: str) -> None:
        """Something went wrong that does not end the run."""
        self._say(f"warning: {text}")

    def text(self, step: int, name: str, text: str) -> None:
        """What is too long for the console."""
        self._record(lambda writer: writer.add_text(name, text, step))

    def closing(self, state: TrainState, stopped_by: str, steps_per_second: float) -> None:
        """The line that is left when all is done, or how to go on."""
        if stopped_by:
            where = f"after step {state.step:,}, which is saved" if state.step else "before the first step"
            self._say(f"stopped by {stopped_by} {where}: the same command goes on")
            return
        seen = f"{state.step * self.steps.batch_size:,} images seen"
        if steps_per_second:
            seen += f" at {steps_per_second * self.steps.batch_size:,.0f} a second"
        best = f"best {state.best_top1:.2f} % at step {state.best_step:,}"
        self._say(f"done: top1 {state.top1:.2f} %, {best}; {seen}; tensorboard --logdir {Path(self.config.run_dir).parent}")

    def flush(self) -> None:
        """Bring all that was logged to the disk: before a checkpoint says that it is done."""
        if not self.writer and not self.silent:
            with suppress(OSError):
                self.writer = SummaryWriter(self.config.run_dir)
        self._record(SummaryWriter.flush)

    def _place(self, step: int) -> str:
        return f"epoch {step / self.steps.per_epoch:.2f}  step {step:,}/{self.total:,}"

    def _scalars(self, step: int, group: str, values: dict[str, float]) -> None:
        def write(writer: SummaryWriter) -> None:
            for name, value in values.items():
                writer.add_scalar(f"{group}/{name}", value, step)

        self._record(write)

    def _record(self, write: Callable[[SummaryWriter], object]) -> None:
        """Write for TensorBoard. A disk that is full, or fails, does not end the run: the next save tries a new file."""
        if not self.writer:
            return
        try:
            write(self.writer)
        except OSError as error:
            self.writer = None
            self.warn(f"TensorBoard's file cannot be written: {error}; until the next save, reports go to the console only")

    def _say(self, text: str) -> None:
        if not self.silent and text:
            with suppress(OSError):  # the console may be a file, on the same disk
                tqdm.write(text)
