"""Rules on losses: stalled, spiking, overfitting."""

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from cifarlab.diagnosis.evidence import WINDOW, Evidence
from cifarlab.diagnosis.finding import Finding


def stalled(e: Evidence) -> Finding | None:
    """The training loss has not fallen since the beginning, at a learning rate that is not low.

    Found after 200 steps where the mean of the last hundred is above 98 % of the first twenty's, or within 2 % of chance level.
    Not of a loss that may be negative: a critic's tells nothing by its size.
    """
    if e.lowest_loss < 0:
        return None
    losses, first = e.values("train/loss"), e.values("train/loss", e.beginning)
    if e.step < 2 * WINDOW or len(losses) < WINDOW or not np.isfinite(losses).all() or not np.isfinite(first).all():
        return None
    now, at_chance = losses.mean(), abs(losses.mean() - e.chance) < 0.02 * e.chance
    if (now < 0.98 * first.mean() and not at_chance) or e.lr_is_low():
        return None
    if e.facts.num_classes > 1 and now < 0.5 * e.chance:
        return None  # begun with weights that knew it all
    chance = f", which is chance level (log K = {e.chance:.3f})" if at_chance else ""
    return Finding(
        evidence=f"the training loss is {now:.3f} over the last {WINDOW} steps{chance}, and was {first.mean():.3f} at first",
        cause="nothing is learned: a learning rate far too low or too high, labels that do not belong to their images, or "
        "inputs that are not normalised",
        remedy="try learning rates ten times higher and lower, look at a batch with its labels, and see whether 100 images can "
        "be learned by heart",
        reference="Karpathy 2019, A recipe for training neural networks",
    )


def loss_spike(e: Evidence) -> Finding | None:
    """The training loss jumps to several times what it was, for two steps of three at least, and comes back.

    A jump is one above 1.5 times the median of the forty steps before, twenty times their spread (median deviation) above it, and
    0.5 above it. One step alone is usual: a batch with a wrong label, where the loss is small.
    """
    losses = e.values("train/loss")
    if len(losses) < 60 or not np.isfinite(losses).all():
        return None
    steps = e.values("step", [row for row in e.rows if "train/loss" in row])
    before, after = sliding_window_view(losses, 40)[: len(losses) - 47], sliding_window_view(losses, 3)[40 : len(losses) - 7]
    # A median is at least the minimum, which costs a tenth of it: where no loss is far above that, there is no jump.
    lows = before.min(axis=1)
    if not (after[:, 0] > np.maximum(1.5 * lows, lows + 0.5)).any():
        return None
    middles, peaks = np.median(before, axis=1), np.median(after, axis=1)  # of step 40 and on, but for the last seven
    spreads = np.median(np.abs(before - middles[:, None]), axis=1)
    limits = np.maximum(np.maximum(1.5 * middles, middles + 20 * spreads), middles + 0.5)
    is_spike = (after[:, 0] > limits) & (peaks > limits) & (np.median(losses[-5:]) < (middles + peaks) / 2)
    if is_spike.any():
        first = int(np.argmax(is_spike))
        k, middle = first + 40, middles[first]
        lr = e.values("lr")
        rate = f" (learning rate {lr[min(k, len(lr) - 1)]:.3g})" if len(lr) else ""
        return Finding(
            step=int(steps[k]),
            evidence=f"the loss jumped from {middle:.3g} to {after[first].max():.3g} within three steps",
            cause=f"a step went too far{rate}, or a batch was broken",
            remedy="clip the gradient's norm a little above its usual value, lower the learning rate, or with Adam lower "
            "beta2 to 0.95; look at that batch's images and labels",
            reference="Wortsman et al. 2023, arXiv:2309.14322",
        )
    return None


def overfitting(e: Evidence) -> Finding | None:
    """The loss on held-out images rises while that on training images falls.

    Found where the held-out loss is more than 10 % above its minimum and the training loss has fallen by 10 % since, both as
    running medians of three evaluations, and the last three held-out losses are all that high.
    """
    for split in ("val", "test"):
        rows = [row for row in e.evaluations if f"{split}/loss" in row]
        train_key = next((key for key in ("clean/loss", "train_epoch/loss") if rows and key in rows[-1]), None)
        if train_key is None or len(rows) < 5:
            continue
        held, train = e.values(f"{split}/loss", rows), e.values(train_key, rows)
        if len(train) != len(held) or not np.isfinite(held).all() or not np.isfinite(train).all():
            continue
        # Single evaluations at a high learning rate jump by a third and more.
        smooth, smooth_train = (np.median(sliding_window_view(v, 3), axis=1) for v in (held, train))
        middle = int(smooth.argmin())
        best = middle + 1  # the evaluation in the middle of those three
        if smooth[middle] <= 0 or smooth_train.min() < 0:
            continue  # of such a loss there is no tenth
        if not (held[-3:] > 1.1 * smooth[middle]).all() or not smooth_train[-1] < 0.9 * smooth_train[middle]:
            continue
        return Finding(
            step=int(rows[best]["step"]),
            evidence=f"{split} loss was lowest around step {rows[best]['step']:,.0f} ({held[best]:.3f}) and is {held[-1]:.3f} "
            f"now, while the training loss fell from {train[best]:.3f} to {train[-1]:.3f}",
            cause="the network learns its training images by heart",
            remedy="augment more (crop, flip, cutout, MixUp), decay weights more, smooth labels, or stop earlier; a loss that "
            "rises while accuracy does not fall is over-confidence, which label smoothing cures",
            reference="Zhang et al. 2016, arXiv:1611.03530",
        )
    return None
