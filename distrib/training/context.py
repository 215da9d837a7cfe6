"""What a run works with."""

from collections.abc import Callable
from dataclasses import dataclass, field

from accelerate import Accelerator
from torch import nn

from distrib.config import Config
from distrib.data.loaders import Loader
from distrib.reporting.log import Log
from distrib.runtime.checkpoint import Saver
from distrib.runtime.stopwatch import Stopwatch
from distrib.training.objective import Objective
from distrib.training.optim import Schedule
from distrib.training.records import StepRecord
from distrib.training.replay import Replay


@dataclass(frozen=True)
class Run:
    """What a run works with; only `TrainState` changes, and what is read or written."""

    config: Config  # without auto in precision and compile
    objective: Objective
    accelerator: Accelerator
    model: nn.Module  # what a step calls: the network, inside DDP if there are several ranks
    loader: Loader
    schedule: Schedule
    log: Log
    saver: Saver
    stopwatch: Stopwatch
    write_status: Callable[..., None]  # which only rank 0 does
    replay: Replay = field(default_factory=Replay)
    micro_batches: int = 1  # that a rank's share of a batch is cut into
    records: list[StepRecord] = field(default_factory=list)  # of the steps since they were last collected
