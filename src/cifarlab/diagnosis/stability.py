"""The rule on curvature: a learning rate above the edge of stability."""

import numpy as np

from cifarlab.diagnosis.evidence import WINDOW, Evidence
from cifarlab.diagnosis.finding import Finding

UNSTABLE = 3.0  # times the edge. Softmax regression at its edge, measured on half of the images that it is trained on, has 2.0


def unstable_lr(e: Evidence) -> Finding | None:
    """The sharpness of the loss stays above three times what the optimizer can stand, in two measurements after step 100.

    At first steps Adam's denominators are nearly zero for weights that have had no gradient yet: SimpleCNN, learning well, had
    9,481 times the edge at step 20 and 0.03 at step 40. With any optimizer, sharpness above the edge is usual at first, and falls
    as soon as the steps that it repels have moved the weights elsewhere.
    """
    steps, share = e.steps("curvature"), e.column("curvature", "edge_share")
    late = steps > WINDOW
    if late.sum() < 2:
        return None
    last = share[late][-2:, 0]
    if not (last > UNSTABLE).all():
        return None
    sharpness, own, edge = (e.column("curvature", name)[late][-1, 0] for name in ("sharpness", "preconditioned", "edge"))
    felt, value = ("preconditioned sharpness", own) if np.isfinite(own) else ("sharpness", sharpness)
    lr = e.values("lr")
    return Finding(
        evidence=f"{felt} is {last[-1]:.2g} times the edge of stability ({value:.3g} against {edge:.3g})"
        + (f" at a learning rate of {lr[-1]:.3g}" if len(lr) else ""),
        cause="along the sharpest direction every step overshoots further than the one before",
        remedy=f"lower the learning rate by a factor of {np.ceil(last[-1]):.0f} or more, or warm it up so that flatter regions "
        "are found",
        reference="Cohen et al. 2021, arXiv:2103.00065; for Adam arXiv:2207.14484",
    )
