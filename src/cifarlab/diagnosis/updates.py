"""Rules on updates: too large, too small, none at all."""

import numpy as np

from cifarlab.diagnosis.evidence import WINDOW, Evidence
from cifarlab.diagnosis.finding import Finding

TOO_LARGE, TOO_SMALL = 0.1, 1e-6  # of ‖w‖ in one step; 1e-4 … 1e-2 is usual
NOT_LEARNING_STEPS = 20


def update_too_large(e: Evidence) -> Finding | None:
    """A weight matrix is rewritten every few steps: ‖Δw‖ above a tenth of ‖w‖ for a hundred steps."""
    ratio = e.column("update_flow", "ratio")
    if len(ratio) < WINDOW or e.steps("update_flow")[0] <= WINDOW:  # the first steps are allowed to be wild
        return None
    typical = np.quantile(np.where(np.isfinite(ratio), ratio, 0)[:, e.matrices], 0.2, axis=0)
    high = np.flatnonzero(typical > TOO_LARGE)
    if not len(high):
        return None
    worst = high[np.argsort(-typical[high], kind="stable")]
    return Finding(
        layers=tuple(e.name(e.matrices[k]) for k in worst),
        evidence=f"‖Δw‖/‖w‖ stays above {typical[worst[0]]:.2g} at four steps of five over the last {WINDOW} steps; "
        "1e-4 to 1e-2 is usual",
        cause="the learning rate is too high for these weights, or they have become very small",
        remedy="lower the learning rate three- to tenfold, or less weight decay if it is the weights that shrink",
        reference="Karpathy, CS231n notes: ratio of updates to weights about 1e-3",
    )


def update_too_small(e: Evidence) -> Finding | None:
    """Weight matrices hardly move although the learning rate is not low: ‖Δw‖ below a millionth of ‖w‖ for a hundred steps."""
    ratio, lr = e.column("update_flow", "ratio"), e.values("lr")
    if len(ratio) < WINDOW or not len(lr) or lr.min() < 0.1 * e.peak_lr:
        return None
    typical = np.quantile(np.nan_to_num(ratio[:, e.matrices]), 0.8, axis=0)
    low = np.flatnonzero((typical < TOO_SMALL) & (typical > 0))
    if not len(low):
        return None
    worst = low[np.argsort(typical[low], kind="stable")]
    return Finding(
        layers=tuple(e.name(e.matrices[k]) for k in worst),
        evidence=f"‖Δw‖/‖w‖ stays below {typical[worst[0]]:.2g} over the last {WINDOW} steps; 1e-4 to 1e-2 is usual",
        cause="the learning rate is far too low, the clip too tight, or hardly any gradient reaches these layers",
        remedy="raise the learning rate (a range test finds it), loosen the clip, and look at the gradient flow of these layers",
        reference="Karpathy, CS231n notes: ratio of updates to weights about 1e-3",
    )


def not_learning(e: Evidence) -> Finding | None:
    """A parameter tensor has not moved at all for twenty steps while others have."""
    moved = e.column("update_flow", "norm")[-NOT_LEARNING_STEPS:]
    lr = e.values("lr")[-NOT_LEARNING_STEPS:]
    if len(moved) < NOT_LEARNING_STEPS or (len(lr) and lr.min() == 0) or not (moved > 0).any():
        return None
    still = np.flatnonzero(~(moved > 0).any(axis=0) & ~np.isnan(moved).all(axis=0))
    if not len(still):
        return None
    gradients = e.column("gradient_flow", "mean_abs")[-NOT_LEARNING_STEPS:]
    frozen = [k for k in still if not e.facts.parameters[k].trainable]
    unused = [k for k in still if gradients.size and np.isnan(gradients[:, k]).all()]
    if len(frozen) == len(still):
        cause, remedy = "requires_grad is False: frozen", "set requires_grad to True, or leave it if that is meant"
        layers = frozen
    elif len(unused) + len(frozen) == len(still):
        cause = "no gradient reaches them: the forward pass does not use them, or detaches what they make"
        remedy = "use them in the loss, remove a detach or no_grad, or leave them out of the model"
        layers = list(still)
    elif gradients.size and not np.nan_to_num(gradients[:, still]).any():
        cause = "their gradient is exactly zero: the units behind them are dead, masked or multiplied by zero"
        remedy = "look at the activations behind them, at biases and at masks"
        layers = list(still)
    else:
        cause = "they have a gradient but no optimizer moves them: not among its parameters, or learning rate 0 in their group"
        remedy = "give the optimizer all parameters of the model"
        layers = list(still)
    return Finding(
        layers=tuple(e.name(int(k)) for k in layers),
        evidence=f"{len(still)} of {moved.shape[1]} parameter tensors have not moved in the last {NOT_LEARNING_STEPS} steps",
        cause=cause, remedy=remedy, reference="Goodfellow et al. 2016, Deep Learning, chapter 8",
    )  # fmt: skip


def zero_weights(e: Evidence) -> Finding | None:
    """A weight matrix has been all zeros for twenty steps, and blocks what is before and behind it."""
    largest = e.column("weight_flow", "max_abs")[-NOT_LEARNING_STEPS:]
    if len(largest) < NOT_LEARNING_STEPS:
        return None
    zero = e.matrices[(largest[:, e.matrices] == 0).all(axis=0)]
    if not len(zero):
        return None
    return Finding(
        layers=tuple(e.name(k) for k in zero),
        evidence=f"{e.name(zero[0])} is zero in every entry, and has not changed in {NOT_LEARNING_STEPS} steps",
        cause="a layer whose weights are all zero passes nothing forward and no gradient back, so it stays as it is",
        remedy="initialise it at random; only the last layer of a network or of a residual branch may begin at zero",
        reference="symmetry of equal weights: Goodfellow et al. 2016, Deep Learning, section 8.4",
    )
