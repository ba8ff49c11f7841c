"""Rules on losses: stalled, spiking, overfitting."""

import math

import numpy as np

from cifarlab.diagnosis.evidence import WINDOW, Evidence
from cifarlab.diagnosis.finding import Finding


def stalled(e: Evidence) -> Finding | None:
    """The training loss has not fallen since the beginning, at a learning rate that is not low.

    Found after 200 steps where the mean of the last hundred is above 98 % of the first twenty's, or of chance level.
    """
    losses, first = e.values("train/loss"), e.values("train/loss", e.beginning)
    lr = e.values("lr")
    if e.step < 2 * WINDOW or len(losses) < WINDOW or not np.isfinite(losses).all() or not np.isfinite(first).all():
        return None
    start = min(first.mean(), math.log(e.facts.num_classes)) if e.facts.num_classes > 1 else first.mean()
    if losses.mean() < 0.98 * start or (len(lr) and lr.min() < 0.1 * e.peak_lr):
        return None
    chance = f", chance level is {math.log(e.facts.num_classes):.3f}" if e.facts.num_classes > 1 else ""
    return Finding(
        evidence=f"the training loss is {losses.mean():.3f} over the last {WINDOW} steps and was {first.mean():.3f} at first{chance}",
        cause="nothing is learned: a learning rate far too low or too high, labels that do not belong to their images, or inputs that "
        "are not normalised",
        remedy="try learning rates ten times higher and lower, look at a batch with its labels, and see whether 100 images can be learned "
        "by heart",
        reference="Karpathy 2019, A recipe for training neural networks",
    )


def loss_spike(e: Evidence) -> Finding | None:
    """The training loss jumps to several times what it was, and comes back."""
    losses = e.values("train/loss")
    if len(losses) < 60 or not np.isfinite(losses).all():
        return None
    steps = e.values("step", [row for row in e.rows if "train/loss" in row])
    for k in range(40, len(losses) - 5):
        before, after = losses[k - 40 : k], losses[k + 1 : k + 6]
        middle = np.median(before)
        spread = np.median(np.abs(before - middle))
        if losses[k] > max(3 * middle, middle + 20 * spread, middle + 0.5) and np.median(after) < losses[k]:
            lr = e.values("lr")
            return Finding(
                step=int(steps[k]),
                evidence=f"the loss jumped from {middle:.3g} to {losses[k]:.3g} in one step",
                cause=f"one step went too far (learning rate {lr[min(k, len(lr) - 1)]:.3g})" if len(lr) else "one step went too far",
                remedy="clip the gradient's norm a little above its usual value, lower the learning rate, or with Adam lower beta2 to 0.95; "
                "look at that batch's images and labels",
                reference="Wortsman et al. 2023, arXiv:2309.14322",
            )
    return None


def overfitting(e: Evidence) -> Finding | None:
    """The loss on held-out images rises while that on training images falls.

    Found where the held-out loss has been more than 10 % above its minimum in three evaluations running, and the training loss has
    fallen by 10 % since that minimum.
    """
    for split in ("val", "test"):
        rows = [row for row in e.evaluations if f"{split}/loss" in row]
        if len(rows) < 4:
            continue
        held = e.values(f"{split}/loss", rows)
        best = int(np.nanargmin(held)) if np.isfinite(held).any() else len(held)
        train_key = next((key for key in ("clean/loss", "train_epoch/loss") if key in rows[-1]), None)
        if train_key is None or best > len(held) - 4 or not (held[-3:] > 1.1 * held[best]).all():
            continue
        train = e.values(train_key, rows)
        if len(train) != len(held) or not train[-1] < 0.9 * train[best]:
            continue
        return Finding(
            step=int(rows[best]["step"]),
            evidence=f"{split} loss was lowest at epoch {rows[best]['epoch']:.3g} ({held[best]:.3f}) and is {held[-1]:.3f} now, while the "
            f"training loss fell from {train[best]:.3f} to {train[-1]:.3f}",
            cause="the network learns its training images by heart",
            remedy="augment more (crop, flip, cutout, MixUp), decay weights more, smooth labels, or stop earlier; a loss that rises while "
            "accuracy does not fall is over-confidence, which label smoothing cures",
            reference="Zhang et al. 2016, arXiv:1611.03530",
        )
    return None
