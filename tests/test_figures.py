"""Every figure by the same contract, with pleasant and unpleasant data; then what each is there to show."""

import io
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from cifarlab.config import InputError
from cifarlab.figures import (
    FIGURES,
    draw_class_accuracy,
    draw_confusion,
    draw_learning_curves,
    draw_lr,
    draw_lr_accuracy,
    draw_lr_range,
    draw_samples,
    how_to_read,
    save_figure,
)
from cifarlab.figures.style import unchecked

NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
STRANGE = ['"quoted\' & <b>', "<script>alert(1)</script>", "猫 🐈 naïve", "x" * 60, "x" * 60,
           "$\\frac{1}{2$", "a\nb\x00c", "", " ", "%s {0}\\"]  # fmt: skip


def make_panels(names: list[str]) -> list[dict[str, Any]]:
    x, y = np.meshgrid(np.linspace(-1, 1, 6), np.linspace(-2, 2, 5))
    loss = 0.1 + x**2 + y**2
    return [{"name": names[0], "xs": x[0], "ys": y[:, 0], "loss": loss, "path": np.array([[1.0, 1.0], [0.5, 0.2], [0.0, 0.0]])},
            {"name": names[1], "xs": x[0], "ys": y[:, 0], "loss": loss * 9}]  # fmt: skip


def make_arguments(figure: str, names: list[str], seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    k, steps = len(names), np.arange(1, 401)
    counts = rng.multinomial(30, np.full(k, 1 / k), size=k) + np.diag(np.full(k, 60))
    epochs = np.arange(1.0, 5.0)
    return {
        "learning-curves": {
            "curves": {"train/loss": (steps / 100, 2 / steps**0.2), "test/loss": (epochs, 1 / epochs),
                       "val/accuracy": (epochs, epochs / 8)},
            "title": names[0],
        },
        "learning-rate": {"steps": steps, "lr": 0.1 * np.cos(steps / 400), "momentum": 0.9 + steps / 1e4, "steps_per_epoch": 100,
                          "marks": [(60, names[0]), (120, names[1]), (180, names[1])]},
        "lr-range": {"lrs": np.geomspace(1e-7, 10, 400), "loss": 2 - np.tanh(steps / 50 - 4) + (steps > 350) * steps,
                     "low": 1.9 - np.tanh(steps / 50 - 4), "high": np.where(steps > 380, np.inf, 9.0), "title": names[0],
                     "raw": [(np.geomspace(1e-7, 1, 300), rng.random(300))], "subtitle": names[1:3],
                     "suggestions": {names[3]: 1e-3, names[4] + " ": 2e-3, names[5]: 7.0}},
        "lr-accuracy": {"lrs": np.geomspace(1e-4, 1e-2, 10), "accuracy": rng.random((3, 10)), "title": names[0],
                        "subtitle": names[1:3], "suggestions": {names[3]: 5e-3}},
        "confusion": {"matrix": counts, "class_names": names, "title": names[1]},
        "class-accuracy": {"accuracy": rng.random(k), "support": rng.integers(0, 30, k), "class_names": names},
        "reliability": {"edges": np.linspace(0, 1, 5), "counts": [0, 3, 40, 2000], "confidence": [np.nan, 0.4, 0.6, 0.9],
                        "accuracy": [np.nan, 0.3, 0.7, 0.8], "title": names[0], "subtitle": names[1:3]},
        "flops": {"names": names, "forward_macs": np.arange(k) * 1e6, "backward_macs": np.arange(k) * 2e6, "title": names[0]},
        "roofline": {"names": names, "intensity": np.geomspace(0.1, 300, k), "gflops": np.geomspace(0.5, 90, k),
                     "weight": np.arange(1, k + 1), "peak_gflops": 100.0, "peak_gbytes_per_second": 20.0, "title": names[1]},
        "samples": {
            "images": rng.integers(0, 256, (k, 3, 16, 16), dtype=np.uint8), "true": np.arange(k), "predicted": np.arange(k)[::-1],
            "probability": rng.random(k), "class_names": names, "title": names[0],
        },
        "receptive-field": {"names": names, "sizes": 8 * np.arange(1.0, k + 1), "image_size": 32, "title": names[0]},
        "effective-field": {"array": rng.random((12, 9)) ** 8, "title": names[0]},
        "gradient-flow": {"names": names, "mean_abs": rng.random(k), "max_abs": 1 + rng.random(k), "title": names[0],
                          "subtitle": names[1]},
        "flow-map": {"steps": steps, "names": names, "values": rng.random((400, k)), "quantity": names[2], "title": names[0]},
        "update-ratio": {"steps": steps, "names": names, "ratio": rng.random((400, k)), "title": names[0]},
        "weight-magnitude": {"steps": steps, "names": names, "mean_abs": rng.random((400, k)), "title": names[0]},
        "distributions": {"steps": steps, "names": names, "counts": rng.integers(0, 9, (400, k, 11)), "title": names[0],
                          "exponents": np.arange(-3, 2), "quantity": names[1], "not_finite": rng.integers(0, 2, (400, k))},
        "activations": {"steps": steps, "names": names, "mean": rng.random((400, k)), "std": rng.random((400, k)),
                        "dead": rng.random((400, k)), "saturated": rng.random((400, k)), "title": names[0]},
        "sharpness": {"steps": steps, "sharpness": steps / 9, "edge": 2 / steps, "uncertainty": steps / 90, "title": names[0],
                      "edge_name": names[1]},
        "landscape-line": {"xs": np.linspace(-1, 1, 9), "losses": {name: np.linspace(-1, 1, 9) ** 2 + 0.1 for name in names[:4]},
                           "errors": {names[0]: np.full(9, 0.05)}, "shape_errors": {names[0]: np.full(9, 0.01)},
                           "marks": {names[1]: 0.0}, "title": names[0], "x_name": names[1]},
        "landscape-contour": {"panels": make_panels(names), "title": names[0], "x_name": names[1], "y_name": names[2]},
        "landscape-surface": {"panels": make_panels(names), "title": names[0], "x_name": names[1], "y_name": names[2]},
        "filters": {"filters": rng.normal(size=(k, 3, 3, 3)), "title": names[0]},
        "feature-maps": {"images": rng.integers(0, 256, (2, 3, 16, 16), dtype=np.uint8), "maps": rng.normal(size=(2, k, 7, 5)),
                         "names": names, "title": names[0]},
        "exciting": {"made": rng.random((k, 3, 8, 8)), "images": rng.integers(0, 256, (k, 3, 3, 8, 8), dtype=np.uint8),
                     "values": rng.random((k, 3)), "names": names, "boxes": np.tile([1, 1, 4, 4], (k, 3, 1)), "title": names[0]},
        "saliency": {"images": rng.integers(0, 256, (k, 3, 8, 8), dtype=np.uint8), "slopes": rng.random((k, 8, 8)),
                     "cams": rng.random((k, 2, 3)), "names": names, "title": names[0]},
        "geometry": {"strides": [1, 2], "paddings": [0, 1, 2],
                     "maps": [[rng.random((6 - s, 6 + p)) for p in range(3)] for s in (1, 2)],
                     "captions": [[f"{names[p]}\nb" for p in range(3)]] * 2, "title": names[0],
                     "image": rng.integers(0, 256, (3, 8, 8), dtype=np.uint8)},
        "arms": {"names": names, "base": names[0], "diverged": [k % 2 for k in range(k)], "title": names[1], "subtitle": names[2],
                 "panels": {"accuracy (%)": (list(rng.random((k, 3))), np.full(k, np.nan), np.ones(k)),
                            names[2]: ([[np.nan]] * k, np.zeros(k), np.ones(k))}},
        "arm-curves": {"curves": {name: [(epochs, epochs * j), (epochs[:3], epochs[:3])] for j, name in enumerate(names[:8])},
                       "diverged": {names[0]: [2.5], names[1]: [0.1]}, "axis": names[2], "title": names[0]},
        "pairs": {"settings": {names[0]: [0.1, 0.1, 1e-4, 1e-4], names[1]: [1, 2, 1, 2], names[2]: ["a", "b", "b", names[4]]},
                  "values": [90.0, np.nan, 95.0, 93.0], "is_grid": seed % 2 == 0, "title": names[1]},
        "importance": {"names": names, "share": rng.random(k), "low": np.zeros(k), "high": np.full(k, np.nan),
                       "rest": {"chance": 0.2, "interactions": np.nan}, "title": names[0]},
        "noise": {"steps": steps, "scale": steps * 3.0, "cosine": np.cos(steps), "batch_size": 64, "title": names[0]},
    }[figure]  # fmt: skip


@pytest.mark.parametrize("names", [NAMES, STRANGE], ids=["plain", "strange"])
@pytest.mark.parametrize("figure", FIGURES)
def test_every_figure_is_drawn_as_png_and_svg(figure: str, names: list[str], tmp_path: Path) -> None:
    draw: Callable[..., Any] = FIGURES[figure]
    arguments = make_arguments(figure, names)
    drawn = draw(**arguments)
    np.testing.assert_equal(arguments, make_arguments(figure, names))  # nothing given was changed
    save_figure(drawn, tmp_path / "a.png")
    with unchecked():  # what was just drawn has passed Altair's checks
        save_figure(drawn, tmp_path / "a.svg")
    with Image.open(tmp_path / "a.png") as image:
        assert min(image.size) > 300
        assert len(set(image.convert("L").tobytes())) > 20  # something is drawn on it
    assert ElementTree.parse(tmp_path / "a.svg").getroot().tag == "{http://www.w3.org/2000/svg}svg"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "a.svg"]  # no temporary file stays


def test_equal_arguments_give_equal_pictures(tmp_path: Path) -> None:
    for figure in ("learning-rate", "samples"):  # one of each library
        first, second = (save_figure(FIGURES[figure](**make_arguments(figure, NAMES)), tmp_path / f"{k}.png") for k in range(2))
        assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("figure", FIGURES)
def test_every_figure_says_how_to_read_it(figure: str) -> None:
    text = how_to_read(FIGURES[figure])
    assert len(text) > 150
    assert text.endswith(".")
    assert "\n" not in text


def test_a_notebook_shows_whole_letters_under_images() -> None:
    """Jupyter cuts a figure's white edges off (bbox_inches="tight"): no letter may be lost with them."""
    white = np.full((10, 3, 16, 16), 255, np.uint8)  # so that the ink is letters and frames
    figure = draw_samples(**make_arguments("samples", NAMES) | {"images": white})
    ink = []
    for box in (None, "tight"):
        content = io.BytesIO()
        figure.savefig(content, format="png", dpi=72, bbox_inches=box)
        ink.append(int((255 - np.asarray(Image.open(content).convert("L")).astype(int)).sum()))
    assert ink[1] == pytest.approx(ink[0], rel=0.01)


def test_figures_need_no_torch_and_load_their_libraries_late() -> None:
    script = ("import sys; sys.modules['torch'] = None; from cifarlab.figures import FIGURES, draw_lr; import numpy as np\n"
              "assert not {'altair', 'matplotlib', 'sklearn'} & set(sys.modules)\n"
              "draw_lr(np.arange(9), np.ones(9)); FIGURES['samples'](np.zeros((1, 3, 8, 8), 'u1'), [0], [0], [1.0], ['a'])\n"
              "assert 'matplotlib.pyplot' not in sys.modules")  # fmt: skip
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def data_of(chart: Any) -> list[dict[str, Any]]:
    """All rows that a chart holds, in one place or at its layers."""

    def walk(node: Any) -> Iterator[dict[str, Any]]:
        if isinstance(node, dict):
            if isinstance(node.get("data"), dict):
                yield from node["data"].get("values", ())
            for key, value in node.items():
                if key == "datasets":
                    yield from (row for rows in value.values() for row in rows)
                elif key != "data":
                    yield from walk(value)
        elif isinstance(node, list | tuple):
            for value in node:
                yield from walk(value)

    return list(walk(chart.to_dict()))


def test_curves_show_the_mean_of_each_epoch_at_its_middle() -> None:
    steps = np.arange(1, 21)  # two epochs of ten steps
    loss = np.where(steps <= 10, 3.0, 1.0)
    chart = draw_learning_curves({"train/loss": (steps / 10, loss), "test/accuracy": ([1, 2], [0.5, 0.75])})
    points = {(row["split"], row["epoch"], row["value"]) for row in data_of(chart)}
    assert {("train", 0.55, 3.0), ("train", 1.55, 1.0), ("test", 1.0, 50.0), ("test", 2.0, 75.0)} <= points
    assert "last: train 1.000" in str(chart.to_dict())
    assert "last: test 75.0 %" in str(chart.to_dict())


def test_long_runs_give_small_charts() -> None:
    steps = np.arange(1, 60_001)
    rows = data_of(draw_learning_curves({"train/loss": (steps / 500, 1 / steps)})) + data_of(draw_lr(steps, 1 / steps))
    assert len(rows) < 3000


@pytest.mark.parametrize("log_loss", [False, True])
def test_a_diverged_run_is_drawn_and_marked(log_loss: bool, tmp_path: Path) -> None:
    loss = np.array([2.3, 2.0, 5.0, 1e30, np.nan, np.inf])
    chart = draw_learning_curves({"train/loss": (np.arange(1, 7) / 2, loss)}, log_loss=log_loss)
    assert "not finite from epoch 2.5" in str(chart.to_dict())
    assert {"epoch": 2.5} in data_of(chart)
    assert ("cut off, highest 1e+30" in str(chart.to_dict())) == (not log_loss)
    save_figure(chart, tmp_path / "curves.svg")


def test_nothing_measured_still_gives_a_figure(tmp_path: Path) -> None:
    empty = np.zeros((0, 3, 8, 8), np.uint8)
    for figure in (draw_learning_curves({}), draw_learning_curves({"test/loss": ([1], [np.nan])}), draw_lr([], []),
                   draw_lr_range([], [], [], []), draw_lr_accuracy([1e-3], [[np.nan]]),
                   draw_lr_range([1e-3, 1e-2], [np.inf, np.inf], [1.0, np.nan], [np.inf, np.inf], suggestions={"a": 1e-2}),
                   draw_lr_range([0.0, 1.0], [1.0, 2.0], [1.0, 2.0], [1.0, 2.0], logarithmic=False, suggestions={"a": 0.5}),
                   draw_confusion(np.zeros((3, 3), int), ["a", "b", "c"]),
                   draw_class_accuracy([np.nan], [0], ["a"]), draw_samples(empty, [], [], [], ["a"])):  # fmt: skip
        save_figure(figure, tmp_path / "empty.png")


def test_a_range_test_shows_points_median_band_and_every_suggestion() -> None:
    lrs = np.geomspace(1e-4, 1, 5)
    loss, high = np.array([2.0, 1.5, 1.0, 1.2, np.inf]), np.array([2.2, 1.7, 1.1, np.inf, np.inf])
    chart = draw_lr_range(lrs, loss, loss - 0.1, high, raw=[(lrs[:3], [2.1, 1.4, 1.1]), (lrs[:1], [99.0])],
                          suggestions={"valley": 1e-3, "steepest": 2e-3, "far away": 50.0})  # fmt: skip
    rows = data_of(chart)
    assert {"x": 0.01, "y": 1.1, "seed": 0} in rows
    assert not any(row.get("y") == 99 for row in rows)  # far above: it would flatten the rest
    assert {(row["x"], row["told"]) for row in rows if "told" in row} == {(1e-3, "valley 0.001"), (2e-3, "steepest 0.002")}
    assert next(row for row in rows if "y2" in row) == {"x": 1e-4, "y": 1.9, "y2": 2.2}
    assert "median of 2 smoothed curves" in str(chart.to_dict())


def test_a_ladder_shows_each_seed_and_their_median() -> None:
    rows = data_of(draw_lr_accuracy([1e-4, 1e-3, 1e-2], [[0.1, 0.5, 0.4], [0.2, 0.6, np.nan], [0.3, 0.9, 0.6]]))
    points = [(row["x"], row["y"]) for row in rows]
    assert points.count((1e-3, 60.0)) == 2  # a seed's dot, and the median
    assert len(points) == 8 + 3


def test_marks_of_a_schedule_stand_at_their_steps_on_both_axes() -> None:
    marks = [(101, "restart"), (151, "restart")]
    chart = draw_lr(np.arange(1, 201), np.ones(200), 0.9 * np.ones(200), steps_per_epoch=50, marks=marks)
    places = [row for row in data_of(chart) if set(row) == {"x"}]
    assert places == [{"x": 2.02}, {"x": 3.02}]
    text = str(chart.to_dict())
    assert "restart at steps 101 (epoch 2.02), 151 (epoch 3.02)" in text
    assert "round(datum.value * 50)" in text
    assert "[0.85, 0.9500000000000001]" in text  # once the axis of a momentum held at 0.9 said 1


def test_confusion_names_the_most_frequent_mistake_and_keeps_all_counts() -> None:
    matrix = np.array([[50, 3, 0], [9, 40, 1], [0, 0, 50]])
    rows = data_of(draw_confusion(matrix, ["cat", "dog", "dog"]))
    cells = {(row["true"], row["predicted"]): row["count"] for row in rows if "true" in row}
    assert cells == {("cat", "cat"): 50, ("cat", "dog"): 3, ("dog", "cat"): 9, ("dog", "dog"): 40, ("dog", "dog (2)"): 1,
                     ("dog (2)", "dog (2)"): 50}  # fmt: skip
    assert next(row for row in rows if "pair" in row) == {"pair": "dog → cat", "count": 9, "cell": [1, 0]}


def test_a_hundred_classes_are_all_labelled(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    names = [f"species {k}" for k in range(100)]
    path = save_figure(draw_confusion(rng.integers(0, 9, (100, 100)), names), tmp_path / "confusion.svg")
    texts = [element.text for element in ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}text")]
    assert all(texts.count(name) == 2 for name in names)
    path = save_figure(draw_class_accuracy(rng.random(100), np.full(100, 100), names), tmp_path / "classes.svg")
    assert all(f">{name}<" in path.read_text(encoding="utf-8") for name in names)


def test_classes_come_worst_first_and_absent_ones_are_named() -> None:
    chart = draw_class_accuracy([0.9, np.nan, 0.1, 0.5], [100, 0, 100, 100], ["a", "b", "c", "d"])
    rows = [row for row in data_of(chart) if "class" in row]
    assert list(dict.fromkeys(row["class"] for row in rows)) == ["c", "d", "a"]
    assert "not in this split: b" in str(chart.to_dict())
    # Wilson's interval of 50 out of 100, as in the textbooks: 0.404 to 0.596
    assert next((row["low"], row["high"]) for row in rows if row["class"] == "d") == pytest.approx((40.4, 59.6), abs=0.05)


def test_samples_show_the_pixels_given() -> None:
    images = np.random.default_rng(0).integers(0, 256, (7, 3, 8, 8), dtype=np.uint8)
    figure = draw_samples(images, [0] * 7, [0, 1] * 3 + [0], [0.5] * 7, ["cat", "$dog$"])
    for image, axes in zip(images, figure.axes, strict=True):
        np.testing.assert_array_equal(axes.images[0].get_array(), image.transpose(1, 2, 0))
    texts = [text.get_text() for text in figure.texts]
    assert "7 images: 4 right (✓ blue), 3 wrong (✗ orange)" in texts
    assert (texts.count("✓ cat"), texts.count("✗ $dog$"), texts.count("is cat")) == (4, 3, 3)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    images = np.zeros((2, 3, 8, 8), np.uint8)
    with pytest.raises(InputError, match="K×K"):
        draw_confusion(np.zeros((3, 3)), ["a", "b"])
    with pytest.raises(InputError, match="one of each per class"):
        draw_class_accuracy([0.5], [1, 2], ["a", "b"])
    with pytest.raises(InputError, match="N of each"):
        draw_samples(images, [0], [0, 0], [1, 1], ["a"])
    with pytest.raises(InputError, match="outside 0…0"):
        draw_samples(images, [0, 1], [0, 0], [1, 1], ["a"])
    with pytest.raises(InputError, match=r"end the name in \.png or \.svg"):
        save_figure(draw_lr([1], [0.1]), tmp_path / "lr.jpg")
    assert not list(tmp_path.iterdir())


def test_a_loss_line_has_its_bands_and_marks_what_is_not_finite() -> None:
    xs, loss = np.linspace(-1, 1, 5), np.array([4.0, 1.0, 0.5, np.nan, 3.0])
    chart = FIGURES["landscape-line"](xs, {"after": loss}, errors={"after": np.full(5, 0.1)}, marks={"here": 0.0})
    rows = data_of(chart)
    assert {row["x"]: row["y"] for row in rows if "y" in row and "y2" not in row} == {-1: 4, -0.5: 1, 0: 0.5, 1: 3}
    band = [(row["y"], row["y2"]) for row in rows if "y2" in row and row["x"] == -0.5]
    assert band == [pytest.approx((1 - 0.196, 1 + 0.196))]
    assert {row["part"] for row in rows if row["x"] == 1 and "part" in row} == {1}  # no line is drawn across the gap
    assert {"x": 0.5, "curve": "after"} in rows
    assert "not finite: 1 points" in str(chart.to_dict())
    assert "log" not in str(FIGURES["landscape-line"](xs, {"a": np.arange(1, 6)}).to_dict()["layer"][0]["encoding"]["y"]["scale"])
    wide = FIGURES["landscape-line"](xs, {"a": [1, 2, 30, 2, 1]})
    assert "'log'" in str(wide.to_dict()["layer"][0]["encoding"]["y"]["scale"])


def test_contours_share_their_levels_and_show_the_path() -> None:
    panels = make_panels(NAMES)
    figure = FIGURES["landscape-contour"](panels)
    left, right = figure.axes[:2]
    levels = [axes.collections[0].levels for axes in (left, right)]
    np.testing.assert_array_equal(*levels)
    low, high = panels[0]["loss"].min(), panels[1]["loss"].max()
    np.testing.assert_allclose(levels[0], np.geomspace(low, high, 17))
    assert any(np.array_equal(line.get_xydata(), panels[0]["path"]) for line in left.lines)
    assert [line.get_marker() for line in right.lines] == ["+"]
    panels[1]["loss"] = np.where(panels[1]["loss"] > 20, np.inf, panels[1]["loss"])
    broken = FIGURES["landscape-contour"](panels)
    assert any("points not finite" in text.get_text() for text in broken.texts)


@pytest.mark.parametrize("figure", ["landscape-contour", "landscape-surface"])
def test_landscapes_that_cannot_be_drawn_still_give_a_figure(figure: str, tmp_path: Path) -> None:
    nothing = {"name": "a", "xs": [0.0, 1.0], "ys": [0.0, 1.0], "loss": np.full((2, 2), np.nan)}
    flat, point = nothing | {"loss": np.ones((2, 2))}, {"name": "b", "xs": [0.0], "ys": [0.0], "loss": [[1.0]]}
    for panels in ([], [nothing], [flat, nothing], [point], [nothing | {"loss": [[0.0, -1.0], [1e30, np.inf]]}]):
        save_figure(FIGURES[figure](panels), tmp_path / "a.png")
    save_figure(FIGURES["landscape-line"]([0.0, 1.0], {"a": [np.nan, np.inf]}), tmp_path / "b.png")
    save_figure(FIGURES["landscape-line"]([], {}), tmp_path / "c.png")


def test_filters_are_drawn_around_grey_and_deep_ones_as_slices() -> None:
    filters = np.zeros((2, 3, 3, 3))
    filters[0, 0, 1, 1], filters[1, 2, 0, 0] = 2.0, -1.0
    figure = FIGURES["filters"](filters)
    first, second = (axes.images[0].get_array() for axes in figure.axes)
    assert first[1, 1].tolist() == [1.0, 0.5, 0.5]
    assert second[0, 0].tolist() == [0.5, 0.5, 0.0]
    assert "1 · 0.50" in [text.get_text() for text in figure.texts]
    deep = FIGURES["filters"](np.random.default_rng(0).normal(size=(20, 40, 3, 3)))
    assert len(deep.axes) == 16 * 16
    assert "the first 16 with their first 16 inputs" in " ".join(" ".join(text.get_text() for text in deep.texts).split())


def test_saliency_says_where_nothing_speaks_for_the_class() -> None:
    images = np.zeros((2, 3, 8, 8), np.uint8)
    figure = FIGURES["saliency"](images, np.ones((2, 8, 8)), np.stack([np.zeros((4, 4)), np.eye(4)]), ["cat", "dog"])
    assert [text.get_text() for axes in figure.axes for text in axes.texts] == ["nothing"]
    FIGURES["saliency"](images[:0], np.ones((0, 8, 8)), np.ones((0, 4, 4)), [])


def test_geometry_in_true_size_shows_how_maps_shrink() -> None:
    figure = FIGURES["geometry"]([1, 2], [0], [[np.ones((8, 8))], [np.ones((4, 4))]], [["8×8"], ["4×4"]], true_size=True)
    large, small = (axes.get_position().width for axes in figure.axes)
    assert large == pytest.approx(2 * small)


def test_pictures_that_do_not_fit_are_refused() -> None:
    images = np.zeros((2, 3, 8, 8), np.uint8)
    for figure, arguments in {
        "landscape-line": ([0, 1], {"a": [1, 2, 3]}), "filters": (np.ones((3, 3)),),
        "feature-maps": (images, np.ones((2, 3, 4, 4)), ["a"]),
        "landscape-contour": ([{"name": "a", "xs": [0, 1], "ys": [0], "loss": [[1.0]]}],),
        "exciting": (np.ones((1, 3, 8, 8)), images[None], np.ones((1, 3)), ["a"]),
        "saliency": (images, np.ones((2, 8, 8)), np.ones((2, 4, 4)), ["a"]),
        "geometry": ([1, 2], [0], [[np.ones((2, 2))]], [["a"]]),
    }.items():  # fmt: skip
        with pytest.raises(InputError, match="not fit"):
            FIGURES[figure](*arguments)  # type: ignore[operator]
