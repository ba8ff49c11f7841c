"""Probes: what happens to gradients, weights and updates while a network trains. One quantity a file.

The cheap three measure every step; the others at an interval, for they cost passes of their own. No probe changes a number of
the training: weights are bitwise the same with and without.
"""

from dataclasses import dataclass

from cifarlab.config import InputError, did_you_mean


@dataclass(frozen=True)
class Probe:
    """What a probe is called, and when it measures.

    every_step: at each optimizer step, else at an interval. by_default: part of `--probes default`.
    needs_loss: of labels and a loss function too, not of images only.
    """

    summary: str
    every_step: bool = False
    by_default: bool = False
    needs_loss: bool = False


PROBES: dict[str, Probe] = {
    "gradient_flow": Probe("mean |g|, max |g|, ‖g‖₂ before and after clipping, zeros, NaN", every_step=True, by_default=True),
    "weight_flow": Probe("mean, max, ‖w‖₂ and variance of the weights", every_step=True, by_default=True),
    "update_flow": Probe("‖Δw‖₂, ‖Δw‖₂/‖w‖₂ of the true optimizer step", every_step=True, by_default=True),
    "activations": Probe("mean, std, dead and saturated share of each activation function", by_default=True),
    "batch_norm": Probe("running statistics against those of a batch", by_default=True),
    "distributions": Probe("weights, gradients and updates by powers of two", by_default=True),
    "curvature": Probe("largest Hessian eigenvalue against 2/lr", needs_loss=True),
    "noise": Probe("gradient noise scale, cosine between successive gradients", needs_loss=True),
}


def choose_probes(wanted: str) -> frozenset[str]:
    """The names meant by `none`, `default`, `all` or a comma-separated list (`default,curvature`).

    Raises InputError for a name that is no probe.
    """
    chosen: set[str] = set()
    for name in filter(None, (part.strip().replace("-", "_") for part in wanted.split(","))):
        if name in ("all", "default"):
            chosen |= {key for key, probe in PROBES.items() if name == "all" or probe.by_default}
        elif name in PROBES:
            chosen.add(name)
        elif name != "none":
            known = ("none", "default", "all", *PROBES)
            raise InputError(f"probes={wanted!r} cannot be used: there is no probe {name!r}{did_you_mean(name, known)}; "
                             f"choose from {', '.join(known)}")  # fmt: skip
    return frozenset(chosen)
