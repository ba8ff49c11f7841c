"""Every rule of the written findings: a folder that triggers it, and one that does not."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cifarlab.config import InputError, TrainConfig
from cifarlab.recipes import RECIPES, load_recipe
from cifarlab.report.facts import Facts, interval
from cifarlab.report.findings import FINDINGS, ORDER, SECTIONS, find
from cifarlab.runs import Run

sys.path.insert(0, str(Path(__file__).parent))
from run_folders import CURVE, calibrated_logits, make_run

sys.path.pop(0)

Case = tuple[dict[str, Any], str, str]  # (what is wrong with the run, severity, words of the sentence)
CUSTOM = TrainConfig(epochs=12.0, recipe="custom")
QUICK = load_recipe("quick")


def with_scores(right: int, n: int = 1000, *, confidence: float = 4.0) -> dict[str, Any]:
    """Logits of a model that has exactly so many right, the mistakes spread over all pairs of classes."""
    labels = np.arange(n) % 10
    predicted = labels.copy()
    wrong = np.arange(right, n)
    predicted[wrong] = (labels[wrong] + 1 + wrong // 10 % 9) % 10
    logits = np.zeros((n, 10), np.float32)
    logits[np.arange(n), predicted] = confidence
    return {"logits": logits, "labels": labels}


def with_confusion(pairs: dict[tuple[int, int], int], support: int = 100, confidence: float = 6.0) -> dict[str, Any]:
    labels = np.repeat(np.arange(10), support)
    predicted = labels.copy()
    for (true, taken_for), count in pairs.items():
        free = np.flatnonzero((labels == true) & (predicted == true))[:count]
        predicted[free] = taken_for
    logits = np.zeros((len(labels), 10), np.float32)
    logits[np.arange(len(labels)), predicted] = confidence
    return {"logits": logits, "labels": labels}


def sharpened(factor: float) -> dict[str, Any]:
    logits, labels = calibrated_logits()
    return {"logits": factor * logits, "labels": labels}


def with_nan() -> dict[str, Any]:
    logits, labels = calibrated_logits()
    logits[:3] = np.nan
    return {"logits": logits, "labels": labels}


ALARM = {"rule": "dead_units", "step": 40, "noticed": 60, "layers": ["conv2"], "evidence": "9 of 10 units are zero",
         "cause": "c", "remedy": "lower the learning rate", "reference": "r"}  # fmt: skip
UNFINISHED = {"is_finished": False}
IMPROVING = np.linspace(0.5, 0.9, 12).tolist()
FLAT = [0.5, 0.7, 0.8, 0.85, 0.88, 0.9, 0.901, 0.899, 0.9, 0.901, 0.899, 0.9]

SAYS: dict[str, list[Case]] = {
    "ending": [
        (UNFINISHED, "note", "120 of 120 steps"),
        ({"is_finished": False, "result": {"state": "diverged", "step": 7}}, "problem", "diverged at step 7"),
        ({"is_finished": False, "result": {"state": "climbed", "step": 7}}, "problem", "stopped at step 7"),
    ],
    "non_finite_logits": [(with_nan(), "problem", "For 3 of 2,000 test images")],
    "accuracy": [(with_scores(969), "note", "969 of 1,000 test images are right: 96.9 %")],
    "expected": [
        ({"config": QUICK, **with_scores(940)}, "warning", "Less than expected: 94.0 %"),
        ({"config": QUICK, **with_scores(980)}, "good", "As expected: 98.0 % on the test set; the recipe quick promises 96.9 %"),
        ({"config": load_recipe("simplecnn-adam", precision="fp32"), **with_scores(940)}, "good", "Better than expected: 94.0 %"),
        ({"config": load_recipe("resnet34-cifar100", precision="bf16"), **with_scores(720)}, "good", "promises 70.0 % to 75.0 %"),
        ({"config": load_recipe("quick", seed=3), **with_scores(990)}, "good", "As expected"),
    ],
    "data_variant": [({"dataset": {"source": "CIFAR-10, parquet, JPEG-coded"}}, "note", "not the data set's own pixels")],
    "chosen_on_test": [({"result": {"reported_step": 50}}, "problem", "the test set has chosen it")],
    "train_test_gap": [
        ({"train": 1.0, **with_scores(800)}, "warning", "Over-fitting: 100.0 %"),
        ({"train": 0.6, **with_scores(600)}, "warning", "Under-fitting: only 60.0 %"),
        ({"train": 0.97, **with_scores(920)}, "note", "A usual gap"),
        ({"train": 0.95, **with_scores(945)}, "good", "No over-fitting shows"),
    ],
    "still_improving": [({"curve": IMPROVING, **with_scores(900)}, "note", "rose by about 10.9 points over the last 4")],
    "plateau": [({"curve": FLAT, **with_scores(900)}, "note", "gained nothing that shows")],
    "better_on_the_way": [({"curve": [*CURVE[:5], 0.95, *CURVE[6:]], **with_scores(900)}, "note", "95.0 % after epoch 6")],
    "worst_class": [
        (with_confusion({(3, 5): 40}), "warning", "60 of 100 images of “cat” are recognised"),
        (with_scores(950), "good", "No class is shown to be worse"),
    ],
    "confused_pair": [
        (with_confusion({(3, 5): 20, (5, 3): 4}), "note", "20 of 100 “cat” are taken for “dog” (13.3 % to 28.9 %), 4 of 100"),
        (with_confusion({(3, 5): 20, (5, 3): 2}), "note", "a lean towards “dog”"),
    ],
    "calibration": [
        ({}, "good", "can be taken at their word"),
        (sharpened(1.4), "note", "Over-confident"),
        (sharpened(2.0), "warning", "Over-confident"),
        (sharpened(0.3), "warning", "Under-confident"),
    ],
    "sure_mistakes": [
        (with_confusion({(3, 5): 40}, confidence=9.0), "warning", "40 of 40 mistakes are made with more than 99 %"),
    ],
    "alarms": [
        ({"alarms": [ALARM]}, "warning", "raised 1 alarm (dead units). The first, at step 40 in conv2: 9 of 10 units are zero."),
        ({}, "good", "no alarm over 120 measured steps"),
    ],
    "update_ratio": [
        ({"ratio": {"conv2.weight": 0.5}}, "warning", "conv2.weight are large beside its weights: ‖Δw‖/‖w‖ is 5.0e-01"),
        ({"ratio": {"conv2.weight": 1e-7}}, "warning", "conv2.weight are small"),
        ({"ratio": {"conv2.weight": 0.02}}, "note", "1 of 3 layers are outside"),
        ({"ratio": {"fc.bias": 0.5}}, "good", "Every layer's updates were of a healthy size"),
    ],
    "gradient_flow": [
        ({"gradient": {"conv1.weight": 1e-8}}, "warning", "(conv1.weight) to 1.0e-03 (conv2.weight), a factor of 100,000"),
        ({"gradient": {"conv1.weight": 0.0}}, "warning", "No gradient reaches conv1.weight"),
        ({}, "good", "Gradients reach every layer"),
    ],
    "averaged_weights": [
        ({"config": replace(CUSTOM, ema_decay=0.99)}, "warning", "over about the last 100 of 120 steps, 83 % of the training"),
        ({"config": replace(CUSTOM, ema_decay=0.9)}, "note", "over about the last 10 of 120 steps."),
    ],
    # 64 images/s of 2 · (3 · 4,000,000 − 1,000,000) FLOP
    "cost": [
        ({}, "note", "Training took 2 min at 64 images/s, which is 1.408 GFLOP/s (forward and backward, 0.022 GFLOP an image)"),
        ({}, "note", "conv2 alone takes 75 %"),
    ],
    "slow_evaluation": [({"epoch_seconds": 20.0}, "note", "50 % of the epochs' 4 min was not training")],
    "slowed_down": [({"speeds": [64.0] * 11 + [20.0]}, "note", "epoch 12 ran at 20 images/s")],
    "probe_cost": [({"result": {"probe_share": 0.2}}, "note", "Probes took 20.0 %")],
    "probes_lost": [({"result": {"probes_lost": {"curvature": "RuntimeError: no"}}}, "warning", "curvature: RuntimeError: no")],
    "uncommitted": [({"environment": {"git": {"commit": "abc", "changed": True}}}, "note", "(on top of abc)")],
}  # fmt: skip

SILENT: dict[str, list[dict[str, Any]]] = {
    "ending": [{}],
    "non_finite_logits": [{}],
    "accuracy": [UNFINISHED],
    "expected": [
        {},  # no recipe's settings
        {"config": load_recipe("quick", lr=1e-3), **with_scores(940)},
        {"config": QUICK, "dataset": {"source": "digits, not the official file"}, **with_scores(940)},
        {"config": load_recipe("resnet18-adam")},  # that has no figure
        UNFINISHED | {"config": QUICK},
    ],
    "data_variant": [{}, {"config": replace(CUSTOM, data="/my/images")}],
    "chosen_on_test": [{}, {"config": replace(CUSTOM, val_fraction=0.1), "result": {"reported_step": 50}}],
    "train_test_gap": [UNFINISHED, {"config": replace(CUSTOM, mixup_alpha=0.2)}],
    "still_improving": [with_scores(900), {"curve": FLAT, **with_scores(900)}, {"curve": IMPROVING[:5]}],
    "plateau": [with_scores(900), {"curve": IMPROVING}, UNFINISHED],
    "better_on_the_way": [with_scores(900)],
    "worst_class": [UNFINISHED],
    "confused_pair": [with_confusion({}), with_confusion({(3, 5): 2}), UNFINISHED],
    "calibration": [UNFINISHED, {"logits": np.full((50, 10), np.nan), "labels": np.arange(50) % 10}],
    "sure_mistakes": [with_confusion({(3, 5): 40}, confidence=5.0), with_confusion({(3, 5): 2}, confidence=9.0)],
    "averaged_weights": [{}],
    "cost": [UNFINISHED],
    "slow_evaluation": [{}],
    "slowed_down": [{}],
    "probe_cost": [{}],
    "probes_lost": [{}],
    "uncommitted": [{}],
}  # fmt: skip


@pytest.mark.parametrize(("rule", "case"), [(rule, case) for rule, cases in SAYS.items() for case in cases])
def test_a_rule_finds_it(rule: str, case: Case, tmp_path: Path) -> None:
    given, severity, words = case
    found = {finding.rule: finding for finding in find(make_run(tmp_path / "run", **given))}
    assert words in found[rule].sentence
    assert found[rule].severity == severity


@pytest.mark.parametrize(("rule", "given"), [(rule, given) for rule, cases in SILENT.items() for given in cases])
def test_a_rule_keeps_silent(rule: str, given: dict[str, Any], tmp_path: Path) -> None:
    assert rule not in [finding.rule for finding in find(make_run(tmp_path / "run", **given))]


def test_an_interval_that_is_not_the_charts_says_why(tmp_path: Path) -> None:
    """The worst class's is wider than the one in the chart that is its evidence: it is the worst of ten looks."""
    found = {finding.rule: finding for finding in find(make_run(tmp_path / "run", **with_confusion({(3, 5): 40})))}
    assert "widened for the worst of 10)" in found["worst_class"].sentence
    assert "(60.0 %, 95 % interval " in found["worst_class"].sentence


def test_no_advice_against_the_alarms(tmp_path: Path) -> None:
    """A run whose rate was a million times too high was told to raise it, as it under-fits, and to lower it, as it explodes."""
    given = {"train": 0.1, **with_scores(100)}
    calm, alarmed = (find(make_run(tmp_path / name, alarms=alarms, **given)) for name, alarms in (("a", []), ("b", [ALARM])))
    advice = [{finding.rule: finding.recommendation for finding in found}["train_test_gap"] for found in (calm, alarmed)]
    assert "higher learning rate" in advice[0]
    assert "higher learning rate" not in advice[1]
    assert "alarms" in advice[1]


def test_a_small_share_of_all_mistakes_is_not_none(tmp_path: Path) -> None:
    """Of a hundred classes the most confused pair has some tenths of a percent, which read `0 % of all mistakes`."""
    mistakes = {(k, j): 8 for k in range(10) for j in range(10) if k != j} | {(3, 5): 9}
    few = {finding.rule: finding for finding in find(make_run(tmp_path / "few", **with_confusion(mistakes)))}
    assert "together 2.4 % of all mistakes" in few["confused_pair"].sentence


def test_every_rule_has_both() -> None:
    assert set(SAYS) == set(FINDINGS)
    # These three have nothing to look at where no probe ran: see below.
    assert set(FINDINGS) - set(SILENT) == {"alarms", "update_ratio", "gradient_flow"}


def test_without_probes_nothing_is_said_of_layers(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    for path in (run.path / "probes").iterdir():
        path.unlink()
    assert not {"alarms", "update_ratio", "gradient_flow"} & {finding.rule for finding in find(Run(run.path))}


def test_findings_are_sentences_with_evidence_the_worst_first(tmp_path: Path) -> None:
    cases = [given for cases in SAYS.values() for given, _, _ in cases]
    for k, given in enumerate(cases[::4]):
        found = find(make_run(tmp_path / str(k), **given))
        assert [ORDER.index(f.severity) for f in found] == sorted(ORDER.index(f.severity) for f in found)
        for finding in found:
            assert finding.section in SECTIONS
            assert finding.numbers, finding
            for text in (finding.sentence, *([finding.recommendation] if finding.recommendation else [])):
                assert text.endswith(".")
                assert not text.endswith("..")
                assert text[0].isupper() or text[0].isdigit() or text.startswith("conv"), text
                assert "nan" not in text
            if finding.severity in ("problem", "warning"):
                assert finding.recommendation, finding
            json.dumps(finding.numbers, allow_nan=False)


def test_the_test_set_chooses_among_runs_of_one_folder(tmp_path: Path) -> None:
    for k, lr in enumerate((0.1, 0.2, 0.3, 0.4)):
        run = make_run(tmp_path / str(k), config=replace(CUSTOM, lr=lr))
    found = {finding.rule: finding for finding in find(run)}["chosen_on_test"]
    assert found.severity == "warning"
    assert found.numbers["other runs"] == 3
    assert "--val-fraction" in found.recommendation


def test_the_low_learning_rate_at_the_end_is_no_small_update(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    rows = run.path / "metrics.jsonl"
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    for line in lines:
        if "lr" in line and line["step"] > 60:
            line["lr"] = 1e-6
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    names, values = Facts(Run(run.path)).matrices("update_flow", "ratio")
    assert names == ["conv1.weight", "conv2.weight", "fc.weight"]
    assert len(values) == 40  # steps 21 to 60


def test_hostile_names_stay_on_their_line(tmp_path: Path) -> None:
    names = ["<script>alert(1)</script>", 'a"b\nc', "\u202egnp.exe", *map(str, range(7))]
    found = find(make_run(tmp_path / "run", names=names, **with_confusion({(0, 1): 40, (2, 1): 30})))
    told = " ".join(finding.sentence for finding in found)
    assert "“<script>alert(1)</script>”" in told  # as it is: a page escapes it
    assert not any(c in told for c in "\n\u202e")


def test_a_damaged_folder_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run.path / "cost.json").write_text('{"layers": [{"name": "a"}]}')
    with pytest.raises(InputError, match="its cost cannot be told"):
        find(Run(run.path))
    (run.path / "predictions.npz").write_bytes(b"PK")
    with pytest.raises(InputError, match=r"predictions\.npz cannot be read"):
        find(Run(run.path))


def test_watched_and_range_runs(tmp_path: Path) -> None:
    watched = make_run(tmp_path / "watched", is_finished=False, result={"state": "stopped", "step": 5})
    for name in ("config.json", "dataset.json"):
        (watched.path / name).unlink()
    (watched.path / "watch.json").write_text("{}")
    found = {finding.rule: finding for finding in find(Run(watched.path))}
    assert "before its watch was closed" in found["ending"].sentence
    assert "gradient_flow" in found
    swept = make_run(tmp_path / "swept", config=replace(CUSTOM, schedule="range-exponential", min_lr=1e-6), is_finished=False,
                     result={"state": "swept", "step": 100, "train_seconds": 3.0})  # fmt: skip
    assert not {"still_improving", "plateau", "ending", "train_test_gap"} & {finding.rule for finding in find(swept)}


def test_recipes_promise_in_numbers_what_they_say_in_words() -> None:
    for recipe in RECIPES.values():
        if recipe.accuracy is None:
            assert recipe.expected.startswith(("no ", "not "))  # what follows may be another's figure, measured otherwise
        else:
            low, high = recipe.accuracy
            assert 0 < low <= high < 1
            said = 100 * (low + high) / 2
            assert any(f"{value:g}" in recipe.expected for value in (said, round(100 * low, 4))), recipe.expected


def test_wilson_by_hand() -> None:
    """8 of 10: Wilson 1927, to be solved from |p̂ − p| = z √(p (1 − p)/n)."""
    for p in interval(8, 10):
        assert abs(0.8 - p) == pytest.approx(1.96 * (p * (1 - p) / 10) ** 0.5, rel=1e-9)


def test_every_rule_says_what_it_looks_for() -> None:
    assert all(rule.__doc__ and rule.__doc__.endswith(".") for rule in FINDINGS.values())


def test_the_page_of_the_docs_lists_every_rule() -> None:
    page = (Path(__file__).parent.parent / "docs" / "findings.md").read_text()
    assert re.findall(r"^\| `(\w+)` \|", page, flags=re.MULTILINE) == list(FINDINGS)
