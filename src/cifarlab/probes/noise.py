"""How noisy the gradient is: the simple noise scale on a fixed batch, and the cosine between successive gradients."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cifarlab.config import InputError
from cifarlab.probes.embeddings import gradients_dense
from cifarlab.probes.fixed_batch import FixedBatch, dot, measuring, wide

COLUMNS = ("noise_scale", "gradient_square", "noise_trace", "cosine")


def measure_noise(model: nn.Module, batch: FixedBatch, num_pieces: int = 4, *, cosine: Tensor | None = None) -> Tensor:
    """B = tr Σ / |G|², the simple gradient noise scale in images; one row of COLUMNS, 1×4, float32, on the model's device.

    G is the gradient of the mean loss over the data the batch was drawn from, Σ the covariance of one image's gradient.
    From the gradients gᵢ of k pieces of nᵢ images (N in all) and their mean ḡ = Σ nᵢgᵢ/N:

    - noise_trace: tr Σ ≈ Σ nᵢ|gᵢ − ḡ|² / (k − 1);
    - gradient_square: |G|² ≈ |ḡ|² − tr Σ / N, for equal pieces the mean dot product of two different pieces' gradients;
    - noise_scale: their quotient, NaN where gradient_square is not above 0;
    - cosine: what the caller gives (see GradientMemory), else NaN.

    The estimates of tr Σ and |G|² are unbiased for any piece sizes, their quotient only roughly, and all have few degrees of
    freedom (k − 1): look at averages of gradient_square and noise_trace over several rows, and divide those.

    Cost: one forward and one backward pass over the batch, in k pieces; two more vectors as long as the weights; no device sync.
    Weights that are frozen (requires_grad False) are left out. `.grad`, buffers and random states stay as they are, see
    `measuring`. Batch norm works with each piece's statistics: Σ is then that of training with batches of N/k images, and part
    of the noise is batch norm's own.

    Raises InputError for fewer than 2 pieces, more pieces than images, or a model without trainable weights.

    Source: McCandlish et al. 2018, arXiv:1812.06162, appendix A.1. Ours differs: the big batch is the pieces themselves (there,
    the sum over data-parallel ranks), so no second pass; pieces may differ in size (for equal ones the numbers are the paper's);
    G is that of the fixed batch's loss, without weight decay or augmentation by the training; no moving averages here.

    How to read: below the noise scale, a larger batch still pays: twice the images a step need nearly half the steps. Above it, a
    larger batch brings nearly the same step at twice the price. It typically grows as the loss falls (|G|² shrinks faster than
    tr Σ): a reason to raise the batch size or to lower the learning rate late. Far below the batch size in use: the batch is
    larger than needed. NaN says that these images cannot tell the gradient from zero: the noise scale is likely far above N.
    Take a larger fixed batch, or average rows; do not read it as zero.
    """
    if num_pieces < 2:
        raise InputError(f"num_pieces={num_pieces} cannot be used to measure noise: it must be at least 2")
    pieces = batch.split(num_pieces)
    with torch.inference_mode(False), torch.enable_grad(), measuring(model) as net, gradients_dense(net):
        weights = [weight for weight in net.parameters() if weight.requires_grad]
        if not weights:
            raise InputError("the model has no trainable weights, so no gradient whose noise could be measured")
        # Welford's update: two vectors however many pieces, and no difference of large numbers.
        means = [torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32)) for weight in weights]
        spread = torch.zeros((), dtype=wide(weights[0]), device=weights[0].device)
        num_images = 0
        for piece in pieces:
            gradients = torch.autograd.grad(piece.loss(net), weights, allow_unused=True, materialize_grads=True)
            differences = [gradient - mean for gradient, mean in zip(gradients, means, strict=True)]
            spread += len(piece) * num_images / (num_images + len(piece)) * dot(differences, differences)
            num_images += len(piece)
            torch._foreach_add_(means, differences, alpha=len(piece) / num_images)
        noise_trace = spread / (num_pieces - 1)
        gradient_square = dot(means, means) - noise_trace / num_images
        unknown = torch.full_like(spread, math.nan)
        noise_scale = torch.where(gradient_square > 0, noise_trace / gradient_square, unknown)
        row = [noise_scale, gradient_square, noise_trace, unknown if cosine is None else cosine.to(spread)]
        return torch.stack(row).to(torch.float32)[None].detach()


class GradientMemory:
    """cos(gₜ₋₁, gₜ) = gₜ₋₁·gₜ / (‖gₜ₋₁‖‖gₜ‖) of the training's own gradients.

    `remember` at the step before a due one, `cosine_with` at the due one, with the gradients of the same weights in the same
    order; None for a weight that got none (it counts as zero). Cost: a copy of the gradient kept, a pass over it each time, no
    device sync. `state_dict` holds that copy, so that a run stopped between the two steps goes on with the same bits.

    How to read: near 0 at batch sizes below the noise scale, where most of a gradient is noise; clearly above 0 where the
    direction lasts (a long valley: a larger learning rate or more momentum would help); steadily below 0 where each step
    undoes the last one (oscillation across a valley: the edge of stability, or a learning rate above it). At full batch at the
    edge of stability, values towards −1 are normal.
    """

    def __init__(self) -> None:
        self.gradients: list[Tensor | None] | None = None

    def remember(self, gradients: Sequence[Tensor | None]) -> None:
        """Keeps a copy, and lets go of the one before."""
        self.gradients = [None if gradient is None else gradient.detach().clone() for gradient in gradients]

    def forget(self) -> None:
        """Lets go of the copy: its step is over."""
        self.gradients = None

    def cosine_with(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """The cosine, 0-d on the gradients' device; NaN when nothing is remembered or one of the two is zero or not finite.

        Raises ValueError when these are not as many gradients as were remembered.
        """
        there = next((gradient for gradient in gradients if gradient is not None), torch.zeros(()))
        zero = torch.zeros((), dtype=wide(there), device=there.device)
        products = [zero, zero, zero]  # kept·kept, new·new, kept·new
        for kept, new in zip([None] * len(gradients) if self.gradients is None else self.gradients, gradients, strict=True):
            if kept is not None and new is not None and (kept.device, kept.stride()) != (new.device, new.stride()):
                kept = torch.empty_like(new, dtype=kept.dtype).copy_(kept)  # one order of summing, whatever a file made of it
            for place, (one, other) in enumerate([(kept, kept), (new, new), (kept, new)]):
                if one is not None and other is not None:
                    products[place] = products[place] + dot([one.detach()], [other.detach()]).to(zero)
        return products[2] / (products[0] * products[1]).sqrt()

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on as if never stopped."""
        return {"gradients": self.gradients}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.gradients = state["gradients"]
