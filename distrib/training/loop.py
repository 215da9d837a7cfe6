"""The training loop: a step, and when a report, an evaluation and a checkpoint are due."""

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from distrib.data.loaders import Batch
from distrib.data.steps import DROPOUT, fold
from distrib.runtime import ranks
from distrib.training.context import Run
from distrib.training.evaluation import evaluate, reduce_totals
from distrib.training.freezing import freeze_or_thaw
from distrib.training.health import check_replicas, collect_records, nonfinite, report_bad_images
from distrib.training.meters import Totals
from distrib.training.optim import set_learning_rate, update_ema
from distrib.training.records import StepRecord
from distrib.training.state import TrainState, snapshot


def fit(state: TrainState, run: Run) -> str:
    """Train from `state.step` to the end, or until a signal or the file STOP; returns the name of what stopped it, or "".

    Every rank must call this. Raises RunError if a loss or gradient is not finite, or if the last state cannot be saved.
    """
    config, total, epoch = run.config, run.schedule.total, run.loader.steps.per_epoch
    stopped_by, saved = "", state.step
    run.stopwatch.enter("step")
    for batch in run.loader.train(range(state.step, total)):
        stopped_by = run.vote(state.step)
        if stopped_by:
            break
        freeze_or_thaw(state, run)
        train_step(state, batch, run)
        run.stopwatch.stepped()
        run.log.move_bar(state.step)

        if due(state.step, config.log_every, total):
            report(state, run)
        improved = due(state.step, config.eval_every or epoch, total) and validate(state, run)
        if improved or due(state.step, config.save_every or epoch, total):
            saved = save(state, run)

    if saved != state.step:
        save(state, run)
    with run.stopwatch.during("save"):
        failure = ranks.broadcast_object(run.saver.wait())
    if failure:
        raise failure
    return stopped_by


def due(step: int, every: int, total: int) -> bool:
    """Whether an action with the interval `every` is due after `step`; after the last step, all actions are due."""
    return step % every == 0 or step == total


def train_step(state: TrainState, batch: Batch, run: Run) -> None:
    """One optimizer step on this rank's share of a batch. The host does not wait for the device, except in fp16 (GradScaler).

    Python code that depends on the step belongs here, since a run on a single GPU captures `device_step` as a CUDA graph.
    """
    seed_dropout(fold(run.config.seed, DROPOUT, state.step, run.accelerator.process_index), run.accelerator.device)
    set_learning_rate(state.optimizer, run.schedule(state.step))
    run.records.append(run.replay(partial(device_step, state, run), batch))
    state.step += 1


def device_step(state: TrainState, run: Run, batch: Batch) -> StepRecord:
    """Compute the gradient of a batch in micro-batches, and update the weights.

    Each loss is weighted by its number of images, so uneven micro-batches give the gradient of the whole batch. If the gradient
    is not finite on some rank, the weights do not change on any rank.
    """
    may_skip = run.config.nonfinite == "skip" or state.scaler
    saved_buffers = [(buffer, buffer.clone()) for buffer in state.network.buffers()] if may_skip else []
    micro_batches, sums = batch.split(run.micro_batches), []
    for i, (images, targets) in enumerate(micro_batches, 1):
        # The ranks exchange gradients once, after the last micro-batch.
        with nullcontext() if i == len(micro_batches) else run.accelerator.no_sync(state.model):
            loss, meter_sums = run.objective.loss_and_sums(state.model(images), targets)
            weight = len(targets) / len(batch.targets)
            scaled = state.scaler.scale(loss) if state.scaler else loss
            # 0 * loss is nan if the loss is not finite. DDP's all-reduce then makes the gradient nan on all ranks.
            scaled.backward(gradient=weight + 0 * loss.detach())
        sums.append(meter_sums)

    skipped, error = update(state, run)
    for buffer, before in saved_buffers:
        buffer.copy_(torch.where(skipped == 0, buffer, before))
    if state.ema is not None:
        update_ema(*state.ema_pairs, run.config.optim.ema_decay)
    return StepRecord.of(error, sums, [len(targets) for _, targets in micro_batches])


def update(state: TrainState, run: Run) -> tuple[Tensor, Tensor]:
    """Step the optimizer if the gradient is finite. Returns whether the step was skipped, and whether that is an error.

    Both are tensors of 1.0 or 0.0. In fp16 the gradient scaler decides. Overflows are normal while the scaler lowers its scale:
    a skipped step is an error only if the scale cannot go lower.
    """
    optimizer: Any = state.optimizer
    if not state.scaler:
        optimizer = optimizer.optimizer  # accelerate's wrapper takes 0.14 ms per step: it looks for the package lomo_optim
        optimizer.found_inf = nonfinite(state.weights)  # read on the device by torch's fused optimizers and by our Muon
    if run.config.optim.clip_norm:
        run.accelerator.clip_grad_norm_(state.weights, run.config.optim.clip_norm)
    optimizer.step()
    optimizer.zero_grad()
    if not state.scaler:
        return optimizer.found_inf, optimizer.found_inf
    overflow = run.accelerator.optimizer_step_was_skipped
    expected = overflow and state.scaler.get_scale() >= 1
    state.skipped_steps += expected
    skipped, error = torch.tensor([overflow, overflow and not expected], dtype=torch.float32, device=run.accelerator.device)
    return skipped, error


def seed_dropout(seed: int, device: torch.device) -> None:
    """Seed the generators that layers such as dropout draw from. torch.manual_seed seeds every backend, which takes longer."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[torch.cuda.current_device()].manual_seed(seed)


def report(state: TrainState, run: Run) -> None:
    """Report the steps since the last report, over all ranks. Every rank must call this."""
    collect_records(state, run)  # waits for the device, so that the measured time includes its work
    values = reduce_totals(state.totals, run.accelerator).values(run.objective.meters)
    values |= {
        "lr": run.schedule(state.step - 1),
        "images_per_second": run.stopwatch.steps_per_second() * run.config.batch_size,
    }
    if state.skipped_steps or state.scaler:
        values["skipped_steps"] = state.skipped_steps
    if run.replay.failure:
        run.log.warn(run.replay.failure)
        run.replay.failure = ""
    run.log.training(state.step, values)
    state.totals = Totals.zero()


def validate(state: TrainState, run: Run) -> bool:
    """Evaluate the network, and its moving average if there is one, and store the result. Every rank must call this.

    Returns whether this evaluation was the best so far.
    """
    networks: dict[str, nn.Module] = {"val": state.network}
    if state.ema is not None:
        networks["val_ema"] = state.ema
    collect_records(state, run)
    size = -(-run.loader.steps.share // run.micro_batches)  # a micro-batch of training, which fits in memory
    with run.stopwatch.during("evaluation"):
        for group, network in networks.items():
            work = partial(evaluate, network, run.loader, run.objective, run.accelerator, size, run.config.tta)
            state.values, state.evaluated_step = run.replay.run_other(work), state.step
            run.log.validation(state.step, group, state.values)
    report_bad_images(run)
    score = run.objective.score
    improved = ranks.broadcast_object(not state.best_values or score(state.values) > score(state.best_values))
    if improved:
        state.best_values, state.best_step = state.values, state.step
    return improved


def save(state: TrainState, run: Run) -> int:
    """Start to write a checkpoint; returns its step. Reports if the previous save failed. Every rank must call this.

    Raises RunError if a gradient was not finite or the ranks' weights differ: such a state is not saved.
    """
    collect_records(state, run)  # waits for the device, here, so that the stopwatch does not count this as saving
    with run.stopwatch.during("save"):
        check_replicas(state, run.accelerator)
        failure = ranks.broadcast_object(run.saver.wait())
        if failure:
            run.log.warn(f"{failure}; trying again now")
        run.log.flush()  # what is logged up to this step must be on the disk before the checkpoint is
        sum_totals_on_rank0(state, run)
        state.kept_seconds += run.stopwatch.seconds_since_save()
        if run.accelerator.is_main_process:
            score = run.objective.score(state.values) if state.evaluated_step == state.step and state.values else None
            run.saver.save(snapshot(state, run.saver.last, score))
    return state.step


def sum_totals_on_rank0(state: TrainState, run: Run) -> None:
    """Add the totals of all ranks on rank 0, and reset those of the others. Every rank must call this."""
    pooled = reduce_totals(state.totals, run.accelerator)
    flat = pooled.flat().cpu()
    state.totals = pooled.with_values(flat if run.accelerator.is_main_process else torch.zeros_like(flat))
