"""Muon: SGD with momentum, whose step along a matrix of weights is made orthogonal (Jordan et al., 2024).

torch.optim.Muon takes matrices only, computes in bf16 on any device, and does not know `found_inf`.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD

# Rounds of Newton and Schulz. Singular values above a hundredth of the norm then lie between 0.3 and 1.2 or so: enough.
ROUNDS = 3
COEFFICIENTS = 3.4445, -4.7750, 2.0315  # of their polynomial, chosen by Jordan for its slope at 0


class Muon(SGD):
    """In groups that have `inertia`, a momentum, weights move by orthogonal matrices; in the others as SGD would move them.

    The filters of a convolution, (out, in, height, width), are the rows of a matrix.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], lr: float, momentum: float, *, fused: bool) -> None:
        super().__init__(groups, lr, momentum, nesterov=momentum > 0, fused=fused)
        for group in self.param_groups:
            if "inertia" in group:
                group |= {"momentum": 0.0, "nesterov": False}  # it has had its momentum when SGD comes to it

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Turn each gradient into an orthogonal step of Nesterov's momentum, then do as SGD does.

        With `found_inf` of 1, which torch's fused optimizers know too, nothing changes.
        """
        found = getattr(self, "found_inf", None)
        for group in self.param_groups:
            for weight in group["params"] if "inertia" in group else ():
                if weight.grad is None:
                    continue
                buffer = self.state[weight]["momentum_buffer"]
                moved = weight.grad.add(buffer, alpha=group["inertia"])
                step = orthogonal(weight.grad.add(moved, alpha=group["inertia"]).flatten(1)).view_as(weight)
                weight.grad.copy_(step)  # in place: DDP's gradients are parts of its buckets
                buffer.copy_(moved if found is None else torch.where(found == 1, buffer, moved))
        super().step()


def orthogonal(matrix: Tensor, rounds: int = ROUNDS) -> Tensor:
    """Nearly the orthogonal matrix that is nearest to `matrix`, found by products of matrices alone (Newton and Schulz)."""
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(rounds):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)  # a x + (b gram + c gram gram) x
    found: Tensor = x.T if tall else x
    return found
