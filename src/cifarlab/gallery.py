"""A run's figures folder: which figures there are, and which of its numbers each is drawn from. No torch here."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cifarlab.calibration import Calibration, measure_calibration
from cifarlab.figures import (
    draw_activations,
    draw_class_accuracy,
    draw_confusion,
    draw_distributions,
    draw_flow_map,
    draw_gradient_flow,
    draw_learning_curves,
    draw_lr,
    draw_lr_accuracy,
    draw_lr_range,
    draw_noise,
    draw_reliability,
    draw_samples,
    draw_sharpness,
    draw_update_ratio,
    draw_weight_magnitude,
    save_figure,
)
from cifarlab.figures.style import unchecked
from cifarlab.lr_curve import FILE, LrRange
from cifarlab.optim.schedules import Schedule
from cifarlab.records import Table
from cifarlab.runs import Run

if TYPE_CHECKING:
    from cifarlab.evaluate import Evaluation

CURVES = ("train", "clean", "val", "test")
SHOWN = 100  # steps behind the picture of the gradient flow
MOST_RECORDS = 100_000  # of a probe that are drawn: memory and time of a picture do not grow any more from there on


def draw_run_figures(run: Run, evaluation: "Evaluation", images: NDArray[np.uint8], class_names: Sequence[str]) -> None:
    """Every figure of a run that has just ended.

    Whatever goes wrong here is said and passed over: the numbers are worth more than their pictures.
    """
    draw_recorded_figures(run)
    with no_harm(run), unchecked():
        draw_evaluation_figures(run.path / "figures", evaluation, images, class_names)


def draw_recorded_figures(run: Run) -> None:
    """Every figure of the rows and probes of a run, which may still be running; what goes wrong is said and passed over."""
    with no_harm(run), unchecked():
        draw_training_figures(run)
        draw_probe_figures(run)


@contextmanager
def no_harm(run: Run, what: str = "not all figures could be drawn") -> Iterator[None]:
    """What goes wrong in drawing is said in one line, and passed over."""
    try:
        yield
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        told = f"cifarlab: {run.path}: {what} ({why}); its numbers are complete"
        print(" ".join(told.split()), file=sys.stderr)


def draw_probe_figures(run: Run) -> None:
    """figures/*.png from each table of a run's probes, which may still be running."""
    for name in run.tables:
        if len(table := table_to_draw(run, name)):
            (run.path / "figures").mkdir(exist_ok=True)
            for title, figure in PROBE_FIGURES[name](run, table).items():
                save_figure(figure, run.path / "figures" / f"{title}.png")


def table_to_draw(run: Run, probe: str) -> Table:
    """What a probe measured, of a long run in part: MOST_RECORDS evenly spaced, and all at whose steps an alarm was raised."""
    return run.tables[probe].thin(MOST_RECORDS, [alarm["step"] for alarm in run.alarms], tail=SHOWN)


def _gradient_flow(run: Run, table: Table) -> dict[str, Any]:
    """The picture is of medians over the last steps. A parameter without a gradient is not measured, others may be not finite."""
    missing = np.isnan(table["non_finite"])
    last = table.values[-SHOWN:]
    masked = np.ma.masked_array(last, np.broadcast_to(missing[-SHOWN:, :, None], last.shape))
    mean_abs, max_abs = (np.ma.median(masked[:, :, table.columns.index(column)], axis=0)  # type: ignore[no-untyped-call]
                         for column in ("mean_abs", "max_abs"))  # fmt: skip
    subtitle = f"medians over steps {table.steps[-SHOWN:][0]:,} to {table.steps[-1]:,}"
    means = np.ma.masked_array(table["mean_abs"], missing)
    title, names, epoch = f"Gradient flow: {_title(run)}", table.items, _epoch(run)
    return {
        "gradient_flow": draw_gradient_flow(names, mean_abs, max_abs, title=title, subtitle=subtitle),
        # Not the norm, which grows with the size of a tensor: the largest would be the "worst" of any net.
        "gradient_flow_over_time": draw_flow_map(table.steps, names, means, quantity="mean |g|", steps_per_epoch=epoch),
    }


def _update_flow(run: Run, table: Table) -> dict[str, Any]:
    (names, ratio), means, epoch = _matrices(run, table, "ratio"), _means(run, table), _epoch(run)
    return {
        "update_ratio": draw_update_ratio(table.steps, names, ratio, steps_per_epoch=epoch),
        "update_flow_over_time": draw_flow_map(table.steps, table.items, means, quantity="mean |Δw|", steps_per_epoch=epoch,
                                               title="Update flow over time"),
    }


def _means(run: Run, table: Table) -> NDArray[np.float32]:
    """mean_abs, masked where nothing was measured: of several optimizers not all may have stepped."""
    means, gradients = table["mean_abs"], table_to_draw(run, "gradient_flow") if "gradient_flow" in run.tables else None
    if gradients is not None and np.array_equal(gradients.steps, table.steps):
        return np.ma.masked_array(means, np.isnan(means) & np.isnan(gradients["non_finite"]))
    return means


def _weight_flow(run: Run, table: Table) -> dict[str, Any]:
    names, sizes = _matrices(run, table, "mean_abs")
    return {
        "weight_magnitude": draw_weight_magnitude(table.steps, names, sizes, steps_per_epoch=_epoch(run)),
        "weight_flow_over_time": draw_flow_map(table.steps, table.items, _means(run, table), quantity="mean |w|",
                                               steps_per_epoch=_epoch(run), title="Weight flow over time"),
    }


def _distributions(run: Run, table: Table) -> dict[str, Any]:
    exponents = [int(column[3:]) for column in table.columns if column.startswith("+2^")]
    numels = {parameter["name"]: float(np.prod(parameter["shape"], dtype=float)) for parameter in run.probed["parameters"]}
    figures = {}
    for kind in dict.fromkeys(item.partition("/")[0] for item in table.items):
        chosen = [k for k, item in enumerate(table.items) if item.startswith(f"{kind}/")]
        names = [table.items[k].partition("/")[2] for k in chosen]
        counts = table.values[:, chosen] * np.array([numels[name] for name in names])[:, None]
        broken = counts[..., -1]
        figures[f"distributions_{kind}"] = draw_distributions(
            table.steps, names, counts[..., :-1], exponents, quantity=kind, not_finite=broken, steps_per_epoch=_epoch(run)
        )
    return figures


def _activations(run: Run, table: Table) -> dict[str, Any]:
    columns = (table[column] for column in ("mean", "std", "dead_share", "saturated_share"))
    return {"activations": draw_activations(table.steps, table.items, *columns, steps_per_epoch=_epoch(run))}


def _curvature(run: Run, table: Table) -> dict[str, Any]:
    plain, preconditioned, edge, residual = (table[name][:, 0] for name in ("sharpness", "preconditioned", "edge", "residual"))
    is_preconditioned = bool(np.isfinite(preconditioned).any())  # then it is what the edge belongs to
    sharpness = preconditioned if is_preconditioned else plain
    with_momentum = "(2 + 2 momentum)/lr"
    edge_name = "the largest that the optimizer stands"
    if not run.is_watched:
        edge_name = {"sgd": with_momentum if run.config.momentum else "2/lr", "rmsprop": with_momentum, "muon": edge_name}.get(
            run.config.optimizer, "(2 + 2 beta1)/((1 - beta1) lr)")  # fmt: skip
    title = "Preconditioned sharpness" if is_preconditioned else "Sharpness"
    return {"sharpness": draw_sharpness(table.steps, sharpness, edge, edge_name=edge_name, uncertainty=sharpness * residual,
                                        title=title, steps_per_epoch=_epoch(run))}  # fmt: skip


def _noise(run: Run, table: Table) -> dict[str, Any]:
    cosine = np.ma.masked_invalid(table["cosine"][:, 0])  # the first step has none before it
    batch_size = None if run.is_watched else run.config.batch_size
    scale = table["noise_scale"][:, 0]
    return {"noise": draw_noise(table.steps, scale, cosine, batch_size=batch_size, steps_per_epoch=_epoch(run))}


PROBE_FIGURES: dict[str, Callable[[Run, Table], dict[str, Any]]] = {
    "gradient_flow": _gradient_flow,
    "update_flow": _update_flow,
    "weight_flow": _weight_flow,
    "distributions": _distributions,
    "activations": _activations,
    "batch_norm": lambda run, table: {},  # two numbers a layer, which the diagnosis watches
    "curvature": _curvature,
    "noise": _noise,
}


def _matrices(run: Run, table: Table, column: str) -> tuple[list[str], NDArray[np.float32]]:
    """Names and values of the weight matrices: biases and norms begin at 0 or 1, and would fill the list of the worst."""
    shapes = {parameter["name"]: parameter["shape"] for parameter in run.probed["parameters"]}
    matrices = [k for k, item in enumerate(table.items) if len(shapes[item]) > 1]
    kept = matrices or list(range(len(table.items)))
    return [table.items[k] for k in kept], table[column][:, kept]


def _title(run: Run) -> str:
    return run.path.name if run.is_watched else run.config.recipe


def _epoch(run: Run) -> int | None:
    """Steps to an epoch; `watch` knows none, and the axis then counts steps."""
    return run.environment.get("steps_per_epoch") if (run.path / "environment.json").exists() else None


def draw_training_figures(run: Run) -> None:
    """figures/learning_curves.png and figures/learning_rate.png from the rows of a run, finished or not."""
    folder = run.path / "figures"
    if "lr" not in run.metrics:
        return
    folder.mkdir(exist_ok=True)
    curves = draw_learning_curves(collect_curves(run), title=f"Learning curves: {_title(run)}")
    save_figure(curves, folder / "learning_curves.png")
    save_figure(draw_run_lr(run), folder / "learning_rate.png")


def collect_curves(run: Run) -> dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Metric key -> (epochs, values) of loss and accuracy; of a watched run, which knows no epochs, over steps."""
    metrics, steps_per_epoch = run.metrics, _epoch(run) or 1
    keys = (f"{split}/{quantity}" for split in CURVES for quantity in ("loss", "accuracy"))
    return {key: (metrics.steps(key) / steps_per_epoch, metrics[key]) for key in keys if key in metrics}


def draw_run_lr(run: Run) -> Any:
    """Learning rate, and momentum where it was set, of the steps done."""
    metrics = run.metrics
    return draw_lr(metrics.steps("lr"), metrics["lr"], metrics.get("momentum"), steps_per_epoch=_epoch(run))


def draw_range_figures(test: LrRange, folder: Path) -> None:
    """lr_range.png in that folder: loss over learning rate; of a ladder lr_accuracy.png too."""
    suggestions = {found.name: found.lr for found in test.suggestions}
    what = " on held-out images" if test.split == "val" else ""
    title = f"Learning-rate range test{what}" + (f": {test.recipe}" if test.recipe else "")
    seeds = f"{len(test.curves)} seed{'s' * (len(test.curves) != 1)}"
    broke = f"; the loss broke away at about {test.diverged_at:.2g}" if np.isfinite(test.diverged_at) else ""
    points = "epochs" if test.per == "epoch" else "points"
    told = [f"{seeds}, {test.points} {points} asked for from {test.start:g} to {test.end:g}{broke}",
            *(f"Warning: {warning}" for warning in test.warnings)]  # fmt: skip
    is_log, raw = test.mode == "exponential", [(curve.lrs, curve.losses) for curve in test.curves]
    figure = draw_lr_range(test.lrs, test.median, *test.band, raw=raw, logarithmic=is_log, title=title, subtitle=told,
                           suggestions={} if test.accuracy.size else suggestions, split=test.split,
                           smoothed=test.per == "step")  # fmt: skip
    save_figure(figure, (folder / FILE).with_suffix(".png"))
    if test.accuracy.size:
        figure = draw_lr_accuracy(test.lrs, test.accuracy, logarithmic=is_log, title=title, subtitle=told,
                                  suggestions=suggestions, split=test.split)  # fmt: skip
        save_figure(figure, folder / "lr_accuracy.png")


def draw_plan(schedule: Schedule, title: str) -> Any:
    """The learning rate and momentum of a run that is yet to be, its turning points marked."""
    config, steps = schedule.config, np.arange(1, schedule.num_steps + 1)
    rates = [schedule.lr_at(int(step)) for step in steps]
    momenta = [schedule.momentum_at(int(step)) for step in steps]
    name = "momentum" if config.optimizer in ("sgd", "rmsprop", "muon") else "beta1"
    held = config.momentum if name == "momentum" else config.beta1
    return draw_lr(steps, rates, [held if m is None else m for m in momenta], steps_per_epoch=schedule.steps_per_epoch,
                   title=title, marks=schedule.marks(), momentum_name=name)  # fmt: skip


def draw_evaluation_figures(folder: Path, evaluation: "Evaluation", images: NDArray[np.uint8],
                            class_names: Sequence[str]) -> None:  # fmt: skip
    """Confusion matrix, accuracy per class, reliability, surest mistakes, most doubtful images, a sample of right and wrong ones.

    images: the evaluated split's, uint8 N×3×H×W.
    """
    folder.mkdir(exist_ok=True)
    per_class = evaluation.per_class
    title = f"Confusion matrix: {evaluation.split} images"
    save_figure(draw_confusion(evaluation.confusion, class_names, title=title), folder / "confusion.png")
    chart = draw_class_accuracy(per_class["accuracy"], per_class["support"], class_names)
    save_figure(chart, folder / "class_accuracy.png")
    save_figure(draw_calibration(measure_calibration(evaluation.logits, evaluation.labels)), folder / "reliability.png")
    listed = {
        "mistakes": ("Wrong, and surest of it", evaluation.mistakes(36)["row"]),
        "doubtful": ("Most doubtful", evaluation.doubtful(36)["row"]),
        "samples": ("Some right, some wrong", evaluation.sample()),
    }
    for name, (title, rows) in listed.items():
        if len(rows):
            probability = evaluation.probabilities[rows].max(axis=1)
            shown, labels, predicted = images[evaluation.indices[rows]], evaluation.labels[rows], evaluation.predicted[rows]
            figure = draw_samples(shown, labels, predicted, probability, class_names, title=title)
            save_figure(figure, folder / f"{name}.png")


def draw_calibration(found: Calibration) -> Any:
    """The reliability diagram with its numbers in the subtitle."""
    told = [f"ECE {100 * found.ece:.2f} % (bins of equal mass {100 * found.ece_equal_mass:.2f} %); of a perfectly calibrated "
            f"model up to {100 * found.ece_by_chance:.2f} %",
            f"mean confidence {100 * found.mean_confidence:.2f} %, accuracy {100 * found.accuracy:.2f} %; largest gap "
            f"{100 * found.mce:.1f} %; Brier {found.brier:.4f}"]  # fmt: skip
    return draw_reliability(found.edges, found.counts, found.confidence, found.accuracies,
                            subtitle=told if found.num_images else "no image with finite logits")  # fmt: skip
