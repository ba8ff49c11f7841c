"""How a score depends on several settings at once: a heat map for every pair, and which setting matters."""

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cifarlab.config import InputError
from cifarlab.figures.style import BLUE, GREY, INK, ORANGE, inline, label_names, style_chart

if TYPE_CHECKING:
    import altair as alt

COLUMNS = 3  # maps beside each other


def draw_pairs(
    settings: Mapping[str, Sequence[Any]], values: ArrayLike, *, is_grid: bool = True, quantity: str = "validation accuracy (%)",
    title: str = "Every pair of settings", subtitle: str = "",
) -> "alt.VConcatChart":  # fmt: skip
    """A map for every pair of settings, coloured by the score.

    settings: name -> the setting of each of N trainings; values: (N,), nan for a training that diverged. is_grid: settings are
    few values that combine, and a cell shows the mean over all trainings with that pair (over seeds and all other settings), in
    figures too; × is a cell all of whose trainings diverged. Otherwise they lie anywhere, and each training is a dot, diverged
    ones a ×. One scale of colours for all maps.

    How to read: bright is good. Bands along one axis mean that this setting matters and the other does not; a bright diagonal
    means that the two trade off (a larger batch wants less decay, say), and neither can be chosen alone; one bright
    corner at the edge means that the best lies outside what was tried, so widen the range. A cell averages over everything else,
    so a dark one may hide one good combination. Colours that all look alike: see the numbers, the settings may not matter at all.

    Raises InputError when lengths differ or there are fewer than two settings.
    """
    import altair as alt

    array = np.asarray(values, dtype=float)
    if len(settings) < 2 or any(len(each) != len(array) for each in settings.values()):
        raise InputError(f"{len(settings)} settings of {len(array)} trainings give no pairs: give two or more, a value for each")
    finite = array[np.isfinite(array)]
    if is_grid:
        cells = [_cells(settings[a], settings[b], array) for a, b in itertools.combinations(settings, 2)]
        shown = np.array([row["value"] for rows in cells for row in rows if row["value"] is not None])
    else:
        shown = finite
    low, high = (float(shown.min()), float(shown.max())) if len(shown) else (0.0, 1.0)
    if len(shown) > 8:  # one that hardly learned would leave a single colour to all others
        low = max(low, high - 4 * max(high - float(np.quantile(shown, 0.25)), 1e-9))
        if low > shown.min():
            subtitle += f"; darkest: {low:.0f} and below"
    scale = alt.Scale(scheme="viridis", domain=[low, high if high > low else low + 1], clamp=True)
    legend = alt.Legend(orient="right", gradientLength=100, titleLimit=300, titleFontWeight="normal")
    maps, num_pairs = [], len(settings) * (len(settings) - 1) // 2
    for k, (a, b) in enumerate(itertools.combinations(settings, 2)):
        is_last = k == min(COLUMNS, num_pairs) - 1  # of the first row: one legend is enough
        color = alt.Color("value:Q", title=quantity, scale=scale, legend=legend if is_last else None)
        if is_grid:
            maps.append(_heat_map(alt, cells[k], a, b, color, (low + high) / 2, settings))
        else:
            maps.append(_scatter(alt, settings[a], settings[b], array, a, b, color))
    rows = [alt.hconcat(*maps[k : k + COLUMNS], spacing=36) for k in range(0, len(maps), COLUMNS)]
    return style_chart(alt.vconcat(*rows, spacing=24), title, subtitle)  # type: ignore[no-any-return]


def _cells(first: Sequence[Any], second: Sequence[Any], values: Any) -> list[dict[str, Any]]:
    found: dict[tuple[str, str], list[float]] = {}
    for x, y, value in zip(first, second, values, strict=True):
        found.setdefault((_word(x), _word(y)), []).append(float(value))
    rows = []
    for (x, y), each in found.items():
        known = [value for value in each if np.isfinite(value)]
        mean = float(np.mean(known)) if known else None
        told = "×" if mean is None else f"{mean:.1f}" + ("*" if len(known) < len(each) else "")
        rows.append({"x": x, "y": y, "value": mean, "told": told})
    return rows


def _word(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _order(values: Sequence[Any]) -> list[str]:
    kinds = list(dict.fromkeys(values))
    if all(isinstance(kind, int | float) for kind in kinds):
        kinds.sort()
    return list(dict.fromkeys(map(_word, kinds)))


def _heat_map(alt: Any, rows: list[dict[str, Any]], a: str, b: str, color: Any, middle: float,
              settings: Mapping[str, Sequence[Any]]) -> Any:  # fmt: skip
    xs, ys = _order(settings[a]), _order(settings[b])
    x = alt.X("x:N", sort=xs, title=a, axis=alt.Axis(labelAngle=0))
    y = alt.Y("y:N", sort=ys[::-1], title=b)
    for row in rows:
        row["ink"] = "dark" if row["value"] is None or row["value"] > middle else "light"
    base = alt.Chart(inline(rows))
    ink = alt.Color("ink:N", scale=alt.Scale(domain=["dark", "light"], range=[INK, "white"]), legend=None)
    known = alt.Chart(inline([row for row in rows if row["value"] is not None])).mark_rect().encode(x, y, color)
    unknown = alt.Chart(inline([row for row in rows if row["value"] is None])).mark_rect(fill="#F2F2F2").encode(x, y)
    text = base.mark_text(fontSize=12).encode(x, y, ink, text="told:N")
    width, height = max(150, 62 * len(xs)), max(110, 44 * len(ys))
    return alt.layer(unknown, known, text).resolve_scale(color="independent").properties(width=width, height=height)


def _scatter(alt: Any, first: Sequence[Any], second: Sequence[Any], values: Any, a: str, b: str, color: Any) -> Any:
    rows: list[dict[str, Any]] = []
    for x, y, value in zip(first, second, values, strict=True):
        rows.append({"x": x, "y": y, "value": float(value) if np.isfinite(value) else None})
    axes = []
    for channel, name, each in ((alt.X, a, first), (alt.Y, b, second)):
        key = "x" if channel is alt.X else "y"
        if all(isinstance(value, int | float) and not isinstance(value, bool) for value in each):
            kind, ticks, more = _choose_axis(np.asarray(each, dtype=float))
            small = "datum.value != 0 && abs(datum.value) < 0.001"
            axis = alt.Axis(values=ticks, labelExpr=f"format(datum.value, {small} ? '~e' : '~g')", labelOverlap=True)
            scale = alt.Scale(type=kind, zero=False, nice=False, padding=10, **more)
            axes.append(channel(f"{key}:Q", title=name, axis=axis, scale=scale))
        else:
            axes.append(channel(f"{key}:N", title=name))
    rows.sort(key=lambda row: row["value"] or 0.0)  # where dots lie on each other, the best is on top
    known = alt.Chart(inline([row for row in rows if row["value"] is not None]))
    lost = alt.Chart(inline([row for row in rows if row["value"] is None]))
    dots = alt.layer(
        known.mark_point(filled=True, size=80, opacity=0.9, stroke="white", strokeWidth=0.5).encode(*axes, color),
        lost.mark_text(text="×", fontSize=18, color=ORANGE, fontWeight="bold").encode(*axes),
    )
    # With one scale of colours for all maps, those without a legend would hide it.
    return dots.resolve_scale(color="independent").properties(width=230, height=200)


def _choose_axis(values: NDArray[np.float64]) -> tuple[str, list[float], dict[str, float]]:
    """(kind of scale, ticks, further options): the values themselves where they are few, decades on a logarithmic scale."""
    above = values[values > 0]
    is_log = bool(len(above)) and above.max() >= 9.9 * above.min() and not (values < 0).any()
    kind = "linear" if not is_log else "symlog" if (values == 0).any() else "log"
    more = {"constant": float(above.min())} if kind == "symlog" else {}
    distinct = np.unique(values)
    if len(distinct) <= 7 and (is_log or len(distinct) < 2 or np.diff(distinct).min() > np.ptp(distinct) / 10):
        return kind, distinct.tolist(), more
    if not is_log:
        step = 10 ** np.floor(np.log10(max(np.ptp(values), 1e-12) / 4))
        step *= next(times for times in (1, 2, 5, 10) if np.ptp(values) / (times * step) <= 6)
        return kind, (step * np.arange(np.ceil(values.min() / step), np.floor(values.max() / step) + 1)).tolist(), more
    low, high = np.log10(above.min()), np.log10(above.max())
    decades = np.arange(np.floor(low), np.ceil(high) + 1)
    ticks = [times * 10.0**power for power in decades for times in ((1, 3) if high - low < 2.5 else (1,))]
    ticks = [tick for tick in ticks if above.min() * 0.99 <= tick <= above.max() * 1.01][:: 1 if high - low < 6 else 2]
    return kind, [0.0] * (kind == "symlog") + [float(f"{tick:.6g}") for tick in ticks], more


def draw_importance(
    names: Sequence[str], share: ArrayLike, low: ArrayLike, high: ArrayLike, *, rest: Mapping[str, float] | None = None,
    axis: str = "share of the differences (%)", title: str = "Which setting matters", subtitle: str = "",
) -> "alt.LayerChart":  # fmt: skip
    """A bar a setting, longest first: the share of the differences between trainings that it explains, with its interval.

    names, share, low, high: S of each, shares 0…1; nan is not known. rest: what no single setting explains, in grey, such as
    interactions and chance.

    How to read: the longest bar is what to tune first, if the line of its interval keeps clear of the next bar's; intervals that
    overlap leave the order open. Bars that are all short beside a long grey one of chance mean that none of the settings
    matters within the range tried; a long one of interactions, that they cannot be tuned one by one: see the maps of pairs.
    Importance is of the range tried: a setting varied too little looks unimportant.

    Raises InputError when lengths differ.
    """
    import altair as alt

    shares, lows, highs = (100 * np.asarray(each, dtype=float) for each in (share, low, high))
    if not len(names) == len(shares) == len(lows) == len(highs):
        raise InputError(f"{len(names)} settings cannot be drawn with {len(shares)} shares, {len(lows)} and {len(highs)} ends")
    labels = label_names([*names, *(rest or {})], longest=44)
    order = sorted(range(len(names)), key=lambda k: -np.nan_to_num(shares[k], nan=-1))
    rows: list[dict[str, Any]] = []
    for k in order:
        known, ends = bool(np.isfinite(shares[k])), bool(np.isfinite(lows[k]))
        interval = f" ({lows[k]:.1f} to {highs[k]:.1f})" if ends else ""
        told = f"{shares[k]:.1f} %{interval}" if known else "not known"
        rows.append({"name": labels[k], "share": float(shares[k]) if known else 0.0, "kind": "setting", "told": told,
                     "low": float(lows[k]) if ends else None, "high": float(highs[k]) if ends else None,
                     "at": float(np.nanmax([shares[k], highs[k], 0]))})  # fmt: skip
    for label, value in zip(labels[len(names) :], (rest or {}).values(), strict=True):
        known = bool(np.isfinite(value))
        rows.append({"name": label, "share": 100 * value if known else 0.0, "kind": "rest", "low": None, "high": None,
                     "told": f"{100 * value:.1f} %" if known else "not known", "at": 100 * value if known else 0.0})  # fmt: skip
    y_axis = alt.Axis(labelLimit=320, ticks=False, labelFontSize=12)
    y = alt.Y("name:N", sort=[row["name"] for row in rows], title=None, axis=y_axis)
    x = alt.X("share:Q", title=axis, scale=alt.Scale(domain=[0, max(10.0, min(130.0, 1.25 * max(row["at"] for row in rows)))]))
    color = alt.Color("kind:N", scale=alt.Scale(domain=["setting", "rest"], range=[BLUE, GREY]), legend=None)
    layers = [
        alt.Chart(inline(rows)).mark_bar(height=16).encode(x, y, color),
        alt.Chart(inline([row for row in rows if row["low"] is not None])).mark_rule(color=INK, strokeWidth=1.8).encode(
            alt.X("low:Q", title=axis), y, alt.X2("high:Q")),
        alt.Chart(inline(rows)).mark_text(align="left", dx=6, color=INK).encode(alt.X("at:Q", title=axis), y, text="told:N"),
    ]  # fmt: skip
    return style_chart(alt.layer(*layers).properties(width=480, height=34 * len(rows)), title, subtitle)  # type: ignore[no-any-return]
