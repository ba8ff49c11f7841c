"""How large the weights of each parameter tensor are."""

import numpy as np
from numpy.typing import NDArray

from cifarlab.probes.moments_torch import ABS_MAX, ABS_SUM, SQUARE_SUM, SUM

COLUMNS = ("mean", "mean_abs", "max_abs", "norm", "variance")


def weight_flow(weights: NDArray[np.float64], numels: NDArray[np.int64]) -> NDArray[np.float64]:
    """mean w, mean |w|, max |w|, ‖w‖₂ and the (biased) variance of each tensor's weights after the update

    weights: moments (…, P, 6); numels: (P,). Returns (…, P, 5), the order of COLUMNS. The variance is mean w² − (mean w)², so one
    below 1e-15 of mean w² cannot be told from none, and is 0.

    How to read: norms drift slowly, and weight decay holds them. Weights before a batch norm grow without decay, since their
    size has no effect but on the effective learning rate, which falls as 1/‖w‖². A norm that doubles within an epoch is too
    high a learning rate; one that falls to nothing too much decay. A variance that goes to 0 is a layer whose units become alike.

    Source: effective learning rate, van Laarhoven 2017, arXiv:1706.05350.
    """
    mean, mean_square = weights[..., SUM] / numels, weights[..., SQUARE_SUM] / numels
    with np.errstate(invalid="ignore"):  # Inf − Inf
        variance = mean_square - mean**2
    variance = np.where(variance < 1e-15 * mean_square, 0, variance)
    size = [weights[..., ABS_SUM] / numels, weights[..., ABS_MAX], np.sqrt(weights[..., SQUARE_SUM])]
    return np.stack([mean, *size, variance], axis=-1)
