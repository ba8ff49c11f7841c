"""How well each class is recognised."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cifarlab.config import InputError
from cifarlab.figures.style import BLUE, INK, ORANGE, inline, label_names, plain_text, style_chart

if TYPE_CHECKING:
    import altair as alt


def draw_class_accuracy(
    accuracy: ArrayLike, support: ArrayLike, class_names: Sequence[str], *, title: str = "Accuracy per class"
) -> "alt.LayerChart":
    """Share of each class's images that were recognised (its recall), worst first, with a 95 % interval.

    accuracy: (K,), 0…1; support: (K,), images of each class. Classes without images are left out and named.
    The interval is Wilson's for a share of `support` images: it says how far another test set of that size could differ,
    not how far another training run could.

    How to read: bars of a healthy model lie within some 15 points of each other around the mean (orange line). A class far below,
    whose interval does not reach the mean, is the place to look: too few or wrongly labelled images, or a twin class (the
    confusion matrix names it). Bars whose intervals overlap are not worth ranking.

    Source: Wilson, "Probable inference", J. Am. Stat. Assoc. 22 (1927).
    Raises InputError when the lengths differ.
    """
    import altair as alt

    shares, counts = np.asarray(accuracy, dtype=float), np.asarray(support, dtype=float)
    if shares.shape != (len(class_names),) or counts.shape != shares.shape:
        raise InputError(f"accuracy {shares.shape}, support {counts.shape} and {len(class_names)} class names do not fit "
                         "together: give one of each per class")  # fmt: skip
    labels = label_names(class_names)
    measured = (counts > 0) & np.isfinite(shares)
    low, high = wilson(shares, counts)
    order = [int(k) for k in np.argsort(shares, kind="stable") if measured[k]]
    rows = [{"class": labels[k], "accuracy": 100 * shares[k], "low": 100 * low[k], "high": 100 * high[k]} for k in order]
    names = [labels[k] for k in order]
    step = 26 if len(names) <= 30 else 13
    y = alt.Y("class:N", title=None, sort=names, scale=alt.Scale(domain=names, paddingInner=0.25),
              axis=alt.Axis(labelOverlap=False, labelFontSize=12 if step > 20 else 10, ticks=False))  # fmt: skip
    x = alt.X("accuracy:Q", title="accuracy (%), with 95 % interval", scale=alt.Scale(domain=[0, 100]))
    base = alt.Chart(inline(rows)).encode(y)
    layers = [
        base.mark_bar(color=BLUE, opacity=0.55).encode(x),
        base.mark_rule(color=INK, strokeWidth=1.2).encode(alt.X("low:Q"), alt.X2("high:Q")),
        # Numbers stand in a column of their own, so that they never run into an interval.
        base.mark_text(align="right", fontSize=12 if step > 20 else 10, color=INK).encode(
            x=alt.value(536), text=alt.Text("accuracy:Q", format=".1f")
        ),
    ]
    subtitle = ["nothing measured"]
    if names:
        mean = float(shares[measured].mean()) * 100
        layers.append(alt.Chart(inline([{"mean": mean}])).mark_rule(color=ORANGE, strokeWidth=2).encode(alt.X("mean:Q")))
        smallest, largest = int(counts[measured].min()), int(counts[measured].max())
        images = f"{smallest:,}" if smallest == largest else f"{smallest:,} to {largest:,}"
        subtitle = [f"mean over classes {mean:.1f} % (orange line); {images} images per class"]
    absent = [labels[k] for k in np.flatnonzero(~measured)]
    if absent and names:
        subtitle.append(plain_text(f"not in this split: {', '.join(absent)}", 90))
    chart = alt.layer(*layers).properties(width=500, height=step * max(len(names), 1))
    return style_chart(chart, title, subtitle)  # type: ignore[no-any-return]


def wilson(p: NDArray[np.float64], n: NDArray[np.float64], z: float = 1.96) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(low, high) of Wilson's interval for a share p of n, with z standard deviations to either side."""
    n = np.maximum(n, 1)
    center = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return center - half, center + half
