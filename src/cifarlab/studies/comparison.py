"""What studies of arms have in common: their table, their pictures, and sentences that claim no more than the seeds allow."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from cifarlab.figures import draw_arm_curves, draw_arms
from cifarlab.statistics import Comparison, Interval, compare_with_base, mean_interval
from cifarlab.studies.study import Arm, Outcome, Results

MOST_CURVES = 8
READING = "Dots: runs, one a seed. Upright bar and line: mean and 95 % interval."


def draw_accuracy(results: Results, title: str, *, with_gap: bool = False) -> Any:
    """Validation accuracy of every run by arm, best mean first; with_gap: the generalisation gap beside."""
    arms = rank(results)
    panels = {"validation accuracy (%)": _panel(results, arms, lambda outcome: 100 * outcome.at_report("val/accuracy"))}
    if with_gap:
        panels["gap: clean training − validation accuracy (points)"] = _panel(results, arms, gap)
    base = results.base_arm
    subtitle = READING + (f" Dashed: {base.name}." if base else "")
    return draw_arms([arm.name for arm in arms], panels, base=base.name if base else "",
                     diverged=[results.count("diverged", arm) for arm in arms], title=title, subtitle=subtitle)  # fmt: skip


def _panel(results: Results, arms: Sequence[Arm], of: Any) -> tuple[list[Any], list[float], list[float]]:
    values = [np.array([of(outcome) for outcome in results.of(arm)]) for arm in arms]
    intervals = [mean_interval(each) for each in values]
    return values, [interval.low for interval in intervals], [interval.high for interval in intervals]


def gap(outcome: Outcome) -> float:
    """Points of accuracy on clean training images above that on validation images, at the reported step."""
    return 100 * (outcome.at_report("clean/accuracy") - outcome.at_report("val/accuracy"))


def draw_curves(results: Results, title: str, arms: Sequence[Arm] | None = None, *, key: str = "val/accuracy") -> Any:
    """The metric over epochs, an arm a colour; the eight best arms, the base among them, where there are more."""
    chosen = list(arms) if arms is not None else rank(results)
    if len(chosen) > MOST_CURVES:
        kept = chosen[: MOST_CURVES - 1]
        base = results.base_arm
        chosen = [*kept, base] if base and base not in kept else chosen[:MOST_CURVES]
    percent = key.endswith("accuracy")
    curves: dict[str, list[Any]] = {}
    diverged: dict[str, list[float]] = {}
    for arm in chosen:
        runs = []
        for outcome in results.of(arm):
            if key in outcome.run.metrics:
                epochs = outcome.run.metrics.steps(key) / outcome.steps_per_epoch
                runs.append((epochs, outcome.run.metrics[key] * (100 if percent else 1)))
            if outcome.state == "diverged":
                diverged.setdefault(arm.name, []).append(outcome.run.result["step"] / outcome.steps_per_epoch)
        curves[arm.name] = runs
    names = {"val/accuracy": "validation accuracy (%)", "val/loss": "validation loss"}
    left_out = len(results.arms) - len(chosen) if arms is None else 0
    subtitle = "Thick: mean over seeds; faint: each run." + (f" {left_out} arms of lower accuracy not shown." if left_out else "")
    return draw_arm_curves(curves, axis=names.get(key, key), diverged=diverged, title=title, subtitle=subtitle,
                           last="{:.1f} % at the end" if percent else "{:.3f} at the end")  # fmt: skip


def rank(results: Results) -> list[Arm]:
    """The arms by mean validation accuracy, best first; those with a diverged run behind all without, and the lost ones last."""

    def merit(arm: Arm) -> tuple[float, float]:
        mean = mean_interval(results.values(arm)).mean
        return (-results.count("diverged", arm), mean if not math.isnan(mean) else -1.0)

    return sorted(results.arms, key=merit, reverse=True)


def table(results: Results, *, with_gap: bool = False) -> str:
    """A Markdown table, best arm first: accuracies with intervals, difference to the base, p, effect size, diverged runs."""
    base, compared = results.base_arm, compare(results)
    head = ["arm", "validation accuracy", "test accuracy"] + (["gap (points)"] if with_gap else [])
    head += ["difference", "p (Holm)", "effect d"] if base else []
    rows = [head, ["---"] + ["---:"] * (len(head) - 1)]
    for arm in rank(results):
        cells = [arm.name + (" (base)" if arm.is_base else "")]
        lost = {state: results.count(state, arm) for state in ("diverged", "failed", "unfinished", "pruned")}
        troubles = (f"; {number} of {len(results.of(arm))} {state}" for state, number in lost.items() if number)
        cells.append(tell_interval(mean_interval(100 * results.values(arm))) + "".join(troubles))
        cells.append(tell_interval(mean_interval(100 * results.values(arm, "test/accuracy"))))
        if with_gap:
            cells.append(tell_interval(mean_interval([gap(outcome) for outcome in results.of(arm)]), ""))
        if base:
            each = compared.get(arm.name)
            told = tell_interval(each.difference, "", sign=True, scale=100) if each else ""
            cells += [told, _number(each.adjusted, "{:.3f}"), _number(each.effect, "{:+.1f}")] if each else ["", "", ""]
        rows.append(cells)
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def compare(results: Results, values: Any = None) -> dict[str, Comparison]:
    """Every arm against the base by validation accuracy (or `values` of an outcome), in pairs by seed; {} without a base."""
    base = results.base_arm
    if base is None:
        return {}
    of = values or (lambda outcome: outcome.at_report("val/accuracy"))
    if results.record.get("search"):  # its seed chose what is compared, and flatters it: the others are asked
        found = of
        of = lambda outcome: math.nan if outcome.trial.seed == results.seeds[0] else found(outcome)  # noqa: E731
    common = {arm.name: [of(outcome) for outcome in results.of(arm)] for arm in results.arms
              if len(results.of(arm)) == len(results.of(base))}  # fmt: skip
    return compare_with_base(common, base.name)


def tell_comparisons(results: Results, *, quantity: str = "validation accuracy", values: Any = None, unit: str = "points",
                     scale: float = 100.0) -> str:  # fmt: skip
    """Sentences: which arms differ from the base, and for which no difference could be shown."""
    base = results.base_arm
    if base is None:
        return ""
    if len(results.seeds) < 2:
        return ("With one seed nothing can be said about chance: another seed might turn any of these differences round. "
                "Give two or more, such as --seeds 0,1,2.")  # fmt: skip
    shown, not_shown, lost = [], [], []
    compared = compare(results, values)
    for name, each in compared.items():
        if each.difference.n < 2:
            lost.append(name)
        elif each.is_shown:
            d = each.difference
            low, high = sorted((abs(scale * d.low), abs(scale * d.high)))
            effect = "" if math.isnan(each.effect) else f", d = {each.effect:+.1f}"
            shown.append(f"{name} is {abs(scale * d.mean):.2f} {unit} {'higher' if d.mean > 0 else 'lower'} "
                         f"({low:.2f} to {high:.2f}; p = {each.adjusted:.3f}{effect}{_fewer(results, d.n)})")  # fmt: skip
        else:
            fewer = _fewer(results, each.difference.n)
            not_shown.append(name + (f" ({fewer.removeprefix('; ')})" if fewer else ""))
    tested = len(shown) + len(not_shown)
    pairs = f"{len(results.seeds)} pairs of equal seeds, paired t test, {tested} comparisons, Holm's correction, level 5 %"
    if not tested:
        pairs = "paired t test of equal seeds"
    told = [f"In {quantity} against {base.name} ({pairs}):"]
    if shown:
        told.append("; ".join(shown) + ".")
    if not_shown:
        every = "any arm" if not shown and not lost else ", ".join(not_shown)
        told.append(f"No difference could be shown for {every}: that is no proof of equality, with {len(results.seeds)} seeds "
                    "only differences far above the spread of seeds can be shown.")  # fmt: skip
    if lost:
        told.append(f"Too few finished runs for a comparison: {', '.join(lost)}.")
    return " ".join(told)


def _fewer(results: Results, n: int) -> str:
    """Said where runs of the arm or of the base are missing: the comparison is of what is left, and may flatter."""
    return f"; only {n} of {len(results.seeds)} pairs" if n < len(results.seeds) else ""


def tell_best(results: Results) -> str:
    """A sentence on the arm with the highest mean, and how it does on the test set, which chose nothing."""
    best, *others = rank(results)
    value, test = mean_interval(100 * results.values(best)), mean_interval(100 * results.values(best, "test/accuracy"))
    if math.isnan(value.mean):
        return "No arm finished a run, so nothing can be said."
    told = (f"Highest mean validation accuracy: **{best.name}**, {tell_interval(value)} over {value.n} seed(s); "
            f"on the test set, which chose nothing, {tell_interval(test)}.")  # fmt: skip
    lost = results.count("diverged", best)
    if lost:
        told += f" But {lost} of its {len(results.of(best))} runs diverged, and no arm is without: none can be called good."
    ties = [arm.name for arm in others if results.count("diverged", arm) == lost
            and abs(100 * mean_interval(results.values(arm)).mean - value.mean) < 1e-9]  # fmt: skip
    if ties:
        told += f" The very same mean: {', '.join(ties)}."
    return told


def tell_interval(interval: Interval, unit: str = " %", *, sign: bool = False, scale: float = 1.0) -> str:
    """`97.31 ± 0.42 %`; without ± for a single value, `–` for none."""
    if math.isnan(interval.mean):
        return "–"
    mean = f"{scale * interval.mean:{'+' if sign else ''}.2f}"
    return f"{mean} ± {scale * interval.half:.2f}{unit}" if interval.n > 1 else f"{mean}{unit}"


def _number(value: float, style: str) -> str:
    return "–" if math.isnan(value) else style.format(value)
