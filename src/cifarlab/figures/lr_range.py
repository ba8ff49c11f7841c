"""What a learning-rate range test found: loss over learning rate, and accuracy over the rungs of a ladder."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from cifarlab.figures.layers import log_axis, log_domain, tell_amount
from cifarlab.figures.style import BLUE, GREEN, INK, NAMED_MARKS, inline, style_chart, thin, wrap_text

if TYPE_CHECKING:
    import altair as alt

WIDTH, HEIGHT, LINE = 640, 360, 17  # pixels; LINE: between two names of marks
MOST = 600  # points drawn of a curve


def draw_lr_range(
    lrs: ArrayLike, loss: ArrayLike, low: ArrayLike, high: ArrayLike, *, raw: Sequence[tuple[ArrayLike, ArrayLike]] = (),
    suggestions: Mapping[str, float] | None = None, split: str = "train", logarithmic: bool = True, smoothed: bool = True,
    title: str = "Learning-rate range test", subtitle: Sequence[str] = (),
) -> "alt.LayerChart":  # fmt: skip
    """Loss over learning rate: each seed's points faintly, the median of their smoothed curves, and the band between the seeds.

    lrs, loss, low, high: of the same length, inf or NaN where there is nothing. raw: (rates, losses) of each seed.
    suggestions: name -> learning rate. Losses far above where the curve began are cut off.

    How to read: from left to right the loss stays (rates too small to learn with), falls, lies at its lowest, and breaks away
    upward. Good rates lie where it falls, well left of the lowest point: there it is already about to break away. A curve that
    falls from the very left, or is lowest at the very right, needs a wider range; one that never leaves its noise says nothing.
    A wide band, or seeds that fall at different rates, means the suggestions are that uncertain.
    """
    import altair as alt

    rates, middle, lower, upper = (np.array(a, dtype=float).ravel() for a in (lrs, loss, low, high))
    points = [(np.array(x, dtype=float).ravel(), np.array(y, dtype=float).ravel()) for x, y in raw]
    seen = middle[np.isfinite(middle)]
    begin, bottom = (float(seen[0]), float(seen.min())) if len(seen) else (1.0, 0.0)
    drop = max(begin - bottom, 0.05 * abs(begin), 1e-12)
    floor = min([bottom - 0.1 * drop, *(float(np.nanmin(y)) for _, y in points if np.isfinite(y).any())])
    top = begin + 0.9 * drop  # the names of the marks are above what has not broken away
    if not suggestions:
        shown = [float(np.max(y[np.isfinite(y)], initial=begin)) for y in (upper, *(y for _, y in points))]
        top = min(top, max(shown) + 0.06 * drop)
    scale = alt.Scale(domain=[max(floor - 0.04 * drop, bottom - 0.6 * drop), top], nice=False)
    y = alt.Y("y:Q", title=f"{split} loss (nats per image)", axis=alt.Axis(tickCount=7), scale=scale)
    measured = np.concatenate([rates[np.isfinite(middle)], *(x for x, _ in points)])
    x = _rate_axis(alt, measured, logarithmic)

    faint = [{"x": float(a), "y": float(b), "seed": k} for k, (xs, ys) in enumerate(points)
             for a, b in _thinned(xs, ys) if b <= top]  # fmt: skip
    band = [{"x": float(rates[k]), "y": float(lower[k]), "y2": float(min(upper[k], 1.2 * top))}
            for k in np.flatnonzero(np.isfinite(lower) & ~np.isnan(upper))]  # fmt: skip
    drawn = [{"x": float(a), "y": float(min(b, 1.2 * top))} for a, b in _thinned(rates, middle)]
    layers = [
        alt.Chart(inline(faint)).mark_circle(size=11, opacity=0.35, color=BLUE, clip=True).encode(x, y),
        alt.Chart(inline(band)).mark_area(color=BLUE, opacity=0.18, clip=True).encode(x, y, alt.Y2("y2:Q")),
        alt.Chart(inline(drawn)).mark_line(color=BLUE, strokeWidth=2.5, clip=True).encode(x, y),
        *_marks(alt, x, suggestions or {}, measured, logarithmic),
    ]
    line = "smoothed" if smoothed else "the same, joined"
    if len(points) > 1:
        line = f"median of {len(points)}{' smoothed' * smoothed} curves; band: lowest and highest"
    told = [*subtitle, f"dots: single points; line: {line}"] if len(points) else list(subtitle)
    return style_chart(alt.layer(*layers).properties(width=WIDTH, height=HEIGHT), title, wrap_text(told))  # type: ignore[no-any-return]


def draw_lr_accuracy(
    lrs: ArrayLike, accuracy: ArrayLike, *, suggestions: Mapping[str, float] | None = None, logarithmic: bool = True,
    split: str = "train", title: str = "Accuracy over learning rate", subtitle: Sequence[str] = (),
) -> "alt.LayerChart":  # fmt: skip
    """Accuracy over the rungs of a ladder: one dot a seed, the line their median.

    lrs: rungs; accuracy: seeds × rungs, 0…1, NaN where a seed had stopped. suggestions: name -> learning rate.

    How to read: each rung is an epoch at its learning rate, on top of all rungs before, so accuracy rises at first
    whatever the rate. Take the rate at which it stops rising, or falls, for the peak of a schedule; a curve that
    rises to its last rung has not found the limit. Dots of one rung that lie far apart say how much is chance.
    """
    import altair as alt

    rates = np.array(lrs, dtype=float).ravel()
    rows = 100 * np.atleast_2d(np.array(accuracy, dtype=float))
    x = _rate_axis(alt, rates, logarithmic)
    seen = rows[np.isfinite(rows)]
    low, high = (float(seen.min()), float(seen.max())) if len(seen) else (0.0, 100.0)
    room = max(high - low, 2.0)
    y = alt.Y("y:Q", title=f"{split} accuracy (%)", scale=alt.Scale(domain=[low - 0.08 * room, high + 0.25 * room], nice=False),
              axis=alt.Axis(tickCount=7))  # fmt: skip
    dots = [{"x": float(rates[k]), "y": float(row[k])} for row in rows for k in np.flatnonzero(np.isfinite(row))]
    known = np.flatnonzero(np.isfinite(rows).any(axis=0))
    line = [{"x": float(rates[k]), "y": float(np.nanmedian(rows[:, k]))} for k in known]
    layers = [
        alt.Chart(inline(line)).mark_line(color=GREEN, strokeWidth=2.5).encode(x, y),
        alt.Chart(inline(dots)).mark_circle(size=45, opacity=0.7, color=GREEN).encode(x, y),
        *_marks(alt, x, suggestions or {}, rates, logarithmic),
    ]
    seeds = f"dots: {len(rows)} seeds; line: their median" if len(rows) > 1 else ""
    told = [*subtitle, seeds] if seeds else list(subtitle)
    return style_chart(alt.layer(*layers).properties(width=WIDTH, height=HEIGHT), title, wrap_text(told))  # type: ignore[no-any-return]


def _rate_axis(alt: Any, rates: Any, logarithmic: bool) -> Any:
    good = rates[np.isfinite(rates) & (rates > 0)]
    if not logarithmic:
        ends = [0.0, float(good.max(initial=1e-9))]
        return alt.X("x:Q", title="learning rate", scale=alt.Scale(domain=ends, nice=False), axis=alt.Axis(tickCount=8))
    low, high = (float(good.min()), float(good.max())) if len(good) else (0.1, 1.0)
    ends = [low, high] if high > 1.5 * low else list(log_domain(good))
    return alt.X("x:Q", title="learning rate", axis=log_axis(ends[0] * 0.999, ends[1] * 1.001, most=12),
                 scale=alt.Scale(type="log", domain=ends, nice=False))  # fmt: skip


def _marks(alt: Any, x: Any, suggestions: Mapping[str, float], rates: Any, logarithmic: bool) -> list[Any]:
    """An upright line for each suggestion, its name and rate at the top.

    Each name has a line of its own, and the next rule begins below it, so that no name is crossed.
    """
    good = rates[np.isfinite(rates) & (rates > 0)]
    kept = sorted((lr, name) for name, lr in suggestions.items() if len(good) and good.min() <= lr <= good.max())
    if not kept:
        return []
    ends = np.log([good.min(), kept[-1][0], good.max()]) if logarithmic else np.array([0, kept[-1][0], good.max()])
    is_right = bool((ends[1] - ends[0]) / max(ends[2] - ends[0], 1e-300) > 0.72)  # no room for a name beside the last
    layers = []
    for k, (lr, name) in enumerate(kept[::-1] if is_right else kept):
        color, dash = NAMED_MARKS[k % len(NAMED_MARKS)]
        chart = alt.Chart(inline([{"x": float(lr), "told": f"{name} {tell_amount(float(lr))}"}]))
        rule = chart.mark_rule(color=color, strokeWidth=2, strokeDash=dash)
        layers.append(rule.encode(x, y=alt.value(3 + LINE * k), y2=alt.value(HEIGHT)))
        layers.append(
            chart.mark_text(color=INK, fontSize=12, align="right" if is_right else "left", dx=-6 if is_right else 6)
            .encode(x, y=alt.value(10 + LINE * k), text="told:N")
        )  # fmt: skip
    return layers


def _thinned(x: Any, y: Any) -> list[tuple[float, float]]:
    known = np.flatnonzero(~np.isnan(y))
    return [(x[known[k]], y[known[k]]) for k in thin(known, MOST)] if len(known) else []
