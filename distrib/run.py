"""`train`: builds a run from a config and, if the caller passes them, a data set, a network and an objective."""

import time
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from distrib.config import OWN, Config, refuse_all_held_out
from distrib.data.loaders import Batch, Loader
from distrib.data.sharing import agreed_fingerprint, load_shared
from distrib.data.source import Arrays, Source
from distrib.data.steps import Steps
from distrib.data.workers import Workers, start_workers
from distrib.errors import UserError
from distrib.keys import keys_changed, refuse_keys_that_do_not_apply
from distrib.models.build import NetworkOrBuilder, build_model
from distrib.models.layers import fit_whitening
from distrib.reporting.log import Log
from distrib.runtime import attempts, disk, ranks, signals
from distrib.runtime.checkpoint import checkpoint_at
from distrib.runtime.environment import warn_of_one_rank, with_accelerate_settings
from distrib.runtime.run_folder import ask_for_requeue, open_run, write_config
from distrib.runtime.saver import Saver, try_save
from distrib.runtime.status import Status
from distrib.runtime.stop_vote import StopVote
from distrib.runtime.stopwatch import Stopwatch
from distrib.runtime.watchdog import Watchdog
from distrib.schema import AUTO
from distrib.training import memory
from distrib.training.context import Run
from distrib.training.format1 import upgrade
from distrib.training.freezing import release
from distrib.training.groups import table
from distrib.training.identity import Identity, choose, with_pixels_of_weights
from distrib.training.loop import fit
from distrib.training.objective import Objective, build_objective
from distrib.training.optim import Schedule, build_ema, build_optimizer, build_schedule
from distrib.training.parallel import make_accelerator, wrap
from distrib.training.replay import Replay, can_replay
from distrib.training.state import TrainState, progress, restore


def train(
    config: Config,
    *,
    source: Source | None = None,
    network: NetworkOrBuilder | None = None,
    objective: Objective | None = None,
    changes: Collection[str] = (),
    began: float | None = None,
) -> TrainState:
    """Train as `config` says, from the newest intact checkpoint in its run folder if there is one. Every rank must call this.

    `source`, `network` and `objective` replace those that `config` names. `network` may be a function that returns the network;
    it is called after torch's generator is seeded. `changes` names keys that may differ from those of a run under way:
    optim.lr, optim.weight_decay, optim.clip_norm and epochs. `began` is the time.time() at which this attempt started, if that
    was before this call. A signal stops the run; a second call resumes it.

    Returns the state: `network` has the trained weights, `ema` their moving average, `values` the last evaluation. Raises
    UserError for a mistake that the user can correct, and RunError if the run failed.
    """
    began = time.time() if began is None else began
    config, lines = with_accelerate_settings(with_names_of(config, source, network, objective))
    lines += warn_of_one_rank()
    disk.retries = disk.Retries(limit=config.limits.read)
    with ExitStack() as cleanup:
        cleanup.enter_context(signals.listening())
        workers = cleanup.enter_context(start_workers(config, source))
        watchdog = cleanup.enter_context(Watchdog(config))
        watchdog.channel = channel = cleanup.enter_context(ranks.connected(config))
        config, shown = with_pixels_of_weights(config, own=source is not None)
        data = (source or load_shared(config.data)).normalized_as(config.data)
        refuse_keys_of_other_data(config, data)
        fingerprint = agreed_fingerprint(data, own=source is not None, skip=config.data.bad_images == "skip")
        identity = Identity(config, data, fingerprint, objective or build_objective(config), changes)
        vote, status = StopVote(config, channel), Status(Path(config.run_dir), began)
        state, run, setup = prepare(identity, network, workers, watchdog.stopwatch, vote, status, cleanup)
        with open_run(config, channel, status) as watchdog.lease:
            warnings = [*(watchdog.lease.warnings if watchdog.lease else []), *resume(state, run, identity)]
            lines += [*(f"data: {each}" for each in data.notes), *(f"warning: {each}" for each in warnings)]
            stopped_by = attempt(state, run, data, [*lines, *shown, *setup])
            run.status.write(
                "stopped" if stopped_by else "completed", cause=stopped_by, **progress(state.numbers(), run.objective.main)
            )
            if stopped_by:
                ask_for_requeue(stopped_by)
    return state


def prepare(
    identity: Identity,
    network: NetworkOrBuilder | None,
    workers: Workers,
    stopwatch: Stopwatch,
    vote: StopVote,
    status: Status,
    cleanup: ExitStack,
) -> tuple[TrainState, Run, list[str]]:
    """Build everything a run needs; returns also lines for the user. Writes no file. Every rank must call this."""
    manifest, source, objective = identity.find_manifest(), identity.source, identity.objective
    earlier: dict[str, Any] = manifest.get("chosen", {})
    device = ranks.device()
    config, precision = choose(identity.config, earlier, device)
    accelerator = make_accelerator(config)
    if device.type == "cpu":
        memory.keep_freed_memory()
    rank, world = accelerator.process_index, accelerator.num_processes
    steps = Steps(len(source.train), config.batch_size, config.seed, rank, world)
    loader, schedule = Loader(source, config, steps, device, workers), build_schedule(config, steps.per_epoch)
    state, loaded = build(config, loader, network, accelerator, load=not manifest)
    cleanup.callback(release, state, accelerator)
    micro_batches, cut = cut_into_memory(config, state, loader, objective, accelerator)
    chosen = earlier or {"precision": config.precision, "compile": config.compile, "virtual_ranks": world * micro_batches}
    forms = {name: meter.form for name, meter in objective.meters.items()}
    log = Log(config, schedule.total, steps, forms, objective.main, silent=rank > 0)
    saver = Saver(config, identity.about(chosen, world), lambda saved: status.write(**progress(saved.numbers, objective.main)))
    wanted = can_replay(config, device, world, scaled=state.scaler is not None)
    replay = Replay(wanted=wanted, undo=state.optimizer.zero_grad)
    changed = identity.changed(manifest)
    parts = (loader, schedule, vote, log, saver, stopwatch, status, changed, replay, micro_batches)
    run = Run(config, objective, accelerator, *parts)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    setup = f"ranks {world}, device {name}, threads {torch.get_num_threads()}, {precision}"
    return state, run, [*loaded, *rates_of(config, state, schedule), *(f"warning: {each}" for each in cut), setup]


def rates_of(config: Config, state: TrainState, schedule: Schedule) -> list[str]:
    """What learns at which rate, as lines, in a run that starts from weights or has other rates for some layers."""
    if not config.model.weights and not schedule.frozen and config.optim.layer_decay == 1:
        return []
    last = f"until step {schedule.frozen:,} (epoch {config.model.freeze:g}), only the last layer learns"
    return [*table(state.optimizer.param_groups, schedule.peak), *([last] if schedule.frozen else [])]


def build(
    config: Config, loader: Loader, network: NetworkOrBuilder | None, accelerator: Accelerator, *, load: bool
) -> tuple[TrainState, list[str]]:
    """The state at step 0, and lines for the user. Every rank must call this.

    Pretrained weights are loaded only if `load`: a run that resumes needs neither their file nor the network.
    """
    source = loader.source
    torch.manual_seed(config.seed)
    build_on = partial(build_model, config.model, source.shape, len(source.classes), network, names=source.classes)
    lines = list[str]()
    built = ranks.rank0_first(lambda rank0: build_on(load=load and rank0, tell=lines.append)).to(loader.device)
    if network is not None or config.model.weights:
        ranks.broadcast_network(built)  # each rank built its own, and rank 0 loaded its weights
    fit_whitening(built, loader.sample)
    ema = build_ema(built, config.optim.ema_decay)
    optimizer = build_optimizer(built, config.optim, fused=accelerator.scaler is None)
    model, optimizer = wrap(accelerator, built, optimizer, config.compile)
    return TrainState(built, model, optimizer, ema=ema), lines


def cut_into_memory(
    config: Config, state: TrainState, loader: Loader, objective: Objective, accelerator: Accelerator
) -> tuple[int, list[str]]:
    """The number of micro-batches that fit in memory, and lines for the user. Every rank must call this."""
    targets, shape, share = loader.source.train.targets, loader.source.shape, loader.steps.share

    def rehearse(images: int) -> bool:
        like = Batch(torch.empty(images, *shape, device="meta"), torch.empty_like(targets[:images], device="meta"))
        return memory.fits(state, accelerator, lambda *batch: objective.loss_and_sums(*batch)[0], like)

    refuse = partial(memory.refuse_graphs_of_parts, config.compile, device=loader.device)
    return memory.micro_batches_that_fit(config.micro_batches, Path(config.run_dir), share, rehearse, refuse)


def resume(state: TrainState, run: Run, identity: Identity) -> list[str]:
    """Load the newest checkpoint, and see that the next one can be saved; returns warnings. Every rank must call this."""
    run_dir = Path(run.config.run_dir)
    warnings = ranks.on_rank0(partial(upgrade, run_dir, state, run.saver.about))
    warnings += restore(state, run_dir, identity.refuse_another)
    ranks.on_rank0(partial(write_config, identity.config))
    ranks.on_rank0(partial(try_save, run_dir, state.size()))
    return warnings


def attempt(state: TrainState, run: Run, source: Source, lines: list[str]) -> str:
    """Train to the end, or until a stop is requested; returns who requested it, or "". Every rank must call this."""
    config, log = run.config, run.log
    run.status.write("running", **progress(state.numbers(), run.objective.main))
    attempts.record(config, state.step, run.changed)
    rank, auto = run.accelerator.process_index, config.micro_batches == AUTO
    explained = memory.memory_errors_explained(state, rank, run.micro_batches, auto=auto)
    words = ", ".join(f"{name} {before} -> {after}" for name, (before, after) in run.changed.items())
    with log.opened(state.step), run.saver, explained:
        log.opening(state.step, [*lines, f"from here on: {words}"] if words else lines, source, state.network)
        stopped_by = fit(state, run)
        if stopped_by:
            log.stopped(state.step, stopped_by)
        else:
            best = checkpoint_at(Path(config.run_dir), state.best_step)
            log.done(state.step, state.values, best, state.best_values, run.stopwatch.overall())
    return stopped_by


def with_names_of(
    config: Config, source: Source | None, network: NetworkOrBuilder | None, objective: Objective | None
) -> Config:
    """`config` with the names of the objects that were passed in. Raises UserError if a key would be ignored."""
    named = {
        "data": source and source.name,
        "model": None if network is None else getattr(network, "__name__", type(network).__name__),
        "objective": objective and objective.name,
    }
    changed = keys_changed(config)
    for section, name in named.items():
        keys = getattr(config, section)
        if name and f"{section}.name" in changed:
            raise UserError(f"{section}.name={keys.name} was given together with an object that replaces it: omit one of them")
        if name:
            config = replace(config, **{section: replace(keys, name=f"{OWN}{name}")})
    refuse_keys_that_do_not_apply(config, changed)
    refuse_all_held_out(config.data)
    if not config.run_dir:
        raise UserError("run_dir is missing: name the folder of this run, such as Config(run_dir='runs/mine')")
    return config


def refuse_keys_of_other_data(config: Config, source: Source) -> None:
    """Raise UserError if a key is for image files, and the images are in memory, or the reverse."""
    in_memory = isinstance(source.train, Arrays)
    idle, kind = ({"data.workers", "data.crop_area"}, "image files") if in_memory else ({"data.resident"}, "images in memory")
    given = sorted(idle & keys_changed(config))
    if given:
        raise UserError(f"{', '.join(given)} would be ignored: it applies to {kind} only; omit it")
