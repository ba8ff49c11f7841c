"""The rule on curvature: a learning rate above the edge of stability."""

import numpy as np

from cifarlab.diagnosis.evidence import Evidence
from cifarlab.diagnosis.finding import Finding


def unstable_lr(e: Evidence) -> Finding | None:
    """The sharpness of the loss stays more than 1.5 times above what the optimizer can stand, in two measurements after step 50.

    At first steps sharpness above the edge is usual, and falls as soon as the steps it repels have moved the weights elsewhere.
    """
    steps, share = e.steps("curvature"), e.column("curvature", "edge_share")
    late = steps > 50
    if late.sum() < 2:
        return None
    last = share[late][-2:, 0]
    if not (last > 1.5).all():
        return None
    sharpness, edge = (e.column("curvature", name)[late][-1, 0] for name in ("sharpness", "edge"))
    lr = e.values("lr")
    return Finding(
        evidence=f"sharpness is {last[-1]:.2g} times the edge of stability ({sharpness:.3g} against {edge:.3g})"
        + (f" at a learning rate of {lr[-1]:.3g}" if len(lr) else ""),
        cause="along the sharpest direction every step overshoots further than the one before",
        remedy=f"lower the learning rate by a factor of {np.ceil(last[-1]):.0f} or more, or warm it up so that flatter regions are found",
        reference="Cohen et al. 2021, arXiv:2103.00065; for Adam arXiv:2207.14484",
    )
