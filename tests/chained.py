"""Run by test_survival.py under torchrun: uneven.py's run on images in memory, noted step by step, and killed after some step.

usage: chained.py RUN_DIR KILL NOTES, where NOTES is a folder, and KILL the step after which the last rank kills itself
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from torch import Tensor
from uneven import KEYS, NOISE, Seen, uneven, watch

import distrib
from distrib.command_line import load_config
from distrib.runtime import exits
from distrib.runtime.environment import env_rank, env_world_size
from distrib.training import loop
from distrib.training.state import TrainState


def main(run_dir: str, kill: int, notes: Path) -> None:
    torch.set_default_dtype(torch.float64)  # as in uneven.py: what differs is then no rounding
    rank, world, seen = env_rank(), env_world_size(), Seen()
    watch(seen)
    watched = loop.train_step

    def step(state: TrainState, *rest: object) -> None:
        images: Tensor = seen.ids[len(seen.batches)]
        with (notes / f"{world}_ranks_until_{kill}_rank_{rank}.jsonl").open("a") as file:
            file.write(json.dumps({"step": state.step, "images": images.tolist()}) + "\n")
        watched(state, *rest)  # type: ignore[arg-type]
        if state.step == kill and rank == world - 1:
            os.kill(os.getpid(), signal.SIGKILL)

    loop.train_step = step
    distrib.train(load_config([f"run_dir={run_dir}", "save_every=3", "log_every=4", *KEYS, *NOISE]), source=uneven())


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
    exits.leave(0)
