"""The loop: what a step does, what an evaluation does, and when each is due."""

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn

from distrib import ranks
from distrib.checkpoint import Saver
from distrib.config import Config, RunError
from distrib.data.augment import views
from distrib.data.loaders import Batch, Loader
from distrib.data.steps import DROPOUT, fold
from distrib.health import check_replicas, look_back, nonfinite
from distrib.log import Log
from distrib.metrics import hits, losses, means, totals, zeros
from distrib.optim import Schedule, move_average, set_learning_rate
from distrib.state import Told, TrainState, snapshot
from distrib.vote import StopVote
from distrib.watch import Watch


@dataclass(frozen=True)
class Run:
    """What a run works with; only `TrainState` changes."""

    config: Config
    accelerator: Accelerator
    loader: Loader
    schedule: Schedule
    log: Log
    saver: Saver
    watch: Watch


def fit(state: TrainState, run: Run) -> str:
    """Train from `state.step` to the end of the schedule, or until someone asks to stop; returns who did, or "".

    Every rank must call this. Raises RunError if numbers went wrong, or if the last state could not be saved.
    """
    config, total, epoch = run.config, run.schedule.total, run.loader.steps.per_epoch
    vote, stopper, saved = StopVote(config), "", state.step
    run.watch.enter("step")
    for batch in run.loader.train(range(state.step, total)):
        stopper = vote(state.step)
        if stopper:
            break
        rate = run.schedule(state.step)
        train_step(state, batch, rate, config, run.accelerator)
        run.watch.stepped()
        run.log.tick(state.step)

        if due(state.step, config.log_every, total):
            report(state, rate, run)
        if due(state.step, config.eval_every or epoch, total):
            validate(state, run)
        if due(state.step, config.save_every or epoch, total):
            saved = save(state, run)

    if saved != state.step:
        save(state, run)
    with run.watch.during("save"):
        failure = ranks.agreed(run.saver.wait())
    if failure:
        raise RunError(failure)
    return stopper


def save(state: TrainState, run: Run) -> int:
    """Begin to write a checkpoint; returns its step. Tell if the one before was not written. Every rank must call this.

    Raises RunError if a step was not finite or the ranks' weights differ: that is not worth saving.
    """
    look_back(state, run.config, run.loader.steps, run.log)  # waits for the steps that a GPU has yet to do, in their own time
    with run.watch.during("save"):
        check_replicas(state, run.accelerator)
        failure = ranks.agreed(run.saver.wait())
        if failure:
            run.log.warn(f"{failure}; it is tried again now")
        run.log.flush()  # the checkpoint will say that all up to here is done
        pool(state, run.accelerator)
        state.kept_seconds += run.watch.taken()
        if run.accelerator.is_main_process:
            run.saver.save(snapshot(state, run.saver.taken))
    return state.step


def report(state: TrainState, rate: float, run: Run) -> None:
    """Report the training since the last report, over all ranks. Every rank must call this."""
    look_back(state, run.config, run.loader.steps, run.log)  # waits for the device, so that the clock counts what was done
    values = means(run.accelerator.reduce(state.sums))
    del values["top5"]
    values |= {"lr": rate, "images_per_second": run.watch.lap() * run.config.batch_size}
    if state.skipped_steps or state.scaler:
        values["skipped_steps"] = state.skipped_steps
    if state.replay.failure:
        run.log.warn(state.replay.failure)
        state.replay.failure = ""
    run.log.training(state.step, values)
    state.sums.zero_()


def due(step: int, every: int, total: int) -> bool:
    """Whether what is done every so many steps is done after this one; after the last step, everything is."""
    return step % every == 0 or step == total


def train_step(state: TrainState, batch: Batch, rate: float, config: Config, accelerator: Accelerator) -> None:
    """One optimizer step on this rank's share of a batch. Nothing here waits for the device, but for the scaler of fp16.

    What depends on the step and is not a tensor belongs here: one GPU records what `learn` does, and replays that.
    """
    seed_dropout(fold(config.seed, DROPOUT, state.step, accelerator.process_index), accelerator.device)
    set_learning_rate(state.optimizer, rate)
    told = state.replay(partial(learn, state, config, accelerator), batch)
    state.told.append(Told(told, [len(labels) for _, labels in batch.split(state.micro_batches)]))
    state.step += 1


def learn(state: TrainState, config: Config, accelerator: Accelerator, batch: Batch) -> list[Tensor]:
    """Change the weights by what a batch, in `state.micro_batches` parts, teaches; returns what `Told` keeps.

    Each part's loss has the weight of its images, so parts may be uneven: the gradient is that of the whole batch. If that
    is not finite, on any rank, no rank's weights change.
    """
    reversible = config.nonfinite == "skip" or state.scaler
    statistics = [(each, each.clone()) for each in state.network.buffers()] if reversible else []
    told: list[Tensor] = []
    parts = batch.split(state.micro_batches)
    for i, (images, labels) in enumerate(parts, 1):
        # The ranks need to agree on the gradient only once.
        with nullcontext() if i == len(parts) else accelerator.no_sync(state.model):
            logits = state.model(images)
            loss, plain = losses(logits, labels, config.optim.label_smoothing)
            share = len(labels) / len(batch.labels)
            scaled = state.scaler.scale(loss) if state.scaler else loss
            # A loss that is not finite makes the gradient so, since 0 times it is nan: thus all ranks get to know.
            scaled.backward(gradient=share + 0 * loss.detach())
        told += plain.detach(), hits(logits, labels)

    withheld, odd = update(state, config, accelerator)
    for buffer, before in statistics:
        buffer.copy_(torch.where(withheld == 0, buffer, before))
    if state.average is not None:
        move_average(*state.averaged, config.optim.average_decay)
    return [odd, *told]


def update(state: TrainState, config: Config, accelerator: Accelerator) -> tuple[Tensor, Tensor]:
    """Step the optimizer, unless the gradient is not finite; returns whether nothing was changed, and whether that is odd.

    Each is 1.0 or 0.0. fp16's scaler looks for itself, for which the host waits, and gradients that overflow are its daily
    work: they are odd only where it can go no lower.
    """
    optimizer: Any = state.optimizer
    if not state.scaler:
        optimizer = optimizer.optimizer  # accelerate's looks for a package on the disk in each step, which takes 0.14 ms
        optimizer.found_inf = nonfinite(state.weights)  # read on the device, by torch's fused optimizers and by ours
    if config.optim.clip_norm:
        accelerator.clip_grad_norm_(state.weights, config.optim.clip_norm)
    optimizer.step()
    optimizer.zero_grad()
    if not state.scaler:
        return optimizer.found_inf, optimizer.found_inf
    overflow = accelerator.optimizer_step_was_skipped
    daily = overflow and state.scaler.get_scale() >= 1
    state.skipped_steps += daily
    withheld, odd = torch.tensor([overflow, overflow and not daily], dtype=torch.float32, device=accelerator.device)
    return withheld, odd


def seed_dropout(seed: int, device: torch.device) -> None:
    """Make what layers such as dropout draw next a function of `seed`; torch.manual_seed would take 70 times as long."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[torch.cuda.current_device()].manual_seed(seed)


def validate(state: TrainState, run: Run) -> None:
    """Evaluate the network, and the moving average if there is one; note the accuracy. Every rank must call this."""
    models: dict[str, nn.Module] = {"val": state.network}
    if state.average is not None:
        models["val_average"] = state.average
    look_back(state, run.config, run.loader.steps, run.log)
    part = -(-run.loader.steps.share // state.micro_batches)  # images that are known to fit in memory at once
    with run.watch.during("evaluation"):
        for group, model in models.items():
            values = state.replay.beside(partial(evaluate, model, run.loader, part, run.config.views, run.accelerator))
            run.log.validation(state.step, group, values)
            state.top1, state.evaluated_step = values["top1"], state.step
    if state.top1 > state.best_top1:
        state.best_top1, state.best_step = state.top1, state.step


@torch.no_grad()
def evaluate(model: nn.Module, loader: Loader, part: int, count: int, accelerator: Accelerator) -> dict[str, float]:
    """Loss, top1 and top5 over the whole validation set, `part` images at a time, each counted once. Every rank must call this.

    Logits are averaged over `count` views of an image. The ranks' shares may be uneven: `model` is not the DDP one, so nothing
    is exchanged before the sums are.
    """
    for buffer in model.buffers():
        broadcast(buffer)  # each rank has batch statistics of its own images; rank 0's are those that are saved
    sums = zeros(accelerator.device)
    model.eval()
    for images, labels in loader.val(part):
        with accelerator.autocast():
            logits = torch.stack([weight * model(view).float() for weight, view in views(images, count)]).sum(0)
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
