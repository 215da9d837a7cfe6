"""The loop: what a step does, and when a report, an evaluation and a checkpoint are due."""

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from distrib.data.loaders import Batch
from distrib.data.steps import DROPOUT, fold
from distrib.errors import RunError
from distrib.runtime import ranks
from distrib.runtime.stop_vote import StopVote
from distrib.training.context import Run
from distrib.training.evaluation import evaluate, summed
from distrib.training.health import check_replicas, collect_records, nonfinite
from distrib.training.meters import Totals
from distrib.training.optim import set_learning_rate, update_ema
from distrib.training.records import StepRecord
from distrib.training.state import TrainState, snapshot


def fit(state: TrainState, run: Run) -> str:
    """Train from `state.step` to the end of the schedule, or until someone asks to stop; returns who did, or "".

    Every rank must call this. Raises RunError if numbers went wrong, or if the last state could not be saved.
    """
    config, total, epoch = run.config, run.schedule.total, run.loader.steps.per_epoch
    vote, stopper, saved = StopVote(config), "", state.step
    run.stopwatch.enter("step")
    for batch in run.loader.train(range(state.step, total)):
        stopper = vote(state.step)
        if stopper:
            break
        train_step(state, batch, run)
        run.stopwatch.stepped()
        run.log.tick(state.step)

        if due(state.step, config.log_every, total):
            report(state, run)
        if due(state.step, config.eval_every or epoch, total):
            validate(state, run)
        if due(state.step, config.save_every or epoch, total):
            saved = save(state, run)

    if saved != state.step:
        save(state, run)
    with run.stopwatch.during("save"):
        failure = ranks.broadcast_object(run.saver.wait())
    if failure:
        raise RunError(failure)
    return stopper


def due(step: int, every: int, total: int) -> bool:
    """Whether what is done every so many steps is done after this one; after the last step, everything is."""
    return step % every == 0 or step == total


def train_step(state: TrainState, batch: Batch, run: Run) -> None:
    """One optimizer step on this rank's share of a batch. Nothing here waits for the device, but for the scaler of fp16.

    What depends on the step and is not a tensor belongs here: one GPU records what `learn` does, and replays that.
    """
    seed_dropout(fold(run.config.seed, DROPOUT, state.step, run.accelerator.process_index), run.accelerator.device)
    set_learning_rate(state.optimizer, run.schedule(state.step))
    run.records.append(run.replay(partial(learn, state, run), batch))
    state.step += 1


def learn(state: TrainState, run: Run, batch: Batch) -> StepRecord:
    """Change the weights by what a batch teaches, in micro-batches.

    Each loss has the weight of its images, so micro-batches may be uneven: the gradient is that of the whole batch. If that is
    not finite, on any rank, no rank's weights change.
    """
    reversible = run.config.nonfinite == "skip" or state.scaler
    statistics = [(each, each.clone()) for each in state.network.buffers()] if reversible else []
    parts, sums = batch.split(run.micro_batches), []
    for i, (images, targets) in enumerate(parts, 1):
        # The ranks need to agree on the gradient only once.
        with nullcontext() if i == len(parts) else run.accelerator.no_sync(run.model):
            loss, measured = run.objective.train(run.model(images), targets)
            share = len(targets) / len(batch.targets)
            scaled = state.scaler.scale(loss) if state.scaler else loss
            # A loss that is not finite makes the gradient so, since 0 times it is nan: thus all ranks get to know.
            scaled.backward(gradient=share + 0 * loss.detach())
        sums.append(measured)

    withheld, odd = update(state, run)
    for buffer, before in statistics:
        buffer.copy_(torch.where(withheld == 0, buffer, before))
    if state.ema is not None:
        update_ema(*state.averaged, run.config.optim.ema_decay)
    return StepRecord.of(odd, sums, [len(targets) for _, targets in parts])


def update(state: TrainState, run: Run) -> tuple[Tensor, Tensor]:
    """Step the optimizer, unless the gradient is not finite; returns whether nothing was changed, and whether that is odd.

    Each is 1.0 or 0.0. fp16's scaler looks for itself, for which the host waits, and gradients that overflow are its daily
    work: they are odd only where it can go no lower.
    """
    optimizer: Any = state.optimizer
    if not state.scaler:
        optimizer = optimizer.optimizer  # accelerate's looks for a package on the disk in each step, which takes 0.14 ms
        optimizer.found_inf = nonfinite(state.weights)  # read on the device, by torch's fused optimizers and by ours
    if run.config.optim.clip_norm:
        run.accelerator.clip_grad_norm_(state.weights, run.config.optim.clip_norm)
    optimizer.step()
    optimizer.zero_grad()
    if not state.scaler:
        return optimizer.found_inf, optimizer.found_inf
    overflow = run.accelerator.optimizer_step_was_skipped
    daily = overflow and state.scaler.get_scale() >= 1
    state.skipped_steps += daily
    withheld, odd = torch.tensor([overflow, overflow and not daily], dtype=torch.float32, device=run.accelerator.device)
    return withheld, odd


def seed_dropout(seed: int, device: torch.device) -> None:
    """Make what layers such as dropout draw next a function of `seed`; torch.manual_seed would take 70 times as long."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[torch.cuda.current_device()].manual_seed(seed)


def report(state: TrainState, run: Run) -> None:
    """Report the training since the last report, over all ranks. Every rank must call this."""
    collect_records(state, run)  # waits for the device, so that the clock counts what was done
    values = summed(state.totals, run.accelerator).values(run.objective.meters)
    values |= {"lr": run.schedule(state.step - 1), "images_per_second": run.stopwatch.lap() * run.config.batch_size}
    if state.skipped_steps or state.scaler:
        values["skipped_steps"] = state.skipped_steps
    if run.replay.failure:
        run.log.warn(run.replay.failure)
        run.replay.failure = ""
    run.log.training(state.step, values)
    state.totals = Totals.of_none()


def validate(state: TrainState, run: Run) -> None:
    """Evaluate the network, and the moving average if there is one; remember how good it was. Every rank must call this."""
    networks: dict[str, nn.Module] = {"val": state.network}
    if state.ema is not None:
        networks["val_ema"] = state.ema
    collect_records(state, run)
    size = -(-run.loader.steps.share // run.micro_batches)  # images that are known to fit in memory at once
    with run.stopwatch.during("evaluation"):
        for group, network in networks.items():
            work = partial(evaluate, network, run.loader, run.objective, run.accelerator, size, run.config.tta)
            state.values, state.evaluated_step = run.replay.beside(work), state.step
            run.log.validation(state.step, group, state.values)
    score = run.objective.score
    if not state.best_values or score(state.values) > score(state.best_values):
        state.best_values, state.best_step = state.values, state.step


def save(state: TrainState, run: Run) -> int:
    """Begin to write a checkpoint; returns its step. A failure of the one before is reported. Every rank must call this.

    Raises RunError if a step was not finite or the ranks' weights differ: that is not worth saving.
    """
    collect_records(state, run)  # waits for the steps that a GPU has yet to do, in their own time
    with run.stopwatch.during("save"):
        check_replicas(state, run.accelerator)
        failure = ranks.broadcast_object(run.saver.wait())
        if failure:
            run.log.warn(f"{failure}; it is tried again now")
        run.log.flush()  # the checkpoint will say that all up to here is done
        move_to_rank0(state, run)
        state.kept_seconds += run.stopwatch.taken()
        if run.accelerator.is_main_process:
            score = run.objective.score(state.values) if state.evaluated_step == state.step and state.values else None
            run.saver.save(snapshot(state, run.saver.last, score))
    return state.step


def move_to_rank0(state: TrainState, run: Run) -> None:
    """Move the ranks' totals to rank 0, which reports or saves them. Every rank must call this."""
    pooled = summed(state.totals, run.accelerator)
    flat = pooled.flat().cpu()
    state.totals = pooled.with_values(flat if run.accelerator.is_main_process else torch.zeros_like(flat))
