"""Which classes are taken for which."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cifarlab.config import InputError
from cifarlab.figures.style import INK, ORANGE, inline, label_names, style_chart

if TYPE_CHECKING:
    import altair as alt


def draw_confusion(matrix: ArrayLike, class_names: Sequence[str], *, title: str = "Confusion matrix") -> "alt.HConcatChart":
    """Confusion matrix (row = true, column = predicted) as a share of each row, beside its most frequent confusions.

    matrix: counts, (K, K). Right answers (blue) and mistakes (orange) have a colour scale each, for one scale would leave
    all mistakes of a good model white. Cells carry their counts up to 20 classes.

    How to read: a good model is a strong blue diagonal. An orange cell is a habit: its mirror image just as strong means two
    classes that look alike; a lone one means a bias towards the predicted class. A whole strong column means a class
    predicted too readily (class imbalance, or training not finished); a faint row means a class that is not learned: look at its
    images and labels.

    Raises InputError when matrix and names do not fit.
    """
    import altair as alt

    counts = np.asarray(matrix)
    num_classes = len(class_names)
    if counts.shape != (num_classes, num_classes):
        raise InputError(f"a confusion matrix of shape {counts.shape} does not fit {num_classes} class names: give K×K, K names")
    labels = label_names(class_names)
    shares = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    cell = 46 if num_classes <= 12 else 34 if num_classes <= 20 else 16 if num_classes <= 50 else 11
    with_numbers = num_classes <= 20
    rows = [
        {"true": labels[i], "predicted": labels[j], "count": int(counts[i, j]), "share": float(shares[i, j]), "right": i == j,
         "cell": [i, j]}
        for i, j in zip(*(a.tolist() for a in np.nonzero(counts)), strict=True)
    ]
    scale = alt.Scale(domain=labels, paddingInner=0.04 if with_numbers else 0)
    axis = alt.Axis(labelOverlap=False, labelFontSize=11 if num_classes <= 50 else 9, grid=not with_numbers, zindex=0)
    x_axis = axis.copy()
    x_axis.labelAngle = -40 if with_numbers else -90
    x = alt.X("predicted:N", title="predicted class", sort=labels, scale=scale, axis=x_axis)
    y = alt.Y("true:N", title="true class", sort=labels, scale=scale, axis=axis)
    base = alt.Chart(inline(rows)).encode(x, y)
    wrong = shares[~np.eye(num_classes, dtype=bool)]
    layers = [
        _draw_cells(alt, base, "datum.right", "right (% of the true class)", "blues", 100.0),
        _draw_cells(alt, base, "!datum.right", "mistaken (% of the true class)", "oranges", float(wrong.max(initial=0)) or 1.0),
    ]
    if with_numbers:
        dark = "datum.share > 55" if not wrong.size else f"datum.right ? datum.share > 55 : datum.share > {0.6 * wrong.max():.4g}"
        ink = alt.condition(dark, alt.value("white"), alt.value(INK))
        layers.append(base.mark_text(fontSize=11).encode(text=alt.Text("count:Q", format=",d"), color=ink))
    heat = alt.layer(*layers).resolve_scale(color="independent").properties(width=cell * num_classes, height=cell * num_classes)
    right, total = int(np.trace(counts)), int(counts.sum())
    subtitle = f"{right:,} of {total:,} images right ({100 * right / max(total, 1):.1f} %)"
    return style_chart(alt.hconcat(heat, _draw_pairs(alt, counts, labels), spacing=30), title, subtitle)  # type: ignore[no-any-return]


def _draw_cells(alt: Any, base: Any, which: str, title: str, scheme: str, top: float) -> Any:
    legend = alt.Legend(orient="bottom", direction="horizontal", gradientLength=180, titleLimit=260)
    color = alt.Color("share:Q", title=title, scale=alt.Scale(scheme=scheme, domain=[0, top]), legend=legend)
    told = [alt.Tooltip("true:N"), alt.Tooltip("predicted:N"), alt.Tooltip("count:Q", title="images", format=",d"),
            alt.Tooltip("share:Q", title="of the class (%)", format=".1f")]  # fmt: skip
    return base.transform_filter(which).mark_rect().encode(color=color, tooltip=told)


def _draw_pairs(alt: Any, counts: NDArray[Any], labels: list[str], at_most: int = 15) -> Any:
    off = np.where(np.eye(len(labels), dtype=bool), 0, counts)
    places = np.argsort(-off, axis=None, kind="stable")[:at_most]
    pairs = [(int(i), int(j)) for i, j in zip(*np.unravel_index(places, off.shape), strict=True) if off[i, j]]
    rows = [{"pair": f"{labels[i]} → {labels[j]}", "count": int(off[i, j]), "cell": [i, j]} for i, j in pairs]
    order = [row["pair"] for row in rows]
    y_axis = alt.Axis(labelLimit=330, ticks=False, domain=False)
    base = alt.Chart(inline(rows)).encode(
        alt.Y("pair:N", title=None, sort=order, scale=alt.Scale(domain=order), axis=y_axis),
        alt.X("count:Q", title="images", axis=alt.Axis(tickMinStep=1, tickCount=4)),
    )
    bars = base.mark_bar(color=ORANGE, height=12)
    numbers = base.mark_text(align="left", dx=4, fontSize=11, color=INK).encode(text=alt.Text("count:Q", format=",d"))
    heading = "Most frequent mistakes (true → predicted)" if rows else "No mistakes"
    return (bars + numbers).properties(
        width=170, height=max(20 * len(rows), 20), title=alt.TitleParams(heading, anchor="start", fontSize=13)
    )
