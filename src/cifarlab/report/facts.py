"""A finished or running run as the rules of findings see it: numbers read once, each None where it was not measured."""

import json
import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from cifarlab.calibration import Calibration, measure_calibration
from cifarlab.config import TrainConfig
from cifarlab.diagnosis.evidence import FIRST
from cifarlab.evaluate import Evaluation, load_evaluation
from cifarlab.figures.classes import wilson
from cifarlab.gallery import table_to_draw
from cifarlab.recipes import RECIPES, Recipe
from cifarlab.runs import Row, Run

Array = NDArray[np.float64]
MOST_RECORDS = 2000  # of a probe's table, evenly spaced: a long run has a hundred thousand
LOW_LR = 0.1  # of the peak: below it small updates are what the schedule wants


@dataclass(frozen=True, eq=False)
class Facts:
    """Everything is read when it is first asked for. config: None of a watched run."""

    run: Run

    @cached_property
    def config(self) -> TrainConfig | None:
        return None if self.run.is_watched else self.run.config

    @property
    def is_training(self) -> bool:
        """Whether a trained network was wanted: no range test of learning rates."""
        return self.config is None or not self.config.is_range_test

    @cached_property
    def recipe(self) -> Recipe | None:
        """The recipe that all settings but the seed are equal to."""
        if self.config is None or self.config.recipe not in RECIPES:
            return None
        recipe = RECIPES[self.config.recipe]
        return recipe if recipe.build().matches(self.config, seed=False) else None

    @cached_property
    def data_source(self) -> str:
        return "" if self.run.is_watched else str(self.run.dataset.get("source", ""))

    @property
    def is_official(self) -> bool:
        """Whether the data are a public set's own pixels, so that published figures can be compared with."""
        if self.config is None or self.config.data not in ("cifar10", "cifar100", "digits"):
            return False
        return "JPEG-coded" not in self.data_source and "not the official" not in self.data_source

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        return self._loaded[1] if self._loaded else ()

    @cached_property
    def _loaded(self) -> tuple[Evaluation, tuple[str, ...]] | None:
        """The final evaluation: of a finished run only, whose numbers are those of its end."""
        if self.run.result.get("state") != "finished" or not (self.run.path / "predictions.npz").exists():
            return None
        return load_evaluation(self.run.path)

    @property
    def evaluation(self) -> Evaluation | None:
        return self._loaded[0] if self._loaded else None

    @cached_property
    def calibration(self) -> Calibration | None:
        if self.evaluation is None:
            return None
        found = measure_calibration(self.evaluation.logits, self.evaluation.labels)
        return found if found.num_images else None

    @cached_property
    def confusion(self) -> NDArray[np.int64]:
        """(K, K), row = true class; (0, 0) without an evaluation. Not scikit-learn's, whose import takes 1.7 s."""
        if self.evaluation is None:
            return np.zeros((0, 0), np.int64)
        k, predicted = self.evaluation.num_classes, self.evaluation.predicted
        kept = predicted >= 0
        return np.bincount(self.evaluation.labels[kept] * k + predicted[kept], minlength=k * k).reshape(k, k)

    @cached_property
    def support(self) -> NDArray[np.int64]:
        """(K,): test images of each class."""
        return np.bincount(self.evaluation.labels, minlength=len(self.class_names)) if self.evaluation else np.zeros(0, np.int64)

    @cached_property
    def test_accuracy(self) -> float:
        """0…1 at the reported step; nan where it was not measured."""
        return float(self.run.result.get("test/accuracy", math.nan))

    @cached_property
    def test_interval(self) -> tuple[float, float]:
        """95 % interval of the test accuracy over test sets of this size (Wilson's)."""
        n = len(self.evaluation.labels) if self.evaluation else 0
        return interval(round(self.test_accuracy * n), n) if n and math.isfinite(self.test_accuracy) else (math.nan, math.nan)

    @cached_property
    def epochs(self) -> list[Row]:
        """The rows of evaluations, in order."""
        return self.run.metrics.rows.having("epoch")

    def curve(self, key: str) -> tuple[Array, Array]:
        """(epochs, values) of a key of those rows."""
        rows = [row for row in self.epochs if key in row]
        return np.array([row["epoch"] for row in rows]), np.array([float(row[key]) for row in rows])

    @cached_property
    def flops_per_image(self) -> float:
        """FLOP of forward and backward of one training image; nan where nothing was counted.

        Backward is twice forward, less the gradient of the first layer's input, which is not asked for.
        """
        layers = [layer for layer in self.layers if layer["forward_macs"]]
        return 2.0 * (3 * sum(layer["forward_macs"] for layer in layers) - layers[0]["forward_macs"]) if layers else math.nan

    @cached_property
    def layers(self) -> list[dict[str, float]]:
        """cost.json's, in the network's order."""
        path = self.run.path / "cost.json"
        return list(json.loads(path.read_bytes())["layers"]) if path.exists() else []

    def matrices(self, probe: str, column: str) -> tuple[list[str], Array]:
        """(names, values (records, matrices)) of a probe while the learning rate was not low; empty where nothing was measured.

        Weight matrices only: biases and norms begin at 0 or 1. The first FIRST steps are allowed to be wild.
        """
        table = table_to_draw(self.run, probe) if probe in self.run.tables else None
        shapes = {parameter["name"]: parameter["shape"] for parameter in self.run.probed.get("parameters", [])}
        if table is None or column not in table.columns:
            return [], np.empty((0, 0))
        places = [k for k, item in enumerate(table.items) if len(shapes.get(item, ())) > 1]
        kept = table.steps > FIRST
        if "lr" in self.run.metrics:
            steps, lr = self.run.metrics.steps("lr"), self.run.metrics["lr"]
            at = np.clip(np.searchsorted(steps, table.steps), 0, len(steps) - 1)
            kept &= lr[at] >= LOW_LR * lr.max()
        rows = np.flatnonzero(kept)
        rows = rows[np.unique(np.linspace(0, len(rows) - 1, min(len(rows), MOST_RECORDS)).astype(int))] if len(rows) else rows
        if not len(rows) or not places:
            return [], np.empty((0, 0))
        values = table.values[rows][:, places, table.columns.index(column)].astype(float)
        return [table.items[k] for k in places], values


def interval(count: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval of a share of n."""
    low, high = wilson(np.array([count / max(n, 1)]), np.array([float(n)]), z)
    return max(0.0, float(low[0])), min(1.0, float(high[0]))  # rounding takes them a hair beyond
