"""Whether what a model is sure of is right as often as it says."""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from cifarlab.config import InputError
from cifarlab.figures.classes import wilson
from cifarlab.figures.style import BLUE, GREY, INK, ORANGE, inline, style_chart

if TYPE_CHECKING:
    import altair as alt

SIDE = 380  # pixels of the square


def draw_reliability(
    edges: ArrayLike, counts: ArrayLike, confidence: ArrayLike, accuracy: ArrayLike, *,
    title: str = "Reliability", subtitle: str | list[str] = "",
) -> "alt.VConcatChart":  # fmt: skip
    """Accuracy over confidence in bins of confidence, with 95 % intervals, above the number of images in each bin.

    edges: (B+1,), rising, 0…1; counts: (B,); confidence (mean probability of the predicted class), accuracy: (B,), 0…1,
    nan where a bin is empty. A point stands at its bin's mean confidence; the coloured bar runs from there to the diagonal: it is
    the gap. Orange: less often right than promised (over-confident); blue: more often; faint where the interval (Wilson's) holds
    the bin's mean confidence.

    How to read: points on the diagonal mean that of images the model is 80 % sure of, 80 % are right. Orange bars below it
    mean over-confidence, the usual fault of large nets trained long: label smoothing, MixUp, or a temperature fitted on held-out
    images mend it. Blue bars above it mean under-confidence, which label smoothing and MixUp can overdo. Look at the numbers of
    images below first: a long bar of ten images is nothing, and where its interval crosses the diagonal nothing is shown.

    Source: DeGroot and Fienberg 1983; Guo et al. 2017 (arXiv:1706.04599). Raises InputError when the lengths differ.
    """
    import altair as alt

    bounds, n = np.asarray(edges, dtype=float), np.asarray(counts, dtype=float)
    sure, right = np.asarray(confidence, dtype=float), np.asarray(accuracy, dtype=float)
    if not len(bounds) - 1 == len(n) == len(sure) == len(right):
        raise InputError(f"edges {bounds.shape}, counts {n.shape}, confidence {sure.shape} and accuracy {right.shape} do not fit "
                         "together: give B+1 edges and B of each")  # fmt: skip
    low, high = wilson(right, n)
    rows = [
        {"from": 100 * bounds[b], "to": 100 * bounds[b + 1], "images": int(n[b]), "confidence": 100 * sure[b],
         "accuracy": 100 * right[b], "low": 100 * low[b], "high": 100 * high[b],
         "over": bool(right[b] < sure[b]), "shown": bool(not low[b] <= sure[b] <= high[b]),
         "bin": f"{100 * bounds[b]:.0f} to {100 * bounds[b + 1]:.0f} % sure"}
        for b in range(len(n)) if n[b] and np.isfinite(sure[b]) and np.isfinite(right[b])
    ]  # fmt: skip
    span = [100 * float(bounds[0]), 100 * float(bounds[-1])]
    x_scale = alt.Scale(domain=span, nice=False, padding=0)
    bare = alt.Axis(labels=False, ticks=False, tickCount=6)
    x = alt.X("confidence:Q", scale=x_scale, title=None, axis=bare)
    base = alt.Chart(inline(rows)).encode(
        x, tooltip=[alt.Tooltip("bin:N", title="bin"), alt.Tooltip("images:Q", format=",d"),
                    alt.Tooltip("confidence:Q", title="mean confidence (%)", format=".1f"),
                    alt.Tooltip("accuracy:Q", title="accuracy (%)", format=".1f")],
    )  # fmt: skip
    color = alt.condition("datum.over", alt.value(ORANGE), alt.value(BLUE))
    y = alt.Y("accuracy:Q", title="accuracy (%), with 95 % interval", scale=alt.Scale(domain=[0, 100]))
    ends = alt.Chart(inline([{"confidence": span[0], "accuracy": span[0]}, {"confidence": span[1], "accuracy": span[1]}]))
    layers = [
        ends.mark_line(color=GREY, strokeDash=[5, 4]).encode(x, y),
        base.mark_bar(width=14).encode(
            y, alt.Y2("confidence"), color=color, opacity=alt.condition("datum.shown", alt.value(0.65), alt.value(0.18))
        ),
        base.mark_rule(color=INK, strokeWidth=1.2).encode(alt.Y("low:Q"), alt.Y2("high:Q")),
        base.mark_circle(size=46, opacity=1, color=INK).encode(y),
    ]
    diagram = alt.layer(*layers).properties(width=SIDE, height=SIDE)
    wide = alt.Chart(inline([row | {"none": 0} for row in rows])).encode(
        alt.X("from:Q", scale=x_scale, title="confidence: probability of the predicted class (%)", axis=alt.Axis(tickCount=6)),
        alt.X2("to"),
    )
    most = max([row["images"] for row in rows], default=1)
    tall = alt.Y("images:Q", title="images", axis=alt.Axis(tickCount=3, format=",d"), scale=alt.Scale(domain=[0, 1.25 * most]))
    numbers = wide.transform_calculate(middle="(datum.from + datum.to) / 2").encode(
        alt.X("middle:Q", scale=x_scale),
        alt.X2(),
        alt.Y("images:Q"),
        alt.Text("images:Q", format=",d"),
    )
    histogram = alt.layer(
        wide.mark_rect(color=GREY, opacity=0.6, stroke="white").encode(tall, alt.Y2("none")),
        numbers.mark_text(dy=-6, fontSize=9, color=INK),
    ).properties(width=SIDE, height=90)
    key = "gap to the diagonal: orange over-confident, blue under-confident, faint within chance" if rows else "nothing measured"
    heading = [*([subtitle] if isinstance(subtitle, str) else subtitle), key]
    heading = [line for line in heading if line]
    return style_chart(alt.vconcat(diagram, histogram, spacing=8), title, heading)  # type: ignore[no-any-return]
