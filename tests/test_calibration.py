"""Calibration against arithmetic by hand, scikit-learn, and models whose labels are drawn from their own probabilities."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.calibration import calibration_curve
from sklearn.metrics import log_loss
from sklearn.preprocessing import label_binarize

from cifarlab.calibration import measure_calibration
from cifarlab.config import InputError
from cifarlab.evaluate import build_evaluation
from cifarlab.figures import draw_reliability
from cifarlab.gallery import draw_calibration

sys.path.insert(0, str(Path(__file__).parent))
from run_folders import calibrated_logits

sys.path.pop(0)


def test_by_hand() -> None:
    """Four images, two classes: confidences 0.9, 0.9, 0.6, 0.6; right, wrong, right, right. In bins of 0.2: 0.6 is in 0.4…0.6."""
    p = np.array([[0.9, 0.1], [0.1, 0.9], [0.6, 0.4], [0.4, 0.6]])
    found = measure_calibration(np.log(p), [0, 0, 0, 1], num_bins=5)
    assert found.counts.tolist() == [0, 0, 0, 2, 2] or found.counts.tolist() == [0, 0, 2, 0, 2]  # 0.6 is rounded either way
    assert found.accuracy == 0.75
    assert found.mean_confidence == pytest.approx(0.75)
    assert found.overconfidence == pytest.approx(0)
    assert found.ece == pytest.approx(0.5 * abs(1 - 0.6) + 0.5 * abs(0.5 - 0.9))
    assert found.mce == pytest.approx(0.4)
    assert found.brier == pytest.approx(2 * np.mean([0.1**2, 0.9**2, 0.4**2, 0.4**2]))
    assert found.nll == pytest.approx(-np.mean(np.log([0.9, 0.1, 0.6, 0.6])))
    # Two groups of two, by confidence: (0.6, 0.6) right, (0.9, 0.9) half right.
    assert measure_calibration(np.log(p), [0, 0, 0, 1], num_bins=2).ece_equal_mass == pytest.approx(0.4)


def test_a_bin_holds_its_upper_edge() -> None:
    confidences = np.array([0.5, 0.75, 1.0, 0.7500001])
    logits = np.log(np.stack([confidences, 1 - confidences], axis=1) + 1e-300)
    assert measure_calibration(logits, [0] * 4, num_bins=4).counts.tolist() == [0, 1, 1, 2]


def test_twin_of_scikit_learn() -> None:
    logits, labels = calibrated_logits(3000, 7, seed=5)
    evaluation, found = build_evaluation("test", logits, labels), measure_calibration(logits, labels)
    confidence = evaluation.probabilities.astype(float).max(axis=1)
    accuracies, means = calibration_curve(evaluation.predicted == labels, confidence, n_bins=15)
    kept = found.counts > 0
    np.testing.assert_allclose(found.accuracies[kept], accuracies, rtol=1e-6)
    np.testing.assert_allclose(found.confidence[kept], means, rtol=1e-6)
    assert found.ece == pytest.approx(np.sum(found.counts[kept] / 3000 * np.abs(accuracies - means)), rel=1e-5)
    assert found.mce == pytest.approx(np.abs(accuracies - means).max(), rel=1e-5)
    probabilities = evaluation.probabilities.astype(float)
    assert found.nll == pytest.approx(log_loss(labels, probabilities / probabilities.sum(axis=1, keepdims=True)), rel=1e-5)
    assert found.nll == pytest.approx(evaluation.loss, rel=1e-9)
    truth = label_binarize(labels, classes=range(7))
    assert found.brier == pytest.approx(((probabilities - truth) ** 2).sum(axis=1).mean(), rel=1e-5)
    accuracies, means = calibration_curve(evaluation.predicted == labels, confidence, n_bins=15, strategy="quantile")
    assert found.ece_equal_mass == pytest.approx(np.abs(accuracies - means).mean(), rel=1e-3)  # its groups differ by one image


def test_what_chance_gives_a_calibrated_model() -> None:
    """Of models whose labels are drawn from their probabilities, 95 of 100 stay below ece_by_chance; a sharpened one not."""
    found = [measure_calibration(*calibrated_logits(300, seed=seed)) for seed in range(60)]
    below = sum(each.ece <= each.ece_by_chance for each in found)
    assert 51 <= below < 60  # 57 expected; 50 or fewer have a chance of 1 in 500, 60 of 1 in 20: the seeds are fixed
    logits, labels = calibrated_logits(2000)
    sharp = measure_calibration(3 * logits, labels)
    assert sharp.ece > 2 * sharp.ece_by_chance
    assert sharp.overconfidence > 0.05


def test_images_without_finite_logits_are_left_out() -> None:
    logits, labels = calibrated_logits(100)
    whole = measure_calibration(logits[10:], labels[10:])
    logits[:10, 3] = np.nan
    part = measure_calibration(logits, labels)
    assert (part.num_images, part.num_left_out) == (90, 10)
    assert part.ece == whole.ece
    none = measure_calibration(np.full((3, 2), np.inf), [0, 1, 1])
    assert none.num_images == 0
    assert np.isnan([none.ece, none.mce, none.brier]).all()
    draw_calibration(none).to_dict()


@pytest.mark.parametrize(
    ("logits", "labels", "bins"),
    [(np.zeros((3, 2)), [0, 1], 15), (np.zeros(3), [0, 1, 1], 15), (np.zeros((2, 2)), [0, 2], 15), (np.zeros((2, 2)), [0, 1], 0)],
)
def test_what_does_not_fit_is_refused(logits: Any, labels: Any, bins: int) -> None:
    with pytest.raises(InputError):
        measure_calibration(logits, labels, num_bins=bins)


def test_the_diagram_shows_the_gap_of_each_bin() -> None:
    chart = draw_reliability([0, 0.5, 1], [10, 1000], [0.4, 0.9], [0.5, 0.7]).to_dict()
    rows = chart["datasets"][chart["vconcat"][0]["layer"][1]["data"]["name"]]
    assert [(row["confidence"], row["accuracy"], row["over"], row["shown"]) for row in rows] == [(40, 50, False, False),
                                                                                                (90, 70, True, True)]  # fmt: skip
    with pytest.raises(InputError, match="do not fit"):
        draw_reliability([0, 1], [10, 1000], [0.4, 0.9], [0.5, 0.7])
