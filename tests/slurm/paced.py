"""python paced.py train.py ...: trains as train.py does, but slowly in a job's first life, so that its time limit comes first.

It also leaves a note of the GPUs and the place among the ranks that SLURM gave this one, in the folder NOTES.
"""

import sys

from distrib.runtime import signals

if __name__ == "__main__":
    signals.listen()

import json
import os
import time
from pathlib import Path
from typing import Any

from distrib import cli
from distrib.runtime import exits
from distrib.runtime.environment import launched_rank
from distrib.training import loop
from distrib.training.state import TrainState

train_step = loop.train_step


def paced(state: TrainState, *rest: Any) -> None:
    if not os.environ.get("SLURM_RESTART_COUNT"):
        time.sleep(float(os.environ.get("PACE", "0")))
    train_step(state, *rest)


if __name__ == "__main__":
    loop.train_step = paced
    if "NOTES" in os.environ:
        names = (
            "RANK",
            "WORLD_SIZE",
            "LOCAL_RANK",
            "LOCAL_WORLD_SIZE",
            "CUDA_VISIBLE_DEVICES",
            "SLURMD_NODENAME",
            "MASTER_ADDR",
        )
        told = {name: os.environ.get(name) for name in names}
        Path(os.environ["NOTES"], f"rank_{launched_rank()}.json").write_text(json.dumps(told))
    exits.leave(cli.main(["train", *sys.argv[2:]]))
