"""Learning curves: loss and accuracy over epochs."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cifarlab.figures.style import ORANGE, SPLITS, inline, style_chart

if TYPE_CHECKING:
    import altair as alt

MOST = 1000  # points of a line: a picture has no more pixels, and a page is to stay small


def draw_learning_curves(
    curves: Mapping[str, tuple[ArrayLike, ArrayLike]], *, title: str = "Learning curves", log_loss: bool = False
) -> "alt.HConcatChart":
    """Loss and accuracy against epochs, side by side, one line per split.

    curves: metric key -> (epochs as fractions, values), keys `train/…`, `clean/…` (training images without augmentation),
    `val/…`, `test/…` of `loss` and `accuracy` (0…1); measured points only. A curve with more than three points per epoch is
    drawn as the mean over each epoch, at the epoch's middle since that is where it was measured on average, with the
    points themselves, smoothed, faintly behind. Of more than a thousand points of a line means of neighbours are drawn.

    How to read: healthy losses fall steeply, then slowly, and most of the last gain comes as the learning rate goes to 0.
    Training and test loss that both stay high mean too small a model or a learning rate far off; a test loss that
    rises while training loss falls is overfitting (augment more, or decay weights more); jumps upward mean too high a learning
    rate. Test above training accuracy is usual with augmentation or dropout, which handicap training only. A dotted
    upright line marks the first value that is not finite: there the run diverged.
    """
    import altair as alt

    seen = [split for split in SPLITS if f"{split}/loss" in curves or f"{split}/accuracy" in curves]
    end = max([1.0, *(np.max(epochs, initial=0) for epochs, _ in curves.values())])
    panels = [
        _draw_panel(alt, curves, seen, end, "loss", "cross-entropy loss (nats per image)", log_loss),
        _draw_panel(alt, curves, seen, end, "accuracy", "accuracy (%)", False),
    ]
    return style_chart(alt.hconcat(*panels, spacing=70, bounds="flush"), title)  # type: ignore[no-any-return]


def _draw_panel(
    alt: Any, curves: Mapping[str, tuple[ArrayLike, ArrayLike]], seen: list[str], end: float, quantity: str, axis: str, log: bool
) -> Any:
    points: list[dict[str, Any]] = []
    faint: list[dict[str, Any]] = []
    last, broken = [], []
    for split in seen:
        epochs, values = (np.asarray(a, dtype=float).ravel() for a in curves.get(f"{split}/{quantity}", ((), ())))
        values = values * 100 if quantity == "accuracy" else values
        finite = np.isfinite(values)
        broken += epochs[~finite][:1].tolist()
        epochs, values = epochs[finite], values[finite]
        if log:
            epochs, values = epochs[values > 0], values[values > 0]
        if not len(values):
            continue
        if len(values) > 3 * np.ceil(epochs.max()):
            faint += _rows(split, *_bin_means(epochs, values, max(1, len(values) // 300)))
            epochs, values = _epoch_means(epochs, values)
        points += _rows(split, *_bin_means(epochs, values, -(-len(values) // MOST)))
        style = ".1f" if quantity == "accuracy" else ".3f" if values[-1] < 1000 else ".1e"
        last.append(f"{split} {values[-1]:{style}}" + (" %" if quantity == "accuracy" else ""))

    marks = points
    note = f"; not finite from epoch {min(broken):.3g}" if broken else ""
    scale = alt.Scale(type="log", nice=False) if log else alt.Scale(zero=False, nice=True)
    start, top = (max((row["value"] for row in rows), default=0) for rows in ([*faint[:5], *points[:1]], faint + points))
    if quantity == "loss" and not log and top > 3 * start > 0:  # a loss that explodes would flatten all that came before
        scale, note = alt.Scale(domain=[0, 3 * start]), note + f"; cut off, highest {top:.3g}"
        for row in faint + points:  # drawn out of the picture, not to 1e30, where renderers give up the whole line
            row["value"] = min(row["value"], 3.1 * start)
        marks = [row for row in points if row["value"] <= 3 * start]
    if not points:  # a scale without a domain, or a legend without entries, would leave the picture without a size
        scale = alt.Scale(domain=[0, 1])
    legend = alt.Legend(orient="bottom", symbolOpacity=1) if seen else None
    x = alt.X("epoch:Q", title="epoch", scale=alt.Scale(domain=[0, end], nice=False), axis=alt.Axis(tickMinStep=1))
    y = alt.Y("value:Q", title=axis, scale=scale)
    color = alt.Color("split:N", title=None, scale=alt.Scale(domain=seen, range=[SPLITS[s] for s in seen]),
                      legend=legend)  # fmt: skip
    shape = alt.Shape("split:N", title=None, scale=alt.Scale(domain=seen))
    layers = [
        alt.Chart(inline(faint, f"{quantity}-raw")).mark_line(opacity=0.3, strokeWidth=1, clip=True).encode(x, y, color),
        alt.Chart(inline(points, f"{quantity}-line")).mark_line(strokeWidth=2, clip=True).encode(x, y, color),
    ]
    # Marks tell the splits apart without colour, until there are too many; then they are only there to be pointed at.
    look = {"size": 34, "opacity": 1} if len(points) <= 200 else {"size": 80, "opacity": 0}
    told = [alt.Tooltip("split:N"), alt.Tooltip("epoch:Q", format=".4~g"), alt.Tooltip("value:Q", title=axis, format=".4~g")]
    layers.append(alt.Chart(inline(marks, f"{quantity}-marks")).mark_point(filled=True, **look).encode(
        x, y, color, *([shape] if len(points) <= 200 else []), tooltip=told))  # fmt: skip
    if broken:
        rule = alt.Chart(inline([{"epoch": min(broken)}]))
        layers.append(rule.mark_rule(color=ORANGE, strokeDash=[2, 3], strokeWidth=2).encode(x))
    ends = ("last: " + ", ".join(last)) if last else "nothing measured"
    title = alt.TitleParams(quantity, subtitle=ends + note, anchor="start", fontSize=13, subtitleFontSize=12)
    return alt.layer(*layers).properties(width=400, height=300, title=title)


def _rows(split: str, epochs: NDArray[np.float64], values: NDArray[np.float64]) -> list[dict[str, Any]]:
    pairs = zip(epochs.tolist(), values.tolist(), strict=True)
    return [{"split": split, "epoch": round(epoch, 4), "value": float(f"{value:.5g}")} for epoch, value in pairs]


def _bin_means(x: NDArray[np.float64], y: NDArray[np.float64], size: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Means over runs of `size` neighbours: smooths, and keeps a figure of 50,000 steps small."""
    starts = np.arange(0, len(x), size)
    counts = np.diff(np.append(starts, len(x)))
    return np.add.reduceat(x, starts) / counts, np.add.reduceat(y, starts) / counts


def _epoch_means(epochs: NDArray[np.float64], values: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean position and value in each epoch; epoch k covers (k−1, k]. The epochs rise."""
    starts = np.flatnonzero(np.diff(np.ceil(epochs - 1e-9), prepend=-1.0))
    counts = np.diff(np.append(starts, len(epochs)))
    return np.add.reduceat(epochs, starts) / counts, np.add.reduceat(values, starts) / counts
