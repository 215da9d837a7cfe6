"""Muon: SGD with momentum, where the step of each weight matrix is made orthogonal (Jordan et al., 2024).

torch.optim.Muon accepts matrices only, computes in bf16 on every device, and ignores `found_inf`.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD

# Newton-Schulz iterations. They bring singular values above 0.01 of the norm to between about 0.3 and 1.2, which is enough.
ROUNDS = 3
COEFFICIENTS = 3.4445, -4.7750, 2.0315  # of the polynomial, chosen by Jordan for its slope at 0


class Muon(SGD):
    """Groups with `inertia` (their momentum) get orthogonal steps; the other groups get those of SGD.

    A convolution's weight, (out, in, height, width), is taken as a matrix with `out` rows.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], lr: float, momentum: float, *, fused: bool) -> None:
        super().__init__(groups, lr, momentum, nesterov=momentum > 0, fused=fused)
        for group in self.param_groups:
            if "inertia" in group:
                group |= {"momentum": 0.0, "nesterov": False}  # `step` applies the momentum itself, before SGD's step

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Replace each gradient by the orthogonalised Nesterov momentum, then do SGD's step.

        If `found_inf` is 1, nothing changes, as in torch's fused optimizers.
        """
        found = getattr(self, "found_inf", None)
        for group in self.param_groups:
            for weight in group["params"] if "inertia" in group else ():
                if weight.grad is None:
                    continue
                buffer = self.state[weight]["momentum_buffer"]
                moved = weight.grad.add(buffer, alpha=group["inertia"])
                step = orthogonal(weight.grad.add(moved, alpha=group["inertia"]).flatten(1)).view_as(weight)
                weight.grad.copy_(step)  # in place, since DDP's gradients are views of its buckets
                buffer.copy_(moved if found is None else torch.where(found == 1, buffer, moved))
        super().step()


def orthogonal(matrix: Tensor, rounds: int = ROUNDS) -> Tensor:
    """An approximation of the orthogonal matrix nearest to `matrix`, by the Newton-Schulz iteration."""
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(rounds):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)  # a x + (b gram + c gram gram) x
    found: Tensor = x.T if tall else x
    return found
