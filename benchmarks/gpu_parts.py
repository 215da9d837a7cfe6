"""The parts of benchmarks/gpu.py that need a process of their own: python -m benchmarks.gpu_parts PART QUICK [...]"""

import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD

from distrib import Arrays, Source, train
from distrib.command_line import load_config
from distrib.runtime import exits
from distrib.training import loop
from distrib.training.replay import WARM_UP

NEVER = 10**9
STEADY = WARM_UP + 1  # the step from which on each is like the one before
WAITED = "called a synchronizing"  # what torch warns of, where set_sync_debug_mode asks for that
Record = dict[str, Any]


def ceilings(quick: bool) -> Record:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    side, size, times = (256, 1 << 20, 3) if quick else (8192, 1 << 30, 30)
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    source, target = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    one = torch.zeros(1, device=device)
    return {
        "side": side,
        "flops": 2 * side**3 / timed(lambda: a @ b, times),
        "bytes": size,
        "copied": 2 * size / timed(lambda: target.copy_(source), times),
        "launch": timed(lambda: one.add_(1), 100 * times),
    }


def timed(action: Callable[[], object], times: int) -> float:
    """Seconds of an action, of so many in a row."""
    for _ in range(3):
        action()
    wait()
    began = perf_counter()
    for _ in range(times):
        action()
    wait()
    return (perf_counter() - began) / times


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Null(nn.Module):
    """As little as can be trained: what a step takes is what the loop takes."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(images.flatten(1))
        return logits


def tax(quick: bool, *keys: str) -> Record:
    """Seconds of a step in the trainer's loop, reports included, and in a bare one over the same batches.

    The clock of either starts when it has its first batch.
    """
    steps = 60 if quick else 2000
    clock, runs = list[float](), list[Any]()
    train_step, validate = loop.train_step, loop.validate

    def first_step(*args: Any) -> None:
        loop.train_step = train_step  # nothing of ours stands before the steps that follow
        clock.append(now())
        train_step(*args)

    def at_the_end(state: Any, run: Any) -> None:  # of the steps: an evaluation and a checkpoint follow
        clock.append(now())
        runs.append(run)
        validate(state, run)

    loop.train_step, loop.validate = first_step, at_the_end
    own = ["batch_size=8", f"epochs={steps / 179}", "precision=no", f"eval_every={NEVER}", f"save_every={NEVER}"]
    with tempfile.TemporaryDirectory() as folder:
        state = train(load_config([f"run_dir={folder}/run", *own, *keys]), network=Null)

    run = runs[0]
    loss_of = nn.CrossEntropyLoss(label_smoothing=0.1)
    optimizer = SGD(state.network.parameters(), 0.1, 0.9, nesterov=True, fused=True)
    for step, (images, labels) in enumerate(run.loader.train(range(steps))):
        if step == 0:
            clock.append(now())
        optimizer.param_groups[0]["lr"] = run.schedule(step)
        loss_of(state.model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    clock.append(now())
    seconds = [(clock[each + 1] - clock[each]) / steps for each in (0, 2)]
    return {"the trainer": seconds[0], "bare loop": seconds[1]}


def now() -> float:
    """The clock, once the device has done all that was asked of it."""
    wait()
    return perf_counter()


def steps(quick: bool, name: str, size: str, batch: str, count: str, *keys: str) -> Record:
    """Train on noise: seconds of a step, of which the GPU had work, and how often in a step the host waited for it."""
    total, images = 16 if quick else int(count), 60_000 if size == "28" else 4_096
    shape = (1 if size == "28" else 3, int(size), int(size))
    meter = Meter(loop.train_step, total)
    loop.train_step = meter  # type: ignore[assignment]
    own = ["data.flip=random", f"model.name={name}", f"batch_size={batch}"]
    own += [f"epochs={total / (images // int(batch))}", f"log_every={NEVER}", f"eval_every={NEVER}", f"save_every={NEVER}"]
    with tempfile.TemporaryDirectory() as folder:
        train(load_config([*own, *keys, f"run_dir={folder}/run"]), source=noise(shape, images))
    return meter.found


class Meter:
    """Stands before each step: looks for waits in the first third, takes the time of the next, and profiles the last six."""

    def __init__(self, step: Callable[..., None], total: int) -> None:
        self.step, self.cuda = step, torch.cuda.is_available()
        self.clocked, self.profiled, self.total = total // 3, total - 6, total
        self.found = Record(busy=0.0)
        self.waits: list[warnings.WarningMessage] | None = None
        self.caught = warnings.catch_warnings(record=True)
        self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])

    def __call__(self, state: Any, *rest: Any) -> None:
        if state.step == STEADY:
            self.waits = self.caught.__enter__()
            self.look("warn")  # which warns, once, that it does not find all of them
            warnings.simplefilter("always")
        elif state.step == self.clocked:
            self.look("default")
            self.caught.__exit__(None, None, None)
            self.found["syncs"] = sum(WAITED in str(each.message) for each in self.waits or ()) / (self.clocked - STEADY)
            wait()
            self.began = perf_counter()
        elif state.step == self.profiled:
            wait()
            self.found["step"] = (perf_counter() - self.began) / (self.profiled - self.clocked)
            if self.cuda:
                self.profiler.start()
        self.step(state, *rest)
        if state.step == self.total and self.cuda:
            wait()
            self.profiler.stop()
            kernels = sum(each.self_device_time_total for each in self.profiler.key_averages() if not each.is_user_annotation)
            self.found["busy"] = kernels / 1e6 / (self.total - self.profiled)

    def look(self, mode: str) -> None:
        if self.cuda:
            torch.cuda.set_sync_debug_mode(mode)


def noise(shape: tuple[int, int, int], images: int) -> Source:
    """A data set that no disk holds."""
    source = torch.Generator().manual_seed(0)
    train, val = (
        Arrays(torch.randint(256, (n, *shape), dtype=torch.uint8, generator=source), torch.randint(10, (n,), generator=source))
        for n in (images, 256)
    )
    return Source(train, val, tuple("0123456789"), shape, (0.5,) * shape[0], (0.25,) * shape[0], name="noise")


PARTS: dict[str, Callable[..., Record]] = {"ceilings": ceilings, "tax": tax, "steps": steps}

if __name__ == "__main__":
    said = PARTS[sys.argv[1]](sys.argv[2] == "1", *sys.argv[3:])
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(said), flush=True)
    exits.leave(0)
