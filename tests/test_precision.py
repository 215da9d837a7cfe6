"""bf16 is tried out before it is trusted."""

import pytest
import torch
import torch.nn.functional as F

from distrib.errors import UserError
from distrib.training import precision
from distrib.training.precision import bf16_error, choose_precision

CPU = torch.device("cpu")


def break_bf16(monkeypatch: pytest.MonkeyPatch, kernel: int) -> None:
    """What pytorch#163347 saw: bf16 convolutions with a 2x2 kernel that give a quarter of the sum."""
    right = F.conv2d

    def wrong(images, weight, **rest):
        out = right(images, weight, **rest)
        return out / 4 if images.dtype == torch.bfloat16 and weight.shape[-1] == kernel else out

    monkeypatch.setattr(F, "conv2d", wrong)


def test_this_machine_convolves_rightly_in_bf16() -> None:
    assert bf16_error(CPU) < precision.TOLERANCE / 2


@pytest.mark.parametrize("kernel", [1, 2, 3, 7])
def test_a_wrong_bf16_convolution_means_fp32_or_a_refusal(monkeypatch: pytest.MonkeyPatch, kernel: int) -> None:
    monkeypatch.setattr(precision, "is_fast_at_bf16", lambda device: (True, "it is"))
    break_bf16(monkeypatch, kernel)
    assert choose_precision("auto", CPU) == ("no", "its bf16 convolutions are wrong by 75% of the result")
    with pytest.raises(UserError, match="precision=bf16 cannot be trusted on this cpu"):
        choose_precision("bf16", CPU)
    assert choose_precision("no", CPU)[0] == "no"


def test_a_device_that_is_slow_at_bf16_gets_fp32_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "cpu_has", lambda feature: False)
    assert choose_precision("auto", CPU) == ("no", "the CPU has neither avx512_bf16 nor amx_bf16")
    assert choose_precision("bf16", CPU)[0] == "bf16"


def test_fp16_needs_a_gpu() -> None:
    with pytest.raises(UserError, match="precision=fp16 needs a GPU"):
        choose_precision("fp16", CPU)
