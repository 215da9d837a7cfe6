"""Train an image classifier:  accelerate launch train.py [CONFIG.yaml] [key=value ...]"""

from distrib import interrupt

if __name__ == "__main__":
    interrupt.listen()  # before the slow imports, so that no signal goes unheard

import sys
from collections.abc import Sequence

import torch
from accelerate import Accelerator

from distrib import folder, ranks
from distrib.checkpoint import Unsaved
from distrib.config import Config, UserError, help_text, load_config, to_yaml
from distrib.data.loaders import Loader
from distrib.data.sources import load_source
from distrib.data.steps import Steps
from distrib.log import Log
from distrib.loop import fit
from distrib.metrics import zeros
from distrib.models import build_model
from distrib.optim import build_average, build_optimizer, build_schedule
from distrib.state import TrainState, restore


def train(config: Config, accelerator: Accelerator, setup: str = "", *, longer: bool = False) -> TrainState:
    """Train as `config` says, from the newest good checkpoint in its run folder if there is one. Every rank must call this.

    `setup` is a line for the console; `longer` allows more epochs than the folder was begun with. Raises UserError if
    something is wrong that the user can mend, and Unsaved if the last state could not be saved.
    """
    rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    source = ranks.first(lambda leads: load_source(config.data, download=leads))
    steps = Steps(len(source.train), config.batch_size, config.seed, rank, world)
    schedule = build_schedule(config, steps.per_epoch)
    loader = Loader(source, config, steps, device)

    torch.manual_seed(config.seed)
    network = ranks.first(lambda leads: build_model(config.model, source.shape, len(source.classes))).to(device)
    average = build_average(network, config.optim.average_decay)
    optimizer = build_optimizer(network, config.optim, fused=accelerator.scaler is None)
    model, optimizer = ranks.prepared(accelerator, network, optimizer)
    state = TrainState(model, network, optimizer, average, zeros(device))

    with folder.held(config, longer=longer) as note:
        warnings = restore(state, config)
        note("running", step=state.step)
        with Log(config, state.step, schedule.total, steps, silent=rank > 0) as log:
            log.opening(setup, source, network, warnings)
            ending = fit(state, loader, schedule, config, accelerator, log)
            log.closing(state, ending)
        note("stopped" if ending.stopped_by else "completed", step=state.step, top1=state.top1, cause=ending.stopped_by)
    return state


def main(args: Sequence[str]) -> int:
    """Do what a command line says. Returns 0 if it was done or stopped, 1 if it could not be saved, 2 for a mistake in it."""
    try:
        if "--help" in args:
            return ranks.say(help_text())
        config = load_config([arg for arg in args if arg != "--print-config"])
        if "--print-config" in args:
            return ranks.say(to_yaml(config))
        accelerator, setup = ranks.start(config)
        train(config, accelerator, setup, longer=any(arg.startswith("epochs=") for arg in args))
        return 0
    except UserError as error:
        return ranks.refuse(error, code=2)
    except Unsaved as error:
        return ranks.refuse(error, code=1)
    except Exception as error:
        return ranks.fail(error)


if __name__ == "__main__":
    ranks.leave(main(sys.argv[1:]))
