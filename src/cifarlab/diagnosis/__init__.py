"""What is wrong with a training, told from its rows and probes: rules, each with evidence, cause, remedy and reference.

No torch here: the same rules run live in the loop and over any run's folder afterwards, with the same result.
"""

import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from cifarlab.config import InputError
from cifarlab.diagnosis import gradients, losses, stability, units, updates
from cifarlab.diagnosis.evidence import USED, Evidence, Facts
from cifarlab.diagnosis.finding import Finding
from cifarlab.records import Measured, Table
from cifarlab.runs import Run

__all__ = ["RULES", "Alarm", "Diagnosis", "Evidence", "Facts", "Finding", "Rule", "diagnose", "diagnose_run"]

CHECK_EVERY = 20  # steps: the same whenever rows arrive, so that a replay raises what the live run raised


@dataclass(frozen=True)
class Rule:
    """A way to find one kind of trouble.

    needs: probes or keys of rows, of which one must have been measured for the rule to be asked.
    explains: rules whose trouble is usually a consequence of this one's; theirs are not raised beside or after it.
    """

    find: Callable[[Evidence], Finding | None]
    needs: tuple[str, ...]
    explains: tuple[str, ...] = ()

    @property
    def summary(self) -> str:
        return (self.find.__doc__ or "").splitlines()[0].rstrip(".")


# Of a network whose numbers are broken, nothing more can be said.
_ALL_ELSE = ("non_finite", "zero_weights", "vanishing", "dead_units", "no_gradient", "not_learning", "saturated", "unstable_lr",
             "update_too_large", "update_too_small", "stalled", "loss_spike", "overfitting", "norm_drift",
             "always_clipped")  # fmt: skip

RULES: dict[str, Rule] = {  # causes before what they explain
    "exploding": Rule(gradients.exploding, ("gradient_flow", "weight_flow", "train/loss"), _ALL_ELSE),
    "non_finite": Rule(gradients.non_finite, ("gradient_flow", "train/loss"), _ALL_ELSE[1:]),
    "zero_weights": Rule(
        updates.zero_weights, ("weight_flow",),
        ("dead_units", "vanishing", "no_gradient", "stalled", "not_learning", "update_too_small", "norm_drift"),
    ),
    "vanishing": Rule(gradients.vanishing, ("gradient_flow",), ("stalled", "update_too_small", "not_learning", "no_gradient")),
    "dead_units": Rule(
        units.dead_units, ("activations",), ("vanishing", "no_gradient", "stalled", "not_learning", "update_too_small")
    ),
    "no_gradient": Rule(
        gradients.no_gradient, ("gradient_flow",), ("dead_units", "vanishing", "stalled", "not_learning", "update_too_small")
    ),
    "not_learning": Rule(updates.not_learning, ("update_flow",), ("vanishing", "update_too_small")),
    "saturated": Rule(units.saturated, ("activations",), ("stalled", "update_too_small")),
    "unstable_lr": Rule(stability.unstable_lr, ("curvature",), ("loss_spike", "update_too_large", "stalled")),
    "update_too_large": Rule(updates.update_too_large, ("update_flow",), ("norm_drift", "stalled")),
    "always_clipped": Rule(gradients.always_clipped, ("gradient_flow",), ("update_too_small", "stalled")),
    "update_too_small": Rule(updates.update_too_small, ("update_flow",), ("stalled",)),
    "stalled": Rule(losses.stalled, ("train/loss",)),
    "loss_spike": Rule(losses.loss_spike, ("train/loss",)),
    "overfitting": Rule(losses.overfitting, ("val/loss", "test/loss")),
    "norm_drift": Rule(units.norm_drift, ("batch_norm",)),
}  # fmt: skip


@dataclass(frozen=True)
class Alarm:
    """A finding with its place in the run: what was seen, where, why probably, and what to do.

    step: the first at which it showed; layers: those concerned, worst first; noticed: the step at which it was raised.
    """

    rule: str
    step: int
    noticed: int
    layers: tuple[str, ...]
    evidence: str
    cause: str
    remedy: str
    reference: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"layers": list(self.layers)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Alarm":
        return cls(**(values | {"layers": tuple(values["layers"])}))

    def format(self, width: int = 100) -> list[str]:
        """A few lines: what and where, then evidence, cause and remedy."""
        where = ", ".join(self.layers[:4]) + (f" and {len(self.layers) - 4} more" if len(self.layers) > 4 else "")
        head = f"  ALARM at step {self.step:,}: {self.rule.replace('_', ' ')}" + (f" · {where}" if where else "")
        lines = textwrap.wrap(head, width, subsequent_indent="    ")
        for name in ("evidence", "cause", "remedy", "reference"):
            lines += textwrap.wrap(f"{name:9} {getattr(self, name)}", width, initial_indent="    ", subsequent_indent=" " * 14)
        return lines

    def __str__(self) -> str:
        where = f" in {', '.join(self.layers[:3])}{' …' if len(self.layers) > 3 else ''}" if self.layers else ""
        what = f"step {self.step:,}: {self.rule.replace('_', ' ')}{where}"
        return f"{what}: {self.evidence}. {self.cause}. {self.remedy}. [{self.reference}]"


class Diagnosis:
    """Sees a run's rows and records in order, and says each trouble once, at the first check at which a rule finds it.

    Rules are asked at every CHECK_EVERY-th step, at evaluations and at the end; one that another's alarm explains keeps silent.
    incident: what incidents/ of the run folder tell of a step, or None.
    """

    def __init__(self, facts: Facts, rules: dict[str, Rule] | None = None, *,
                 incident: Callable[[int], dict[str, Any] | None] = lambda step: None) -> None:  # fmt: skip
        self.evidence = Evidence(facts, incident)
        self.raised: list[Alarm] = []
        self._rules = RULES if rules is None else rules

    def see(self, rows: Iterable[dict[str, float]], tables: Sequence[Measured | Table]) -> list[Alarm]:
        """The alarms that these new rows and records raise. A step's records must come with its row."""
        tables = [table for table in tables if table.name in USED]
        # As in the file, in float32: live and replayed numbers are the same to the last digit.
        with np.errstate(over="ignore"):
            values = [t.values if t.values.dtype == np.float32 else t.values.astype(np.float32) for t in tables]
        places = [0] * len(tables)  # of each table's next record: steps rise in tables as they do in rows
        raised = []
        for row in rows:
            is_evaluation = "epoch" in row
            self.evidence.step = int(row["step"])
            if not is_evaluation:
                step = self.evidence.step
                for k, table in enumerate(tables):
                    while places[k] < len(table.steps) and table.steps[places[k]] <= step:
                        if table.steps[places[k]] == step:
                            self.evidence.add_record(table.name, table.items, table.columns, step, values[k][places[k]])
                        places[k] += 1
            self.evidence.add_row(row)
            if is_evaluation or self.evidence.step % CHECK_EVERY == 0:
                raised += self._check()
        return raised

    def finish(self) -> list[Alarm]:
        """A last check, at whatever step the run ended."""
        return self._check()

    @property
    def unasked(self) -> dict[str, tuple[str, ...]]:
        """Rules that had nothing to look at, with what one of would have had to be measured for them."""
        return {name: rule.needs for name, rule in self._rules.items() if not any(map(self.evidence.has, rule.needs))}

    def _check(self) -> list[Alarm]:
        raised = []
        silent = {name for alarm in self.raised for name in (alarm.rule, *self._rules[alarm.rule].explains)}
        for name, rule in self._rules.items():
            if name in silent:
                continue
            finding = rule.find(self.evidence)
            if finding:
                alarm = Alarm(name, finding.step or self.evidence.step, self.evidence.step, finding.layers, finding.evidence,
                              finding.cause, finding.remedy, finding.reference)  # fmt: skip
                raised.append(alarm)
                silent |= {name, *rule.explains}
        self.raised += raised
        return raised


def diagnose(facts: Facts, rows: Iterable[dict[str, float]], tables: dict[str, Table],
             incident: Callable[[int], dict[str, Any] | None] = lambda step: None) -> Diagnosis:  # fmt: skip
    """The diagnosis of a whole run, its alarms as they would have been raised while it ran."""
    diagnosis = Diagnosis(facts, incident=incident)
    diagnosis.see(rows, list(tables.values()))
    diagnosis.finish()
    return diagnosis


def diagnose_run(run: Run) -> Diagnosis:
    """The same of a run's folder: finished, still running, diverged or watched.

    Raises InputError where the folder is damaged.
    """
    num_classes = run.probed.get("num_classes", 0)
    if not num_classes and (run.path / "dataset.json").exists():
        num_classes = len(run.dataset["class_names"])
    facts = Facts.from_dict(run.probed | {"num_classes": num_classes})
    names = tuple(p.name for p in facts.parameters)
    for name in ("gradient_flow", "weight_flow", "update_flow"):
        if name in run.tables and run.tables[name].items != names:
            raise InputError(f"{run.path} has other parameters in probes/{name}.rec than in probes.json: it mixes two runs")
    return diagnose(facts, run.metrics.rows, run.tables, run.incident)
