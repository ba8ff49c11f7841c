"""Reading a range test: synthetic curves whose answers are known, and what is said where there is none."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cifarlab.config import InputError, TrainConfig
from cifarlab.lr_curve import (
    FILE,
    Climb,
    Curve,
    LrRange,
    find_range,
    load_range,
    memory_of,
    smooth,
    suggest,
    suggest_by_accuracy,
)
from cifarlab.recipes import load_recipe

LRS = 1e-7 * 1e8 ** (np.arange(200) / 199)


def tanh_curve(lrs: Any, middle: float = 1e-3, width: float = 0.5, breaks_at: float = 1.0) -> Any:
    """Loss falls from 2.3 to 0.3 around `middle` (a tanh of log10 lr, so steepest there) and breaks away at `breaks_at`."""
    x = np.log10(np.asarray(lrs))
    return 1.3 - np.tanh((x - math.log10(middle)) / width) + np.maximum(0, x - math.log10(breaks_at)) ** 2 * 50


def make(losses: Any, *, seeds: int = 1, noise: float = 0.0, lrs: Any = LRS, end: str = "swept", **changes: Any) -> LrRange:
    rng = np.random.default_rng(0)
    rows = [np.asarray(losses) + noise * rng.standard_normal(len(losses)) for _ in range(seeds)]
    curves = tuple(Curve(seed=k, lrs=tuple(lrs[: len(row)]), losses=tuple(row), end=end) for k, row in enumerate(rows))
    settings: dict[str, Any] = dict(mode="exponential", per="step", start=1e-7, end=10.0, points=200, curves=curves,
                                    split="train")  # fmt: skip
    return LrRange(**(settings | changes))


def by_name(found: Any) -> dict[str, float]:
    return {suggestion.name: suggestion.lr for suggestion in found}


# ---- smoothing -------------------------------------------------------------------------------------------------------


def test_smoothing_is_the_weighted_mean_written_out() -> None:
    values = np.random.default_rng(0).normal(2, 1, 30)
    for beta in (0.0, 0.5, 0.98):
        slow = [sum(beta**i * values[t - i] for i in range(t + 1)) / sum(beta**i for i in range(t + 1)) for t in range(30)]
        np.testing.assert_allclose(smooth(values, beta), slow)
    np.testing.assert_allclose(smooth(np.full(9, 3.0), 0.98), 3.0)  # bias correction: not 0.06 at first


@pytest.mark.parametrize("mode", ["exponential", "linear"])
def test_a_smoothed_curve_does_not_lag(mode: Any) -> None:
    """A loss that is linear along the axis stays on its line, so suggestions are not drawn to higher rates."""
    start = 1e-7 if mode == "exponential" else 0.0
    axis = np.arange(200)
    lrs = LRS if mode == "exponential" else 10 * axis / 199
    test = make(5 - 0.02 * axis, lrs=lrs, mode=mode, start=start)
    known = ~np.isnan(test.median)
    assert known.sum() > 190
    np.testing.assert_allclose(test.median[known], (5 - 0.02 * axis)[known], rtol=1e-9)


def test_a_climb_ends_at_the_first_loss_that_is_too_high_or_not_finite() -> None:
    def rows(*losses: float) -> list[dict[str, float]]:
        return [{"step": k, "train/loss": loss} for k, loss in enumerate(losses, 1)]

    assert Climb(4.0, 10).find_end(rows(2, 1, 0.5, 1.9, 2.1, 9)) == (5, "climbed")  # ten points are not smoothed
    assert Climb(4.0, 10).find_end(rows(2, 1, math.nan, 9)) == (3, "diverged")
    assert Climb(0.0, 10).find_end(rows(2, 1, 1e9, math.inf)) == (4, "diverged")
    assert Climb(0.0, 10).find_end(rows(2, 1, 1e9)) == (0, "")
    assert memory_of(100) == 0.75
    jump = rows(*[1.0] * 20, 10.0)
    assert Climb(4.0, 100).find_end(jump) == (0, "")  # one bad batch: smoothed, 3.3
    assert Climb(4.0, 100).find_end([*jump, {"step": 22, "train/loss": 10.0}]) == (22, "climbed")
    learnt = rows(2.3, 1, 0.1, 0.5, 1.1, 1.3)  # a hard batch of a net that has learnt is no divergence of a range test
    assert Climb(4.0, 10).find_end(learnt) == (4, "climbed")
    assert Climb(4.0, 10, halfway=True).find_end(learnt) == (6, "climbed")
    assert Climb(4.0, 10, halfway=True).find_end(rows(2, 1.9, 7.5, 7.7)) == (4, "climbed")
    skipped = [row | {"train/skipped": 1.0} for row in rows(2, 1, 99)]
    assert Climb(4.0, 10).find_end(skipped) == (0, "")
    resumed = Climb(4.0, 100, jump, until=21)
    assert resumed.find_end([{"step": 22, "train/loss": 10.0}]) == (22, "climbed")  # as if it had never been interrupted


# ---- suggestions -----------------------------------------------------------------------------------------------------


def test_suggestions_of_a_curve_with_known_answers() -> None:
    """tanh: steepest at 1e-3; 90 % and 10 % of the drop at atanh(0.8) widths to either side; lowest at the break, 1."""
    found, warnings = suggest(LRS, tanh_curve(LRS))
    answers = by_name(found)
    decade = 8 / 199
    assert answers["steepest"] == pytest.approx(1e-3, rel=10**decade - 1)
    half = 0.5 * math.atanh(0.8)
    assert math.log10(answers["valley"]) == pytest.approx(-3 - half + 2 / 3 * 2 * half, abs=2 * decade)
    assert answers["minimum/10"] == pytest.approx(0.1, rel=10 ** (2 * decade) - 1)
    assert warnings == ()
    for suggestion in found:
        assert suggestion.reason.count("\n") == 0
        assert len(suggestion.reason) > 20


def test_a_long_plateau_before_the_fall_does_not_move_the_valley() -> None:
    """fastai's longest decreasing subsequence begins anywhere on a noisy plateau."""
    noisy = tanh_curve(LRS) + 0.02 * np.sin(np.arange(200) * 2.1)
    long, _ = suggest(LRS, noisy)
    short, _ = suggest(LRS[60:], noisy[60:])
    assert by_name(long)["valley"] == pytest.approx(by_name(short)["valley"], rel=0.3)


def test_a_linear_test_is_read_on_its_own_axis() -> None:
    lrs = np.linspace(0, 1, 101)
    found, _ = suggest(lrs, 2 - np.tanh((lrs - 0.4) / 0.1) + 5 * np.maximum(0, lrs - 0.8), linear=True)
    answers = by_name(found)
    assert answers["steepest"] == pytest.approx(0.4, abs=0.011)
    assert 0.4 < answers["valley"] < 0.5
    assert answers["minimum/10"] == pytest.approx(0.08, abs=0.003)


@pytest.mark.parametrize("noise", [0.02, 0.1])
def test_noise_of_batches_moves_the_answers_little(noise: float) -> None:
    test = make(tanh_curve(LRS), seeds=3, noise=noise)
    answers = by_name(test.suggestions)
    clean = by_name(suggest(LRS, tanh_curve(LRS))[0])
    assert abs(math.log10(answers["valley"] / clean["valley"])) < 0.3
    assert abs(math.log10(answers["steepest"] / clean["steepest"])) < 0.5
    assert test.warnings == ()
    assert test.best is not None
    assert test.best.name == "valley"


def test_the_curve_of_several_seeds_is_their_median_and_its_band() -> None:
    rows = [np.full(200, level) for level in (1.0, 2.0, 7.0)]
    curves = tuple(Curve(seed=k, lrs=tuple(LRS), losses=tuple(row)) for k, row in enumerate(rows))
    test = replace(make([]), curves=curves)
    known = ~np.isnan(test.median)
    np.testing.assert_allclose(test.median[known], 2.0)
    np.testing.assert_allclose(test.band[0][known], 1.0)
    np.testing.assert_allclose(test.band[1][known], 7.0)
    # One of three has stopped: it counts as infinite, and the median is the higher of the others.
    stopped = replace(test, curves=(replace(curves[0], lrs=curves[0].lrs[:50], losses=curves[0].losses[:50], end="diverged"),
                                    *curves[1:]))  # fmt: skip
    assert stopped.median[100] == pytest.approx(7.0)
    assert stopped.band[1][100] == math.inf
    assert stopped.diverged_at == math.inf  # of the median seed


@pytest.mark.parametrize(
    ("losses", "end", "told"),
    [
        (np.full(200, 2.3), "swept", "never falls clearly"),
        (tanh_curve(LRS, middle=1e3), "swept", "never falls clearly"),
        (np.linspace(2.3, 9, 60), "climbed", "only rises"),
        (np.full(4, 2.3), "diverged", "stopped after 4 points"),
        ([], "climbed", "stopped after 0 points"),
        ([], "diverged", "the very first loss is not finite, which no learning rate can be blamed for"),
        (tanh_curve(LRS, middle=1.0, breaks_at=1e3), "swept", "still falling at"),
    ],
    ids=["flat", "range too low", "range too high", "few points", "none", "broken at once", "minimum at the end"],
)
def test_a_curve_without_ground_is_said_to_be_one(losses: Any, end: str, told: str) -> None:
    test = make(losses, noise=0.01, end=end)
    assert told in " ".join(test.warnings)
    assert f"warning: {test.warnings[0][:30]}" in str(test)
    if told != "still falling at":
        assert test.suggestions == ()
        assert test.best is None
        assert test.paste == ()
    else:
        assert "minimum/10" not in by_name(test.suggestions)


def test_a_fall_within_the_noise_is_none() -> None:
    """A drift of 0.05 is learning when batches differ by 0.01, and nothing when they differ by 0.3."""
    drift = 2.3 - 0.05 * np.arange(200) / 199
    assert make(drift, noise=0.3, seeds=3).suggestions == ()
    assert "its noise is" in make(drift, noise=0.3, seeds=3).warnings[0]
    assert make(drift, noise=0.001, seeds=3).suggestions


def test_a_fall_hardly_above_the_noise_is_a_doubtful_one() -> None:
    shallow = 2.3 - 0.1 * (2.3 - tanh_curve(LRS))  # by 0.2
    doubtful = make(shallow, noise=0.2)
    assert any("times the curve's noise" in told for told in doubtful.warnings)
    assert doubtful.suggestions
    assert make(shallow, noise=0.001).warnings == ()


def test_seeds_that_disagree_are_named() -> None:
    near, far = (tuple(tanh_curve(LRS, middle=middle)) for middle in (1e-5, 1e-2))
    curves = tuple(Curve(seed=k, lrs=tuple(LRS), losses=row) for k, row in enumerate((near, far)))
    assert any("the seeds disagree" in told for told in replace(make([]), curves=curves).warnings)
    assert not any("disagree" in told for told in make(tanh_curve(LRS), seeds=3, noise=0.05).warnings)


LADDER = 1e-4 * 100 ** (np.arange(10) / 9)


def ladder(*accuracies: Any, **changes: Any) -> LrRange:
    curves = tuple(Curve(seed=k, lrs=tuple(LADDER), losses=tuple(2 - np.asarray(row)), accuracies=tuple(row))
                   for k, row in enumerate(accuracies))  # fmt: skip
    settings: dict[str, Any] = dict(mode="exponential", per="epoch", start=1e-4, end=1e-2, points=10, curves=curves,
                                    split="train")  # fmt: skip
    return LrRange(**(settings | changes))


RISING = np.array([0.3, 0.4, 0.5, 0.6, 0.65, 0.7, 0.72, 0.74, 0.73, 0.7])


def test_the_ladder_of_lab_d_peaks_where_its_accuracy_does() -> None:
    config = load_recipe("resnet9-onecycle").to_dict()
    test = ladder(RISING, RISING + 0.01, RISING - 0.2, config=config, recipe="resnet9-onecycle")
    assert [found.name for found in test.suggestions] == ["accuracy peak"]
    assert test.best is not None
    assert test.best.lr == pytest.approx(LADDER[7])
    assert "74.00 %" in test.best.reason
    head, lab_d = "cifarlab train resnet9-onecycle", "--div-factor 10 --final-div-factor 1 --anneal linear"
    assert test.paste[1] == f"{head} --schedule one-cycle --lr {LADDER[7]:.2g} {lab_d}"
    lines = test.table()
    assert len(lines) == 11
    assert "← accuracy peak" in lines[8]
    assert "74.00 %" in lines[8]


def test_ladders_without_ground() -> None:
    assert "still rising" in ladder(np.sort(RISING)).warnings[0]
    assert "only falls" in ladder(RISING[::-1] * 0 + np.linspace(0.9, 0.1, 10)).warnings[0]
    assert "too few" in suggest_by_accuracy(LADDER[:2], np.array([[0.1, 0.2]]))[1][0]
    assert "disagree" in ladder(np.eye(10)[1], np.eye(10)[8], RISING).warnings[0]


# ---- as text and as a file -------------------------------------------------------------------------------------------


def test_the_text_fits_a_terminal_and_has_lines_to_paste() -> None:
    config = load_recipe("quick", batch_size=32, nesterov=True, channels_last=False, data="my images", seed=4).to_dict()
    test = make(tanh_curve(LRS), seeds=3, noise=0.05, recipe="quick", config=config)
    assert all(len(line) <= 100 for line in str(test).splitlines())
    assert "valley" in str(test)
    assert repr(test) == str(test)  # in a notebook
    lr = f"{by_name(test.suggestions)['minimum/2']:.2g}"  # the peak of the recipe's one-cycle
    head = "cifarlab train quick --data 'my images' --batch-size 32 --nesterov --no-channels-last"
    assert test.paste == (f"{head} --lr {lr}", f"{head} --schedule one-cycle --lr {lr} --div-factor 25")


@pytest.mark.parametrize(("schedule", "name"), [("one-cycle", "minimum/2"), ("cosine", "valley"), ("constant", "valley")])
def test_auto_takes_half_the_minimum_for_the_peak_of_a_one_cycle_and_the_valley_otherwise(schedule: str, name: str) -> None:
    test = make(tanh_curve(LRS), config=TrainConfig(schedule=schedule).to_dict())  # type: ignore[arg-type]
    answers = by_name(test.suggestions)
    assert answers["minimum/2"] == pytest.approx(5 * answers["minimum/10"])
    assert test.best is not None
    assert (test.best.name, test.best.lr) == (name, answers[name])
    assert f"--lr {answers[name]:.2g}" in test.paste[0]
    assert f"--schedule one-cycle --lr {answers['minimum/2']:.2g}" in test.paste[1]
    still_falling = make(np.linspace(2, 1, len(LRS)), config=TrainConfig(schedule="one-cycle").to_dict())
    assert still_falling.best is not None
    assert still_falling.best.name == "valley"  # there is no minimum


def test_a_loss_that_is_broken_from_the_first_update_accuses_no_rate() -> None:
    """It was said to break away at the first rate, so that the recipe check called every other rate too high."""
    assert make([], end="diverged").diverged_at == np.inf
    assert make([], end="diverged", per="epoch").diverged_at == 1e-7  # a ladder's first rung is an epoch long


def test_a_one_cycle_line_takes_no_other_schedule_over() -> None:
    config = load_recipe("simplecnn-adam", schedule="restarts", schedule_per="epoch", warmup_epochs=2.0, restart_epochs=3.0)
    plain, cycle = make(tanh_curve(LRS), recipe="simplecnn-adam", config=config.to_dict()).paste
    assert "--schedule restarts" in plain
    assert "--warmup-epochs 2.0" in plain
    assert cycle.count("--schedule ") == 1
    assert "--schedule-per" not in cycle  # one-cycle per epoch is a mistake of which the recipe check warns
    assert "--warmup-epochs" not in cycle


def test_lines_for_objects_of_ones_own_are_python_that_runs() -> None:
    weights = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    for shares, groups in (((1.0,), [weights]), ((0.1, 1.0), [weights[:1], weights[1:]])):
        test = make(tanh_curve(LRS), shares=shares)
        answers = by_name(test.suggestions)
        lrs, peaks = ([float(f"{share * answers[name]:.2g}") for share in shares] for name in ("valley", "minimum/2"))
        optimizer = torch.optim.SGD([{"params": group} for group in groups], lr=0.5)
        names: dict[str, Any] = {"torch": torch, "optimizer": optimizer, "epochs": 2, "loader": range(5)}
        exec(test.paste[0], names)
        assert names["lr"] == pytest.approx(lrs[-1])
        if len(shares) > 1:
            assert [group["lr"] for group in optimizer.param_groups] == lrs
        scheduler = eval(test.paste[1], names)
        assert scheduler.total_steps == 10
        assert [group["max_lr"] for group in optimizer.param_groups] == peaks
        assert optimizer.param_groups[0]["momentum"] == 0  # as it was when the rates were tried


def test_lines_to_paste_fit_a_config_without_recipe_and_objects_without_config() -> None:
    plain = make(tanh_curve(LRS), config=TrainConfig(model="simple_cnn").to_dict())
    assert "--model simple_cnn" in plain.paste[0]
    assert "--weight-decay 0.0" in plain.paste[0]  # that of resnet18-cosine, with which `cifarlab train` begins, is another
    own = make(tanh_curve(LRS)).paste
    assert own[0].startswith("lr=")
    assert own[1].startswith("torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=")


def test_a_test_survives_json_and_the_newest_of_a_family_is_found(tmp_path: Path) -> None:
    config = TrainConfig(data="digits", model="tiny")
    own = make(tanh_curve(LRS), shares=(0.1, 1.0))
    assert LrRange.from_dict(json.loads(json.dumps(own.to_dict()))) == own
    tests = {"a": make(tanh_curve(LRS), config=config.to_dict()), "b": ladder(RISING, config=config.to_dict()),
             "other": make(tanh_curve(LRS), config=replace(config, batch_size=8).to_dict())}  # fmt: skip
    for number, (name, test) in enumerate(tests.items()):
        (tmp_path / name).mkdir()
        (tmp_path / name / FILE).write_text(json.dumps(test.to_dict()))
        os.utime(tmp_path / name / FILE, (number, number))
        again = load_range(tmp_path / name)
        assert again == test
        assert again.path == tmp_path / name
        assert again.suggestions == test.suggestions
    values = json.loads((tmp_path / "a" / FILE).read_text())
    assert values["best"] == "valley"
    assert len(values["suggestions"]) == 4
    found = find_range(tmp_path, replace(config, lr=7.0, epochs=3).to_dict())
    assert found is not None
    assert found.path == tmp_path / "b"
    (tmp_path / "b" / FILE).write_text("{")
    with pytest.raises(InputError, match="is damaged"):
        load_range(tmp_path / "b")
    found = find_range(tmp_path, config.to_dict())
    assert found is not None
    assert found.path == tmp_path / "a"
    assert find_range(tmp_path, replace(config, optimizer="adam").to_dict()) is None
    with pytest.raises(InputError, match="run cifarlab lr-range"):
        load_range(tmp_path)


def test_reading_needs_no_torch() -> None:
    script = "import sys; sys.modules['torch'] = None; import cifarlab.lr_curve, cifarlab.gallery"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
