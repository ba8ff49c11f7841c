"""How far each optimizer step moves each parameter tensor."""

import numpy as np
from numpy.typing import NDArray

from cifarlab.probes.moments_torch import SQUARE_SUM
from cifarlab.probes.weight_flow import weight_flow

COLUMNS = ("norm", "ratio", "mean", "mean_abs", "max_abs", "variance")


def update_flow(updates: NDArray[np.float64], weights: NDArray[np.float64], numels: NDArray[np.int64]) -> NDArray[np.float64]:
    """‖Δw‖₂, ‖Δw‖₂/‖w‖₂, mean Δw, mean |Δw|, max |Δw| and the variance of Δw of each tensor

    updates, weights: moments (…, P, 6) of Δw = w after − w before the step, and of w after it; numels: (P,). Returns (…, P, 6),
    the order of COLUMNS. Δw is what the weights really moved by, whatever made them: momentum, weight decay, adaptive
    denominators, orthogonalisation. Where a tensor is all zeros, the ratio is Inf, or NaN if it did not move.

    How to read: ratios of weight matrices around 1e-3 are healthy, 1e-4 to 1e-2 usual (more in the first steps, less as
    the learning rate falls). Above 0.1 a layer is rewritten every ten steps: lower the learning rate. Below 1e-5 with a learning
    rate that has not fallen it hardly learns. Exactly 0: frozen, or without gradient. A mean as large as the mean size is a
    tensor pushed one way as a whole, as weight decay and biases do. Batch norm's parameters and biases begin at 0 or move
    little: judge the matrices.

    Source: the rule of thumb of 1e-3 is common teaching (Karpathy, CS231n notes); measured here on the weights themselves.
    """
    mean, mean_abs, max_abs, norm, variance = np.moveaxis(weight_flow(updates, numels), -1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = norm / np.sqrt(weights[..., SQUARE_SUM])
    return np.stack([norm, ratio, mean, mean_abs, max_abs, variance], axis=-1)
