"""Train an image classifier:  accelerate launch train.py [CONFIG.yaml] [key=value ...]"""

from distrib import interrupt

if __name__ == "__main__":
    interrupt.listen()  # before the slow imports, so that no signal goes unheard

import sys
from collections.abc import Sequence

import torch

from distrib import folder, provenance, ranks
from distrib.checkpoint import Saver
from distrib.config import Config, RunError, UserError, help_text, load_config, to_yaml
from distrib.data.loaders import Loader
from distrib.data.steps import Steps
from distrib.log import Log
from distrib.loop import Run, fit
from distrib.memory import keep_freed_memory, out_of_memory_told, parts_that_fit
from distrib.metrics import zeros
from distrib.models import build_model, fit_whitening
from distrib.optim import build_average, build_optimizer, build_schedule
from distrib.replay import Replay, replayable
from distrib.sharing import load_shared
from distrib.state import TrainState, about, progress, restore
from distrib.watch import Watch


def train(config: Config, *, longer: bool = False) -> TrainState:
    """Train as `config` says, from the newest good checkpoint in its run folder if there is one. Every rank must call this.

    With `longer` there may be more epochs than the folder was begun with. Raises UserError if something is wrong that the
    user can mend, and RunError if the run could not go on.
    """
    with Watch(config) as watch:
        accelerator, setup = ranks.start(config)
        rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
        if device.type == "cpu":
            keep_freed_memory()
        source = load_shared(config.data)
        steps = Steps(len(source.train), config.batch_size, config.seed, rank, world)
        schedule = build_schedule(config, steps.per_epoch)
        loader = Loader(source, config, steps, device)

        torch.manual_seed(config.seed)
        network = ranks.first(lambda leads: build_model(config.model, source.shape, len(source.classes))).to(device)
        fit_whitening(network, loader.sample)
        average = build_average(network, config.optim.average_decay)
        scaled = accelerator.scaler is not None
        optimizer = build_optimizer(network, config.optim, fused=not scaled)
        model, optimizer = ranks.prepared(accelerator, network, optimizer, config)
        replay = Replay(wanted=replayable(config, device, world, scaled=scaled), undo=optimizer.zero_grad)
        state = TrainState(model, network, optimizer, average, zeros(device), replay=replay)
        state.micro_batches, cut = parts_that_fit(config, state, steps.share, source.shape, accelerator)

        with folder.held(config, longer=longer) as note:
            warnings = restore(state, config)
            note("running", **progress(state.numbers()))
            provenance.record(config, state.step)
            with (
                Log(config, state.step, schedule.total, steps, silent=rank > 0) as log,
                Saver(config, about(config, world), lambda taken: note(**progress(taken.numbers))) as saver,
                out_of_memory_told(state, config, rank),
            ):
                log.opening(setup, source, network, [*warnings, *cut])
                stopped_by = fit(state, Run(config, accelerator, loader, schedule, log, saver, watch))
                log.closing(state, stopped_by, watch.overall())
            note("stopped" if stopped_by else "completed", cause=stopped_by, **progress(state.numbers()))
            if stopped_by:
                folder.ask_for_requeue(stopped_by)
    return state


def main(args: Sequence[str]) -> int:
    """Do what a command line says. Returns 0 if it was done or stopped, 1 if it failed, 2 for a mistake in it."""
    try:
        if "--help" in args:
            return ranks.say(help_text())
        config = load_config([arg for arg in args if arg != "--print-config"])
        if "--print-config" in args:
            return ranks.say(to_yaml(config))
        train(config, longer=any(arg.startswith("epochs=") for arg in args))
        return 0
    except UserError as error:
        return ranks.refuse(error, code=2)
    except RunError as error:
        return ranks.refuse(error, code=1, speaker=error.speaker)
    except Exception as error:
        return ranks.fail(error)


if __name__ == "__main__":
    ranks.leave(main(sys.argv[1:]))
