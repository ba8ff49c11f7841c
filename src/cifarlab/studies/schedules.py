"""Study 8: which learning-rate schedule ends highest."""

from collections.abc import Mapping
from typing import Any

from cifarlab.config import TrainConfig
from cifarlab.figures import draw_arm_curves
from cifarlab.studies.comparison import draw_accuracy, draw_curves, table, tell_best, tell_comparisons
from cifarlab.studies.study import Arm, Results, Study

SCHEDULES = ("one-cycle", "step", "cosine", "restarts", "constant")


def shape(base: TrainConfig, schedule: str) -> dict[str, Any]:
    """The schedule with lengths that fit the base's epochs; the base's own stays as it is."""
    if schedule == base.schedule:
        return {"schedule": schedule}
    return {"schedule": schedule} | {
        "step": {"decay_epochs": base.epochs / 3, "decay_factor": 0.1},
        "restarts": {"restart_epochs": base.epochs / 3, "restart_growth": 2},  # two cycles, a third and two thirds
        "one-cycle": {"peak_at": 0.3, "div_factor": 25.0, "final_div_factor": 1e4},
    }.get(schedule, {})


def plan(base: TrainConfig, values: Mapping[str, list[Any]]) -> list[Arm]:
    """One arm a schedule, all with the base's learning rate as the highest."""
    return [Arm(name=schedule, changes=shape(base, schedule), is_base=schedule == base.schedule, settings={"schedule": schedule})
            for schedule in values.get("schedule", list(SCHEDULES))]  # fmt: skip


def draw(results: Results) -> dict[str, Any]:
    rates = {}
    for arm in results.arms:
        known = [outcome for outcome in results.of(arm) if "lr" in outcome.run.metrics]
        rates[arm.name] = [(outcome.run.metrics.steps("lr") / outcome.steps_per_epoch, outcome.run.metrics["lr"])
                           for outcome in known[:1]]  # the same for every seed  # fmt: skip
    return {
        "learning-rates": draw_arm_curves(rates, axis="learning rate", title="Learning rate over time", last="{:.1e} at the end"),
        "validation-curves": draw_curves(results, "Validation accuracy by schedule", results.arms[:8]),
        "accuracy": draw_accuracy(results, "Accuracy by schedule"),
    }


def conclude(results: Results) -> str:
    return "\n\n".join([
        tell_best(results) + " " + tell_comparisons(results),
        f"All have {results.base.lr:g} as their highest rate and {results.base.optimizer} as optimizer: schedules that spend "
        "longer near the top (constant, step) may want a lower one.",
        table(results),
    ])  # fmt: skip


STUDY = Study(
    name="schedules", question="Which learning-rate schedule ends highest?",
    source="arXiv:1608.03983 (cosine, restarts), 1708.07120 (one-cycle)",
    answer="learning rate over time, and final validation accuracy of each schedule against the base's own",
    plan=plan, draw=draw, conclude=conclude, varies=("schedule",),
)  # fmt: skip
