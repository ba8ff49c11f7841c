"""How sharply the loss curves, against what the optimizer in use can stand."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from cifarlab.config import InputError
from cifarlab.probes.embeddings import gradients_dense
from cifarlab.probes.fixed_batch import FixedBatch, dot, measuring

COLUMNS = ("sharpness", "edge", "edge_share", "preconditioned", "residual", "iterations")


def measure_curvature(
    model: nn.Module,
    batch: FixedBatch,
    optimizer: Optimizer,
    *,
    max_iterations: int = 50,
    tolerance: float = 0.01,
    seed: int = 0,
) -> Tensor:
    """λ_max(∇²L) against the largest one the optimizer stands; one row of COLUMNS, 1×6, float32, on the model's device.

    L is the mean loss of the fixed batch as a function of the weights w that this optimizer holds (trainable ones of this model).

    - sharpness: the largest eigenvalue of L's Hessian H, algebraically: −9 and 2 give 2. Its unit is loss per weight².
    - edge: the largest stable sharpness at the present lr. On a quadratic along an eigenvector of H, steps shrink below it and
      grow, with alternating sign, above it. With weight decay d added to the gradient (torch's `weight_decay` but for AdamW),
      the optimizer sees λ + d:
        SGD                     2/lr − d
        SGD, momentum β         (2 + 2β)/lr − d             with dampening τ: (2 + 2β)/((1 − τ)·lr) − d
        SGD, Nesterov           (2 + 2β)/((1 + 2β)·lr) − d
        RMSprop, momentum β     (2 + 2β)/lr                 for the preconditioned sharpness
        Adam                    (2 + 2β₁)/((1 − β₁)·lr)     for the preconditioned sharpness
        AdamW                   (2 − lr·d)(1 + β₁)/((1 − β₁)·lr), the same
    - preconditioned: λ_max(P^-½ (H + D) P^-½), P = diag(√v̂ + ε) from the optimizer's state as its next step would use it but
      for that step's own gradient, D = diag(d). NaN for SGD, whose steps have no P.
    - edge_share: preconditioned/edge, or sharpness/edge where that is NaN: above 1, the quadratic model diverges.
    - residual: bound on the relative error: an eigenvalue lies within λ·(1 ± residual); its true error is far smaller
      (of the order residual²) where λ_max is set apart. The worse of the two sharpnesses. Above `tolerance` when
      `max_iterations` were not enough.
    - iterations: Hessian-vector products, of both sharpnesses together.

    Groups that differ in lr or momentum: `edge` is that of the group with the largest lr, and each weight is scaled to it:
    `preconditioned` (then for SGD too) is λ_max(C^½ (H + D) C^½) with C = that edge over the edge of the weight's own group.
    Exact where all weights flip sign each step, the only way in which a positive quadratic becomes unstable. SGD's groups
    that differ in weight decay alone do not need this: the largest decay is taken off, which is wrong by the difference at most.
    Edge, edge_share and preconditioned are NaN for an optimizer not listed (also a subclass: its step may be another) and
    for `maximize`; the latter two for Adam and RMSprop before the first step. An lr of 0 has the edge ∞ and share 0.

    Cost: dear. One forward and backward pass, then an iteration costs 3 to 5 of them (ResNet-18, 128 images, one CPU thread of
    a busy server, torch 2.13: 4.8 s for a forward and backward pass, 18 to 25 s an iteration, a quarter of it batch norm's second
    derivative). 6 to 30 iterations are usual, twice as many for adaptive optimizers. Memory: the graphs of the forward and
    backward pass over the whole batch (there 2.8 GB at the peak, of which an ordinary backward pass needs 1.2), and five vectors
    as long as the weights. One device sync per iteration, as the tridiagonal matrix is looked at on the host, and one for Adam's
    step count. Nothing is kept between calls, and the start vector comes from its own generator; `.grad`, buffers and random
    states stay as they are, see `measuring`. Attention is computed by its plain formula, as no other can be differentiated twice.

    Raises InputError when the optimizer holds no trainable weight of the model, or max_iterations is below 1.

    Source: Lanczos 1950 in the form of Paige 1972, without reorthogonalisation (lost orthogonality repeats converged
    eigenvalues, it does not move them); H·v: Pearlmutter 1994; edges: Cohen et al. 2021, arXiv:2103.00065, for SGD, and Cohen et
    al. 2022, arXiv:2207.14484, for Adam and RMSprop. Ours differs: theirs is the sharpness of the training set or a large part
    of it, ours that of one fixed batch, which is higher, the more so the smaller the batch; batch norm works with that batch's
    statistics; weight decay, groups and a stopping rule are added. What Adam's correction of the first moment does in the first
    1/(1 − β₁) steps is not in the edge, nor is gradient clipping.

    How to read: in full-batch training with a fixed lr, sharpness rises (progressive sharpening) until edge_share reaches 1, then
    hovers there while the loss still falls, unevenly: that is normal, not a fault. With small batches it settles below 1, lower
    for smaller ones; there the gradient's noise limits the step. Far below 1 for long: the learning rate could be larger.
    Well above 1 for many steps: the learning rate is above the edge: expect spikes or divergence (warm-up keeps the early,
    often sharp phase below 1). When the learning rate falls, the edge rises and sharpness usually follows it.
    """
    if max_iterations < 1:
        raise InputError(f"max_iterations={max_iterations} cannot be used to measure curvature: it must be at least 1")
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        sdpa_kernel(SDPBackend.MATH),
        measuring(model) as net,
        gradients_dense(net),
    ):
        held = {weight: group for group in optimizer.param_groups for weight in group["params"]}
        weights: list[Tensor] = [weight for weight in net.parameters() if weight.requires_grad and weight in held]
        if not weights:
            raise InputError("the optimizer holds no trainable weight of this model, so there is no curvature it could feel")
        groups = [held[weight] for weight in weights]
        hessian = _Hessian(batch.loss(net), weights)
        plain = largest_eigenvalue(hessian.times, hessian.start(seed), max_iterations=max_iterations, tolerance=tolerance)
        edges = [_edge_of(optimizer, group) for group in groups]
        edge = edges[max(range(len(groups)), key=lambda i: float(groups[i].get("lr", 0)))]
        decays = [0.0 if _is_decoupled(optimizer, group) else float(group.get("weight_decay", 0)) for group in groups]
        felt: Eigenvalue | None
        if math.isnan(sum(edges)):
            felt = None
        elif type(optimizer) is SGD and len(set(edges)) == 1:
            edge, felt = edge - max(decays), plain
        elif (roots := _preconditioner(optimizer, weights, groups)) is None:
            felt = None
        else:
            ratios = [edge / own if math.isfinite(edge) else 1.0 for own in edges]
            scale = _flatten([(ratio / root).sqrt() for ratio, root in zip(ratios, roots, strict=True)], hessian.dtype)
            decay = _flatten([torch.full_like(weight, d) for weight, d in zip(weights, decays, strict=True)], hessian.dtype)
            felt = largest_eigenvalue(
                lambda vector: scale * (hessian.times(scale * vector) + decay * scale * vector),
                hessian.start(seed), max_iterations=max_iterations, tolerance=tolerance,
            )  # fmt: skip
    share = math.nan if felt is None else math.inf if edge <= 0 else felt.value / edge
    own = None if felt is plain else felt
    row = [plain.value, edge, share, own.value if own else math.nan,
           max(plain.residual, own.residual) if own else plain.residual,
           plain.iterations + (own.iterations if own else 0)]  # fmt: skip
    return torch.tensor([row], dtype=torch.float32, device=weights[0].device)


class _Hessian:
    """H·v of a loss by differentiating its gradient once more; the graph of the gradient is kept for all products."""

    def __init__(self, loss: Tensor, weights: list[Tensor]) -> None:
        self.weights = weights
        self.dtype = torch.float32
        for weight in weights:
            self.dtype = torch.promote_types(self.dtype, weight.dtype)
        self.gradients = torch.autograd.grad(loss, weights, create_graph=True, allow_unused=True, materialize_grads=True)

    def start(self, seed: int) -> Tensor:
        """A normal vector as long as the weights, the same on every device."""
        size = sum(weight.numel() for weight in self.weights)
        return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=self.dtype).to(self.weights[0].device)

    def times(self, vector: Tensor) -> Tensor:
        parts = torch.split(vector, [weight.numel() for weight in self.weights])
        # A gradient that depends on no weight (of a linear loss, of an unused weight) has a Hessian of zeros.
        curved = [(gradient, part.view(gradient.shape).to(gradient.dtype))
                  for gradient, part in zip(self.gradients, parts, strict=True) if gradient.requires_grad]  # fmt: skip
        if not curved:
            return torch.zeros_like(vector)
        gradients, vectors = zip(*curved, strict=True)
        products = torch.autograd.grad(gradients, self.weights, vectors, retain_graph=True, allow_unused=True,
                                       materialize_grads=True)  # fmt: skip
        return _flatten(products, self.dtype)


def _flatten(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1).to(dtype) for tensor in tensors])


def _edge_of(optimizer: Optimizer, group: dict[str, Any]) -> float:
    """The largest stable (preconditioned) curvature of a group, decay included where it is in the gradient; NaN: unknown."""
    lr = float(group.get("lr", math.nan))
    if group.get("maximize"):
        return math.nan
    if lr == 0:
        return math.inf
    kind = type(optimizer)
    if kind in (Adam, AdamW):
        beta = float(group["betas"][0])
        decay = float(group["weight_decay"]) if _is_decoupled(optimizer, group) else 0.0
        return (2 - lr * decay) * (1 + beta) / ((1 - beta) * lr)
    if kind is RMSprop:
        return 2 * (1 + float(group["momentum"])) / lr
    if kind is SGD:
        beta = float(group["momentum"])
        taken = 1 - group["dampening"] if beta else 1.0  # torch dampens only with momentum
        if group["nesterov"]:
            taken = 1 + 2 * beta
        return 2 * (1 + beta) / (taken * lr) if taken > 0 else math.inf
    return math.nan


def _is_decoupled(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    """Whether weight decay shrinks the weights directly rather than being added to the gradient."""
    return type(optimizer) is AdamW or bool(group.get("decoupled_weight_decay"))


def _preconditioner(optimizer: Optimizer, weights: list[Tensor], groups: list[dict[str, Any]]) -> list[Tensor] | None:
    """What the optimizer divides each weight's gradient by; ∞ for weights it has not stepped yet, None if there are no others."""
    if type(optimizer) is SGD:
        return [torch.ones_like(weight) for weight in weights]
    states = [optimizer.state.get(weight, {}) for weight in weights]
    moved = [state for state in states if state]
    if not moved:
        return None
    steps = iter(torch.stack([torch.as_tensor(state["step"]).detach() for state in moved]).tolist())  # one copy to the host
    roots: list[Tensor] = []
    for weight, state, group in zip(weights, states, groups, strict=True):
        if not state:
            roots.append(torch.full_like(weight, math.inf))
            continue
        step = next(steps)
        if type(optimizer) is RMSprop:
            square = state["square_avg"]
            if group["centered"]:
                square = (square - state["grad_avg"].square()).clamp(min=0)
        else:
            square = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"] / (1 - float(group["betas"][1]) ** step)
        roots.append(square.sqrt() + group["eps"])
    return roots


class Eigenvalue(NamedTuple):
    """An eigenvalue of a symmetric A, as far as an iteration has found it."""

    value: float
    residual: float  # ‖Av − λv‖/|λ| of the unit vector v that belongs to it: an eigenvalue lies within λ·(1 ± residual)
    iterations: int  # products with A


def largest_eigenvalue(
    times: Callable[[Tensor], Tensor], start: Tensor, *, max_iterations: int, tolerance: float
) -> Eigenvalue:
    """λ_max(A), the largest one algebraically, of a symmetric A given by v -> A·v, by Lanczos' three-term recurrence.

    start: any vector that is not at right angles to the eigenvector, such as a random one. Stops when the residual is at most
    `tolerance`, when the vectors reachable from `start` are used up, or after `max_iterations`; NaN when A·v is not finite.
    Cost an iteration: one product, a few passes over three vectors, one device sync. Dot products are gathered in float64.
    """
    alphas: list[float] = []
    betas: list[float] = []
    before = torch.zeros_like(start)
    vector = start / dot([start], [start]).sqrt().to(start.dtype)
    while True:
        product = times(vector)
        if betas:
            product.sub_(before, alpha=betas[-1])
        alpha = dot([product], [vector])
        product.sub_(alpha.to(product.dtype) * vector)
        beta = dot([product], [product]).sqrt()
        for entries, entry in zip((alphas, betas), torch.stack([alpha, beta]).tolist(), strict=True):  # the device sync
            entries.append(entry)
        if not math.isfinite(alphas[-1] + betas[-1]):
            return Eigenvalue(math.nan, math.nan, len(alphas))
        off = betas[:-1]
        values, vectors = np.linalg.eigh(np.diag(alphas) + np.diag(off, 1) + np.diag(off, -1))
        value, error = float(values[-1]), betas[-1] * abs(float(vectors[-1, -1]))
        # Rounding alone leaves a β of about this size where the vectors are used up.
        is_used_up = betas[-1] <= torch.finfo(start.dtype).eps * max(map(abs, values))
        if error <= tolerance * abs(value) or is_used_up or len(alphas) in (max_iterations, start.numel()):
            residual = error / abs(value) if value else (0.0 if is_used_up else math.inf)
            return Eigenvalue(value, residual, len(alphas))
        before, vector = vector, product.div_(betas[-1])
