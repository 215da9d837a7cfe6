"""train.py whose steps take PACE seconds longer from step PACE_FROM on, so that a signal or a time limit comes before the end.

usage: paced.py train.py ...; a job of SLURM's is slow in its first PACE_LIVES lives (1) only. With a folder in NOTES, each rank
notes there which GPUs and which place among the ranks SLURM gave it. With BLOCK, a collective blocks for ever when another rank
is gone, as NCCL's do: gloo's error is caught, and the main thread waits in a C call.
"""

import sys

from distrib.runtime import signals

if __name__ == "__main__":
    signals.listen()

import ctypes
import json
import os
import time
from pathlib import Path
from typing import Any

from distrib import cli, run
from distrib.errors import lost_rank
from distrib.runtime import exits
from distrib.runtime.environment import env_rank
from distrib.training import loop
from distrib.training.state import TrainState

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "CUDA_VISIBLE_DEVICES", "SLURMD_NODENAME", "MASTER_ADDR")

train_step = loop.train_step
pace, first = float(os.environ.get("PACE", "0")), int(os.environ.get("PACE_FROM", "0"))
slow = int(os.environ.get("SLURM_RESTART_COUNT", "0")) < int(os.environ.get("PACE_LIVES", "1"))


def paced(state: TrainState, *rest: Any) -> None:
    if slow and state.step >= first:
        time.sleep(pace)
    train_step(state, *rest)


fit = run.fit


def blocked(*args: Any) -> str:
    try:
        return fit(*args)
    except RuntimeError as error:
        while lost_rank(error):
            ctypes.CDLL(None).pause()
        raise


if __name__ == "__main__":
    loop.train_step = paced
    if "BLOCK" in os.environ:
        run.fit = blocked
    if "NOTES" in os.environ:
        found = {name: os.environ.get(name) for name in NAMES}
        Path(os.environ["NOTES"], f"rank_{env_rank()}.json").write_text(json.dumps(found))
    exits.leave(cli.main(["train", *sys.argv[2:]]))
