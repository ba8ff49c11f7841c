"""Study 7: which optimizer trains fastest, and which ends highest."""

from collections.abc import Mapping
from typing import Any, get_args, get_type_hints

import numpy as np

from cifarlab.config import InputError, TrainConfig
from cifarlab.statistics import mean_interval
from cifarlab.studies.comparison import draw_accuracy, draw_curves, rank, table, tell_best, tell_comparisons
from cifarlab.studies.study import Arm, Results, Study

USUAL: dict[str, dict[str, Any]] = {  # settings that each is usually begun with, for nets like these
    "sgd": {"lr": 0.05, "momentum": 0.9},
    "adam": {"lr": 1e-3},
    "adamw": {"lr": 1e-3},
    "rmsprop": {"lr": 1e-3, "momentum": 0.0},
    "muon": {"lr": 0.02, "momentum": 0.95, "nesterov": True},
}
REACHED = 0.98  # of the best arm's mean accuracy: an arm's own best would praise those that stop early and low


def plan(base: TrainConfig, values: Mapping[str, list[Any]]) -> list[Arm]:
    """One arm an optimizer at its usual rate, or at each rate of `--set lr=…`; the base's own keeps the base's settings."""
    known = get_args(get_type_hints(TrainConfig)["optimizer"])
    arms = []
    for name in values.get("optimizer", [name for name in USUAL if name in known]):
        if name not in USUAL:
            raise InputError(f"study optimizers has no usual learning rate for {name}: choose among {', '.join(USUAL)}")
        usual = {} if name == base.optimizer else USUAL[name]
        # One-cycle may move momentum or beta1, which the optimizers need differently.
        for lr in values.get("lr", [usual.get("lr", base.lr)]):
            own = name == base.optimizer and lr == base.lr
            changes = {"optimizer": name, **usual, "lr": lr}
            if name != base.optimizer and base.nesterov and "nesterov" not in usual:
                changes["nesterov"] = False
            arms.append(Arm(name=f"{name}, lr {lr:g}", changes=changes, is_base=own, settings={"optimizer": name, "lr": lr}))
    return arms


def best_of_each(results: Results) -> list[Arm]:
    """For each optimizer its rate with the highest mean validation accuracy."""
    found: dict[str, Arm] = {}
    for arm in rank(results):
        found.setdefault(str(arm.columns["optimizer"]), arm)
    return list(found.values())


def draw(results: Results) -> dict[str, Any]:
    return {
        "convergence": draw_curves(results, "Convergence by optimizer", best_of_each(results)[:8]),
        "convergence-loss": draw_curves(results, "Validation loss by optimizer", best_of_each(results)[:8], key="val/loss"),
        "accuracy": draw_accuracy(results, "Accuracy by optimizer"),
    }


def epochs_to_reach(results: Results, arm: Arm, target: float) -> tuple[float, int]:
    """(mean over its runs of the first evaluated epoch with that validation accuracy, how many of them reach it)."""
    epochs = []
    for outcome in results.of(arm):
        if "val/accuracy" in outcome.run.metrics and (reached := outcome.run.metrics["val/accuracy"] >= target).any():
            epochs.append(outcome.run.metrics.steps("val/accuracy")[int(reached.argmax())] / outcome.steps_per_epoch)
    return (float(np.mean(epochs)) if epochs else float("nan")), len(epochs)


def tell_convergence(results: Results) -> str:
    target = REACHED * mean_interval(results.values(rank(results)[0])).mean
    if not np.isfinite(target):
        return ""
    told = []
    for arm in best_of_each(results):
        epochs, reached = epochs_to_reach(results, arm, target)
        after = f"after {epochs:.1f} epochs by " if reached else "by "
        told.append(f"{arm.name} {after}{reached} of {len(results.of(arm))}")
    return (f"Convergence: a validation accuracy of {100 * target:.1f} % ({100 * REACHED:g} % of the best arm's mean) is reached "
            f"by so many of its runs: {'; '.join(told)}.")  # fmt: skip


def conclude(results: Results) -> str:
    return "\n\n".join([
        tell_best(results) + " " + tell_comparisons(results),
        tell_convergence(results),
        "Each optimizer stands at one usual rate (the base's own at the base's rate), untuned: an order of optimizers is an "
        "order of these settings, and a better rate may turn it round. `--set lr=0.1,0.01,0.001` tries each at several."
        if len(results.arms) == len(best_of_each(results)) else
        "Of each optimizer the rate with the highest validation accuracy is drawn; the choice flatters all of them alike.",
        f"Weight decay is {results.base.weight_decay:g} for all: an L2 penalty, decoupled with AdamW and Muon.",
        table(results),
    ])  # fmt: skip


STUDY = Study(
    name="optimizers", question="Which optimizer trains fastest, and which ends highest?",
    source="Choi et al. 2019 (arXiv:1910.05446): the order depends on the tuning",
    answer="convergence and final validation accuracy of SGD, Adam, AdamW, RMSprop and Muon, compared with the base's own",
    plan=plan, draw=draw, conclude=conclude, varies=("optimizer", "lr"),
)  # fmt: skip
