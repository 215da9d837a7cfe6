"""The door to Accelerate: mixed precision and DDP, whatever the user's own settings of accelerate are."""

from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DDPCommunicationHookType, DistributedDataParallelKwargs
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from distrib.config import Config
from distrib.runtime.environment import accelerate_settings_hidden


def make_accelerator(config: Config) -> Accelerator:
    """An Accelerator with `config.precision`, which is no longer auto. An earlier run of this process may have had another."""
    AcceleratorState._reset_state()
    GradientState._reset_state()
    hook = DDPCommunicationHookType(config.comm_hook)
    with accelerate_settings_hidden():
        return Accelerator(
            cpu=PartialState().device.type == "cpu",
            mixed_precision=config.precision,
            kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True, comm_hook=hook)],
        )


def wrap(accelerator: Accelerator, network: nn.Module, optimizer: Optimizer, compiled: str) -> tuple[nn.Module, Optimizer]:
    """What a step calls, `network` inside DDP if there are several ranks, and its optimizer. Every rank must call this."""
    if compiled != "no":
        network.compile(mode=compiled)  # in place, so that its weights keep their names
    model, optimizer = accelerator.prepare(network, optimizer)
    if isinstance(model, DistributedDataParallel):
        # Batch statistics are made equal when they are used: in each forward pass that would be a collective that waits.
        model.broadcast_buffers = False  # set here, since DDP's option of this name is being replaced by another
    return model, optimizer


def unwrap(accelerator: Accelerator, model: nn.Module) -> None:
    """Take back what `wrap` did to the network, which may be trained again: in its own precision, and not compiled."""
    network = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    network._compiled_call_impl = None  # torch's Module.compile has no way back of its own
