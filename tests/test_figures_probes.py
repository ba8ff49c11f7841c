"""The figures of probes: what they show is what was measured, the worst comes first, and nothing measured can break them."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cifarlab.config import InputError
from cifarlab.figures import (
    FIGURES,
    draw_activations,
    draw_distributions,
    draw_flow_map,
    draw_gradient_flow,
    draw_noise,
    draw_sharpness,
    draw_update_ratio,
    draw_weight_magnitude,
    how_to_read,
    save_figure,
)
from cifarlab.figures.layers import PALE, bin_steps, label_layers, log_axis, quantile, rank_worst, tell_amount
from cifarlab.figures.style import label_names, unchecked

PROBES = ["gradient-flow", "flow-map", "update-ratio", "weight-magnitude", "distributions", "activations", "sharpness", "noise"]
EXPONENTS = np.arange(-12, 3)


def make_names(n: int) -> list[str]:
    return [f"layer{k // 6 + 1}.{k // 3 % 2}.conv{k % 3}.weight" for k in range(n)]


def make_values(steps: int, layers: int, kind: str = "healthy") -> np.ndarray:
    rng = np.random.default_rng(0)
    values = 1e-3 * np.exp(rng.normal(0, 0.5, (steps, layers)))
    if kind == "nan":
        values[steps // 2 :] = np.nan
    elif kind == "inf":
        values[steps // 3] = np.inf
    elif kind == "zero":
        values[:] = 0
    elif kind == "huge":
        values *= np.geomspace(1e-200, 1e200, steps)[:, None]
    elif kind == "denormal":
        values[:, 0] = 5e-324
    elif kind == "mixed":
        values[steps // 2 :, 0], values[:, -1], values[0] = np.nan, 0, -1e300
    elif kind == "masked":
        return np.ma.masked_less(values, 1e-3)
    return values


def draw_probe(figure: str, steps: int, layers: int, kind: str = "healthy") -> Any:
    values, names, at = make_values(steps, layers, kind), make_names(layers), np.arange(1, steps + 1)
    counts = np.repeat(values[:, :, None] * 1e6, 2 * len(EXPONENTS) + 1, axis=2)
    first = values[:, 0] if layers else np.zeros(steps)
    last = values[-1] if steps else np.zeros(layers)
    arguments: dict[str, tuple[Any, ...]] = {
        "gradient-flow": (names, last, last * 50), "flow-map": (at, names, values), "update-ratio": (at, names, values),
        "weight-magnitude": (at, names, values), "distributions": (at, names, counts, EXPONENTS),
        "activations": (at, names, values, values, values, values), "sharpness": (at, first, first * 2),
        "noise": (at, first, first),
    }  # fmt: skip
    draw: Callable[..., Any] = FIGURES[figure]
    return draw(*arguments[figure])


def data_of(chart: Any) -> list[dict[str, Any]]:
    """All rows that a chart holds."""
    return [row for rows in chart.to_dict().get("datasets", {}).values() for row in rows]


def order_of(rows: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row["layer"] for row in rows if "layer" in row))


def domains_of(chart: Any) -> list[list[Any]]:
    """Domains of all vertical axes that name layers."""
    found: list[list[Any]] = []

    def walk(node: Any) -> None:
        if isinstance(node, dict):
            if node.get("field") == "layer" and isinstance(node.get("sort"), list) and node["sort"] not in found:
                found.append(node["sort"])
            for value in node.values():
                walk(value)
        elif isinstance(node, list):
            for value in node:
                walk(value)

    walk(chart.to_dict())
    return found


def text_of(chart: Any) -> str:
    return str(chart.to_dict())


@pytest.mark.parametrize("kind", ["healthy", "nan", "inf", "zero", "huge", "denormal", "mixed", "masked"])
@pytest.mark.parametrize("figure", PROBES)
def test_nothing_measured_breaks_a_figure(figure: str, kind: str, tmp_path: Path) -> None:
    for steps, layers, checks in ((12, 5, nullcontext), (1, 1, unchecked)):  # the second as a run draws it
        with checks():
            path = save_figure(draw_probe(figure, steps, layers, kind), tmp_path / "a.png")
        with Image.open(path) as image:
            assert image.size[0] > 600
            assert image.size[0] < 3000
            assert image.size[1] < 3000


@pytest.mark.parametrize("figure", PROBES)
def test_figures_of_nothing_say_so(figure: str, tmp_path: Path) -> None:
    for steps, layers in ((0, 0), (0, 3), (4, 0)):
        chart = draw_probe(figure, steps, layers)
        if figure == "gradient-flow" and layers:
            assert "3 zero" in text_of(chart)
        elif figure in ("sharpness", "noise") and steps:
            assert "nothing above 0" in text_of(chart) or "zero" in text_of(chart) or "not above 0" in text_of(chart)
        else:
            assert "nothing measured" in text_of(chart)
        save_figure(chart, tmp_path / "a.png")


@pytest.mark.parametrize("figure", PROBES)
def test_long_runs_of_large_nets_give_small_charts(figure: str) -> None:
    assert len(data_of(draw_probe(figure, 2000, 8 if figure == "distributions" else 110))) < 10_000


@pytest.mark.parametrize("figure", PROBES)
def test_what_does_not_fit_is_refused(figure: str) -> None:
    draw, four, names = FIGURES[figure], np.ones((4, 3)), ["a", "b"]
    bad: dict[str, tuple[Any, ...]] = {
        "gradient-flow": (names, [1, 2, 3], [1, 2]), "distributions": (range(4), names, np.ones((4, 2, 6)), [0, 1, 2]),
        "activations": (range(4), names, four, four, four, four), "sharpness": (range(4), [1, 2], 3),
        "noise": (range(4), [1, 2, 3, 4], [1]),
    }  # fmt: skip
    with pytest.raises(InputError, match="does not fit"):
        draw(*bad.get(figure, (range(4), names, four)))


def test_how_to_read_tells_what_is_healthy() -> None:
    for figure in PROBES:
        assert "healthy" in how_to_read(FIGURES[figure]) or "usual" in how_to_read(FIGURES[figure])


def test_gradient_flow_holds_the_numbers_given_and_the_worst_first() -> None:
    names, mean = list("abcdgef"), np.array([1e-3, 2e-3, 5.0, 8e-3, 1.5e-3, 0.0, np.nan])
    chart = draw_gradient_flow(names, mean, mean * 10)
    bars = {(row["layer"], row["of"]): row["value"] for row in data_of(chart) if "of" in row}
    assert bars == {(name, of): value * by for name, value in zip(names[:5], mean[:5], strict=True)
                    for of, by in (("mean |g|", 1), ("largest |g|", 10))}  # fmt: skip
    depth, worst = domains_of(chart)
    assert depth == names
    assert worst == ["f", "e", "c", "d", "a", "g", "b"]
    assert {"layer": "e", "told": "zero"}.items() <= next(row for row in data_of(chart) if row.get("told") == "zero").items()
    assert "1 not finite, 1 zero" in text_of(chart)


def test_a_tensor_that_was_not_measured_is_not_among_the_worst() -> None:
    mean = np.ma.masked_equal([1e-3, 2e-3, 7.0], 7.0)
    chart = draw_gradient_flow(["a", "b", "c"], mean, mean)
    assert domains_of(chart)[1] == ["a", "b"]
    assert "1 not measured" in text_of(chart)


def test_the_map_holds_every_value_and_names_what_broke_first() -> None:
    steps, names = np.arange(10, 60, 10), ["a", "b", "c", "d"]
    values = np.full((5, 4), 2.0)
    values[3:, 1], values[:, 2], values[4, 0] = np.nan, 0, 7.0
    chart = draw_flow_map(steps, names, values)
    shades = {(row["layer"], row["x2"]): row["value"] for row in data_of(chart) if "value" in row}
    special = {(row["layer"], row["x2"]): row["kind"] for row in data_of(chart) if "kind" in row}
    assert shades == {(n, s): values[i, k] for i, s in enumerate(steps) for k, n in enumerate(names) if values[i, k] > 0}
    assert special == {("b", 40): "not finite", ("b", 50): "not finite"} | {("c", s): "zero" for s in steps}
    assert domains_of(chart) == [["b", "c", "a", "d"]]
    assert domains_of(draw_flow_map(steps, names, values, worst_first=False)) == [names]
    assert "not finite from step 40 on, there in b" in text_of(chart)


def test_a_spike_and_a_nan_of_one_step_survive_binning() -> None:
    values = np.ones((2000, 2))
    values[777, 0], values[1234, 1] = 50.0, np.inf
    rows = data_of(draw_flow_map(np.arange(1, 2001), ["a", "b"], values))
    assert {row["layer"] for row in rows if row.get("value") == 50.0} == {"a"}  # in the map, and in what stands beside it
    lost = [row for row in rows if row.get("kind") == "not finite"]
    assert {(row["layer"], row["x"] < 1235 <= row["x2"]) for row in lost} == {("b", True)}


def test_update_ratio_names_only_layers_outside_the_band_by_how_far() -> None:
    steps, names = np.arange(1, 9), list("abcdefgh")
    values = np.tile([1e-3, 0.02, 0.5, 1e-3, 1e-6, 0.0, 1e-3, 1e-3], (8, 1))
    values[5:, 6], values[:2, 7] = np.nan, np.inf
    chart = draw_update_ratio(steps, names, values)
    text = text_of(chart)
    said = ["g: not finite from step 6", "f: zero in 100 % of", "e: below in 100 %", "c: above in 100 %", "b: above in 100 %"]
    assert [text.find(words) for words in said] == sorted(text.find(words) for words in said)
    assert all(words in text for words in said)
    assert "1 layer left out while the weights were zero" in text
    lines = [(row["layer"], row["x"], row["y"]) for row in data_of(chart) if row.get("layer") == "c" and "part" in row]
    assert lines == [("c", step, 0.5) for step in steps]
    assert "no layer left the band" in text_of(draw_update_ratio(steps, ["a"], np.full((8, 1), 1e-3)))
    with pytest.raises(InputError, match="no band"):
        draw_update_ratio(steps, ["a"], np.ones((8, 1)), healthy=(1.0, 0.1))


def test_weights_that_changed_most_come_first_growth_and_decay_alike() -> None:
    steps, names = np.arange(1, 5), ["same", "grows", "decays", "dies", "broken"]
    values = np.ones((4, 5)) * np.array([1, 1, 1, 1, 1.0])
    values[:, 1], values[:, 2], values[3, 3], values[3, 4] = [1, 2, 3, 4], [8, 4, 2, 1], 0, np.nan
    chart = draw_weight_magnitude(steps, names, values)
    assert domains_of(chart) == [["broken", "dies", "decays", "grows", "same"]]
    factors = {row["layer"]: pytest.approx(row["factor"]) for row in data_of(chart) if "layer" in row and "factor" in row}
    assert factors == {"decays": 0.125, "grows": 4.0, "same": 1.0}
    told = {row["layer"]: row["told"] for row in data_of(chart) if "told" in row}
    assert (told["broken"], told["dies"], told["decays"]) == ("not finite", "became zero", "÷ 8")


def test_distributions_are_shares_in_the_order_of_the_number_line() -> None:
    counts = np.zeros((2, 3, 7))  # exponents −1, 0, 1
    counts[0, 0], counts[1, 0] = [1, 2, 3, 4, 5, 6, 7], [28, 0, 0, 0, 0, 0, 0]
    counts[:, 1, 4] = 10
    counts[:, 2, 5] = 10
    chart = draw_distributions([1, 2], ["a", "b", "c"], counts, [-1, 0, 1], not_finite=[[0, 0, 0], [0, 0, 30]])
    shares = [(row["x2"], row["y"] + 0.5, row["share"]) for row in data_of(chart) if "share" in row]
    assert [share for share in shares if share[0] == 1][:7] != []
    assert {(1, y, float(f"{n / 28:.4g}")) for y, n in zip(range(-3, 4), range(1, 8), strict=True)} <= set(shares)
    assert (2, -3, 1.0) in shares
    assert (2, 2, 0.25) in shares  # 10 of 40, 30 are not finite
    text = text_of(chart)
    assert text.find("'c'") < text.find("'a'") < text.find("'b'")
    assert "not finite 75 %" in text
    assert "30 entries" not in text
    with pytest.raises(InputError, match="consecutive"):
        draw_distributions([1], ["a"], np.zeros((1, 1, 5)), [0, 2])


def test_neighbouring_steps_and_many_exponents_are_added() -> None:
    counts = np.ones((400, 1, 2 * 60 + 1))
    rows = [row for row in data_of(draw_distributions(np.arange(1, 401), ["a"], counts, np.arange(-50, 10))) if "share" in row]
    for x in {row["x"] for row in rows}:
        assert sum(row["share"] for row in rows if row["x"] == x) == pytest.approx(1, rel=1e-3)
    assert len({row["y"] for row in rows}) <= 49


def test_activations_of_the_last_step_and_the_deadest_layer_first() -> None:
    steps, names = np.arange(1, 4), ["a", "b", "c"]
    mean, std = np.tile([0.0, 1.0, -2.0], (3, 1)), np.tile([1.0, 0.5, 1.0], (3, 1))
    mean[:, 2] = [-2, -2, np.inf]
    dead = np.array([[0, 0.1, 0.5]] * 3)
    chart = draw_activations(steps, names, mean, std, dead, np.full((3, 3), np.nan))
    bars = {row["layer"]: (row["mean"], row["low"], row["high"]) for row in data_of(chart) if "low" in row and "mean" in row}
    assert bars == {"a": (0, -1, 1), "b": (1, 0.5, 1.5)}
    text = text_of(chart)
    assert "not finite from step 3 on, there in c" in text
    assert text.find("c: 50 % at the end") < text.find("b: 10 % at the end")
    assert "a: " not in text.split("worst first")[-1]
    assert "no saturated outputs are counted" in text


def test_layers_that_are_not_named_are_pale_dots_and_all() -> None:
    shares = np.tile(np.linspace(0.9, 0.1, 9), (3, 1))
    chart = draw_activations([1, 2, 3], [f"layer{k}" for k in range(9)], shares, shares, shares, np.full((3, 9), np.nan))
    marks = [layer["mark"] for layer in chart.to_dict()["hconcat"][1]["vconcat"][0]["layer"]]
    assert [mark.get("color") for mark in marks] == [PALE, None]
    assert marks[0]["point"]["color"] == PALE


def test_sharpness_beside_its_edge() -> None:
    steps, values, lr = np.array([10, 20, 30, 40]), np.array([10.0, 50.0, np.nan, -1]), np.array([0.1, 0.1, 0.1, 0.0])
    with np.errstate(divide="ignore"):
        chart = draw_sharpness(steps, values, 2 / lr, uncertainty=[1, 5, 1, 1])
    points = [(row["x"], row["y"]) for row in data_of(chart) if row.get("layer") == "λ max, measured"]
    assert points == [(10, 10), (20, 50)]
    assert {(10, 9, 11), (20, 45, 55)} <= {(row["x"], row["y"], row["y2"]) for row in data_of(chart) if "y2" in row}
    text = text_of(chart)
    assert "last λ max 50 at step 20, 2.5 of 2/lr; above the edge at 1 of 2 measurements" in text
    assert "2 not finite or not above 0, left out" in text


def test_noise_scale_beside_the_batch_size() -> None:
    steps, scale, cosine = np.arange(1, 5), np.array([100, 200, -5, 400.0]), np.array([0.5, -0.5, 0, np.nan])
    chart = draw_noise(steps, scale, cosine, batch_size=128)
    assert [(row["x"], row["y"]) for row in data_of(chart) if row.get("layer") == "scale"] == [(1, 100), (2, 200), (4, 400)]
    assert {"y": 128, "told": "batch size 128"} in data_of(chart)
    assert [row["y"] for row in data_of(chart) if "part" in row and "y2" in row and row["y"] == row["y2"]][-3:] == [0.5, -0.5, 0]
    assert "1 noise scales not above 0; 1 measurements not finite" in text_of(chart)


def test_bins_cover_the_time_and_quantiles_agree_with_numpy() -> None:
    bins = bin_steps(np.arange(1, 1001), 64, 100)
    assert bins.size == 16
    np.testing.assert_allclose(bins.left[1:], bins.right[:-1])
    assert bins.domain == [0.0, 10.0]
    values = np.random.default_rng(0).random((7, 50))
    values[values < 0.2] = np.nan
    for q in (0.0, 0.1, 0.5, 0.9, 1.0):
        np.testing.assert_allclose(quantile(values, q, 1), np.nanquantile(values, q, axis=1))
        np.testing.assert_allclose(quantile(values, q, 0), np.nanquantile(values, q, axis=0))
    assert np.isnan(quantile(np.full((2, 3), np.nan), 0.5, 1)).all()


def test_the_worst_is_what_broke_first_but_not_what_was_drawn_into_it() -> None:
    broken = np.zeros((5, 4), dtype=bool)
    broken[3, 2], broken[2, 1] = True, True
    assert rank_worst(broken, np.array([1.0, 0, 0, 5])) == [1, 2, 3, 0]
    broken[4] = True
    assert rank_worst(broken, np.array([1.0, 0, 2, 5])) == [1, 3, 2, 0]


def test_names_are_cut_in_the_middle_and_stay_different() -> None:
    names = ["features." * 9 + "weight", "features." * 8 + "weight", "", "fc"]
    labels = label_layers(names, longest=20)
    assert all(len(label) <= 24 for label in labels)
    assert len(set(labels)) == 4
    assert labels[0].startswith("features.")
    assert labels[0].endswith("weight")
    assert labels[2:] == ["layer 2", "fc"]
    assert label_names(["a", "a (2)", "a"]) == ["a", "a (2)", "a (2) (2)"]


def test_amounts_are_told_as_people_write_them() -> None:
    told = {0.031: "0.031", 3.2: "3.2", 3210.0: "3,210", 3.2e-7: "3.2e-7", 1e5: "1e5", 0.0: "0", 1.0: "1", 9.96: "10"}
    assert {value: tell_amount(value) for value in told} == told
    for low, high in ((1e-9, 1e3), (0.02, 0.05), (0.9, 1.1), (1e-300, 1e300)):
        assert 1 <= len(log_axis(low, high).values) <= 9
