"""Learning curves and the schedule of learning rate and momentum."""

from typing import Any

import numpy as np

from cifarlab.figures import draw_learning_curves, draw_lr
from cifarlab.gallery import collect_curves, draw_run_lr
from cifarlab.report.charts import take_chart
from cifarlab.report.section import Section, make_section
from cifarlab.report.summary import read_facts
from cifarlab.runs import Run


def show_curves(run: Run) -> Section | None:
    curves = collect_curves(run)
    if not curves:
        return None
    log = draw_learning_curves(curves, log_loss=True)
    chart = take_chart("learning-curves", draw_learning_curves(curves), draw_learning_curves, log=log)
    more = describe_time(run)
    units = ["epoch", "step", *(["time"] if len(more["times"]) > 1 else [])] if more["steps_per_epoch"] > 1 else ["step"]
    return make_section("curves", "Learning curves", "curves.html", chart, more=more, units=units, has_log=True)


def describe_time(run: Run) -> dict[str, Any]:
    """Steps to an epoch, and (epoch, minutes of training) at each evaluation: what the axis can count instead of epochs."""
    per_epoch = int(read_facts(run, "environment.json").get("steps_per_epoch", 1))
    times = [(0.0, 0.0)]
    if "time/train_seconds" in run.metrics:
        epochs = run.metrics.steps("time/train_seconds") / per_epoch
        times += list(zip(epochs.tolist(), (run.metrics["time/train_seconds"] / 60).tolist(), strict=True))
    kept = [times[k] for k in np.unique(np.linspace(0, len(times) - 1, min(len(times), 500)).astype(int))]
    return {"steps_per_epoch": per_epoch, "times": [[round(epoch, 4), round(minutes, 4)] for epoch, minutes in kept]}


def show_schedule(run: Run) -> Section | None:
    if "lr" not in run.metrics:
        return None
    chart = take_chart("schedule", draw_run_lr(run), draw_lr)
    return make_section("learning-rate", "Learning rate and momentum", "charts.html", chart, intro="")
