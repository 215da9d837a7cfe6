"""The loop: what a step does, what an evaluation does, and when each is due."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from time import perf_counter

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import nn

from distrib import ranks
from distrib.checkpoint import Saver, Unsaved
from distrib.config import Config
from distrib.data.loaders import Batch, Loader
from distrib.data.steps import DROPOUT, fold
from distrib.log import Log
from distrib.metrics import means, totals, zeros
from distrib.optim import Schedule, set_learning_rate
from distrib.state import Ending, TrainState, about, snapshot


def fit(state: TrainState, loader: Loader, schedule: Schedule, config: Config, accelerator: Accelerator, log: Log) -> Ending:
    """Train from `state.step` to the end of `schedule`, or until someone asks to stop. Every rank must call this.

    Raises Unsaved if the last state could not be saved.
    """
    epoch, clock, vote = loader.steps.per_epoch, Clock(), ranks.StopVote(Path(config.run_dir))
    saved, stopper = state.step, ""
    with Saver(Path(config.run_dir), about(config, accelerator.num_processes), config.keep) as saver:
        for batch in loader.train(range(state.step, schedule.total)):
            stopper = vote(state.step)
            if stopper:
                break
            rate = schedule(state.step)
            train_step(state, batch, rate, config, accelerator)
            log.tick(state.step)
            clock.lap_steps += 1

            if due(state.step, config.log_every, schedule.total):
                report(state, rate, clock, config, accelerator, log)
            with clock.paused():
                if due(state.step, config.eval_every or epoch, schedule.total):
                    validate(state, loader, accelerator, log)
                if due(state.step, config.save_every or epoch, schedule.total):
                    saved = save(state, saver, accelerator, log)

        if saved != state.step:
            save(state, saver, accelerator, log)
        failure = ranks.agreed(saver.wait())
    if failure:
        raise Unsaved(failure)
    return Ending(stopper, clock.overall())


def save(state: TrainState, saver: Saver, accelerator: Accelerator, log: Log) -> int:
    """Begin to write a checkpoint; returns its step. Tell if the one before was not written. Every rank must call this."""
    failure = ranks.agreed(saver.wait())
    if failure:
        log.warn(f"{failure}; it is tried again now")
    log.flush()  # the checkpoint will say that all up to here is done
    pool(state, accelerator)
    if accelerator.is_main_process:
        saver.save(snapshot(state, saver.taken))
    return state.step


def report(state: TrainState, rate: float, clock: "Clock", config: Config, accelerator: Accelerator, log: Log) -> None:
    """Report the training since the last report, over all ranks. Every rank must call this."""
    values = means(accelerator.reduce(state.sums))  # waits for the device, so that the clock counts what was done
    del values["top5"]
    values |= {"lr": rate, "images_per_second": clock.lap() * config.batch_size}
    if accelerator.scaler is not None:
        values["skipped_steps"] = state.skipped_steps
    log.training(state.step, values)
    state.sums.zero_()


def due(step: int, every: int, total: int) -> bool:
    """Whether what is done every so many steps is done after this one; after the last step, everything is."""
    return step % every == 0 or step == total


def train_step(state: TrainState, batch: Batch, rate: float, config: Config, accelerator: Accelerator) -> None:
    """One optimizer step on this rank's share of a batch, in `config.micro_batches` parts. Nothing here waits for the device.

    Each part's loss has the weight of its images, so parts may be uneven: the gradient is that of the whole batch.
    """
    seed_dropout(fold(config.seed, DROPOUT, state.step, accelerator.process_index), accelerator.device)
    parts = list(zip(*(each.tensor_split(config.micro_batches) for each in batch), strict=True))
    for i, (images, labels) in enumerate(parts, 1):
        # The ranks need to agree on the gradient only once.
        with nullcontext() if i == len(parts) else accelerator.no_sync(state.model):
            logits = state.model(images)
            loss = F.cross_entropy(logits, labels, label_smoothing=config.optim.label_smoothing)
            accelerator.backward(loss * (len(labels) / len(batch.labels)))
        state.sums += totals(logits, labels)

    if config.optim.clip_norm:
        accelerator.clip_grad_norm_(state.model.parameters(), config.optim.clip_norm)
    set_learning_rate(state.optimizer, rate)
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.skipped_steps += accelerator.optimizer_step_was_skipped
    if state.average is not None:
        state.average.update_parameters(state.network)
    state.step += 1


def seed_dropout(seed: int, device: torch.device) -> None:
    """Make what layers such as dropout draw next a function of `seed`; torch.manual_seed would take 70 times as long."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[torch.cuda.current_device()].manual_seed(seed)


def validate(state: TrainState, loader: Loader, accelerator: Accelerator, log: Log) -> None:
    """Evaluate the network, and the moving average if there is one; note the accuracy. Every rank must call this."""
    models: dict[str, nn.Module] = {"val": state.network}
    if state.average is not None:
        models["val_average"] = state.average
    for group, model in models.items():
        values = evaluate(model, loader, accelerator)
        log.validation(state.step, group, values)
        state.top1, state.evaluated_step = values["top1"], state.step
    if state.top1 > state.best_top1:
        state.best_top1, state.best_step = state.top1, state.step


@torch.no_grad()
def evaluate(model: nn.Module, loader: Loader, accelerator: Accelerator) -> dict[str, float]:
    """Loss, top1 and top5 over the whole validation set, each image counted once. Every rank must call this.

    The ranks' shares may be uneven: `model` is not the DDP one, so nothing is exchanged before the sums are.
    """
    for buffer in model.buffers():
        broadcast(buffer)  # each rank has batch statistics of its own images; rank 0's are those that are saved
    sums = zeros(accelerator.device)
    model.eval()
    for images, labels in loader.val():
        with accelerator.autocast():
            logits = model(images)
        sums += totals(logits, labels)
    model.train()
    sums = accelerator.reduce(sums)
    images_seen = round(sums[-1].item())
    assert images_seen == len(loader.source.val), (images_seen, len(loader.source.val))
    return means(sums)


def pool(state: TrainState, accelerator: Accelerator) -> None:
    """Move the ranks' sums to rank 0, which reports or saves them. Every rank must call this."""
    pooled = accelerator.reduce(state.sums)
    state.sums.copy_(pooled) if accelerator.is_main_process else state.sums.zero_()


class Clock:
    """Time spent on training, in seconds, without what it is paused for."""

    def __init__(self) -> None:
        self.began = self.lap_began = perf_counter()
        self.steps = self.lap_steps = 0

    @contextmanager
    def paused(self) -> Iterator[None]:
        since = perf_counter()
        yield
        pause = perf_counter() - since
        self.began, self.lap_began = self.began + pause, self.lap_began + pause

    def lap(self) -> float:
        """Steps per second since the last lap."""
        now = perf_counter()
        speed = self.lap_steps / (now - self.lap_began)
        self.steps, self.lap_steps, self.lap_began = self.steps + self.lap_steps, 0, now
        return speed

    def overall(self) -> float:
        """Steps per second up to the last lap."""
        return self.steps / (self.lap_began - self.began) if self.steps else 0.0
