"""Several runs side by side: which settings differ, and whether the difference of their accuracies is more than chance.

Two kinds of chance, and two answers: over images (the same test images, each right or wrong in either run), which says whether
these two networks differ; and over seeds, which says whether these two settings do.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from cifarlab.config import InputError
from cifarlab.evaluate import Evaluation, load_evaluation
from cifarlab.figures.style import plain_text
from cifarlab.listing import compare_runs
from cifarlab.report.facts import interval
from cifarlab.runs import Run
from cifarlab.statistics import LEVEL, Comparison, compare_pairs, holm


@dataclass(frozen=True)
class ImagePairs:
    """Two networks on the same test images. difference: accuracy of b − that of a, with its 95 % interval; p: McNemar's exact.

    only_a, only_b: images that only this one has right. adjusted: p after Holm's correction for several comparisons.
    """

    num_images: int
    both: int
    only_a: int
    only_b: int
    neither: int
    low: float
    high: float
    p: float
    adjusted: float = math.nan

    @property
    def difference(self) -> float:
        return (self.only_b - self.only_a) / self.num_images

    @property
    def is_shown(self) -> bool:
        """Whether a difference was shown at 5 %, after the correction where there was one."""
        return (self.p if math.isnan(self.adjusted) else self.adjusted) < 1 - LEVEL


def compare_images(a: Evaluation, b: Evaluation) -> ImagePairs:
    """b against a over the images of one split.

    Source: exact test of McNemar 1947 (Psychometrika 12): of the images on which they disagree, a half would fall to each;
    interval for a difference of paired shares by Newcombe 1998 (Statistics in Medicine 17, method 10), which holds its level
    also where hardly an image differs. Both take the networks as they are: other seeds are another kind of chance.
    Raises InputError where they were not evaluated on the same images.
    """
    same = a.split == b.split and np.array_equal(a.labels, b.labels) and np.array_equal(a.indices, b.indices)
    if not same:
        raise InputError(f"{len(a.labels):,} {a.split} images and {len(b.labels):,} {b.split} images are not the same ones: "
                         "compare runs on the same data")  # fmt: skip
    from scipy.stats import binomtest

    right_a, right_b = a.predicted == a.labels, b.predicted == b.labels
    both, only_a, only_b = (int(which.sum()) for which in (right_a & right_b, right_a & ~right_b, right_b & ~right_a))
    neither = len(a.labels) - both - only_a - only_b
    p = float(binomtest(only_b, only_a + only_b).pvalue) if only_a + only_b else 1.0
    return ImagePairs(len(a.labels), both, only_a, only_b, neither, *paired_interval(both, only_a, only_b, neither), p)


def paired_interval(both: int, only_a: int, only_b: int, neither: int) -> tuple[float, float]:
    """Newcombe's 95 % interval (method 10) for the share of b − the share of a, from counts of pairs."""
    n = both + only_a + only_b + neither
    right_a, right_b = both + only_a, both + only_b
    p_a, p_b = right_a / n, right_b / n
    (low_a, high_a), (low_b, high_b) = interval(right_a, n), interval(right_b, n)
    margins = right_a * (n - right_a) * right_b * (n - right_b)
    product = float(both * neither - only_a * only_b)
    if product > 0:
        product = max(product - n / 2, 0.0)  # his correction for continuity
    phi = product / math.sqrt(margins) if margins else 0.0
    below = (p_b - low_b) ** 2 - 2 * phi * (p_b - low_b) * (high_a - p_a) + (high_a - p_a) ** 2
    above = (high_b - p_b) ** 2 - 2 * phi * (high_b - p_b) * (p_a - low_a) + (p_a - low_a) ** 2
    return p_b - p_a - math.sqrt(max(below, 0.0)), p_b - p_a + math.sqrt(max(above, 0.0))


@dataclass(frozen=True)
class RunPair:
    """A run against the first; pairs is None where their images cannot be compared, and why_not says why."""

    first: str
    other: str
    pairs: ImagePairs | None
    why_not: str = ""

    @property
    def sentence(self) -> str:
        if self.pairs is None:
            return f"{self.other} cannot be compared with {self.first} image by image: {self.why_not}."
        p = self.pairs
        if p.difference == 0:
            told = f"{self.other} and {self.first} have as many images right"
        else:
            told = (f"{self.other} has {100 * abs(p.difference):.2f} points {'more' if p.difference > 0 else 'fewer'} of the "
                    "images "
                    f"right than {self.first}")  # fmt: skip
        verdict = "a difference is shown for these two networks" if p.is_shown else "no difference is shown"
        of = " after Holm's correction" if not math.isnan(p.adjusted) else ""
        return (f"{told} (95 % interval {100 * p.low:+.2f} to {100 * p.high:+.2f}; {p.only_b:,} only it has right, {p.only_a:,} "
                f"only the other; McNemar p = {p.p if not of else p.adjusted:.2g}{of}): {verdict}.")  # fmt: skip


@dataclass(frozen=True)
class SeedPair:
    """A group of runs of equal settings against the first run's group, by common seeds. first, other: the settings that "
    "differ."""

    first: dict[str, Any]
    other: dict[str, Any]
    seeds: tuple[int, ...]
    comparison: Comparison

    @property
    def sentence(self) -> str:
        d = self.comparison.difference
        names = [" ".join(f"{key}={plain_text(str(value), 60)}" for key, value in side.items())
                 for side in (self.other, self.first)]  # fmt: skip
        verdict = "a difference is shown" if self.comparison.is_shown else "no difference is shown"
        told = f"{names[0]} against {names[1]}: {100 * d.mean:+.2f} points over {d.n} common seeds"
        return (f"{told} (95 % interval {100 * d.low:+.2f} to {100 * d.high:+.2f}; paired t test, "
                f"p = {self.comparison.adjusted:.2g}): {verdict}.")  # fmt: skip


@dataclass(frozen=True)
class SeveralRuns:
    """What can be said of runs side by side. names: theirs, all different.

    settings: those that differ, name -> value of each run (None: not known); results: likewise, all that were measured.
    images: each run against the first; seeds: each group of equal settings with two common seeds or more, against the first's.
    """

    names: tuple[str, ...]
    settings: dict[str, list[Any]]
    results: dict[str, list[Any]]
    images: tuple[RunPair, ...]
    seeds: tuple[SeedPair, ...]


def compare(runs: Sequence[Run]) -> SeveralRuns:
    """These runs side by side, the first the one that others are compared with.

    Raises InputError when there are fewer than two, or a folder is damaged.
    """
    table = compare_runs([run.path for run in runs])
    names = _name_runs([run.path for run in runs])
    images = [_compare_with_first(runs[0], run, names[0], name) for run, name in zip(runs[1:], names[1:], strict=True)]
    if sum(pair.pairs is not None for pair in images) > 1:
        adjusted = iter(holm([pair.pairs.p for pair in images if pair.pairs]))
        images = [replace(pair, pairs=replace(pair.pairs, adjusted=next(adjusted))) if pair.pairs else pair for pair in images]
    return SeveralRuns(tuple(names), table.settings, table.results, tuple(images), tuple(_compare_seeds(runs)))


def _name_runs(paths: Sequence[Path]) -> list[str]:
    """The folders' names; where two are equal, as much of the path before them as tells them apart."""
    whole = [path.resolve().parts for path in paths]
    for depth in range(1, max(map(len, whole)) + 1):
        names = ["/".join(parts[-depth:]) for parts in whole]
        if len(set(names)) == len(set(whole)):
            break
    return [name if name not in names[:k] else f"{name} ({k + 1})" for k, name in enumerate(names)]


def _compare_with_first(first: Run, other: Run, name: str, other_name: str) -> RunPair:
    for run, which in ((first, name), (other, other_name)):
        if run.is_watched or run.result.get("state") != "finished" or not (run.path / "predictions.npz").exists():
            return RunPair(name, other_name, None, f"{which} has no evaluation of a finished training")
    if first.dataset["fingerprint"] != other.dataset["fingerprint"]:
        return RunPair(name, other_name, None, "they were trained and tested on different data")
    try:
        return RunPair(name, other_name, compare_images(load_evaluation(first.path)[0], load_evaluation(other.path)[0]))
    except InputError as error:
        return RunPair(name, other_name, None, str(error))


def _compare_seeds(runs: Sequence[Run]) -> list[SeedPair]:
    groups: dict[str, dict[int, float]] = {}
    values: dict[str, dict[str, Any]] = {}
    data: dict[str, str] = {}
    for run in runs:
        if run.is_watched or run.result.get("state") != "finished":
            continue
        compared = {f.name: getattr(run.config, f.name) for f in fields(run.config) if f.compare and f.name != "seed"}
        key = json.dumps([compared, run.dataset["fingerprint"]], sort_keys=True)
        values[key], data[key] = compared, run.dataset["fingerprint"]
        groups.setdefault(key, {}).setdefault(run.config.seed, float(run.result.get("test/accuracy", math.nan)))
    if len(groups) < 2:
        return []
    (first, base), *others = groups.items()
    found = []
    for key, group in others:
        seeds = tuple(sorted(base.keys() & group.keys()))
        if len(seeds) < 2 or data[key] != data[first]:
            continue
        differing = [name for name in values[key] if values[key][name] != values[first][name]]
        sides = [{name: values[each][name] for name in differing} for each in (first, key)]
        comparison = compare_pairs([group[s] for s in seeds], [base[s] for s in seeds])
        found.append(SeedPair(sides[0], sides[1], seeds, comparison))
    adjusted = holm([pair.comparison.p for pair in found])
    return [replace(pair, comparison=replace(pair.comparison, adjusted=p)) for pair, p in zip(found, adjusted, strict=True)]
