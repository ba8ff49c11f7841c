"""Rules on updates: too large, too small, none at all."""

import numpy as np
from numpy.typing import NDArray

from cifarlab.diagnosis.evidence import FIRST, WINDOW, Array, Evidence
from cifarlab.diagnosis.finding import Finding

TOO_LARGE, TOO_SMALL = 0.1, 1e-6  # of ‖w‖ in one step; 1e-4 … 1e-2 is usual
NOT_LEARNING_STEPS = 20
ENOUGH = 20  # steps of a matrix's own optimizer among those of the window, to speak of it
LEARNED = 0.1  # of the first loss: below it, small gradients are a success
FELT = 1e-3  # of the median matrix's mean |g|: a bias before a batch norm has 1e-6, which is rounding


def update_too_large(e: Evidence) -> Finding | None:
    """A weight matrix is rewritten every few steps: ‖Δw‖ above a tenth of ‖w‖ for a hundred steps."""
    ratio = e.column("update_flow", "ratio")
    if len(ratio) < WINDOW or e.steps("update_flow")[0] <= FIRST:  # the first steps are allowed to be wild
        return None
    if not (ratio > TOO_LARGE).any():
        return None
    typical = _quantile_of_measured(ratio[:, e.matrices], 0.2)
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
    ratio, gradient = e.column("update_flow", "ratio"), e.column("gradient_flow", "mean_abs")
    if len(ratio) < WINDOW or e.lr_is_low() or e.loss_fell_to() < LEARNED:
        return None
    if not (ratio < TOO_SMALL).any():
        return None
    typical = _quantile_of_measured(ratio[:, e.matrices], 0.8)
    # Where gradients are measured, those without one are another rule's.
    pushed = (gradient[:, e.matrices] > 0).any(axis=0) if gradient.shape == ratio.shape else typical > 0
    low = np.flatnonzero((typical < TOO_SMALL) & pushed)
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
    """A parameter tensor has not moved at all for twenty steps while others have.

    It is frozen, and its model does not say that this is meant, or has no gradient at all, or has one that is felt (a thousandth
    of the median matrix's) and is not followed.
    """
    moved = e.column("update_flow", "norm")
    if len(moved) < NOT_LEARNING_STEPS or not (moved[-NOT_LEARNING_STEPS:] > 0).any(axis=1).all():
        return None
    recent = _last_measured(moved, NOT_LEARNING_STEPS)
    going = np.asarray(((moved > 0) | ~recent).all(axis=0) & recent.any(axis=0))
    still = np.asarray(~((moved > 0) & recent).any(axis=0) & recent.any(axis=0))
    still &= np.array([p.trainable or not p.frozen_by_design for p in e.facts.parameters])
    frozen = still & np.array([not p.trainable for p in e.facts.parameters])
    gradients = e.column("gradient_flow", "mean_abs")
    unused = ignored = np.zeros_like(still)
    if still.any() and gradients.shape == moved.shape:
        unused = still & ~frozen & ~(recent & ~np.isnan(gradients)).any(axis=0)
        ratios, matrices = e.column("update_flow", "ratio"), e.matrices[going[e.matrices]]
        # Steps that are lost in rounding (a tiny learning rate) are too small, and not absent.
        if len(matrices) and np.median(ratios[:, matrices][recent[:, matrices]]) > TOO_SMALL:
            usual = np.median(gradients[:, matrices][recent[:, matrices]])
            felt = [np.median(gradients[recent[:, k], k]) if still[k] else 0.0 for k in range(len(still))]
            ignored = still & ~frozen & (np.nan_to_num(felt) > FELT * usual)
    reasons = (
        (unused, "no gradient reaches them: the forward pass does not use them, or detaches what they make",
         "use them in the loss, remove a detach or no_grad, or leave them out of the model"),
        (ignored, "they have a gradient but no optimizer moves them: not among its parameters, or learning rate 0 in their group",
         "give the optimizer all parameters of the model"),
        (frozen, "requires_grad is False: frozen", "set requires_grad to True, or leave it if that is meant"),
    )  # fmt: skip
    reason = next((reason for reason in reasons if reason[0].any()), None)
    if reason is None:
        return None
    which, cause, remedy = reason
    layers = np.flatnonzero(which)
    return Finding(
        layers=tuple(e.name(int(k)) for k in layers),
        evidence=f"{len(layers)} of {moved.shape[1]} parameter tensors have not moved in the last {NOT_LEARNING_STEPS} steps",
        cause=cause, remedy=remedy, reference="Goodfellow et al. 2016, Deep Learning, chapter 8",
    )  # fmt: skip


def zero_weights(e: Evidence) -> Finding | None:
    """A weight matrix has been all zeros for twenty steps, and blocks what is before and behind it."""
    largest = e.column("weight_flow", "max_abs")[:, e.matrices] if e.has("weight_flow") else np.empty((0, 0))
    if len(largest) < NOT_LEARNING_STEPS:
        return None
    recent = _last_measured(largest, NOT_LEARNING_STEPS)
    zero = e.matrices[((largest == 0) | ~recent).all(axis=0) & recent.any(axis=0)]
    if not len(zero):
        return None
    return Finding(
        layers=tuple(e.name(k) for k in zero),
        evidence=f"{e.name(zero[0])} is zero in every entry, and has not changed in {NOT_LEARNING_STEPS} steps",
        cause="a layer whose weights are all zero passes nothing forward and no gradient back, so it stays as it is",
        remedy="initialise it at random; only the last layer of a network or of a residual branch may begin at zero",
        reference="symmetry of equal weights: Goodfellow et al. 2016, Deep Learning, section 8.4",
    )


def _last_measured(values: Array, steps: int) -> NDArray[np.bool_]:
    """Where the last so many measured entries of each column are (NaN: its optimizer did not step); none of one with fewer."""
    if not np.isnan(values[-steps:]).any():
        recent = np.zeros(values.shape, bool)
        recent[-steps:] = True
        return recent
    measured = ~np.isnan(values)
    recent = measured & (measured[::-1].cumsum(axis=0)[::-1] <= steps)
    return np.asarray(recent & (recent.sum(axis=0) == steps))


def _quantile_of_measured(values: Array, q: float) -> Array:
    """Of each column's entries that are finite; NaN of one with fewer than ENOUGH."""
    finite = np.isfinite(values)
    if finite.all():
        return np.asarray(np.quantile(values, q, axis=0))
    return np.array([np.quantile(column[good], q) if good.sum() >= ENOUGH else np.nan
                     for column, good in zip(values.T, finite.T, strict=True)])  # fmt: skip
