"""Muon: momentum whose update of each weight matrix is made orthogonal, and plain SGD for all that is no matrix."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic a·σ + b·σ³ + c·σ⁵, which climbs from 0 as steeply as possible and does not settle at 1, but around it."""


@torch.no_grad()
def orthogonalize(matrix: Tensor, steps: int = 5, dtype: torch.dtype | None = None) -> Tensor:
    """About U·Vᵀ of the matrix U·Σ·Vᵀ: the nearest matrix whose rows (or columns, the fewer of the two) are orthonormal

    matrix: rows × columns. The singular values of the result are not exactly 1: after five steps they lie between 0.68 and 1.14
    if in Σ the smallest is above 0.01 of the Frobenius norm, after three between 0.68 and 1.21 above 0.02 of it; smaller ones
    come near to 1 by further steps. Cost of a step: 2·r²·(2·k + r) FLOP with r the shorter and k the longer side. dtype: of the
    products; None is bf16 on a GPU and fp32 elsewhere.

    In bf16 the largest singular values come out within 0.01 of those in fp32. The result differs in directions of which Σ has
    next to nothing: after three steps by 1 % of its norm for a Gaussian matrix and 4 % for one of rank 6 with 1 % of noise,
    after five by up to 40 % for that.

    Source: Keller Jordan et al. 2024 (kellerjordan.github.io/posts/muon), with its coefficients.
    """
    a, b, c = COEFFICIENTS
    x = matrix.to(dtype or (torch.bfloat16 if matrix.is_cuda else torch.float32))
    is_tall = x.shape[0] > x.shape[1]
    if is_tall:
        x = x.T
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if is_tall else x).to(matrix.dtype)


class Muon(Optimizer):
    """w ← (1 − lr·λ)·w − lr·√max(1, r/k)·O, O about orthogonal, of the momentum buffer seen as an r×k matrix (r: outputs)

    Groups with `is_matrix` get this update; the others w ← (1 − lr·λ)·w − lr·m, which is SGD. The buffer m ← momentum·m + g is as
    in torch's SGD, with Nesterov's form g + momentum·m; the decay λ is decoupled. Every update thus has the Frobenius norm √r,
    whatever the gradient's size: with `renormalize`, which scales each matrix to the norm √r before its update, the learning rate
    is the relative size ‖Δw‖/‖w‖ of an update, near enough. Then λ has no effect on matrices. dtype: as in `orthogonalize`.

    Source: Keller Jordan et al. 2024; Liu et al. 2025, arXiv:2502.16982, for decoupled decay. Ours differs from the latter in
    keeping the scale √max(1, r/k) of the former.
    """

    def __init__(self, params: Any, *, lr: float, momentum: float = 0.95, nesterov: bool = True, weight_decay: float = 0.0,
                 steps: int = 5, renormalize: bool = False, dtype: torch.dtype | None = None) -> None:  # fmt: skip
        super().__init__(params, dict(lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay, steps=steps,
                                      renormalize=renormalize, is_matrix=False, decoupled_weight_decay=True))  # fmt: skip
        self._dtype = dtype

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_dtype": self._dtype}  # torch's has only what all optimizers have

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            if params:
                self._update(params, group)
        return loss

    def _update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        lr, momentum = group["lr"], group["momentum"]
        moved: list[Tensor] = [param.grad for param in params if param.grad is not None]
        if momentum:
            for param in params:
                if not self.state[param]:
                    self.state[param]["momentum_buffer"] = torch.zeros_like(param)
            buffers = [self.state[param]["momentum_buffer"] for param in params]
            torch._foreach_mul_(buffers, momentum)
            torch._foreach_add_(buffers, moved)
            moved = list(torch._foreach_add(moved, buffers, alpha=momentum)) if group["nesterov"] else buffers
        if group["weight_decay"]:
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        if not group["is_matrix"]:
            torch._foreach_add_(params, moved, alpha=-lr)
            return
        for param, update in zip(params, moved, strict=True):
            rows, columns = len(param), param[0].numel()
            if group["renormalize"] and lr:
                param.mul_(rows**0.5 / (param.norm() + 1e-7))
            scale = max(1.0, rows / columns) ** 0.5
            param.add_(orthogonalize(update.flatten(1), group["steps"], self._dtype).view(update.shape), alpha=-lr * scale)
