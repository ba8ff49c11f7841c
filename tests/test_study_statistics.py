"""The statistics against scipy and against numbers worked out by hand."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from cifarlab.statistics import (
    compare_pairs,
    compare_with_base,
    holm,
    mean_interval,
    permutation_shares,
    variance_shares,
)


def test_the_interval_is_scipys() -> None:
    values = [0.91, 0.93, 0.90, 0.95]
    found = mean_interval(values)
    low, high = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    assert (found.mean, found.low, found.high, found.n) == pytest.approx((np.mean(values), low, high, 4))
    # by hand: 1, 2, 3 has s = 1 and t(0.975, 2) = 4.3027, so the half width is 4.3027/√3 = 2.4842
    assert mean_interval([1, 2, 3]).half == pytest.approx(2.4842, abs=1e-4)


def test_one_seed_says_nothing_about_chance() -> None:
    one, none = mean_interval([0.9, math.nan]), mean_interval([math.nan])
    assert (one.mean, one.n) == (0.9, 1)
    assert math.isnan(one.low)
    assert math.isnan(none.mean)
    found = compare_pairs([0.9], [0.8])
    assert found.difference.mean == pytest.approx(0.1)
    assert math.isnan(found.p)
    assert math.isnan(found.effect)
    assert not found.is_shown


def test_the_paired_test_is_scipys_and_leaves_out_what_diverged() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.92, 0.01, 7), rng.normal(0.91, 0.01, 7)
    found = compare_pairs([*a, math.nan, 0.5], [*b, 0.9, math.nan])
    expected = stats.ttest_rel(a, b)
    interval = expected.confidence_interval(0.95)
    assert found.p == pytest.approx(expected.pvalue)
    assert (found.difference.low, found.difference.high) == pytest.approx((interval.low, interval.high))
    # Hedges' correction for 7 pairs is 1 − 3/(4·6 − 1) = 20/23
    assert found.effect == pytest.approx(20 / 23 * np.mean(a - b) / np.std(a - b, ddof=1))


def test_equal_differences_have_no_spread() -> None:
    """Two or three seeds that each differ by the same few images are no proof, though their spread is zero."""
    same, shifted = compare_pairs([0.9, 0.8, 0.7], [0.9, 0.8, 0.7]), compare_pairs([0.9, 0.8, 0.7], [0.8, 0.7, 0.6])
    assert (same.p, same.effect) == (1.0, 0.0)
    assert (shifted.p, shifted.effect) == (0.25, math.inf)
    assert not compare_with_base({"base": [0.8, 0.7], "other": [0.9, 0.8]}, "base")["other"].is_shown
    seven = compare_pairs(np.arange(7) + 1.0, np.arange(7))
    assert seven.p == stats.binomtest(7, 7).pvalue


def test_two_pairs_give_no_effect_size() -> None:
    found = compare_pairs([0.91, 0.95], [0.5, 0.52])
    assert found.p == pytest.approx(stats.ttest_rel([0.91, 0.95], [0.5, 0.52]).pvalue)
    assert math.isnan(found.effect)  # Hedges' correction would make it zero, however large the difference


def test_holm_by_hand() -> None:
    # 0.01·4, 0.02·3, 0.03·2 → not below the one before, 0.5·1
    assert holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert holm([0.9, 0.8]) == pytest.approx([1.0, 1.0])
    adjusted = holm([math.nan, 0.01])
    assert math.isnan(adjusted[0])
    assert adjusted[1] == 0.01


def test_many_comparisons_of_nothing_raise_few_alarms() -> None:
    rng, alarms = np.random.default_rng(1), 0
    for _ in range(300):
        values = {str(k): rng.normal(size=4) for k in range(6)}
        alarms += any(found.is_shown for found in compare_with_base(values, "0").values())
    assert alarms / 300 < 0.08  # 0.05 would be exact; without the correction it is about 0.2


def test_a_real_difference_is_shown() -> None:
    noise = np.random.default_rng(2).normal(0, 0.001, 5)
    found = compare_with_base({"base": np.full(5, 0.9), "better": 0.92 + noise, "same": 0.9 + noise[::-1]}, "base")
    assert found["better"].is_shown
    assert found["better"].effect > 0.8


def grid(effect: float, interaction: float, noise: float, seeds: int = 3) -> tuple[dict[str, list[object]], np.ndarray]:
    rng = np.random.default_rng(3)
    cells = list(itertools.product(("a", "b", "c"), (1.0, 2.0), range(seeds)))
    values = [effect * ("abc".index(x)) + interaction * (x == "a") * (y == 2.0) + noise * rng.normal() for x, y, _ in cells]
    return {"x": [x for x, _, _ in cells], "y": [y for _, y, _ in cells]}, np.array(values)


def test_variance_shares_are_those_of_the_level_means() -> None:
    settings, values = grid(1.0, 0.0, 0.5)
    shares, interactions = variance_shares(settings, values)
    total = ((values - values.mean()) ** 2).sum()
    by_level = sum(6 * (values[np.array(settings["x"]) == x].mean() - values.mean()) ** 2 for x in "abc")
    assert shares["x"].share == pytest.approx(by_level / total)
    assert shares["x"].low < shares["x"].share
    assert shares["x"].share > 0.5 > shares["y"].share
    assert shares["x"].p < 0.001
    assert 0 <= interactions < 0.2


def test_one_setting_alone_is_scipys_one_way_anova() -> None:
    settings, values = grid(1.0, 0.0, 0.5)
    shares, _ = variance_shares({"x": settings["x"]}, values)
    groups = [values[np.array(settings["x"]) == x] for x in "abc"]
    assert shares["x"].p == pytest.approx(stats.f_oneway(*groups).pvalue)


def test_interactions_and_noise_are_no_main_effects() -> None:
    shares, interactions = variance_shares(*grid(0.0, 3.0, 0.01))
    assert interactions > 0.2
    nothing, _ = variance_shares(*grid(0.0, 0.0, 1.0))
    assert all(share.p > 0.05 for share in nothing.values())
    alike, _ = variance_shares({"x": ["a", "b", "a"], "y": [1, 1, 2]}, [1.0, 1.0, 1.0])
    assert all(math.isnan(share.share) for share in alike.values())
    assert shares["x"].share + shares["y"].share + interactions <= 1 + 1e-9


def test_one_seed_gives_shares_without_interval() -> None:
    shares, _ = variance_shares(*grid(1.0, 0.0, 0.1, seeds=1))
    assert shares["x"].share > 0.8
    assert math.isnan(shares["x"].low)


def test_diverged_trainings_are_left_out_of_the_shares() -> None:
    settings, values = grid(1.0, 0.0, 0.1)
    values[0] = math.nan
    assert variance_shares(settings, values)[0]["x"].share > 0.8


def test_permutation_finds_the_setting_that_matters() -> None:
    rng = np.random.default_rng(0)
    settings = {"matters": rng.random(40), "does not": rng.random(40)}
    found = permutation_shares(settings, settings["matters"] ** 2 + 0.01 * rng.normal(size=40), resamples=5)
    assert found["matters"].low > 0.8 > 0.2 > found["does not"].high
    assert sum(each.share for each in found.values()) == pytest.approx(1)
    assert math.isnan(permutation_shares({"x": [1, 2]}, [1, 2])["x"].share)


def test_a_forest_that_fits_noise_names_no_setting() -> None:
    """Shares add up to one whatever they are shares of; a setting was called the one that matters among pure chance."""
    rng = np.random.default_rng(5)
    found = permutation_shares({name: rng.random(24) for name in "abc"}, rng.normal(size=24), resamples=5)
    assert all(math.isnan(each.share) for each in found.values())


def test_a_grid_that_is_exactly_additive_has_a_p() -> None:
    settings = {"x": [0, 0, 1, 1], "y": [0, 1, 0, 1]}
    shares, _ = variance_shares(settings, [0.5, 0.7, 0.5, 0.7])
    assert shares["y"].p < 1e-6
    assert shares["x"].p > 0.9
    shares, _ = variance_shares({"x": [0, 0, 1], "y": [0, 1, 0]}, [0.5, 0.7, 0.5])
    assert math.isnan(shares["y"].p)  # three numbers, three parameters: nothing is left to test against
