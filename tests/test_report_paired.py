"""Runs side by side: over images against arithmetic by hand and simulation, over seeds against the studies' own statistics."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cifarlab.config import InputError, TrainConfig
from cifarlab.evaluate import build_evaluation
from cifarlab.report.paired import compare, compare_images, compare_pairs, paired_interval

sys.path.insert(0, str(Path(__file__).parent))
from run_folders import make_run

sys.path.pop(0)
CONFIG = TrainConfig(epochs=12.0)
LABELS = np.arange(200) % 10


def right_on(rows: Any, n: int = 200) -> dict[str, Any]:
    """Logits that are right on these images and wrong on all others."""
    labels = np.arange(n) % 10
    predicted = (labels + 1) % 10
    predicted[rows] = labels[rows]
    return {"logits": np.eye(10)[predicted], "labels": labels}


def test_over_images_by_hand() -> None:
    """b alone is right on 8 images, a alone on 2: p = 2 · (C(10,0) + C(10,1) + C(10,2)) / 2¹⁰."""
    a = build_evaluation("test", **right_on(np.r_[0:100, 100:102]))
    b = build_evaluation("test", **right_on(np.r_[0:100, 102:110]))
    pairs = compare_images(a, b)
    assert (pairs.both, pairs.only_a, pairs.only_b, pairs.neither) == (100, 2, 8, 90)
    assert pairs.p == pytest.approx(2 * (1 + 10 + 45) / 1024)
    assert pairs.difference == pytest.approx(0.03)
    assert pairs.low < 0.03 < pairs.high
    assert not pairs.is_shown
    turned = compare_images(b, a)
    assert (turned.difference, turned.low, turned.high) == pytest.approx((-0.03, -pairs.high, -pairs.low))
    same = compare_images(a, a)
    assert (same.p, same.difference) == (1.0, 0.0)


def test_the_interval_of_paired_shares_holds_its_level() -> None:
    """In 95 of 100 draws it holds the true difference; that of two independent samples would be far too wide."""
    rng = np.random.default_rng(0)
    for probabilities in ([0.90, 0.02, 0.03, 0.05], [0.5, 0.05, 0.15, 0.3], [0.97, 0.005, 0.005, 0.02]):
        truth = probabilities[2] - probabilities[1]
        held = [low <= truth <= high for low, high in
                (paired_interval(*counts) for counts in rng.multinomial(1000, probabilities, 1500).tolist())]  # fmt: skip
        assert 0.935 < np.mean(held) < 0.975, probabilities
    low, high = paired_interval(900, 20, 30, 50)
    assert high - low < 0.65 * 2 * 1.96 * (2 * 0.925 * 0.075 / 1000) ** 0.5


def test_other_images_cannot_be_compared() -> None:
    a, b = build_evaluation("test", **right_on([0])), build_evaluation("test", **right_on([0], n=100))
    with pytest.raises(InputError, match="not the same"):
        compare_images(a, b)


def test_several_runs(tmp_path: Path) -> None:
    first = make_run(tmp_path / "first", config=CONFIG, **right_on(np.arange(150)))
    better = make_run(tmp_path / "better", config=replace(CONFIG, lr=0.2), **right_on(np.arange(180)))
    alike = make_run(tmp_path / "alike", config=replace(CONFIG, lr=0.3), **right_on(np.r_[0:149, 190:192]))
    other = make_run(tmp_path / "other", config=CONFIG, dataset={"fingerprint": "e" * 32}, **right_on(np.arange(150)))
    diverged = {"state": "diverged", "step": 3, "train_seconds": 1.0}
    broken = make_run(tmp_path / "broken", config=CONFIG, is_finished=False, result=diverged)
    found = compare([first, better, alike, other, broken])
    assert found.names == ("first", "better", "alike", "other", "broken")
    assert found.settings["lr"] == [0.1, 0.2, 0.3, 0.1, 0.1]
    assert "batch_size" not in found.settings
    assert found.results["test/accuracy"][:2] == [0.75, 0.9]
    assert [pair.pairs.is_shown if pair.pairs else None for pair in found.images] == [True, False, None, None]
    assert "better has 15.00 points more of the images right than first" in found.images[0].sentence
    assert found.images[0].pairs is not None
    assert found.images[0].pairs.adjusted == pytest.approx(2 * found.images[0].pairs.p)  # Holm's, of two
    assert "alike has 0.50 points more" in found.images[1].sentence
    assert "no difference is shown" in found.images[1].sentence
    assert "different data" in found.images[2].sentence
    assert "broken has no evaluation" in found.images[3].sentence
    assert found.seeds == ()
    with pytest.raises(InputError, match="two run folders"):
        compare([first])


def test_over_seeds(tmp_path: Path) -> None:
    rights = {(0.1, 0): 150, (0.1, 1): 152, (0.1, 2): 149, (0.2, 0): 160, (0.2, 1): 163, (0.2, 2): 158, (0.2, 3): 20}
    runs = [make_run(tmp_path / f"{lr}-{seed}", config=replace(CONFIG, lr=lr, seed=seed), **right_on(np.arange(right)))
            for (lr, seed), right in rights.items()]  # fmt: skip
    (pair,) = compare(runs).seeds
    assert (pair.first, pair.other, pair.seeds) == ({"lr": 0.1}, {"lr": 0.2}, (0, 1, 2))
    expected = compare_pairs(np.array([160, 163, 158]) / 200, np.array([150, 152, 149]) / 200)
    assert pair.comparison.difference == expected.difference
    assert pair.comparison.p == pair.comparison.adjusted == expected.p
    assert "lr=0.2 against lr=0.1: +5.00 points over 3 common seeds" in pair.sentence
    assert pair.sentence.endswith(": a difference is shown.")


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / study / "run", config=CONFIG, **right_on(np.arange(150))) for study in ("a", "b")]
    found = compare(runs)
    assert found.names == ("a/run", "b/run")
    assert "as many images right" in found.images[0].sentence
