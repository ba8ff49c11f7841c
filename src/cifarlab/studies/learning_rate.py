"""Study 1: which learning rates train this network well."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from cifarlab.config import TrainConfig
from cifarlab.statistics import mean_interval
from cifarlab.studies.comparison import draw_accuracy, draw_curves, rank, table, tell_best, tell_comparisons
from cifarlab.studies.study import Arm, Results, Study

RATES = (0.1, 0.01, 0.001, 0.0001)
NEAR = 0.01  # a rate is good when its mean accuracy is at most this below the best: one point


def plan(base: TrainConfig, values: Mapping[str, list[Any]]) -> list[Arm]:
    """One arm a rate, the base's own too; the rest is as in the base, whose schedule has this rate as its peak."""
    rates = values.get("lr", sorted({*RATES, base.lr}, reverse=True))
    return [Arm(name=f"lr {rate:g}", changes={"lr": rate}, is_base=rate == base.lr) for rate in rates]


def draw(results: Results) -> dict[str, Any]:
    by_rate = sorted(results.arms, key=lambda arm: -arm.changes["lr"])
    return {
        "validation-curves": draw_curves(results, "Validation accuracy by learning rate", by_rate[:8]),
        "accuracy": draw_accuracy(results, "Accuracy by learning rate"),
    }


def good_rates(results: Results) -> list[float]:
    """Rates of which no run diverged or failed and whose mean validation accuracy is within a point of the best, ascending."""
    means = {arm.changes["lr"]: mean_interval(results.values(arm)).mean for arm in results.arms
             if len(results.runs(arm)) == len(results.of(arm)) > 0}  # fmt: skip
    means = {rate: mean for rate, mean in means.items() if np.isfinite(mean)}
    return sorted(rate for rate, mean in means.items() if mean >= max(means.values()) - NEAR)


def conclude(results: Results) -> str:
    good, told = good_rates(results), [tell_best(results)]
    rates = sorted(arm.changes["lr"] for arm in results.arms)
    if good:
        between = [rate for rate in rates if good[0] < rate < good[-1] and rate not in good]
        span = f"**{good[0]:g}**" if len(good) == 1 else f"**{good[0]:g} to {good[-1]:g}**"
        if between:
            span += f", but for {', '.join(f'{rate:g}' for rate in between)}"
        told.append(f"Good range among the rates tried (mean within {100 * NEAR:g} point of the best, no run diverged): {span}.")
        if good[-1] == rates[-1] or good[0] == rates[0]:
            told.append("It reaches the edge of what was tried, so the best rate may lie beyond: widen the list with --set lr=….")
    if diverged := [arm.name for arm in results.arms if results.count("diverged", arm)]:
        told.append(f"Diverged: {', '.join(diverged)}.")
    if comparisons := tell_comparisons(results):
        told.append(comparisons)
    else:
        told.append(f"The base's own rate {results.base.lr:g} is not among them, so nothing is compared with it; the order of "
                    f"the best ({', '.join(arm.name for arm in rank(results)[:3])}) is chosen after the fact.")  # fmt: skip
    return "\n\n".join([" ".join(told), table(results)])


STUDY = Study(
    name="learning-rate", question="Which learning rates train this network well?",
    source="Bengio 2012 (arXiv:1206.5533): the one setting to tune if only one can be",
    answer="the rates whose validation accuracy is within a point of the best, and those that diverge",
    plan=plan, draw=draw, conclude=conclude, varies=("lr",),
)  # fmt: skip
