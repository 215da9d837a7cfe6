"""Numbers that went wrong: found on every rank in the same step, before they reach a weight or a checkpoint.

What a step has to tell stays on the device until somebody waits for that anyway: before a report, and before a save.
"""

import math
from collections import Counter
from collections.abc import Sequence
from itertools import islice

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from distrib import ranks
from distrib.config import Config, RunError
from distrib.data.steps import Steps
from distrib.log import Log
from distrib.state import TrainState


def nonfinite(weights: Sequence[nn.Parameter]) -> Tensor:
    """1.0 if a gradient is not finite, else 0.0: after the exchange, what is not finite on one rank is not on any.

    This is what torch's GradScaler does to look, with a scale of 1; a norm would take five times as long.
    """
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    found = torch.zeros((), dtype=torch.float32, device=gradients[0].device)
    torch._amp_foreach_non_finite_check_and_unscale_(gradients, found, torch.ones_like(found))
    return found


def look_back(state: TrainState, config: Config, steps: Steps, log: Log) -> None:
    """Read what the steps since the last look have told: add up what was seen, and find what went wrong.

    This waits for the device. Every rank must call it. Raises RunError if a step was not finite and `nonfinite` is stop, or if
    more than `nonfinite_limit` in a row were.
    """
    told, state.told = state.told, []
    scalars = [scalar for scalars, _ in told for scalar in scalars]
    numbers = iter(torch.stack(scalars).tolist() if told else ())
    sums = state.sums.tolist()
    for step, (scalars, images_of) in enumerate(told, state.step - len(told)):
        odd_gradient, *parts = islice(numbers, len(scalars))
        if not odd_gradient:
            state.nonfinite_in_a_row = 0
            for loss, hits, n in zip(parts[::2], parts[1::2], images_of, strict=True):
                if math.isfinite(loss):  # in fp16 it may overflow too
                    sums = [sums[0] + loss * n, sums[1] + hits, sums[2], sums[3] + n]
            continue
        state.nonfinite_in_a_row += 1
        state.skipped_steps += 1
        odd = [rank for rank, ok in enumerate(ranks.gathered(math.isfinite(sum(parts)))) if not ok]
        where = f"the loss of rank {', '.join(map(str, odd))}" if odd else "the gradient"
        images = [each for rank in odd or range(steps.world) for each in steps.of_rank(rank)(step).images.tolist()]
        log.warn(f"step {step + 1:,}: {where} is not finite, and no weight was changed; images {shortened(images)}")
        log.text(step + 1, "nonfinite", f"{where}: images {', '.join(map(str, images))}")
        if config.nonfinite == "stop":
            raise RunError(
                f"{where} is not finite in step {step + 1:,}: a smaller optim.lr or optim.clip_norm may help; "
                "nonfinite=skip goes on without such steps"
            )
        if state.nonfinite_in_a_row > config.nonfinite_limit:
            row = f"{state.nonfinite_in_a_row} steps in a row were not finite, up to step {step + 1:,}"
            raise RunError(f"{row}: try a smaller optim.lr, or optim.clip_norm")
    state.sums.copy_(torch.tensor(sums, dtype=state.sums.dtype))


def shortened(images: list[int]) -> str:
    """The first few of many images."""
    return ", ".join(map(str, images[:8])) + (f" and {len(images) - 8} more, in TensorBoard" if len(images) > 8 else "")


def check_replicas(state: TrainState, accelerator: Accelerator) -> None:
    """Raise RunError if the ranks' weights are not the same, bit by bit. Every rank must call this."""
    if accelerator.num_processes == 1:
        return
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = [weight.detach().view(integers[weight.element_size()]) for weight in state.network.parameters()]
    sums = [each.sum(dtype=each.dtype) for each in bits]  # it may overflow, and is as good; in int64 it takes ten times as long
    replicas = accelerator.gather(torch.stack(sums)[None]).tolist()
    common = Counter(map(tuple, replicas)).most_common(1)[0][0]  # of several that are as common, that of the lowest rank
    odd = [str(rank) for rank, each in enumerate(replicas) if tuple(each) != common]
    if odd:
        raise RunError(
            f"the weights of rank {', '.join(odd)} are not those of the other ranks after step {state.step:,}: "
            "nothing is saved any more; check the memory of its device, then the same command goes on from the last checkpoint"
        )
