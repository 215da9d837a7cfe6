"""Mixed precision where the device is fast at it and correct: bf16 is tested before it is used."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from distrib.errors import UserError
from distrib.runtime import ranks

Precision = Literal["no", "bf16", "fp16"]

TOLERANCE = 0.05  # relative to the largest value: a correct bf16 result is off by about 0.01, a wrong one by 1 or more


def choose_precision(asked: str, device: torch.device) -> tuple[Precision, str]:
    """The precision to train in, and the reason in words. Raises UserError if the device cannot do what was requested."""
    if asked == "no":
        return "no", "as asked"
    if asked == "fp16":
        if device.type == "cpu":
            raise UserError("precision=fp16 needs a GPU: use bf16, no or auto on a CPU")
        return "fp16", "as asked"
    fast, why = is_fast_at_bf16(device)
    if asked == "auto" and not fast:
        return "no", why
    off = bf16_error(device)
    if off > TOLERANCE:
        found = f"its bf16 convolutions are wrong by {off:.0%} of the result"
        if asked == "bf16":
            raise UserError(f"precision=bf16 cannot be trusted on this {device.type}: {found}; use no or auto")
        return "no", found
    return "bf16", "as asked" if asked == "bf16" else why


def agree_on_precision(asked: str, device: torch.device) -> tuple[Precision, str]:
    """The precision of all ranks, and the reason in words: bf16 only if it works on all of them. Every rank must call this."""
    mistake, choice = None, None
    try:
        choice = choose_precision(asked, device)
    except UserError as error:
        mistake = error
    ranks.raise_on_all(mistake)
    choices = [each for each in ranks.all_gather_object(choice) if each]
    return next((each for each in choices if each[0] == "no"), choices[0])


def is_fast_at_bf16(device: torch.device) -> tuple[bool, str]:
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return major >= 8, f"compute capability {major}.{minor}, where bf16 begins at 8.0"
    wanted = ("avx512_bf16", "amx_bf16")
    has = [name for name in wanted if cpu_has(name)]
    return bool(has), f"the CPU has {' and '.join(has)}" if has else f"the CPU has neither {' nor '.join(wanted)}"


def cpu_has(feature: str) -> bool:
    try:
        with open("/proc/cpuinfo") as info:
            return any(line.startswith("flags") and feature in line.split() for line in info)
    except OSError:
        return False


def bf16_error(device: torch.device) -> float:
    """The error of bf16 convolutions and their gradients against fp32, relative to the largest value.

    Some CPUs compute some kernel sizes wrongly (pytorch#163347), so each kind of kernel that networks use is tested.
    """
    kinds = [(1, 1, 0), (2, 1, 0), (2, 2, 0), (3, 1, 1), (3, 2, 1), (7, 2, 3)]  # kernel, stride, padding
    return max(error_of(device, *kind) for kind in kinds)


def error_of(device: torch.device, kernel: int, stride: int, padding: int) -> float:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 16, 9, 9, generator=generator).to(device, memory_format=torch.channels_last)
    weight = torch.randn(32, 16, kernel, kernel, generator=generator).to(device)
    exact, rounded = (
        [*convolve(images.to(dtype), weight.to(dtype), stride, padding)] for dtype in (torch.float32, torch.bfloat16)
    )
    return max(((a - b.float()).abs().max() / a.abs().max()).item() for a, b in zip(exact, rounded, strict=True))


def convolve(images: Tensor, weight: Tensor, stride: int, padding: int) -> tuple[Tensor, ...]:
    images, weight = images.detach().requires_grad_(), weight.detach().requires_grad_()
    out = F.conv2d(images, weight, stride=stride, padding=padding)
    ramp = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape).to(out.dtype)
    return out, *torch.autograd.grad(out, (images, weight), ramp)
