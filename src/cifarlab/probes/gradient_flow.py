"""How much gradient reaches each parameter tensor, before and after clipping."""

import numpy as np
from numpy.typing import NDArray

from cifarlab.probes.moments_torch import ABS_MAX, ABS_SUM, NON_FINITE, SQUARE_SUM, ZEROS

COLUMNS = ("mean_abs", "max_abs", "norm", "clipped_mean_abs", "clipped_max_abs", "clipped_norm", "zero_share", "non_finite")


def gradient_flow(before: NDArray[np.float64], after: NDArray[np.float64], numels: NDArray[np.int64]) -> NDArray[np.float64]:
    """mean |g|, max |g| and ‖g‖₂ of each tensor's gradient before and after clipping, its share of exact zeros, its NaN and Inf

    before, after: moments (…, P, 6); numels: (P,). Returns (…, P, 8), the order of COLUMNS. The gradient is the true one of the
    optimizer step: loss scaling undone, accumulated over micro-batches, averaged over ranks. A parameter that got no gradient
    (None) has NaN everywhere.

    How to read: healthy layers lie within two or three powers of ten of each other, and move together. Means that shrink
    steadily towards the first layers are a vanishing gradient (normalise, add shortcuts, change activation or initialisation);
    means that grow so, or a norm that jumps a hundredfold, an exploding one (lower the learning rate, clip). A max a
    thousand times the mean is a few weights that get all the signal. Zeros beyond those of dead units are disconnected weights.
    Clipping at work shows as `clipped_norm` below `norm`; where it is so at every step, the clip is a learning rate in disguise.

    Source: the picture is Glorot & Bengio 2010; clipping Pascanu et al. 2012, arXiv:1211.5063.
    """
    return np.stack(
        [*_sizes(before, numels), *_sizes(after, numels), before[..., ZEROS] / numels, before[..., NON_FINITE]], axis=-1
    )


def _sizes(moments: NDArray[np.float64], numels: NDArray[np.int64]) -> list[NDArray[np.float64]]:
    return [moments[..., ABS_SUM] / numels, moments[..., ABS_MAX], np.sqrt(moments[..., SQUARE_SUM])]
