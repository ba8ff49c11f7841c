"""The arms of a study beside each other: every run a dot, their mean with its interval, and curves over time."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cifarlab.config import InputError
from cifarlab.figures.style import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, inline, label_names, plain_text, style_chart, thin

if TYPE_CHECKING:
    import altair as alt

PALETTE = [BLUE, ORANGE, GREEN, PURPLE, "#E69F00", "#56B4E9", INK, GREY]
DASHES = [[1, 0], [7, 3], [2, 2], [9, 3, 2, 3]]


def draw_arms(
    names: Sequence[str], panels: Mapping[str, tuple[Sequence[ArrayLike], ArrayLike, ArrayLike]], *, base: str = "",
    diverged: Sequence[int] | None = None, title: str = "Arms of the study", subtitle: str = "",
) -> "alt.HConcatChart":  # fmt: skip
    """One row an arm, one panel a quantity: a dot for each run, a bar for the mean, a line for its interval.

    names: A arms, drawn in that order. panels: axis title -> (values of each arm's runs, nan for a run without one; lower and
    upper end of the mean's interval, A of each, nan where there is none). base: the arm that the others are compared with; its
    mean is the dashed line. diverged: how many runs of each arm diverged: marked with × and their number at the left edge.

    How to read: dots are trainings that differ in their seed only, so their spread is chance. An upright bar with its line is
    the mean and the 95 % interval: where an interval reaches over the dashed line of the base, or two intervals overlap widely,
    no difference was shown, however the dots lie. An interval far wider than the dots comes from few seeds: with two or three
    only large differences can be shown. A × counts runs whose loss stopped being finite; such an arm is unstable, and
    the mean of its other runs flatters it.

    Raises InputError when there is not one entry per arm.
    """
    import altair as alt

    labels = label_names(names, longest=44)
    counts = list(diverged) if diverged is not None else [0] * len(names)
    if any(len(part) != len(names) for each in panels.values() for part in map(_sized, each)) or len(counts) != len(names):
        raise InputError(f"{len(names)} arms cannot be drawn: give values, both ends of the interval and counts for each of them")
    drawn = [_panel(alt, labels, axis, values, low, high, list(names).index(base) if base in names else None, counts, k == 0)
             for k, (axis, (values, low, high)) in enumerate(panels.items())]  # fmt: skip
    return style_chart(alt.hconcat(*drawn, spacing=24, bounds="flush"), title, subtitle)  # type: ignore[no-any-return]


def _sized(part: Any) -> Any:
    return part if hasattr(part, "__len__") else [part]


def _panel(alt: Any, labels: list[str], axis: str, values: Sequence[ArrayLike], low: ArrayLike, high: ArrayLike,
           base: int | None, diverged: list[int], is_first: bool) -> Any:  # fmt: skip
    dots, bars, crosses = [], [], []
    lows, highs = np.asarray(low, dtype=float), np.asarray(high, dtype=float)
    arrays = [np.asarray(each, dtype=float).ravel() for each in values]
    arrays = [array[np.isfinite(array)] for array in arrays]
    for k, array in enumerate(arrays):
        dots += [{"arm": labels[k], "x": round(float(x), 5)} for x in array]
        if len(array):
            ends = {"low": float(lows[k]), "high": float(highs[k])} if np.isfinite(lows[k]) else {"low": None, "high": None}
            bars.append({"arm": labels[k], "x": float(array.mean())} | ends)
        if diverged[k]:
            crosses.append({"arm": labels[k], "told": f"× {diverged[k]} diverged"})
    everything = np.concatenate([*arrays, lows[np.isfinite(lows)], highs[np.isfinite(highs)], np.empty(0)])
    # Intervals of two seeds can be enormous: the picture keeps to the runs, and lets a line leave it.
    runs = np.concatenate([*arrays, np.empty(0)])
    span = float(np.ptp(runs)) if len(runs) else 1.0
    span = span or max(abs(float(runs[0])) * 0.05, 1e-3)
    edges = [runs.min() - 0.6 * span, runs.max() + 0.6 * span] if len(runs) else [0.0, 1.0]
    if len(runs):
        edges = [max(edges[0], everything.min() - 0.05 * span), min(edges[1], everything.max() + 0.05 * span)]
    if "(%)" in axis and len(runs) and runs.min() >= 0 and runs.max() <= 100:  # an interval may reach where no run can
        edges = [max(edges[0], 0.0), min(edges[1], 100.0)]
    scale = alt.Scale(domain=edges, nice=True, zero=False)
    y_axis = alt.Axis(labelLimit=320, grid=True, ticks=False, domain=False, labelFontSize=12) if is_first else None
    y = alt.Y("arm:N", sort=labels, title=None, axis=y_axis, scale=alt.Scale(domain=labels))
    x = alt.X("x:Q", title=axis, scale=scale)
    layers = []
    if base is not None and len(arrays[base]):
        rule = alt.Chart(inline([{"x": float(arrays[base].mean())}]))
        layers.append(rule.mark_rule(color=GREY, strokeDash=[5, 4], strokeWidth=1.5).encode(x))
    with_ends = [row for row in bars if row["low"] is not None]
    layers += [
        alt.Chart(inline(with_ends)).mark_rule(color=INK, strokeWidth=1.5, clip=True).encode(
            alt.X("low:Q", scale=scale, title=axis), y, alt.X2("high:Q")),
        alt.Chart(inline(dots)).mark_point(filled=True, size=55, opacity=0.6, color=BLUE).encode(x, y),
        alt.Chart(inline(bars)).mark_tick(color=INK, thickness=3, size=16, opacity=1).encode(x, y),
        alt.Chart(inline(crosses)).mark_text(align="left", dx=6, dy=-9, color=ORANGE, fontWeight="bold", fontSize=11).encode(
            y, text="told:N", x=alt.value(0)),
    ]  # fmt: skip
    return alt.layer(*layers).properties(width=430 if is_first else 300, height=max(110, 30 * len(labels)))


def draw_arm_curves(
    curves: Mapping[str, Sequence[tuple[ArrayLike, ArrayLike]]], *, axis: str = "validation accuracy (%)", log: bool = False,
    diverged: Mapping[str, Sequence[float]] | None = None, title: str = "Curves of the arms", subtitle: str = "",
    time: str = "epoch", last: str = "{:.1f}",
) -> "alt.LayerChart":  # fmt: skip
    """A quantity over epochs, one colour an arm: the mean of its runs as a thick line, each run faintly behind.

    curves: arm -> (epochs, values) of each of its runs; at most eight arms. The mean is over the runs that have a value at that
    epoch, and ends where the first of them ends. diverged: arm -> epochs at which runs of it diverged, marked × at their last
    value. last: how the last mean is written behind the arm's name; "" writes none. log: a logarithmic axis.

    How to read: the order at the end is the answer that short trainings give; curves that still climb steeply there would
    rank differently in longer ones. An arm that is early but ends low is fast and inexact (a rate too high, or one that
    never falls); one that climbs in parallel but later only needs more time. Faint lines of one colour that spread as far as the
    colours lie apart mean that seeds matter as much as arms. A × marks where a run's loss stopped being finite.

    Raises InputError for more than eight arms.
    """
    import altair as alt

    if len(curves) > len(PALETTE):
        raise InputError(f"{len(curves)} arms are too many to be told apart as curves: choose at most {len(PALETTE)}")
    labels = label_names(list(curves), longest=40)
    thick: list[dict[str, Any]] = []
    faint: list[dict[str, Any]] = []
    ends: list[dict[str, Any]] = []
    told: list[str] = []
    for label, runs in zip(labels, curves.values(), strict=True):
        arrays = [(np.asarray(x, dtype=float), np.asarray(y, dtype=float)) for x, y in runs]
        arrays = [(x[np.isfinite(y)], y[np.isfinite(y)]) for x, y in arrays]
        for number, each in enumerate(arrays):
            faint += [{"arm": label, "run": f"{label} {number}", "x": a, "y": b} for a, b in _points(*each)]
        epochs, means = _mean_curve([each for each in arrays if len(each[0])])
        thick += [{"arm": label, "x": a, "y": b} for a, b in _points(epochs, means)]
        told.append(f"{label}: nothing measured" if not len(means) else f"{label}: {last.format(means[-1])}" if last else label)
    for label, name in zip(labels, curves, strict=True):
        for at in (diverged or {}).get(name, ()):
            before = [row for row in faint if row["arm"] == label and row["x"] <= at + 1e-9]
            ends.append({"arm": label, "x": float(at), "y": before[-1]["y"] if before else None})
    if log:
        thick, faint = [r for r in thick if r["y"] > 0], [r for r in faint if r["y"] > 0]
    known = [row["y"] for row in faint] or [0.0, 1.0]
    for row in ends:  # without any value before: at the foot of the picture
        row["y"] = min(known) if row["y"] is None else row["y"]
    end = max([row["x"] for row in [*faint, *ends]], default=1.0)
    x_axis = alt.X("x:Q", title=time, scale=alt.Scale(domain=[0, end], nice=False), axis=alt.Axis(tickMinStep=min(1.0, end / 4)))
    y_axis = alt.Y("y:Q", title=axis, scale=alt.Scale(type="log") if log else alt.Scale(zero=False, nice=True))
    names = dict(zip(labels, told, strict=True))
    for row in [*thick, *faint, *ends]:
        row["arm"] = names[row["arm"]]
    domain = list(names.values())
    legend = alt.Legend(orient="right", labelLimit=320, symbolType="stroke", symbolSize=400, symbolStrokeWidth=3, symbolOpacity=1)
    colors = alt.Scale(domain=domain, range=PALETTE[: len(domain)])
    color = alt.Color("arm:N", title=None, scale=colors, legend=legend)
    dashes = alt.Scale(domain=domain, range=[DASHES[k // 2 % len(DASHES)] for k in range(len(domain))])
    dash = alt.StrokeDash("arm:N", title=None, legend=legend, scale=dashes)
    layers = [
        alt.Chart(inline(faint)).mark_line(opacity=0.28, strokeWidth=1).encode(x_axis, y_axis, color, dash, detail="run:N"),
        alt.Chart(inline(thick)).mark_line(strokeWidth=2.6).encode(x_axis, y_axis, color, dash),
    ]
    if len(thick) <= 160:
        layers.append(alt.Chart(inline(thick)).mark_point(filled=True, size=30, opacity=1).encode(x_axis, y_axis, color))
    if ends:
        cross = alt.Chart(inline(ends)).mark_text(text="×", fontSize=26, fontWeight="bold")
        layers.append(cross.encode(x_axis, y_axis, alt.Color("arm:N", scale=colors, legend=None)))
    return style_chart(alt.layer(*layers).properties(width=560, height=330), title, plain_text(subtitle, 300))  # type: ignore[no-any-return]


def _points(x: NDArray[np.float64], y: NDArray[np.float64]) -> list[tuple[float, float]]:
    return [(round(float(x[k]), 4), float(f"{y[k]:.6g}")) for k in thin(x, 400)] if len(x) else []


def _mean_curve(runs: list[tuple[NDArray[np.float64], NDArray[np.float64]]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The mean over runs where all have a value: a run that ended early would make the mean jump."""
    if not runs:
        return np.empty(0), np.empty(0)
    shared = runs[0][0]
    for x, _ in runs[1:]:
        shared = np.intersect1d(shared, x)
    return shared, np.mean([y[np.isin(x, shared)] for x, y in runs], axis=0) if len(shared) else np.empty(0)
