"""What the rules look at: the recent rows and probe tables of a run, and what it began with. No torch here."""

import math
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cifarlab.config import InputError

WINDOW = 100  # steps that a rule sees
FIRST = 20  # steps that count as the beginning, against which growth is measured

USED = ("gradient_flow", "weight_flow", "update_flow", "activations", "batch_norm", "curvature")  # tables that rules look at

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Parameter:
    """One parameter tensor of the network, in the order of its definition.

    frozen_by_design: its model means it not to be trained.
    """

    name: str
    shape: tuple[int, ...]
    trainable: bool = True
    frozen_by_design: bool = False

    @property
    def is_matrix(self) -> bool:
        """A weight matrix or kernel, and not a bias or a norm's scale."""
        return len(self.shape) > 1


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known of a run before it starts. num_classes 0: not known."""

    parameters: tuple[Parameter, ...] = ()
    num_classes: int = 0

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Facts":
        """From a run's probes.json; raises InputError when that is damaged."""
        try:
            parameters = tuple(Parameter(str(p["name"]), tuple(map(int, p["shape"])), bool(p["trainable"]),
                                         bool(p.get("frozen_by_design", False)))
                               for p in values.get("parameters", []))  # fmt: skip
            return cls(parameters=parameters, num_classes=int(values.get("num_classes", 0)))
        except (KeyError, TypeError, ValueError, AttributeError):
            raise InputError("probes.json lists no parameters that can be read: the run folder is damaged") from None


class _Records:
    """The last WINDOW records of a probe, and its first FIRST, as arrays that need not be put together to be looked at."""

    def __init__(self, items: tuple[str, ...], columns: tuple[str, ...]) -> None:
        self.items, self.columns, self.count = items, columns, 0
        self._steps = np.empty(2 * WINDOW, np.int64)
        self._values = np.empty((2 * WINDOW, len(items), len(columns)))
        self._end = 0
        self.first = np.empty((FIRST, len(items), len(columns)))

    def add(self, step: int, values: NDArray[Any]) -> None:
        if self._end == 2 * WINDOW:
            self._steps[:WINDOW], self._values[:WINDOW] = self._steps[WINDOW:], self._values[WINDOW:]
            self._end = WINDOW
        self._steps[self._end], self._values[self._end] = step, values
        self._end += 1
        if self.count < FIRST:
            self.first[self.count] = values
            self.count += 1

    @property
    def steps(self) -> NDArray[np.int64]:
        return self._steps[max(0, self._end - WINDOW) : self._end]

    @property
    def values(self) -> Array:
        return self._values[max(0, self._end - WINDOW) : self._end]


@dataclass
class Evidence:
    """The run as the rules see it at one step: `window` holds the last WINDOW steps, `beginning` the first FIRST measured ones.

    rows: step rows of the window; beginning: step rows of the first steps. peak_lr: the largest learning rate so far.
    evaluations: all rows so far that hold a held-out loss, with the mean training loss since the one before.
    incident: what incidents/ of the run folder tell of a step, or None. Of a probe that measures at an interval, the window
    holds its last WINDOW records.
    """

    facts: Facts
    incident: Callable[[int], dict[str, Any] | None] = lambda step: None
    step: int = 0
    rows: deque[dict[str, float]] = field(default_factory=lambda: deque(maxlen=WINDOW))
    beginning: list[dict[str, float]] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)
    peak_lr: float = 0.0
    lowest_loss: float = 0.0  # below 0 where one was: such a loss (a critic's, a log-density) has no floor to be compared with
    _keys: set[str] = field(default_factory=set)
    _seen: dict[str, Array] = field(default_factory=dict)  # what `values` gave since the last row
    _since: tuple[float, int] = (0.0, 0)  # training losses since the last evaluation: sum and count
    _records: dict[str, _Records] = field(default_factory=dict)

    # ---- filling ---------------------------------------------------------------------------------------------------------

    def add_row(self, row: dict[str, float]) -> None:
        self._keys |= row.keys()
        self._seen.clear()
        # A loop that is watched has no rows of evaluations: a held-out loss comes with a step.
        if "epoch" in row or "val/loss" in row or "test/loss" in row:
            mean = {"train_epoch/loss": self._since[0] / self._since[1]} if self._since[1] else {}
            self.evaluations.append(mean | row)
            self._since = (0.0, 0)
        if "epoch" in row:
            return
        if "train/loss" in row:
            self._since = (self._since[0] + row["train/loss"], self._since[1] + 1)
        self.rows.append(row)
        if len(self.beginning) < FIRST:
            self.beginning.append(row)
        self.peak_lr = max(self.peak_lr, row.get("lr", 0.0))
        self.lowest_loss = min(self.lowest_loss, row.get("train/loss", 0.0))

    def add_record(self, name: str, items: tuple[str, ...], columns: tuple[str, ...], step: int, values: NDArray[Any]) -> None:
        if name not in USED:
            return
        if name not in self._records:
            self._records[name] = _Records(items, columns)
        self._records[name].add(step, values)

    # ---- reading ---------------------------------------------------------------------------------------------------------

    def steps(self, name: str) -> NDArray[np.int64]:
        """The steps of a probe's records in the window."""
        return self._records[name].steps if name in self._records else np.empty(0, np.int64)

    def column(self, name: str, column: str) -> Array:
        """(records, items) of a probe's column over the same steps; (0, 0) where nothing was measured."""
        if name not in self._records:
            return np.empty((0, 0))
        return self._records[name].values[:, :, self._place(name, column)]

    def column_at_first(self, name: str, column: str) -> Array:
        """The same over the run's first records."""
        if name not in self._records:
            return np.empty((0, 0))
        records = self._records[name]
        return records.first[: records.count, :, self._place(name, column)]

    def has(self, name: str) -> bool:
        """Whether a probe of that name has measured, or a row has that key."""
        return name in self._records or name in self._keys

    def items(self, name: str) -> tuple[str, ...]:
        return self._records[name].items if name in self._records else ()

    def values(self, key: str, rows: Iterable[dict[str, float]] | None = None) -> Array:
        """A key of the step rows of the window, (n,); rows without it are left out."""
        if rows is not None:
            return np.array([row[key] for row in rows if key in row])
        if key not in self._seen:
            self._seen[key] = np.array([row[key] for row in self.rows if key in row])
        return self._seen[key]

    def loss_fell_to(self) -> float:
        """The training loss now (median of the last ten steps) over the first step's; NaN where no loss is known, or one was < 0.

        Inf where the loss is not finite now. The first step's is that of the initial weights; the second's may be beyond measure.
        """
        first, last = self.values("train/loss", self.beginning[:1]), self.values("train/loss")[-10:]
        if not len(first) or not np.isfinite(first[0]) or first[0] <= 0 or self.lowest_loss < 0:
            return math.nan
        return float(np.median(last) / first[0]) if np.isfinite(last).all() else math.inf

    def lr_is_low(self) -> bool:
        """Whether the schedule holds the learning rate down in the window: below a tenth of its peak, or still rising."""
        lr = self.values("lr")
        return bool(len(lr)) and bool(lr.min() < 0.1 * self.peak_lr or lr[-1] > 1.2 * lr[0])

    @property
    def chance(self) -> float:
        """The cross-entropy of a guess, log K; of a network whose K is not told, by the width of its last matrix. NaN: none."""
        if self.facts.num_classes > 1:
            return math.log(self.facts.num_classes)
        widths = [p.shape[0] for p in self.facts.parameters if p.is_matrix]
        return math.log(widths[-1]) if widths and widths[-1] > 1 else math.nan

    @cached_property
    def matrices(self) -> NDArray[np.intp]:
        """Indices of the trainable weight matrices among the parameters, in the network's order."""
        return np.array([k for k, p in enumerate(self.facts.parameters) if p.is_matrix and p.trainable], np.intp)

    def name(self, index: int) -> str:
        return self.facts.parameters[index].name

    def _place(self, name: str, column: str) -> int:
        columns = self._records[name].columns
        if column not in columns:
            raise InputError(f"probes/{name}.rec has no column {column!r}: it is damaged, or of another version of cifarlab")
        return columns.index(column)
