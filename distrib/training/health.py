"""Numbers that are not finite, and replicas that differ: found on all ranks in the same step, before a checkpoint is written.

Records of steps stay on the device until a report or a save waits for the device anyway.
"""

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from distrib.errors import RunError
from distrib.runtime import ranks
from distrib.training.context import Run
from distrib.training.meters import Totals
from distrib.training.records import StepRecord
from distrib.training.state import TrainState


def nonfinite(weights: Sequence[nn.Parameter]) -> Tensor:
    """1.0 if a gradient is not finite, else 0.0; after DDP's exchange, the same on all ranks.

    torch's GradScaler uses this function, here with a scale of 1. A norm takes five times as long.
    """
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    found = torch.zeros((), dtype=torch.float32, device=gradients[0].device)
    torch._amp_foreach_non_finite_check_and_unscale_(gradients, found, torch.ones_like(found))
    return found


def collect_records(state: TrainState, run: Run) -> None:
    """Read the records of the steps since the last call: add their sums to the totals, and report steps that are not finite.

    Waits for the device. Every rank must call this. Raises RunError if a step was not finite and `nonfinite` is stop, or if
    more than `nonfinite_limit` steps in a row were not finite.
    """
    records = run.records.copy()
    run.records.clear()
    if not records:
        return
    rows = torch.stack([each.values for each in records]).cpu().double().numpy()
    sums = rows[:, 1:].reshape(len(records), len(records[0].images), -1)  # of each step and micro-batch
    for step, (odd, measured) in enumerate(zip(rows[:, 0].tolist(), sums, strict=True), state.step - len(records)):
        state.nonfinite_in_a_row = state.nonfinite_in_a_row + 1 if odd else 0
        if odd:
            report_nonfinite(state, run, step, finite=bool(np.isfinite(measured).all()))
    finite = (rows[:, :1] == 0) & np.isfinite(sums).all(2)  # in fp16 the loss itself may overflow
    add_up(state, records[0], np.where(finite[..., None], sums, 0), int((finite * [each.images for each in records]).sum()))


def add_up(state: TrainState, like: StepRecord, sums: np.ndarray[Any, Any], images: int) -> None:
    """Add sums, with the shapes of the record `like`, to the totals, in the order of the steps."""
    if not state.totals.sums:
        zeros = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in like.shapes.items()}
        state.totals = Totals(zeros, state.totals.images)
    before = state.totals.flat().numpy()[None, :-1]
    added = np.concatenate([before, sums.reshape(-1, before.shape[1])]).cumsum(0)[-1]
    state.totals = state.totals.with_values(torch.from_numpy(np.append(added, state.totals.images.item() + images)))


def report_nonfinite(state: TrainState, run: Run, step: int, *, finite: bool) -> None:
    """Report a step whose gradient was not finite; `finite` says whether this rank's loss was. Every rank must call this.

    Raises RunError if the run must end.
    """
    config, steps = run.config, run.loader.steps
    state.skipped_steps += 1
    odd = [rank for rank, ok in enumerate(ranks.all_gather_object(finite)) if not ok]
    where = f"the loss of rank {', '.join(map(str, odd))}" if odd else "the gradient"
    images = [each for rank in odd or range(steps.world) for each in steps.of_rank(rank)(step).images.tolist()]
    names = [run.loader.source.train.name_of(each) for each in images]
    run.log.warn(f"step {step + 1:,}: {where} is not finite, and no weight was changed; images {shortened(names)}")
    run.log.text(step + 1, "nonfinite", f"{where}: images {', '.join(names)}")
    if config.nonfinite == "stop":
        raise RunError(
            f"{where} is not finite in step {step + 1:,}: a smaller optim.lr or optim.clip_norm may help, given with the same "
            "command; nonfinite=skip skips such steps"
        )
    if state.nonfinite_in_a_row > config.nonfinite_limit:
        row = f"{state.nonfinite_in_a_row} steps in a row were not finite, up to step {step + 1:,}"
        raise RunError(f"{row}: try a smaller optim.lr, or optim.clip_norm")


def shortened(names: list[str]) -> str:
    """The first few of a list of names, as text."""
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more, in TensorBoard" if len(names) > 8 else "")


def check_replicas(state: TrainState, accelerator: Accelerator) -> None:
    """Raise RunError if the weights of the ranks differ in any bit. Every rank must call this."""
    if accelerator.num_processes == 1:
        return
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = [weight.detach().view(integers[weight.element_size()]) for weight in state.network.parameters()]
    sums = [each.sum(dtype=each.dtype) for each in bits]  # overflow does no harm here; int64 would take ten times as long
    replicas = accelerator.gather(torch.stack(sums)[None]).tolist()
    common = Counter(map(tuple, replicas)).most_common(1)[0][0]  # in a tie, that of the lowest rank
    odd = [str(rank) for rank, each in enumerate(replicas) if tuple(each) != common]
    if odd:
        raise RunError(
            f"the weights of rank {', '.join(odd)} differ from those of the other ranks after step {state.step:,}, so they are "
            "not saved: check the memory of its device; the same command resumes from the last checkpoint"
        )


def report_bad_images(run: Run) -> None:
    """Report images that cannot be used, of those that were read since the last call. Every rank must call this."""
    if not run.loader.skips_bad_images:
        return
    found = {line for each in ranks.all_gather_object(run.loader.bad_images()) for line in each}
    file = Path(run.config.run_dir, "bad_images.txt")
    if run.accelerator.is_main_process and found - run.bad_images:
        run.bad_images.update(found)
        with suppress(OSError):  # a full disk must not end the run
            known = set(file.read_text("utf-8", "surrogateescape").splitlines()) if file.exists() else set()
            with file.open("a", encoding="utf-8", errors="surrogateescape") as lines:
                lines.writelines(f"{line}\n" for line in sorted(found - known))
        run.log.warn(f"{len(run.bad_images):,} images cannot be used, so others replace them; {file} lists them")
