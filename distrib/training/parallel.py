"""Accelerate's part in training: mixed precision and DDP. The user's own accelerate settings are kept out."""

from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DDPCommunicationHookType, DistributedDataParallelKwargs
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from distrib.config import Config
from distrib.runtime.environment import accelerate_settings_hidden


def make_accelerator(config: Config) -> Accelerator:
    """An Accelerator with `config.precision`. The state of an earlier run in this process is reset."""
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
    """The model that a step calls, wrapped in DDP if there are several ranks, and its optimizer. Every rank must call this."""
    if compiled != "no":
        network.compile(mode=compiled)  # in place, so that its weights keep their names
    model, optimizer = accelerator.prepare(network, optimizer)
    if isinstance(model, DistributedDataParallel):
        # Evaluation broadcasts batch statistics before it uses them; DDP would do it in each forward pass, and wait.
        model.broadcast_buffers = False  # set here, since DDP's argument of this name is deprecated
    return model, optimizer


def unwrap(accelerator: Accelerator, model: nn.Module) -> None:
    """Undo what `wrap` did to the network, so that it can be trained again: autocast and compilation."""
    network = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    network._compiled_call_impl = None  # Module.compile has no public way to undo it
