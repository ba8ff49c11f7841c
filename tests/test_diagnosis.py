"""The diagnosis by hand-made rows and records: each rule just above and just below its threshold, and what holds for all."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cifarlab.config import InputError
from cifarlab.diagnosis import RULES, Alarm, Diagnosis, Facts, diagnose
from cifarlab.diagnosis.evidence import Parameter
from cifarlab.records import Table

NAMES = [f"layer{k}.{kind}" for k in range(5) for kind in ("weight", "bias")]
FACTS = Facts(parameters=tuple(Parameter(name, (8, 8) if name.endswith("weight") else (8,)) for name in NAMES), num_classes=10)
W = [0, 2, 4, 6, 8]  # places of the matrices
COLUMNS = {  # of each table, with a healthy value
    "gradient_flow": dict(mean_abs=1e-3, max_abs=1e-2, norm=0.1, clipped_mean_abs=1e-3, clipped_max_abs=1e-2, clipped_norm=0.1,
                          zero_share=0.0, non_finite=0.0),
    "weight_flow": dict(mean=0.0, mean_abs=0.1, max_abs=1.0, norm=2.0, variance=0.01),
    "update_flow": dict(norm=2e-3, ratio=1e-3, mean=0.0, mean_abs=1e-5, max_abs=1e-4, variance=1e-10),
    "activations": dict(mean=0.5, std=1.0, dead_share=0.05, saturated_share=0.0),
    "batch_norm": dict(mean_shift=0.1, variance_ratio=1.0),
    "curvature": dict(sharpness=10.0, edge=40.0, edge_share=0.25, preconditioned=np.nan, residual=0.01, iterations=12),
}  # fmt: skip
ITEMS = {"activations": ("relu0", "relu1"), "batch_norm": ("norm0", "norm1"), "curvature": ("loss",)}
SPARSE = 20

Value = Callable[[int], Any] | float


@dataclass
class Script:
    """A run as it could have been: a healthy one but for what is given. tables: (table, column) -> value of a step."""

    rows: dict[str, Value] = field(default_factory=dict)
    tables: dict[tuple[str, str], Value] = field(default_factory=dict)
    evaluations: dict[str, Callable[[int], float]] = field(default_factory=dict)  # every 20 steps
    steps: int = 240
    facts: Facts = FACTS
    without: tuple[str, ...] = ()

    def play(self) -> tuple[list[dict[str, float]], dict[str, Table]]:
        rows: list[dict[str, float]] = []
        healthy: dict[str, Value] = {
            "lr": 0.1, "train/loss": lambda s: 2.3 * 0.99**s, "gradient_flow/norm": 0.3, "weight_flow/norm": 5.0,
            "update_flow/ratio": 1e-3,
        }  # fmt: skip
        for step in range(1, self.steps + 1):
            values = {key: float(_at(value, step)) for key, value in (healthy | self.rows).items() if key not in self.without}
            if np.isnan(values.get("gradient_flow/clipped_norm", 0.0)):
                del values["gradient_flow/clipped_norm"]  # as in the row of a step that was not clipped
            rows.append({"step": step} | values)
            if step % 20 == 0 and self.evaluations:
                rows.append({"step": step, "epoch": step / 20} | {k: float(f(step // 20)) for k, f in self.evaluations.items()})
        tables = {}
        for name, columns in COLUMNS.items():
            if name in self.without:
                continue
            items = ITEMS.get(name, tuple(NAMES))
            steps = np.arange(1, self.steps + 1) if name.endswith("flow") else np.arange(SPARSE, self.steps + 1, SPARSE)
            values = np.empty((len(steps), len(items), len(columns)), np.float32)
            for place, (column, value) in enumerate(columns.items()):
                for k, step in enumerate(steps.tolist()):
                    values[k, :, place] = _at(self.tables.get((name, column), value), step)
            tables[name] = Table(name, items, tuple(columns), steps, values)
        return rows, tables

    def diagnose(self) -> list[Alarm]:
        return diagnose(self.facts, *self.play()).raised


def _at(value: Value, step: int) -> Any:
    return value(step) if callable(value) else value


def but(healthy: float, *places: int, value: float, when: Callable[[int], bool] = lambda step: True) -> Callable[[int], Any]:
    """A value of all items, with another one at some places."""

    def give(step: int) -> NDArray[np.float64]:
        array = np.full(len(NAMES), float(healthy))
        if when(step):
            array[list(places)] = value
        return array

    return give


def ladder(lowest: float) -> Callable[[int], Any]:
    """Mean |g| that falls evenly from 1e-2 in the last matrix to `lowest` of that in the first."""
    array = np.repeat(1e-2 * np.geomspace(lowest, 1, 5), 2)
    return lambda step: array


def pair(make: Callable[[Any], Script], above: Any, below: Any) -> tuple[Script, Script]:
    return make(above), make(below)


def noisy(step: int) -> float:
    return 0.02 * (-1) ** step


def flat(step: int) -> float:
    """A loss that neither falls nor is at chance level, log 10."""
    return 2.0 + noisy(step)


PAIRS: dict[str, list[tuple[Script, Script]]] = {  # rule -> (just above its threshold, just below)
    "exploding": [
        pair(
            lambda f: Script({"train/loss": flat, "gradient_flow/norm": lambda s: 0.3 * f ** min(1, s // 100)}, steps=180),
            101,
            99,
        ),
        pair(lambda f: Script({"train/loss": flat, "weight_flow/norm": lambda s: 5 * f ** min(1, s // 100)}, steps=180), 11, 9),
        pair(lambda f: Script({"train/loss": lambda s: 2.0 if s < 30 else 2.3 * f}, steps=40), 31, 29),
        pair(lambda r: Script({"train/loss": flat, "update_flow/ratio": r}, steps=180), 0.91, 0.89),
        (
            Script({"train/loss": flat, "gradient_flow/norm": lambda s: 300 if s in (50, 51) else 0.3}, steps=180),
            Script({"train/loss": flat, "gradient_flow/norm": lambda s: 300 if s == 50 else 0.3}, steps=180),
        ),  # one outlier
        (
            Script({"train/loss": flat, "gradient_flow/norm": lambda s: 0.3 if s < 50 else 40}, steps=180),
            Script({"gradient_flow/norm": lambda s: 0.3 if s < 50 else 40}, steps=180),
        ),  # it may, when the loss falls
        pair(
            lambda f: Script({"gradient_flow/norm": lambda s: 0.3 if s < 50 else 0.3 * f}, without=("train/loss",)), 10100, 9900
        ),
    ],
    "non_finite": [
        (
            Script(
                {"train/loss": lambda s: np.nan if s == 30 else 2.0},
                {("gradient_flow", "non_finite"): but(0, 4, value=3, when=lambda s: s == 30)},
                steps=40,
            ),
            Script({}, {("gradient_flow", "non_finite"): 0}, steps=40),
        ),
        (
            Script({"train/loss": lambda s: np.inf if s == 30 else 2.0}, steps=40, without=("gradient_flow",)),
            Script({"train/loss": lambda s: 1e6 if s == 30 else 2.0}, steps=40, without=("gradient_flow",)),
        ),
        # A scaler's skipped step: no weight moves; without update_flow, no loss tells of it.
        (
            Script({}, {("gradient_flow", "non_finite"): but(0, 4, value=3, when=lambda s: s == 30)}, steps=40),
            Script(
                {},
                {
                    ("gradient_flow", "non_finite"): but(0, 4, value=3, when=lambda s: s == 30),
                    ("update_flow", "norm"): lambda s: 0 if s == 30 else 2e-3,
                },
                steps=40,
            ),
        ),
        pair(
            lambda v: Script(
                {"train/loss": lambda s: v if s == 31 else 2.0},
                {("gradient_flow", "non_finite"): but(0, 4, value=3, when=lambda s: s == 30)},
                steps=40,
                without=("update_flow",),
            ),
            np.nan,
            2.0,
        ),
    ],
    "zero_weights": [
        pair(lambda v: Script({}, {("weight_flow", "max_abs"): but(1, 4, value=v)}), 0, 1e-6),
        pair(lambda place: Script({}, {("weight_flow", "max_abs"): but(1, place, value=0)}), 4, 5),  # a bias may be zero
    ],
    "vanishing": [
        pair(lambda low: Script({}, {("gradient_flow", "mean_abs"): ladder(low)}), 4e-6, 5e-6),
        (
            Script({}, {("gradient_flow", "mean_abs"): ladder(1e-8)}),
            Script({}, {("gradient_flow", "mean_abs"): but(1e-3, 0, 2, value=1e-11)}),
        ),  # cut off, not fading
    ],
    "dead_units": [
        pair(lambda v: Script({}, {("activations", "dead_share"): v}), 0.76, 0.74),
        pair(lambda v: Script({}, {("activations", "dead_share"): lambda s: v if s == 100 else 0.1}), 0.96, 0.94),
    ],
    "no_gradient": [
        pair(lambda v: Script({}, {("gradient_flow", "max_abs"): but(1e-2, 0, value=v)}), 0, 1e-12),
        (
            Script({}, {("gradient_flow", "max_abs"): but(1e-2, 0, value=0)}),
            Script({}, {("gradient_flow", "max_abs"): 0}),
        ),  # of all: nothing is left to learn
        pair(
            lambda n: Script({}, {("gradient_flow", "max_abs"): but(1e-2, 0, value=0, when=lambda s: 40 < s <= 40 + n)}), 20, 19
        ),
    ],
    "not_learning": [
        pair(lambda v: Script({}, {("update_flow", "norm"): but(2e-3, 3, value=v)}), 0, 1e-9),
        pair(
            lambda v: Script(
                {}, {("update_flow", "norm"): but(2e-3, 3, value=0), ("gradient_flow", "mean_abs"): but(1e-3, 3, value=v)}
            ),
            1.1e-6,
            0.9e-6,
        ),  # a bias before a batch norm has a gradient of rounding errors
        pair(lambda n: Script({}, {("update_flow", "norm"): but(2e-3, 3, value=0, when=lambda s: 40 < s <= 40 + n)}), 20, 19),
    ],
    "saturated": [
        pair(lambda v: Script({"train/loss": flat}, {("activations", "saturated_share"): v}, steps=180), 0.76, 0.74),
        pair(
            lambda low: Script(
                {"train/loss": lambda s: 2.3 if s == 1 else 2.3 * low}, {("activations", "saturated_share"): 0.8}, steps=180
            ),
            0.71,
            0.69,
        ),
    ],
    "unstable_lr": [
        pair(lambda v: Script({}, {("curvature", "edge_share"): v}), 3.1, 2.9),
        pair(lambda until: Script({}, {("curvature", "edge_share"): lambda s: 5 if s <= until else 1}, steps=140), 140, 120),
    ],
    "update_too_large": [
        pair(lambda v: Script({}, {("update_flow", "ratio"): but(1e-3, 2, value=v)}), 0.11, 0.09),
        pair(lambda place: Script({}, {("update_flow", "ratio"): but(1e-3, place, value=0.5)}), 2, 3),  # biases begin at zero
        pair(lambda n: Script({}, {("update_flow", "ratio"): but(1e-3, 2, value=0.5, when=lambda s: 40 < s <= 40 + n)}), 100, 59),
    ],
    "always_clipped": [
        pair(lambda kept: Script({"gradient_flow/clipped_norm": 0.3 * kept}), 0.49, 0.51),
        (
            Script({"gradient_flow/clipped_norm": 0.01}, steps=120),
            Script({"gradient_flow/clipped_norm": lambda s: 0.01 if s != 60 else np.nan}, steps=120),
        ),  # one step of the window was not
    ],
    "update_too_small": [
        pair(
            lambda v: Script({"train/loss": flat}, {("update_flow", "ratio"): but(1e-3, 2, value=v)}, steps=180), 0.9e-6, 1.1e-6
        ),
        pair(
            lambda low: Script(
                {"train/loss": flat, "lr": lambda s: 0.1 if s == 1 else 0.1 * low},
                {("update_flow", "ratio"): but(1e-3, 2, value=1e-8)},
                steps=180,
            ),
            0.11,
            0.09,
        ),
        pair(
            lambda low: Script(
                {"train/loss": lambda s: 2.3 if s == 1 else 2.3 * low}, {("update_flow", "ratio"): but(1e-3, 2, value=1e-8)}
            ),
            0.11,
            0.09,
        ),
    ],
    "stalled": [
        pair(lambda f: Script({"train/loss": lambda s: 2.0 if s <= 20 else 2.0 * f}), 0.985, 0.975),
        pair(lambda f: Script({"train/loss": lambda s: 3.0 if s <= 20 else np.log(10) * f}), 0.985, 0.975),
        pair(lambda n: Script({"train/loss": flat}, steps=n), 200, 199),
        pair(lambda slope: Script({"train/loss": flat, "lr": lambda s: 0.1 * slope**s}), 1.0017, 1.0020),  # warm-up
        (Script({"train/loss": 1.16}), Script({"train/loss": 0.05})),  # it knew it all
    ],
    "loss_spike": [
        pair(lambda f: Script({"train/loss": lambda s: 1.0 * f + noisy(s) if s in (100, 101) else 0.7 + noisy(s)}), 1.25, 1.17),
        pair(lambda n: Script({"train/loss": lambda s: 5.0 if 100 <= s < 100 + n else 0.7 + noisy(s)}), 2, 1),
    ],
    "overfitting": [
        pair(
            lambda f: Script(evaluations={"test/loss": lambda k: 1.0 if k <= 6 else f, "train_epoch/loss": lambda k: 0.8**k}),
            1.11,
            1.09,
        ),
        pair(
            lambda f: Script(
                evaluations={"test/loss": lambda k: 1.0 + 0.05 * abs(k - 6), "train_epoch/loss": lambda k: 1 if k <= 8 else f}
            ),
            0.89,
            0.91,
        ),
        (
            Script(evaluations={"val/loss": lambda k: 1.0 if k <= 6 else 1.2, "train_epoch/loss": lambda k: 0.8**k}),
            Script(evaluations={"val/loss": lambda k: 0.5 if k == 6 else 1.0, "train_epoch/loss": lambda k: 0.8**k}),
        ),  # a lucky one
    ],
    "norm_drift": [
        pair(lambda v: Script({}, {("batch_norm", "mean_shift"): v}), 1.05, 0.95),
        pair(lambda v: Script({}, {("batch_norm", "variance_ratio"): v}), 4.1, 3.9),
        pair(lambda v: Script({}, {("batch_norm", "variance_ratio"): v}), 1 / 4.1, 1 / 3.9),
        pair(lambda n: Script({}, {("batch_norm", "mean_shift"): lambda s: 3 if 100 <= s <= n else 0}), 120, 100),
    ],
}


@pytest.mark.parametrize(
    ("rule", "above", "below"),
    [pytest.param(rule, *pair, id=f"{rule}-{k}") for rule, pairs in PAIRS.items() for k, pair in enumerate(pairs)],
)
def test_a_rule_fires_above_its_threshold_and_not_below(rule: str, above: Script, below: Script) -> None:
    assert [alarm.rule for alarm in above.diagnose()] == [rule]
    assert [str(alarm) for alarm in below.diagnose()] == []


def test_a_healthy_run_raises_none() -> None:
    assert Script(steps=400).diagnose() == []


@pytest.mark.parametrize("level", [-2.0, -0.001])
def test_a_loss_that_may_be_negative_is_compared_with_nothing(level: float) -> None:
    """A critic's loss goes up and down around its level, first and last; only its jumps and its end can be judged."""
    rows: dict[str, Value] = {"train/loss": lambda s: level * (1.5 + np.sin(s / 7)), "val/loss": lambda s: level * (3 - s / 100)}
    assert [str(alarm) for alarm in Script(rows).diagnose()] == []
    broken = Script({"train/loss": lambda s: level if s < 230 else np.nan}, without=("gradient_flow",))
    assert [alarm.rule for alarm in broken.diagnose()] == ["non_finite"]


def test_every_rule_is_tried_and_what_it_explains_exists() -> None:
    assert PAIRS.keys() == RULES.keys()
    for name, rule in RULES.items():
        assert rule.summary
        assert rule.needs
        assert name not in rule.explains
        assert set(rule.explains) <= RULES.keys()


@pytest.mark.parametrize("rule", RULES)
def test_every_alarm_has_all_its_parts_and_fits_into_100_columns(rule: str) -> None:
    long = Facts(parameters=tuple(Parameter(f"stage4.block{p.name}", p.shape) for p in FACTS.parameters), num_classes=10)
    for above, _ in PAIRS[rule]:
        above.facts = long
        (alarm,) = above.diagnose()
        above.facts = FACTS
        for text in (alarm.evidence, alarm.cause, alarm.remedy, alarm.reference):
            assert text.strip()
            assert not text.endswith((".", " ", ";", ","))
            assert "nan" not in text.lower().replace("nan or", "").split()
        assert 1 <= alarm.step <= alarm.noticed
        lines = alarm.format()
        assert all(len(line) <= 100 for line in lines), lines
        assert Alarm.from_dict(alarm.to_dict()) == alarm


def test_every_rule_is_in_the_documentation() -> None:
    text = (Path(__file__).parent.parent / "docs" / "diagnosis.md").read_text()
    assert [line.split("`")[1] for line in text.splitlines() if line.startswith("| `")] == list(RULES)


@pytest.mark.parametrize("flush", [1, 7, 20, 1000])
def test_the_size_of_flushes_does_not_matter(flush: int) -> None:
    script = Script(
        {"train/loss": lambda s: 5.0 if s in (150, 151) else 2.0 + noisy(s)},
        {("update_flow", "norm"): but(2e-3, 3, value=0), ("batch_norm", "mean_shift"): 2.0, ("update_flow", "ratio"): 0.3},
        {"test/loss": lambda k: 1.0 if k <= 6 else 1.3, "train_epoch/loss": lambda k: 0.8**k},
    )
    rows, tables = script.play()
    whole = diagnose(FACTS, rows, tables).raised
    assert [alarm.rule for alarm in whole] == ["not_learning", "update_too_large", "loss_spike", "overfitting"]
    diagnosis = Diagnosis(FACTS)
    raised = []
    for start in range(0, len(rows), flush):
        part = rows[start : start + flush]
        steps = [int(row["step"]) for row in part if "epoch" not in row]
        raised += diagnosis.see(part, [table.between(steps[0], steps[-1]) for table in tables.values()] if steps else [])
    raised += diagnosis.finish()
    assert raised == whole
    assert diagnosis.finish() == []


def test_a_consequence_is_not_raised_beside_or_after_its_cause() -> None:
    script = Script(
        {"train/loss": flat}, {("weight_flow", "max_abs"): but(1, 4, value=0), ("gradient_flow", "max_abs"): but(1, 2, value=0)}
    )
    assert [alarm.rule for alarm in script.diagnose()] == ["zero_weights"]


def test_rules_whose_probe_did_not_run_are_told() -> None:
    rows, tables = Script(without=("curvature", "batch_norm")).play()
    assert diagnose(FACTS, rows, tables).unasked == {
        "unstable_lr": ("curvature",), "overfitting": ("val/loss", "test/loss"), "norm_drift": ("batch_norm",),
    }  # fmt: skip
    assert diagnose(Facts(), [{"step": 1}], {}).unasked.keys() == RULES.keys()


def test_rows_alone_are_enough_for_the_rules_on_losses() -> None:
    rows = [{"step": step, "train/loss": 2.0} for step in range(1, 241)]
    assert [alarm.rule for alarm in diagnose(Facts(), rows, {}).raised] == ["stalled"]


def test_a_held_out_loss_that_is_logged_with_a_step_counts_as_an_evaluation() -> None:
    rows = [{"step": step, "train/loss": 0.99**step} for step in range(1, 161)]
    for row in rows[9::10]:
        row["val/loss"] = 1.0 if row["step"] < 100 else 1.5
    (alarm,) = diagnose(Facts(), rows, {}).raised
    assert alarm.rule == "overfitting"


def test_an_incident_names_layer_and_samples() -> None:
    script, _ = PAIRS["non_finite"][0]
    told = {"found": "first in the forward at layer2, samples 3 of the batch", "layer": "layer2", "images": [1024]}
    (alarm,) = diagnose(FACTS, *script.play(), lambda step: told if step == 30 else None).raised
    assert (alarm.step, alarm.layers) == (30, ("layer2",))
    assert "samples 3 of the batch (images 1024 of the training set)" in alarm.evidence


def test_damaged_facts_and_tables_are_refused() -> None:
    with pytest.raises(InputError, match=r"probes\.json"):
        Facts.from_dict({"parameters": [{"name": "w"}]})
    rows, tables = Script(steps=40).play()
    short = tables["gradient_flow"]
    tables["gradient_flow"] = Table("gradient_flow", short.items, ("norm",), short.steps, short.values[:, :, :1])
    with pytest.raises(InputError, match=r"probes/gradient_flow\.rec has no column"):
        diagnose(FACTS, rows, tables)


# ---- an optimizer that seldom steps: NaN in the tables ---------------------------------------------------------------------


def seldom(healthy: float, value: float, every: int) -> Callable[[int], Any]:
    """The first two layers' optimizer steps at every so many steps only, and then gives `value`."""
    first = range(4)
    stepping, waiting = but(healthy, *first, value=value), but(healthy, *first, value=np.nan)
    return lambda step: stepping(step) if step % every == 0 else waiting(step)


def script_of_two(every: int, *, ratio: float = 1e-3, norm: float = 1e-2, weight: float = 0.5, gradient: float = 1e-3) -> Script:
    tables: dict[tuple[str, str], Value] = {
        ("update_flow", "ratio"): seldom(1e-3, ratio, every), ("update_flow", "norm"): seldom(1e-2, norm, every),
        ("weight_flow", "max_abs"): seldom(0.5, weight, every), ("gradient_flow", "mean_abs"): seldom(1e-3, gradient, every),
        ("gradient_flow", "max_abs"): seldom(1e-2, 10 * gradient, every),
    }  # fmt: skip
    return Script({"train/loss": flat}, tables, steps=180)


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        (script_of_two(2), []),
        (script_of_two(5), []),
        (script_of_two(50), []),
        (script_of_two(5, ratio=1e-8), ["update_too_small"]),
        (script_of_two(5, ratio=0.5), ["update_too_large"]),
        (script_of_two(9, ratio=1e-8), []),  # eleven steps are not enough
        (script_of_two(5, norm=0.0, ratio=0.0), ["not_learning"]),
        (script_of_two(9, norm=0.0, ratio=0.0), []),
        (script_of_two(5, weight=0.0, norm=0.0, ratio=0.0, gradient=0.0), ["zero_weights"]),
    ],
    ids=["2", "5", "50", "too small", "too large", "too few", "still", "too few of them", "zero"],
)
def test_steps_that_an_optimizer_did_not_do_count_for_nothing(script: Script, expected: list[str]) -> None:
    assert [alarm.rule for alarm in script.diagnose()] == expected


def test_shares_that_are_not_known_raise_nothing() -> None:
    unknown: dict[tuple[str, str], Value] = {("activations", "dead_share"): np.nan, ("activations", "saturated_share"): np.nan}
    assert Script(tables=unknown).diagnose() == []
    one: dict[tuple[str, str], Value] = {("activations", "dead_share"): lambda step: np.array([np.nan, 0.97])}
    (alarm,) = Script(tables=one).diagnose()
    assert (alarm.rule, alarm.layers) == ("dead_units", ("relu1",))
