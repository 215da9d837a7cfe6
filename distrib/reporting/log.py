"""The output of a run: lines or a progress bar on the console, and TensorBoard. Only rank 0 writes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from distrib.command_line import to_yaml
from distrib.config import Config
from distrib.data.source import Source
from distrib.data.steps import Steps


class Log:
    """Console and TensorBoard output of a run of `total` steps.

    `forms` has the print format of each meter, and `main` is the meter that decides which checkpoint is best. A `silent` Log
    does nothing.
    """

    def __init__(
        self, config: Config, total: int, steps: Steps, forms: Mapping[str, str], main: str, *, silent: bool = False
    ) -> None:
        self.config, self.total, self.steps, self.silent = config, total, steps, silent
        self.forms, self.main = forms, main
        self.writer: SummaryWriter | None = None
        self.bar = tqdm(disable=True)

    @contextmanager
    def opened(self, first: int) -> Iterator[None]:
        """Open the output for the steps after `first`. Points of an interrupted attempt after `first` are purged."""
        self.writer = None if self.silent else SummaryWriter(self.config.run_dir, purge_step=first + 1)
        # disable=None: tqdm shows the bar on a terminal only; elsewhere, lines are printed instead.
        silent = True if self.silent else None
        self.bar = tqdm(total=self.total, initial=first, unit="step", dynamic_ncols=True, disable=silent)
        try:
            yield
        finally:
            self.bar.close()
            self._record(SummaryWriter.close)

    def opening(self, first: int, lines: Sequence[str], source: Source, network: nn.Module) -> None:
        """Print `lines`, then the data set, the network and the number of steps."""
        weights = sum(each.numel() for each in network.parameters())
        shape = "x".join(map(str, source.shape))
        images = f"{len(source.train):,} images to train on and {len(source.val):,} to validate, {shape}"
        idle = self.steps.images % self.steps.batch_size
        for line in lines:
            self._say(line)
        self._say(
            f"{self.config.data.name}: {images}, {len(source.classes)} classes; {self.config.model.name}: {weights:,} weights"
        )
        self._say(
            f"{self.config.run_dir}: {self.total:,} steps of {self.steps.batch_size} images, {self.steps.per_epoch:,} an epoch"
            + (f" (each epoch leaves out {idle} other images)" if idle else "")
            + (f"; resumes after step {first:,}" if first else "")
        )
        if not first:
            self._record(lambda writer: writer.add_text("config", f"```yaml\n{to_yaml(self.config)}```"))

    def move_bar(self, step: int) -> None:
        """Move the progress bar to `step`."""
        self.bar.update(step - self.bar.n)

    def training(self, step: int, values: dict[str, float]) -> None:
        """Report the meters, `lr` and `images_per_second` of the steps since the last report."""
        self._scalars(step, "train", values)
        numbers = f"{self._numbers(values)}  {values['images_per_second']:,.0f} images/s"
        if self.bar.disable:
            seconds = (self.total - step) * self.steps.batch_size / values["images_per_second"]
            self._say(f"{self._place(step)}  train: {numbers}  {tqdm.format_interval(round(seconds))} left")
        else:
            self.bar.set_description_str(f"epoch {step / self.steps.per_epoch:.2f}", refresh=False)
            self.bar.set_postfix_str(numbers)

    def validation(self, step: int, group: str, values: dict[str, float]) -> None:
        """Report the meters of an evaluation; `group` is val, or val_ema for the moving average."""
        self._scalars(step, group, values)
        images = f"  of {values['images']:,.0f} images, without bad ones" if "images" in values else ""
        self._say(f"{self._place(step)}  {group}: {self._numbers(values)}{images}")

    def warn(self, text: str) -> None:
        """Print a warning."""
        self._say(f"warning: {text}")

    def text(self, step: int, name: str, text: str) -> None:
        """Write a text to TensorBoard only: it is too long for the console."""
        self._record(lambda writer: writer.add_text(name, text, step))

    def stopped(self, step: int, stopped_by: str) -> None:
        """Print the last line of a run that was stopped."""
        where = f"after step {step:,}, which is saved" if step else "before the first step"
        self._say(f"stopped by {stopped_by} {where}: run the same command to resume")

    def done(self, step: int, values: dict[str, float], best: Path, best_values: dict[str, float], speed: float) -> None:
        """Print the last line of a run that is complete; `best` is the checkpoint of the best evaluation.

        `speed` is in steps per second, 0 if this attempt did no step.
        """
        seen = f"{step * self.steps.batch_size:,} images seen"
        if speed:
            seen += f" at {speed * self.steps.batch_size:,.0f} a second"
        missed = round(values.get("missed_classes", 0))
        classes = f"{missed} class{'es' * (missed > 1)}"
        told = f"; no image of {classes} was recognized: distrib evaluate {self.config.run_dir}" if missed else ""
        last, highest = (self.forms[self.main].format(each[self.main]) for each in (values, best_values))
        self._say(
            f"done: {self.main} {last}, best {highest} in {best}{told}; {seen}; "
            f"tensorboard --logdir {Path(self.config.run_dir).parent}"
        )

    def flush(self) -> None:
        """Sync everything that was logged to the disk. Called before a checkpoint is written."""
        if not self.writer and not self.silent:
            with suppress(OSError):
                self.writer = SummaryWriter(self.config.run_dir)
        self._record(SummaryWriter.flush)

    def _numbers(self, values: Mapping[str, float]) -> str:
        return "  ".join(f"{name} {form.format(values[name])}" for name, form in self.forms.items() if name in values)

    def _place(self, step: int) -> str:
        return f"epoch {step / self.steps.per_epoch:.2f}  step {step:,}/{self.total:,}"

    def _scalars(self, step: int, group: str, values: dict[str, float]) -> None:
        def write(writer: SummaryWriter) -> None:
            for name, value in values.items():
                writer.add_scalar(f"{group}/{name}", value, step)

        self._record(write)

    def _record(self, write: Callable[[SummaryWriter], object]) -> None:
        """Write to TensorBoard. If the disk is full or fails, the run continues, and the next save opens a new file."""
        if not self.writer:
            return
        try:
            write(self.writer)
        except OSError as error:
            self.writer = None
            self.warn(f"TensorBoard's file cannot be written: {error}; reports go to the console only until the next save")

    def _say(self, text: str) -> None:
        if not self.silent and text:
            with suppress(OSError):  # the console may be a file on a full disk
                tqdm.write(text)
