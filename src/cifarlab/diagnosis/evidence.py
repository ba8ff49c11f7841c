"""What the rules look at: the recent rows and probe tables of a run, and what it began with. No torch here."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cifarlab.config import InputError

WINDOW = 100  # steps that a rule sees
FIRST = 20  # steps that count as the beginning, against which growth is measured

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Parameter:
    """One parameter tensor of the network, in the order of its definition."""

    name: str
    shape: tuple[int, ...]
    trainable: bool = True

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
            parameters = tuple(Parameter(str(p["name"]), tuple(map(int, p["shape"])), bool(p["trainable"]))
                               for p in values.get("parameters", []))  # fmt: skip
            return cls(parameters=parameters, num_classes=int(values.get("num_classes", 0)))
        except (KeyError, TypeError, ValueError, AttributeError):
            raise InputError("probes.json lists no parameters that can be read: the run folder is damaged") from None


@dataclass
class Evidence:
    """The run as the rules see it at one step: `window` holds the last WINDOW steps, `beginning` the first FIRST measured ones.

    rows: step rows of the window; evaluations: all rows of evaluations so far; beginning: step rows of the first steps.
    peak_lr: the largest learning rate so far. sparse: for a probe that measures at an interval, its last few records.
    """

    facts: Facts
    step: int = 0
    rows: deque[dict[str, float]] = field(default_factory=lambda: deque(maxlen=WINDOW))
    beginning: list[dict[str, float]] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)
    peak_lr: float = 0.0
    _records: dict[str, deque[tuple[int, Array]]] = field(default_factory=dict)
    _first: dict[str, list[tuple[int, Array]]] = field(default_factory=dict)
    _shapes: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = field(default_factory=dict)

    # ---- filling ---------------------------------------------------------------------------------------------------------

    def add_row(self, row: dict[str, float]) -> None:
        if "epoch" in row:
            self.evaluations.append(row)
            return
        self.rows.append(row)
        if len(self.beginning) < FIRST:
            self.beginning.append(row)
        self.peak_lr = max(self.peak_lr, row.get("lr", 0.0))

    def add_record(self, name: str, items: tuple[str, ...], columns: tuple[str, ...], step: int, values: Array) -> None:
        self._shapes[name] = (items, columns)
        self._records.setdefault(name, deque(maxlen=WINDOW)).append((step, values))
        first = self._first.setdefault(name, [])
        if len(first) < FIRST:
            first.append((step, values))

    # ---- reading ---------------------------------------------------------------------------------------------------------

    def steps(self, name: str) -> NDArray[np.int64]:
        """The steps of a probe's records that lie in the window of steps (of the sparse ones: the last WINDOW records)."""
        return np.array([step for step, _ in self._records.get(name, ())], np.int64)

    def column(self, name: str, column: str) -> Array:
        """(records, items) of a probe's column over the same steps; (0, 0) where nothing was measured."""
        return self._stack(name, column, self._records.get(name, ()))

    def column_at_first(self, name: str, column: str) -> Array:
        """The same over the run's first records."""
        return self._stack(name, column, self._first.get(name, ()))

    def items(self, name: str) -> tuple[str, ...]:
        return self._shapes.get(name, ((), ()))[0]

    def values(self, key: str, rows: Iterable[dict[str, float]] | None = None) -> Array:
        """A key of the step rows of the window, (n,); rows without it are left out."""
        return np.array([row[key] for row in (self.rows if rows is None else rows) if key in row])

    @property
    def matrices(self) -> NDArray[np.intp]:
        """Indices of the trainable weight matrices among the parameters, in the network's order."""
        return np.array([k for k, p in enumerate(self.facts.parameters) if p.is_matrix and p.trainable], np.intp)

    def name(self, index: int) -> str:
        return self.facts.parameters[index].name

    def _stack(self, name: str, column: str, records: Iterable[tuple[int, Array]]) -> Array:
        kept = list(records)
        if not kept:
            return np.empty((0, 0))
        place = self._shapes[name][1].index(column)
        return np.stack([values[:, place] for _, values in kept])
