"""What several seeds allow one to say: intervals, comparisons in pairs, corrections for many of them, and which setting matters.

Accuracies in, accuracies out (fractions 0…1, or any unit). scipy is imported where it is used.

Seeds are the unit of chance: a difference smaller than what other seeds alone would make is none (Jordan 2023,
arXiv:2304.01910; Summers and Dinneen 2021, arXiv:2103.04514).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean with its interval; low and high are nan for a single value, about whose chance nothing can be said."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def half(self) -> float:
        return (self.high - self.low) / 2


def mean_interval(values: ArrayLike, level: float = LEVEL) -> Interval:
    """mean ± t · s/√n, t the quantile of Student's distribution with n − 1 degrees; entries that are nan are left out.

    Source: Student 1908, Biometrika 6. It supposes values that are about normal over seeds.
    """
    from scipy.stats import t

    array = np.asarray(values, dtype=float)
    array = array[np.isfinite(array)]
    n = len(array)
    if n < 2:
        return Interval(float(array[0]) if n else math.nan, math.nan, math.nan, n)
    mean, half = float(array.mean()), float(t.ppf((1 + level) / 2, n - 1) * array.std(ddof=1) / math.sqrt(n))
    return Interval(mean, mean - half, mean + half, n)


@dataclass(frozen=True)
class Comparison:
    """Two arms by their common seeds: mean of a − b with its interval, p of a paired t test, effect size.

    p is nan with fewer than two pairs, effect with fewer than three. adjusted: p after Holm's correction. effect: Cohen's d of
    the pairs (mean / standard deviation of the differences) with Hedges' correction for few pairs; 0.2 is small, 0.5 middling,
    0.8 large, and it is infinite where every seed gives the very same difference. Of two pairs no d can be estimated: the
    correction, whose exact value is Γ(½(n − 1)) / (√(½(n − 1)) Γ(½(n − 2))), is zero there.
    """

    difference: Interval
    p: float
    effect: float
    adjusted: float = math.nan

    @property
    def is_shown(self) -> bool:
        """Whether a difference was shown at 5 %, after the correction."""
        return self.adjusted < 1 - LEVEL


def compare_pairs(a: ArrayLike, b: ArrayLike) -> Comparison:
    """a against b, one value a seed in the same order; pairs in which either is nan (diverged) are left out.

    Where every pair gives the very same difference, which is common since accuracies are counts of few images, t is not
    defined; p is then of the sign test, 2^(1 − n): two seeds that differ by the same one image show nothing.

    Source: paired t test, Student 1908; Hedges 1981 (J = 1 − 3/(4 (n − 1) − 1)).
    """
    from scipy.stats import t

    differences = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    differences = differences[np.isfinite(differences)]
    interval, n = mean_interval(differences), len(differences)
    if n < 2:
        return Comparison(interval, math.nan, math.nan)
    spread = differences.std(ddof=1)
    if spread < 1e-12:  # rounding
        same = abs(interval.mean) < 1e-12
        effect = 0.0 if same else math.copysign(math.inf, interval.mean)
        return Comparison(interval, 1.0 if same else 2.0 ** (1 - n), effect if n > 2 else math.nan)
    p = 2 * float(t.sf(abs(interval.mean) / (spread / math.sqrt(n)), n - 1))
    correction = 1 - 3 / (4 * (n - 1) - 1) if n > 2 else math.nan
    return Comparison(interval, p, correction * interval.mean / float(spread))


def holm(p: Sequence[float]) -> list[float]:
    """p values adjusted so that the chance of even one false alarm among all of them stays at the level; nan stays nan.

    Source: Holm 1979, Scandinavian Journal of Statistics 6: the k-th smallest of m times m − k + 1, and never falling.
    """
    known = [k for k in range(len(p)) if not math.isnan(p[k])]
    adjusted, highest = [math.nan] * len(p), 0.0
    for rank, k in enumerate(sorted(known, key=lambda k: p[k])):
        highest = max(highest, min(1.0, (len(known) - rank) * p[k]))
        adjusted[k] = highest
    return adjusted


def compare_with_base(values: Mapping[str, ArrayLike], base: str) -> dict[str, Comparison]:
    """Every arm but the base against it, corrected for their number."""
    from dataclasses import replace

    found = {name: compare_pairs(each, values[base]) for name, each in values.items() if name != base}
    adjusted = holm([comparison.p for comparison in found.values()])
    return {name: replace(found[name], adjusted=p) for name, p in zip(found, adjusted, strict=True)}


@dataclass(frozen=True)
class Importance:
    """How much of the differences between trainings one setting explains: its share (0…1), an interval, and p of no effect."""

    share: float
    low: float
    high: float
    p: float


def variance_shares(
    settings: Mapping[str, Sequence[object]], values: ArrayLike, *, resamples: int = 1000, seed: int = 0
) -> tuple[dict[str, Importance], float]:
    """(η² of each setting's main effect, share left to interactions of settings): an analysis of variance of a grid.

    settings: name -> the setting of each training; values: their accuracies, nan where there is none (left out). η² is the
    sum of squares that is lost when the setting is left out of a linear model of main effects (type II; in a full grid that is
    the variance of its level means), over the total; p is of its F test against what the model leaves unexplained. The interval
    is the middle 95 % over resamples in which every cell of the grid draws its own trainings again, with replacement, as far from
    the cell's mean as √(n/(n − 1)) makes them, or two or three would vary too little in the resamples; with one
    training a cell (one seed) nothing can be drawn and it is nan.

    How far from additive: the second result is the share that the cells' means explain beyond the main effects.

    Source: Fisher 1925; Hutter, Hoos and Leyton-Brown 2014 (functional ANOVA) for reading shares of variance as importance.
    """
    from scipy.stats import f as f_distribution

    array = np.asarray(values, dtype=float)
    kept = np.isfinite(array)
    array = array[kept]
    codes = {name: np.unique([str(x) for x, k in zip(each, kept, strict=True) if k], return_inverse=True)[1]
             for name, each in settings.items()}  # fmt: skip
    codes = {name: code for name, code in codes.items() if len(code) and code.max() > 0}
    cells = np.unique(np.array(list(codes.values())), axis=1, return_inverse=True)[1].ravel() if codes else np.zeros(0, int)

    def squares(values: NDArray[np.float64]) -> tuple[dict[str, float], float, float, float, int]:
        total = float(((values - values.mean()) ** 2).sum())
        full, rank = _residual(codes, values)
        main = {name: _residual({other: c for other, c in codes.items() if other != name}, values)[0] - full for name in codes}
        within = sum(float(((values[cells == cell] - values[cells == cell].mean()) ** 2).sum()) for cell in np.unique(cells))
        return main, total, full, within, rank

    if len(array) < 3 or not codes or np.ptp(array) == 0:
        return {name: Importance(math.nan, math.nan, math.nan, math.nan) for name in codes}, math.nan
    main, total, full, within, rank = squares(array)
    free = len(array) - rank
    rng, drawn = np.random.default_rng(seed), []
    members = [np.flatnonzero(cells == cell) for cell in np.unique(cells)]
    if max(len(cell) for cell in members) > 1:
        for _ in range(resamples):
            again = array.copy()
            for cell in members:
                mean, n = array[cell].mean(), len(cell)
                again[cell] = mean + math.sqrt(n / max(n - 1, 1)) * (array[rng.choice(cell, n)] - mean)
            if np.ptp(again) > 0:
                resampled, total_again, *_ = squares(again)
                drawn.append([resampled[name] / total_again for name in codes])
    bounds = np.quantile(np.array(drawn), [0.025, 0.975], axis=0) if drawn else np.full((2, len(codes)), math.nan)
    found = {}
    for k, (name, code) in enumerate(codes.items()):
        degrees = int(code.max())
        ratio = math.nan if free <= 0 else main[name] / degrees / max(full / free, 1e-12 * total)
        p = float(f_distribution.sf(ratio, degrees, free)) if not math.isnan(ratio) else math.nan
        found[name] = Importance(main[name] / total, float(bounds[0, k]), float(bounds[1, k]), p)
    return found, max(0.0, (full - within) / total)


def _residual(codes: Mapping[str, NDArray[np.intp]], values: NDArray[np.float64]) -> tuple[float, int]:
    """(sum of squares that main effects of these settings leave, rank of the model)."""
    columns = [np.ones(len(values))]
    for code in codes.values():
        columns += [(code == level).astype(float) for level in range(1, int(code.max()) + 1)]
    design = np.stack(columns, axis=1)
    fitted, _, rank, _ = np.linalg.lstsq(design, values, rcond=None)
    return float(((values - design @ fitted) ** 2).sum()), int(rank)


def permutation_shares(
    settings: Mapping[str, ArrayLike], values: ArrayLike, *, resamples: int = 30, seed: int = 0
) -> dict[str, Importance]:
    """How much worse a forest of regression trees guesses the accuracy when one setting is shuffled, as shares of their sum.

    For searches, whose points lie anywhere: settings: name -> numbers (0 where it is off). The interval is the middle 95 %
    over resamples of the trainings with replacement; p is nan. Trees split by order, so the scale of a setting does not matter.
    All is nan with fewer than eight trainings, and where the forest tells the trainings that a tree has not seen no better than
    their mean would (R² out of bag): shares of a fit to noise add up to one as well.

    Source: Breiman 2001, Machine Learning 45.
    """
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.inspection import permutation_importance

    names, array = list(settings), np.asarray(values, dtype=float)
    points = np.stack([np.asarray(settings[name], dtype=float) for name in names], axis=1)
    kept = np.isfinite(array)
    points, array = points[kept], array[kept]
    unknown = {name: Importance(math.nan, math.nan, math.nan, math.nan) for name in names}
    if len(array) < 8 or np.ptp(array) == 0:
        return unknown
    if RandomForestRegressor(200, min_samples_leaf=2, random_state=seed, oob_score=True).fit(points, array).oob_score_ <= 0:
        return unknown

    def shares(rows: NDArray[np.intp], state: int) -> NDArray[np.float64]:
        forest = RandomForestRegressor(60, min_samples_leaf=2, random_state=state).fit(points[rows], array[rows])
        drops = permutation_importance(forest, points[rows], array[rows], n_repeats=5, random_state=state).importances_mean
        drops = np.maximum(np.asarray(drops, dtype=float), 0)
        return drops / drops.sum() if drops.sum() > 0 else np.full(len(names), 1 / len(names))

    rng = np.random.default_rng(seed)
    whole = shares(np.arange(len(array)), seed)
    drawn = np.array([shares(rng.integers(0, len(array), len(array)), seed + 1 + k) for k in range(resamples)])
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    return {name: Importance(float(whole[k]), float(low[k]), float(high[k]), math.nan) for k, name in enumerate(names)}
