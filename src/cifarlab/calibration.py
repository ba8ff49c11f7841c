"""Whether a model's probabilities mean what they say: of the images it is 80 % sure of, are 80 % right? No torch here."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cifarlab.config import InputError

RESAMPLES = 200  # of what a perfectly calibrated model would show


@dataclass(frozen=True, eq=False)
class Calibration:
    """Confidence (probability of the predicted class) against accuracy, all 0…1 but brier (0…2) and nll.

    ece: Σ_b n_b/N · |accuracy_b − confidence_b| over bins of equal width, mce: the largest of those gaps; ece_equal_mass: the
    same sum over as many bins of equally many images. ece_by_chance: what the ece of a perfectly calibrated model with these
    confidences stays below in 95 of 100 test sets of this size; an ece below it shows nothing. brier: mean of Σ_k (p_k − y_k)²;
    nll: mean of −log p(label).
    edges: (B+1,); counts, confidence, accuracies: (B,), the last two nan in empty bins. A bin holds its upper edge.
    Images with a logit that is not finite have no confidence: num_left_out of them are in no number here.
    """

    num_images: int
    num_left_out: int
    accuracy: float
    mean_confidence: float
    ece: float
    ece_equal_mass: float
    ece_by_chance: float
    mce: float
    brier: float
    nll: float
    edges: NDArray[np.float64]
    counts: NDArray[np.int64]
    confidence: NDArray[np.float64]
    accuracies: NDArray[np.float64]

    @property
    def overconfidence(self) -> float:
        """Mean confidence − accuracy: above 0 the model promises more than it holds."""
        return self.mean_confidence - self.accuracy


def measure_calibration(logits: ArrayLike, labels: ArrayLike, *, num_bins: int = 15) -> Calibration:
    """The calibration of logits (N, K) against labels (N,).

    How to read: with few images or nearly all of them right, an ece of some percent is chance: see ece_by_chance. The mce is that
    of one bin, often of a handful of images.

    Source: Guo et al. 2017 (arXiv:1706.04599) for ece and mce with 15 bins of equal width; bins of equal mass after Nguyen and
    O'Connor 2015 (arXiv:1508.05154), here of the predicted class only; ece_by_chance is the consistency resampling of Bröcker
    and Smith 2007 (Weather and Forecasting 22) with 200 draws; Brier 1950.
    Raises InputError when shapes or labels do not fit.
    """
    values, truth = np.asarray(logits, dtype=np.float64), np.asarray(labels)
    if values.ndim != 2 or truth.shape != values.shape[:1] or num_bins < 1:
        raise InputError(f"logits {values.shape}, labels {truth.shape} and {num_bins} bins do not fit together: "
                         "give (N, K), (N,), and one bin or more")  # fmt: skip
    if len(truth) and not 0 <= truth.min() <= truth.max() < values.shape[1]:
        raise InputError(f"labels {truth.min()}…{truth.max()} do not fit {values.shape[1]} classes")
    kept, num_given = np.isfinite(values).all(axis=1), len(values)
    values, truth = values[kept], truth[kept].astype(np.intp)
    edges, n = np.linspace(0, 1, num_bins + 1), len(truth)
    if not n:
        empty = np.full(num_bins, np.nan)
        nan = math.nan
        return Calibration(
            0, num_given, nan, nan, nan, nan, nan, nan, nan, nan, edges, np.zeros(num_bins, np.int64), empty, empty
        )
    values -= values.max(axis=1, keepdims=True)
    log_p = values - np.log(np.exp(values).sum(axis=1, keepdims=True))
    p, rows = np.exp(log_p), np.arange(n)
    confidence, is_right = p.max(axis=1), p.argmax(axis=1) == truth
    bins = np.searchsorted(edges[1:-1], confidence)
    counts = np.bincount(bins, minlength=num_bins)
    sure, right = (np.bincount(bins, weights=w, minlength=num_bins) for w in (confidence, is_right))
    gaps = np.abs(right - sure)  # n_b times the gap, 0 in an empty bin
    order = np.argsort(confidence, kind="stable")
    groups = np.array_split(order, min(num_bins, n))
    equal_mass = sum(abs(float((confidence[group] - is_right[group]).sum())) for group in groups) / n
    rng = np.random.default_rng(0)
    by_chance = [np.abs(np.bincount(bins, weights=rng.random(n) < confidence, minlength=num_bins) - sure).sum() / n
                 for _ in range(RESAMPLES)]  # fmt: skip
    with np.errstate(invalid="ignore"):
        return Calibration(
            num_images=n, num_left_out=num_given - n, accuracy=float(is_right.mean()),
            mean_confidence=float(confidence.mean()), ece=float(gaps.sum() / n), ece_equal_mass=equal_mass,
            ece_by_chance=float(np.quantile(by_chance, 0.95)), mce=float(np.nanmax(gaps / counts)),
            brier=float((p**2).sum(axis=1).mean() - 2 * p[rows, truth].mean() + 1), nll=float(-log_p[rows, truth].mean()),
            edges=edges, counts=counts, confidence=sure / counts, accuracies=right / counts,
        )  # fmt: skip
