"""Study 2: how much accuracy depends on batch size, weight decay and gradient clipping, and which of them matters most."""

import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from cifarlab.config import InputError, TrainConfig
from cifarlab.figures import draw_importance, draw_pairs
from cifarlab.statistics import Importance, compare_pairs, holm, permutation_shares, variance_shares
from cifarlab.studies.comparison import draw_accuracy, rank, table, tell_best, tell_comparisons, tell_interval
from cifarlab.studies.study import Arm, Results, Study

SHOWN = 12  # arms in the picture and the table: the best, and the base


def settings(base: TrainConfig, values: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    """The grid's axes: the base's value among three of each, or what `--set` gave in their place, further fields too."""
    own: dict[str, list[Any]] = {
        "batch_size": sorted({max(2, base.batch_size // 2), base.batch_size, base.batch_size * 2}),
        "weight_decay": sorted({0.0, base.weight_decay or 5e-4, 10 * (base.weight_decay or 5e-4)}),
        "clip_norm": sorted({0.0, base.clip_norm or 1.0, 0.1 * (base.clip_norm or 1.0)}),
    }
    if "clip_value" in values or base.clip_value:
        del own["clip_norm"]
    given = {**own, **values} if values.keys() <= own.keys() else dict(values)
    axes = {name: each for name, each in given.items() if len(each) > 1}
    if len(axes) < 2:
        raise InputError("study sensitivity needs two settings with two values or more: give them by --set field=v1,v2")
    return axes


def plan(base: TrainConfig, values: Mapping[str, list[Any]]) -> list[Arm]:
    """One arm a combination: the full grid."""
    axes = settings(base, values)
    arms = []
    for combination in itertools.product(*axes.values()):
        changes = dict(zip(axes, combination, strict=True))
        is_base = all(getattr(base, name) == value for name, value in changes.items())
        arms.append(Arm(name=name_settings(changes), changes=changes, is_base=is_base))
    return arms


def name_settings(changes: Mapping[str, Any]) -> str:
    short = {"batch_size": "batch", "weight_decay": "decay", "clip_norm": "clip"}
    return ", ".join(f"{short.get(name, name)} {value:g}" if isinstance(value, int | float) and not isinstance(value, bool) else
                     f"{short.get(name, name)} {value}" for name, value in changes.items())  # fmt: skip


def space(base: TrainConfig, values: Mapping[str, list[Any]]) -> dict[str, tuple[Any, ...]]:
    """What a search tries: batch sizes as powers of two round the base's, decay and clipping on logarithmic scales."""
    if values:
        return {name: ("choice", list(each)) for name, each in values.items()}
    sizes = sorted({max(2, int(base.batch_size * factor)) for factor in (0.25, 0.5, 1, 2, 4)})
    return {"batch_size": ("choice", sizes), "weight_decay": ("log", 1e-6, 1e-1), "clip_norm": ("log", 1e-2, 1e2),
            "lr": ("log", base.lr / 10, base.lr * 10)}  # fmt: skip


def columns(results: Results) -> dict[str, list[Any]]:
    """name -> the setting of each outcome, for the settings that vary."""
    arms = {arm.name: arm for arm in results.arms}
    names = list(dict.fromkeys(name for arm in results.arms for name in arm.changes))
    return {name: [arms[outcome.trial.arm].changes.get(name, getattr(results.base, name)) for outcome in results.outcomes]
            for name in names}  # fmt: skip


def scores(results: Results) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Validation accuracy in percent of each outcome; for a pruned one what it had reached; nan for a diverged one."""
    found = []
    for outcome in results.outcomes:
        value = outcome.at_report("val/accuracy")
        if outcome.state == "pruned" and "val/accuracy" in outcome.run.metrics:
            value = float(outcome.run.metrics["val/accuracy"].max())
        found.append(100 * value)
    return np.array(found)


def importance(results: Results) -> tuple[dict[str, Importance], dict[str, float]]:
    """(each setting's share of the differences, what is left to interactions and to chance)."""
    given = columns(results)
    if results.record["search"]:
        numbers = {name: _codes(each) for name, each in given.items()}
        return permutation_shares(numbers, scores(results)), {}
    shares, interactions = variance_shares(given, scores(results))
    left = 1 - sum(share.share for share in shares.values()) - interactions
    return shares, {"interactions of them": interactions, "chance (seeds)": left}


def _codes(values: list[Any]) -> list[float]:
    if all(isinstance(value, int | float) for value in values):
        return [float(value) for value in values]
    return [float(sorted(set(map(str, values))).index(str(value))) for value in values]


def draw(results: Results) -> dict[str, Any]:
    is_grid, lost = not results.record["search"], results.count("diverged")
    shares, rest = importance(results)
    found = list(shares.values())
    how = "analysis of variance of the grid" if is_grid else "permutation importance in a forest"
    figures = {
        "pairs": draw_pairs(columns(results), scores(results), is_grid=is_grid,
                            subtitle=("mean over seeds and all other settings" if is_grid else "every training a dot")
                            + ("; * some diverged, × all" if is_grid and lost else "; × diverged" if lost else "")),
        "importance": draw_importance(list(shares), [each.share for each in found], [each.low for each in found],
                                      [each.high for each in found], rest=rest, subtitle=f"{how}; line: 95 % interval"),
    }  # fmt: skip
    if is_grid:
        figures["accuracy"] = draw_accuracy(_few(results), "The best combinations, and the base")
    return figures


def _few(results: Results) -> Results:
    from dataclasses import replace

    best = rank(results)[:SHOWN]
    base = results.base_arm
    kept = tuple(best if base is None or base in best else [*best, base])
    names = {arm.name for arm in kept}
    return replace(results, arms=kept, outcomes=tuple(each for each in results.outcomes if each.trial.arm in names))


def conclude(results: Results) -> str:
    shares, rest = importance(results)
    order = sorted((name for name in shares if not math.isnan(shares[name].share)), key=lambda name: -shares[name].share)
    told, p_of = [], dict(zip(order, holm([shares[name].p for name in order]), strict=True))
    for name in order:
        each = shares[name]
        interval = f" (95 % interval {100 * each.low:.0f} to {100 * each.high:.0f} %)" if not math.isnan(each.low) else ""
        p = f", p = {corrected:.2g}" if not math.isnan(corrected := p_of[name]) else ""
        told.append(f"{name} {100 * each.share:.1f} %{interval}{p}")
    lines = []
    if order:
        first, is_search = shares[order[0]], bool(results.record["search"])
        next_one = shares[order[1]] if len(order) > 1 else None
        is_clear = not math.isnan(first.low) and (next_one is None or first.low > next_one.high)
        adjusted = list(p_of.values())  # corrected, since the first was chosen for being the largest
        is_shown = is_search or any(p < 0.05 for p in adjusted)
        if not is_shown:
            why = "any of the settings within the range tried" if not all(map(math.isnan, adjusted)) else \
                "any of the settings: there are as many parameters as trainings"  # fmt: skip
            lines.append(f"No difference could be shown for {why}.")
        elif is_clear and next_one is None:
            lines.append(f"{order[0]} is the only setting that could be looked at.")
        elif is_clear and (is_search or adjusted[0] < 0.05):
            lines.append(f"**{order[0]} matters most**: its interval lies above the next one's.")
        elif math.isnan(first.low):
            lines.append(f"{order[0]} explains most of these trainings, but without intervals the order of settings is open.")
        else:
            lines.append(f"{order[0]} explains most, but its interval reaches that of {order[1]}: their order is open."
                         if next_one else f"{order[0]} explains most.")  # fmt: skip
        how = "" if is_search else " (F tests with Holm's correction)"
        lines.append(f"Share of the differences in validation accuracy{how}: " + "; ".join(told) + ".")
        others = [f"{name} {100 * value:.1f} %" for name, value in rest.items() if not math.isnan(value)]
        lines += ["What they do not explain: " + "; ".join(others) + "."] * bool(others)
    else:
        lines.append("Which setting matters cannot be said: all trainings scored alike, too few finished, or their settings do "
                     "not foretell the accuracy of others.")  # fmt: skip
    if lost := results.count("diverged"):
        lines.append(f"The {lost} diverged training(s) are not in these shares: a setting that makes trainings diverge matters "
                     "more than its share says.")  # fmt: skip
    if len(results.seeds) < 2 and not results.record["search"]:
        lines.append("With one seed interactions and chance cannot be told apart, and no interval can be given.")
    few = _few(results)
    if results.record["search"]:
        lines.append(_tell_search(results))
    text = [" ".join(line for line in lines if line)]
    if not results.record["search"]:
        compared = tell_comparisons(results) or "The base itself is not in the grid, so nothing is compared with it."
        text.append(f"{tell_best(results)} It is the best of {len(results.arms)}, chosen after the fact, so expect less of it. "
                    + compared)  # fmt: skip
    return "\n\n".join([*text, f"The best combinations{' and the base' if results.base_arm else ''}:", table(few)])


def _tell_search(results: Results) -> str:
    counts = {state: results.count(state) for state in ("finished", "pruned", "diverged", "failed")}
    told = f"Search ({results.record['search']['sampler']}): " + ", ".join(f"{n} {how}" for how, n in counts.items() if n) + "."
    best = next((arm for arm in results.arms if arm.name.endswith("(best)")), None)
    base = results.base_arm
    if best is None or base is None:
        return told
    flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in best.changes.items())
    told += f" Best on validation: `{flags}`."
    # The seed of the search chose it, and flatters it: only the others are asked.
    fresh = [100 * results.values(arm)[1:] for arm in (best, base)]
    found = compare_pairs(*fresh)
    if found.difference.n < 2:
        return told + " It was chosen by this very number, so expect less of it; give three seeds or more to know."
    verdict = "a difference was shown" if found.p < 0.05 else "no difference could be shown"
    return (f"{told} With the {found.difference.n} seeds that did not choose it, it differs from the base by "
            f"{tell_interval(found.difference, ' points', sign=True)} (paired t test, p = {found.p:.3f}): {verdict}.")


STUDY = Study(
    name="sensitivity",
    question="How much does accuracy depend on batch size, weight decay and clipping, and which matters most?",
    source="Hutter et al. 2014 (functional ANOVA) for importance; arXiv:1907.10902 (Optuna) for the search",
    answer="the share of the differences that each setting explains, with its interval, and a heat map for every pair",
    plan=plan, draw=draw, conclude=conclude, varies=("batch_size", "weight_decay", "clip_norm", "clip_value", "*"), space=space,
)  # fmt: skip
