"""What a study is: which trainings, what is drawn of them, and what is concluded. No torch here: a laptop reads a study too.

A study is one file that ends in one `Study`; its line in `STUDIES` makes it a command. The frame around it (`conduct`) trains
what `plan` asks for over all seeds, lets `analyse` look at the trained runs, then draws and concludes from the folder alone.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cifarlab.config import TrainConfig, WatchConfig
from cifarlab.runs import Run


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One of the things compared: the base config with some fields changed, trained once for every seed.

    name: as figures, tables and conclusions call it. changes: fields of TrainConfig (not seed). is_base: what the others are
    compared with; at most one arm of a study. settings: the columns of the table that tell the arms apart, where these are not
    the changes.
    """

    name: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    is_base: bool = False
    settings: Mapping[str, Any] | None = None

    @property
    def columns(self) -> Mapping[str, Any]:
        return self.changes if self.settings is None else self.settings


@dataclass(frozen=True)
class Trial:
    """One training of a study: an arm with a seed. `run`: its folder's name, where study.json has given it one."""

    arm: str
    config: TrainConfig
    run: str = ""

    @property
    def seed(self) -> int:
        return self.config.seed


@dataclass(frozen=True)
class Outcome:
    """A trial and what became of it. `state`: finished, diverged, pruned, failed, or unfinished."""

    trial: Trial
    run: Run
    state: str

    def at_report(self, key: str) -> float:
        """A metric such as "val/accuracy" or "clean/accuracy" at the step that the run reports; nan where there is none."""
        if self.state != "finished" or key not in self.run.metrics:
            return math.nan
        at = self.run.metrics.steps(key) == self.run.result["reported_step"]
        return float(self.run.metrics[key][at][-1]) if at.any() else math.nan

    @property
    def steps_per_epoch(self) -> int:
        return int(self.run.environment["steps_per_epoch"])


@dataclass(frozen=True, kw_only=True)
class Results:
    """A study's folder, read: what `draw` and `conclude` go by.

    folder: of the study; `analyse` leaves its arrays in folder/analysis, where draw finds them. base: the config that the arms
    change. options: the study's own options, defaults filled in. record: study.json as it is.
    """

    folder: Path
    base: TrainConfig
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    outcomes: tuple[Outcome, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    record: Mapping[str, Any] = field(default_factory=dict)

    @property
    def base_arm(self) -> Arm | None:
        return next((arm for arm in self.arms if arm.is_base), None)

    @cached_property
    def _by_arm(self) -> dict[str, dict[int, Outcome]]:
        found: dict[str, dict[int, Outcome]] = {arm.name: {} for arm in self.arms}
        for outcome in self.outcomes:
            found[outcome.trial.arm][outcome.trial.seed] = outcome
        return found

    def of(self, arm: Arm | str) -> list[Outcome]:
        """The arm's outcomes in the order of the seeds, whatever became of them."""
        by_seed = self._by_arm[arm if isinstance(arm, str) else arm.name]
        return [by_seed[seed] for seed in self.seeds if seed in by_seed]

    def runs(self, arm: Arm | str) -> list[Run]:
        """The arm's finished runs, in the order of the seeds."""
        return [outcome.run for outcome in self.of(arm) if outcome.state == "finished"]

    def values(self, arm: Arm | str, key: str = "val/accuracy") -> NDArray[np.float64]:
        """The metric at each run's reported step, one number a seed: nan where a run diverged or is missing."""
        return np.array([outcome.at_report(key) for outcome in self.of(arm)])

    def count(self, state: str, arm: Arm | str | None = None) -> int:
        """How many trials (of that arm) ended so: "diverged" for instance."""
        return sum(outcome.state == state for outcome in (self.outcomes if arm is None else self.of(arm)))


@dataclass(frozen=True, kw_only=True)
class Study:
    """A question, the trainings that answer it, its figures, and its conclusion.

    name: of its command. question: one sentence. source: paper, lab. answer: what counts as one.
    plan(base, values): the arms. `values` holds what `--set field=v1,v2` gave for the fields in `varies`, in place of the
    study's own values. A study without trainings gives an empty list.
    varies: fields of TrainConfig whose values the study goes through, so that several may be given; "*" is any field.
    prepare(base): what every trial of it needs, such as clean images; by default the base itself.
    options: its own options with their defaults, set by `--set name=value` too (grid points, image indices, …). One called
    run names a finished run to look into; where it is given, nothing is trained.
    analyse(results, watch): what needs torch and trained runs; it writes arrays into results.folder / "analysis", may be killed
    and called again, and imports torch inside. watch: where data and device are.
    watch(base): fields of WatchConfig that its trainings need, such as trajectory_every.
    draw(results): figure name -> figure, for PNG and SVG. conclude(results): Markdown, without a heading of its own.
    space(base, values): what `--search` may try, field -> ("choice", values), ("log", low, high); None has nothing to search.
    needs_validation: hold out validation images where the base has none; seeds: how many are enough when none are given.
    """

    name: str
    question: str
    source: str
    answer: str
    plan: Callable[[TrainConfig, Mapping[str, list[Any]]], list[Arm]]
    draw: Callable[[Results], dict[str, Any]]
    conclude: Callable[[Results], str]
    varies: tuple[str, ...] = ()
    prepare: Callable[[TrainConfig], TrainConfig] = lambda base: base
    options: Mapping[str, Any] = field(default_factory=dict)
    analyse: Callable[[Results, WatchConfig], None] | None = None
    watch: Callable[[TrainConfig], Mapping[str, Any]] = lambda base: {}
    space: Callable[[TrainConfig, Mapping[str, list[Any]]], dict[str, tuple[Any, ...]]] | None = None
    needs_validation: bool = True
    seeds: tuple[int, ...] = (0, 1, 2)


def make_trials(base: TrainConfig, arms: list[Arm], seeds: tuple[int, ...]) -> list[Trial]:
    """Every arm with every seed; the arms of a seed stand together, so that a study cut short can be compared in pairs."""
    return [Trial(arm.name, replace(base, **arm.changes, seed=seed)) for seed in seeds for arm in arms]
