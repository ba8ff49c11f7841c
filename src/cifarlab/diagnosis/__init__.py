"""What is wrong with a training, told from its rows and probes: rules, each with evidence, cause, remedy and reference.

No torch here: the same rules run live in the loop and over any run's folder afterwards, with the same result.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from cifarlab.diagnosis import gradients, losses, stability, units, updates
from cifarlab.diagnosis.evidence import Evidence, Facts
from cifarlab.diagnosis.finding import Finding
from cifarlab.records import Measured, Table

__all__ = ["RULES", "Alarm", "Diagnosis", "Evidence", "Facts", "Finding", "Rule"]

CHECK_EVERY = 20  # steps: the same whenever rows arrive, so that a replay raises what the live run raised


@dataclass(frozen=True)
class Rule:
    """A way to find one kind of trouble.

    explains: rules whose trouble is usually a consequence of this one's; theirs are not raised beside or after it.
    """

    find: Callable[[Evidence], Finding | None]
    explains: tuple[str, ...] = ()

    @property
    def summary(self) -> str:
        return (self.find.__doc__ or "").splitlines()[0].rstrip(".")


RULES: dict[str, Rule] = {  # causes before what they explain
    "exploding": Rule(gradients.exploding, (
        "non_finite", "loss_spike", "stalled", "update_too_large", "update_too_small", "unstable_lr", "norm_drift", "saturated",
        "dead_units", "vanishing", "not_learning", "zero_weights", "overfitting")),
    "non_finite": Rule(gradients.non_finite, (
        "loss_spike", "stalled", "update_too_large", "update_too_small", "unstable_lr", "norm_drift", "saturated", "dead_units",
        "vanishing", "not_learning", "zero_weights", "overfitting")),
    "zero_weights": Rule(updates.zero_weights, ("dead_units", "vanishing", "stalled", "not_learning", "update_too_small")),
    "vanishing": Rule(gradients.vanishing, ("stalled", "update_too_small", "not_learning")),
    "dead_units": Rule(units.dead_units, ("vanishing", "stalled", "not_learning", "update_too_small")),
    "not_learning": Rule(updates.not_learning, ("vanishing", "update_too_small")),
    "saturated": Rule(units.saturated, ("stalled", "update_too_small")),
    "unstable_lr": Rule(stability.unstable_lr, ("loss_spike", "update_too_large")),
    "update_too_large": Rule(updates.update_too_large, ("norm_drift",)),
    "update_too_small": Rule(updates.update_too_small, ("stalled",)),
    "stalled": Rule(losses.stalled),
    "loss_spike": Rule(losses.loss_spike),
    "overfitting": Rule(losses.overfitting),
    "norm_drift": Rule(units.norm_drift),
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

    def __str__(self) -> str:
        where = f" in {', '.join(self.layers[:3])}{' …' if len(self.layers) > 3 else ''}" if self.layers else ""
        return f"step {self.step:,}: {self.rule.replace('_', ' ')}{where}: {self.evidence}. {self.cause}. {self.remedy}. [{self.reference}]"


class Diagnosis:
    """Sees a run's rows and records in order, and says each trouble once, at the first check at which a rule finds it.

    Rules are asked at every CHECK_EVERY-th step, at evaluations and at the end; a rule that another's alarm explains keeps silent.
    """

    def __init__(self, facts: Facts, rules: dict[str, Rule] | None = None) -> None:
        self.evidence = Evidence(facts)
        self.raised: list[Alarm] = []
        self._rules = RULES if rules is None else rules

    def see(self, rows: list[dict[str, float]], tables: list[Measured] | list[Table]) -> list[Alarm]:
        """The alarms that these new rows and records raise. A step's records must come with its row."""
        records: dict[int, list[tuple[Table | Measured, int]]] = {}
        for table in tables:
            for k, step in enumerate(table.steps.tolist()):
                records.setdefault(step, []).append((table, k))
        raised = []
        for row in rows:
            is_evaluation = "epoch" in row
            self.evidence.step = int(row["step"])
            if not is_evaluation:
                for table, k in records.pop(self.evidence.step, ()):
                    self.evidence.add_record(table.name, table.items, table.columns, self.evidence.step, table.values[k].astype(float))
            self.evidence.add_row(row)
            if is_evaluation or self.evidence.step % CHECK_EVERY == 0:
                raised += self._check()
        return raised

    def finish(self) -> list[Alarm]:
        """A last check, at whatever step the run ended."""
        return self._check()

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


def diagnose(facts: Facts, rows: list[dict[str, float]], tables: dict[str, Table]) -> list[Alarm]:
    """Every alarm of a whole run, as it would have been raised while it ran."""
    diagnosis = Diagnosis(facts)
    return [*diagnosis.see(rows, list(tables.values())), *diagnosis.finish()]
