"""The objects that a run works with."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from accelerate import Accelerator

from distrib.config import Config
from distrib.data.loaders import Loader
from distrib.reporting.log import Log
from distrib.runtime.saver import Saver
from distrib.runtime.status import Status
from distrib.runtime.stop_vote import StopVote
from distrib.runtime.stopwatch import Stopwatch
from distrib.training.objective import Objective
from distrib.training.optim import Schedule
from distrib.training.records import StepRecord
from distrib.training.replay import Replay


@dataclass(frozen=True)
class Run:
    """The objects that a run works with. What training changes is in `TrainState`."""

    config: Config  # precision and compile are no longer auto
    objective: Objective
    accelerator: Accelerator
    loader: Loader
    schedule: Schedule
    vote: StopVote
    log: Log
    saver: Saver
    stopwatch: Stopwatch
    status: Status
    changed: Mapping[str, tuple[Any, Any]]  # keys that were changed midway: their values before this attempt and now
    replay: Replay = field(default_factory=Replay)
    micro_batches: int = 1  # number of parts that a rank's share of a batch is cut into
    records: list[StepRecord] = field(default_factory=list)  # of the steps since collect_records was called
    bad_images: set[str] = field(default_factory=set)  # that were reported
