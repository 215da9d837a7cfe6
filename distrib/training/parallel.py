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
    return wrap_network(accelerator, network, compiled), accelerator.prepare_optimizer(optimizer)


def wrap_network(accelerator: Accelerator, network: nn.Module, compiled: str) -> nn.Module:
    if compiled != "no":
        network.compile(mode=compiled)  # in place, so that its weights keep their names
    model: nn.Module = accelerator.prepare_model(network, device_placement=False)  # it is there; a copy would be other tensors
    if isinstance(model, DistributedDataParallel):
        # Evaluation broadcasts batch statistics before it uses them; DDP would do it in each forward pass, and wait.
        model.broadcast_buffers = False  # set here, since DDP's argument of this name is deprecated
    return model


def wrap_again(accelerator: Accelerator, model: nn.Module, compiled: str) -> nn.Module:
    """The model anew, after other weights than before require gradients. Every rank must call this."""
    network = unwrap(accelerator, model)
    accelerator._models.clear()  # it has only this one
    return wrap_network(accelerator, network, compiled)


def unwrap(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """The network, as it was before `wrap`: without autocast and compilation."""
    network: nn.Module = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    network._compiled_call_impl = None  # Module.compile has no public way to undo it
    return network
