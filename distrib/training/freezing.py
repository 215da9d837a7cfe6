"""Fine-tuning: in the first steps of a run, only the last layer learns. Whether it does is a function of the step."""

from accelerate import Accelerator
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from distrib.errors import UserError
from distrib.models.weights import first_and_last
from distrib.training.context import Run
from distrib.training.parallel import unwrap, wrap_again
from distrib.training.state import Frozen, TrainState


def freeze_or_thaw(state: TrainState, run: Run) -> None:
    """Let those weights learn that learn in the next step. Every rank must call this."""
    if (state.step < run.schedule.frozen) == bool(state.frozen):
        return
    state.optimizer.zero_grad()
    if state.frozen:
        thaw(state)
    else:
        freeze(state)
    state.model = wrap_again(run.accelerator, state.model, run.config.compile)  # DDP waits for the gradients of all that learns
    run.replay.start_again()


def freeze(state: TrainState) -> None:
    """Freeze all but the last layer. Raises UserError if there is no such layer."""
    weights, last = dict(state.network.named_parameters()), {*first_and_last(state.network)[1]}
    if last.isdisjoint(weights):
        raise UserError("model.freeze needs a network whose last layer is a linear layer or a convolution: omit it")
    body = [each for name, each in weights.items() if name not in last and each.requires_grad]
    norms: list[nn.Module] = [each for each in state.network.modules() if isinstance(each, _BatchNorm) and each.training]
    state.frozen = Frozen(body, norms)
    for weight in body:
        weight.requires_grad_(False)
    for norm in norms:
        norm.eval()


def thaw(state: TrainState) -> None:
    """Let all weights learn again that learned before they were frozen."""
    assert state.frozen
    for weight in state.frozen.weights:
        weight.requires_grad_(True)
    for norm in state.frozen.norms:
        norm.train()
    state.frozen = None


def release(state: TrainState, accelerator: Accelerator) -> None:
    """Give the network back as it was before training, but for its weights."""
    if state.frozen:
        thaw(state)
    unwrap(accelerator, state.model)
