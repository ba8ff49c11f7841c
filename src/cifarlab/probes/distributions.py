"""Where the entries of weights, gradients and updates lie, as histograms over powers of two."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cifarlab.probes.moments_torch import NUM_BINS

SMALLEST, LARGEST = -40, 8
EXPONENTS = tuple(range(SMALLEST, LARGEST + 1))
"""Powers of two with a bin of their own; what is smaller or larger is in the first or the last."""
COLUMNS = (*(f"-2^{e}" for e in reversed(EXPONENTS)), "0", *(f"+2^{e}" for e in EXPONENTS), "non_finite")
"""From the largest negative to the largest positive: column "-2^-3" counts entries from −2⁻³ to (excluding) −2⁻²."""
KINDS = ("weight", "gradient", "update")


def fold_bins(counts: Tensor) -> Tensor:
    """Share of the entries in each of COLUMNS: (…, 512) counts by sign and exponent -> (…, 100)

    How to read: each distribution is a hump of five to ten powers of two, with a mirror image. A hump that wanders left step
    by step is fading (vanishing gradient, decaying weights), one that broadens to the right is about to explode. Gradients
    that reach below 2^-24 are lost in fp16 without loss scaling; updates 2^-24 below the weights they are added to are lost in
    fp32, 2^-8 below in bf16. A tall bar at 0 is dead units or pruned weights.
    """
    positive, negative = counts[..., : NUM_BINS // 2], counts[..., NUM_BINS // 2 :]
    first = SMALLEST + 127
    sides = []
    for side in (positive, negative):
        inner = side[..., first : LARGEST + 128].clone()
        inner[..., 0] += side[..., 1:first].sum(-1)
        inner[..., -1] += side[..., LARGEST + 128 : 255].sum(-1)
        sides.append(inner)
    zeros, broken = ((positive[..., k] + negative[..., k])[..., None] for k in (0, 255))
    folded = torch.cat([sides[1].flip(-1), zeros, sides[0], broken], -1)
    return folded / folded.sum(-1, keepdim=True).clamp(min=1)


def mean_exponent(shares: NDArray[np.float32]) -> NDArray[np.float64]:
    """The mean power of two of a tensor's non-zero entries: (…, 100) -> (…); NaN where all are 0"""
    by_size = shares[..., : len(EXPONENTS)][..., ::-1] + shares[..., len(EXPONENTS) + 1 : -1]
    total = by_size.sum(-1, dtype=np.float64)
    with np.errstate(invalid="ignore"):
        mean: NDArray[np.float64] = (by_size * np.array(EXPONENTS)).sum(-1, dtype=np.float64) / np.where(total > 0, total, np.nan)
    return mean
