"""Rules on activations and batch norm, on a fixed batch: dead units, saturated outputs, drifting statistics."""

import numpy as np

from cifarlab.diagnosis.evidence import Array, Evidence
from cifarlab.diagnosis.finding import Finding

MANY, NEARLY_ALL = 0.75, 0.95  # half of a wide hidden layer is often silent in a net that learns well (512 units, ten digits)


def dead_units(e: Evidence) -> Finding | None:
    """Three of four units of a layer are never positive in two measurements running, or 19 of 20 in one."""
    found = _over(e, "dead_share")
    if found is None:
        return None
    layers, shares = found
    return Finding(
        layers=layers,
        evidence=f"{100 * shares[0]:.0f} % of the units after {layers[0]} are zero for every image of the fixed batch"
        + (f", and many in {len(layers) - 1} more layers" if len(layers) > 1 else ""),
        cause="their input is always negative, so they pass no gradient and cannot recover: a large negative bias or shift, or a "
        "step that was too long",
        remedy="initialise biases at 0, lower the learning rate or warm it up, put batch norm before the function, or use a "
        "leaky one",
        reference="Lu et al. 2019, arXiv:1903.06733",
    )


def saturated(e: Evidence) -> Finding | None:
    """Three of four outputs of a layer sit at a limit of their function in two measurements running, or 19 of 20 in one.

    Only while the loss has not fallen.
    """
    found = _over(e, "saturated_share")
    # Units of a net that has learned are sure of themselves: two layers of sigmoids, trained to a loss of 0.3, had 0.8 saturated.
    if found is None or e.loss_fell_to() < 0.7:
        return None
    layers, shares = found
    return Finding(
        layers=layers,
        evidence=f"{100 * shares[0]:.0f} % of the outputs of {layers[0]} are within 2 % of its limits",
        cause="the inputs of a bounded function (sigmoid, tanh) are so large that its slope is nearly zero",
        remedy="smaller initial weights, normalisation before the function, a lower learning rate, or a function without limits",
        reference="Glorot & Bengio 2010",
    )


def norm_drift(e: Evidence) -> Finding | None:
    """Batch norm's running statistics stay far from a batch's own, so evaluation sees another network than training."""
    steps = e.steps("batch_norm")
    if len(steps) < 2 or steps[-2] < 100:  # the averages of the first steps still remember their start
        return None
    shift, ratio = e.column("batch_norm", "mean_shift")[-2:], e.column("batch_norm", "variance_ratio")[-2:]
    with np.errstate(divide="ignore", invalid="ignore"):
        far = np.maximum(shift / 1.0, np.abs(np.log(ratio)) / np.log(4.0)).min(axis=0)
    bad = np.flatnonzero(far > 1)
    if not len(bad):
        return None
    worst = bad[np.argsort(-far[bad], kind="stable")]
    names = e.items("batch_norm")
    k = worst[0]
    return Finding(
        layers=tuple(names[k] for k in worst),
        evidence=f"{names[k]}: the running mean is {shift[-1, k]:.2g} standard deviations from a batch's, the running variance "
        f"{ratio[-1, k]:.2g} times a batch's, in two measurements running",
        cause="weights move faster than the running averages follow, batches are too small, or momentum of the norm too low",
        remedy="lower the learning rate, use larger batches or a larger batch-norm momentum, or measure the statistics anew "
        "before evaluating (--ema-decay does)",
        reference="Ioffe 2017, arXiv:1702.03275",
    )


def _over(e: Evidence, column: str) -> tuple[tuple[str, ...], Array] | None:
    """(layers, shares), worst first, of the layers where the share is NEARLY_ALL now, or MANY now and the time before."""
    shares = e.column("activations", column)
    if not shares.size:
        return None
    now, before = shares[-1], shares[-2] if len(shares) > 1 else np.zeros(shares.shape[1])
    bad = np.flatnonzero((now >= NEARLY_ALL) | ((now >= MANY) & (before >= MANY)))
    if not len(bad):
        return None
    worst = bad[np.argsort(-now[bad], kind="stable")]
    return tuple(e.items("activations")[k] for k in worst), now[worst]
