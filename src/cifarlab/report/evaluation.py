"""How good the network is, class by class: confusions with the images behind them, scores, surest mistakes, calibration."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from cifarlab.calibration import measure_calibration
from cifarlab.config import InputError
from cifarlab.evaluate import load_evaluation
from cifarlab.figures import draw_class_accuracy, draw_confusion, draw_reliability, draw_samples, how_to_read
from cifarlab.gallery import draw_calibration
from cifarlab.report.charts import take_chart
from cifarlab.report.pictures import Pictures, load_pictures
from cifarlab.report.section import Section, make_section
from cifarlab.runs import Run


def show_evaluation(run: Run) -> Iterator[Section]:
    """Confusion matrix, classes, mistakes and calibration, as far as the run has been evaluated."""
    found = run.evaluation
    if not found:
        return
    try:
        counts, rows = np.array(found["confusion"], dtype=np.int64), found["per_class"]
        names = [str(row["name"]) for row in rows]
        scores = {key: np.array([float(row[key]) for row in rows]) for key in ("accuracy", "precision", "f1", "support")}
        macro = float(found["macro"]["f1"])
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise InputError(f"{run.path / 'evaluation.json'} is damaged ({type(error).__name__}: {error}): "
                         f"run `cifarlab evaluate {run.path}`") from None  # fmt: skip
    pictures = load_pictures(run)
    yield _show_confusion(counts, names, pictures, str(found["split"]))
    chart = take_chart("classes", draw_class_accuracy(scores["accuracy"], scores["support"], names), draw_class_accuracy)
    listed = [{"name": name} | {key: None if np.isnan(column[k]) else float(column[k]) for key, column in scores.items()}
              for k, name in enumerate(names)]  # fmt: skip
    yield make_section("classes", "Classes", "classes.html", chart, rows=listed, macro_f1=macro, has_pictures=bool(pictures))
    if pictures and pictures.mistakes:
        told = (f"The {len(pictures.mistakes[:24])} wrong answers that the network was surest of (true class → its answer).")
        yield make_section("mistakes", "Most confident mistakes", "mistakes.html", told=told, how=how_to_read(draw_samples))
    if (run.path / "predictions.npz").exists():
        evaluation, _ = load_evaluation(run.path)
        drawn = draw_calibration(measure_calibration(evaluation.logits, evaluation.labels))
        calibration = take_chart("reliability", drawn, draw_reliability)
        yield make_section("calibration", "Calibration", "charts.html", calibration, intro="")


def _show_confusion(counts: Any, names: list[str], pictures: Pictures | None, split: str) -> Section:
    chart = take_chart("confusion", draw_confusion(counts, names), draw_confusion)
    per_class = np.maximum(counts.sum(axis=1), 1)
    off = np.where(np.eye(len(names), dtype=bool), 0, counts)
    pairs = [{"true": int(i), "predicted": int(j), "count": int(off[i, j]), "share": float(off[i, j] / per_class[i])}
             for i, j in zip(*np.unravel_index(np.argsort(-off, axis=None, kind="stable"), off.shape), strict=True)
             if off[i, j]]  # fmt: skip
    more: dict[str, Any] = {"names": names, "counts": counts.tolist(), "pictures": _pack_pictures(pictures, names)}
    told = f"Of the {split} images, row: the true class, column: what the network said."
    return make_section("confusion", "Confusion matrix", "confusion.html", chart, more=more, pairs=pairs, names=names, told=told,
                        has_pictures=pictures is not None)  # fmt: skip


def _pack_pictures(pictures: Pictures | None, names: list[str]) -> dict[str, Any] | None:
    if pictures is None:
        return None
    listed = [[p.index, p.true, p.predicted, round(float(p.probability), 4)] for p in pictures.pictures]
    return {
        "uri": pictures.data_uri, "columns": pictures.columns, "rows": pictures.rows, "width": pictures.width,
        "height": pictures.height, "names": names, "pictures": listed, "mistakes": list(pictures.mistakes),
        "cells": {f"{true},{predicted}": list(places) for (true, predicted), places in pictures.cells.items()},
    }  # fmt: skip
