"""A run's figures folder: which figures there are, and which of its numbers each is drawn from. No torch here."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cifarlab.figures import draw_class_accuracy, draw_confusion, draw_learning_curves, draw_lr, draw_samples, save_figure
from cifarlab.runs import Run

if TYPE_CHECKING:
    from cifarlab.evaluate import Evaluation

CURVES = ("train", "clean", "val", "test")


def draw_run_figures(run: Run, evaluation: "Evaluation | None", images: NDArray[np.uint8], class_names: Sequence[str]) -> None:
    """Every figure of a run that has just ended (evaluation None: that diverged).

    Whatever goes wrong here is said and passed over: the numbers are worth more than their pictures.
    """
    try:
        draw_training_figures(run)
        if evaluation:
            draw_evaluation_figures(run.path / "figures", evaluation, images, class_names)
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        told = f"cifarlab: not all figures of {run.path} could be drawn ({why}); its numbers are complete"
        print(" ".join(told.split()), file=sys.stderr)


def draw_training_figures(run: Run) -> None:
    """figures/learning_curves.png and figures/learning_rate.png from the rows of a run, finished or not."""
    metrics, folder = run.metrics, run.path / "figures"
    if "lr" not in metrics:
        return
    steps_per_epoch = run.environment["steps_per_epoch"]
    folder.mkdir(exist_ok=True)
    curves = {
        key: (metrics.steps(key) / steps_per_epoch, metrics[key])
        for key in (f"{split}/{quantity}" for split in CURVES for quantity in ("loss", "accuracy"))
        if key in metrics
    }
    save_figure(draw_learning_curves(curves, title=f"Learning curves: {run.config.recipe}"), folder / "learning_curves.png")
    plan = draw_lr(metrics.steps("lr"), metrics["lr"], metrics.get("momentum"), steps_per_epoch=steps_per_epoch)
    save_figure(plan, folder / "learning_rate.png")


def draw_evaluation_figures(folder: Path, evaluation: "Evaluation", images: NDArray[np.uint8],
                            class_names: Sequence[str]) -> None:  # fmt: skip
    """Confusion matrix, accuracy per class, surest mistakes, most doubtful images, and a sample of right and wrong ones.

    images: the evaluated split's, uint8 N×3×H×W.
    """
    folder.mkdir(exist_ok=True)
    per_class = evaluation.per_class
    title = f"Confusion matrix: {evaluation.split} images"
    save_figure(draw_confusion(evaluation.confusion, class_names, title=title), folder / "confusion.png")
    chart = draw_class_accuracy(per_class["accuracy"], per_class["support"], class_names)
    save_figure(chart, folder / "class_accuracy.png")
    # The sample: twelve right and twelve wrong, evenly spaced over the split, so that it is neither picked nor random.
    finite = np.flatnonzero(evaluation.predicted >= 0)
    is_right = evaluation.predicted[finite] == evaluation.labels[finite]
    spread = np.concatenate([_spread(finite[is_right], 12), _spread(finite[~is_right], 12)])
    listed = {
        "mistakes": ("Wrong, and surest of it", evaluation.mistakes(36)["row"]),
        "doubtful": ("Most doubtful", evaluation.doubtful(36)["row"]),
        "samples": ("Some right, some wrong", spread),
    }
    for name, (title, rows) in listed.items():
        if len(rows):
            probability = evaluation.probabilities[rows].max(axis=1)
            shown, labels, predicted = images[evaluation.indices[rows]], evaluation.labels[rows], evaluation.predicted[rows]
            figure = draw_samples(shown, labels, predicted, probability, class_names, title=title)
            save_figure(figure, folder / f"{name}.png")


def _spread(rows: NDArray[np.intp], count: int) -> NDArray[np.intp]:
    spread: NDArray[np.intp] = rows[np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)]
    return spread
