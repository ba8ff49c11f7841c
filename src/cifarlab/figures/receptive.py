"""How much of the image a layer sees: in theory by depth, in effect as a map."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from cifarlab.config import InputError
from cifarlab.figures.style import BLUE, INK, ORANGE, inline, label_names, plain_text, style_chart

if TYPE_CHECKING:
    import altair as alt
    from matplotlib.figure import Figure


def draw_receptive_field(
    names: Sequence[str], sizes: ArrayLike, image_size: int | tuple[int, int], *, title: str = "Receptive field by depth"
) -> "alt.LayerChart":
    """Side of each layer's receptive field in pixels, layers in order of execution, beside the side of the image.

    names: dotted names of L layers; sizes: pixels, (L,), or (L, 2) for height × width, of which the larger is drawn; NaN where
    it is not known. image_size: pixels, or (height, width), of which the larger is marked. Layers that see as much as the one
    before (batch norm, ReLU) are left out.

    How to read: the field should grow in even steps and pass the image (orange line) in the deeper half. A first step that is
    already a quarter of the image belongs to a stem made for larger images; a net that ends left of the line must decide
    without ever seeing the whole, but for its last pooling. Layers far right of the line see mostly padding: depth there adds
    computation, not view. In effect a layer sees much less than in theory, see the effective receptive field.

    Raises InputError when names and sizes do not fit.
    """
    import altair as alt

    given = np.asarray(sizes, dtype=float).reshape(len(names), -1) if len(names) else np.zeros((0, 1))
    if given.size not in (len(names), 2 * len(names)):
        raise InputError(f"{np.asarray(sizes).shape} sizes do not fit {len(names)} names: give one, or height and width, of each")
    sides = given.max(axis=1)
    is_known = np.isfinite(sides)
    known = np.flatnonzero(is_known)
    shown = [int(k) for i, k in enumerate(known) if i == 0 or sides[k] != sides[known[i - 1]]]
    labels = label_names([names[k] for k in shown], longest=48)
    drawn = [float(sides[k]) for k in shown]
    rows = [{"layer": label, "size": size} for label, size in zip(labels, drawn, strict=True)]
    image = float(np.max(image_size))
    step = 22 if len(rows) <= 30 else 14
    top = max([image, *drawn]) * 1.04

    y = alt.Y("layer:N", title=None, sort=labels, scale=alt.Scale(domain=labels, paddingInner=0.25),
              axis=alt.Axis(labelOverlap=False, ticks=False, labelFontSize=12 if step > 20 else 10))  # fmt: skip
    x = alt.X("size:Q", title="receptive field (side in pixels)", scale=alt.Scale(domain=[0, top], nice=False))
    bars = alt.Chart(inline(rows)).encode(y)
    whole = alt.Chart(inline([{"size": image}])).mark_rule(color=ORANGE, strokeWidth=2).encode(x)
    numbers = bars.mark_text(align="right", fontSize=11, color=INK).encode(x=alt.value(536), text=alt.Text("size:Q", format="d"))
    subtitle = [f"orange line: the image, {image:.0f} pixels"]
    if beyond := [label for label, size in zip(labels, drawn, strict=True) if size >= image]:
        subtitle[0] += f"; reached at {plain_text(beyond[0], 48)}"
    if len(known) < len(names):
        subtitle.append(f"not known for {len(names) - len(known)} layers")
    chart = alt.layer(bars.mark_bar(color=BLUE, opacity=0.55).encode(x), whole, numbers)
    return style_chart(chart.properties(width=500, height=step * max(len(rows), 1)), title, subtitle)  # type: ignore[no-any-return]


def draw_effective_field(array: ArrayLike, *, title: str = "Effective receptive field") -> "Figure":
    """Share of the gradient that falls on each pixel of the image, as a heat map; the largest share is 1.

    array: (H, W), from 0. The white line encloses the pixels above 4.55 % of the largest: two standard deviations, were it a
    Gaussian.

    How to read: a healthy field is a round blob around the centre that falls off like a Gaussian, much smaller than the
    theoretical field, and grows while training. It should cover what tells the classes apart: if it does not, more depth,
    stride or dilation helps. A regular grid of dots comes from dilation or stride without overlap; a blob off the centre
    from padding on one side only.

    Source: Luo et al. 2016, arXiv:1701.04128. Raises InputError when the array is not a map of shares.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shares = np.asarray(array, dtype=float)
    if shares.ndim != 2 or not shares.size or not np.isfinite(shares).all() or shares.min() < 0:
        raise InputError(f"an effective field of shape {shares.shape} cannot be drawn: give H×W finite numbers from 0")
    shares = shares / (shares.max() or 1)
    figure = Figure(figsize=(5.6, 5.2), facecolor="white")
    FigureCanvasAgg(figure)
    figure.text(0.04, 0.96, plain_text(title, 60), fontsize=13, fontweight="bold", color=INK, va="top", parse_math=False)
    inside = int((shares > 0.0455).sum())
    words = f"{inside:,} of {shares.size:,} pixels above 4.55 % of the largest (side {np.sqrt(inside):.1f})"
    figure.text(0.04, 0.9, words, fontsize=9.5, color="#555555", va="top")
    axes = figure.add_axes((0.09, 0.07, 0.74, 0.76))
    drawn = axes.imshow(shares, cmap="magma", vmin=0, vmax=1, interpolation="nearest")
    if 0 < inside < shares.size:
        fine = np.kron(shares > 0.0455, np.ones((8, 8)))  # so that the line follows the pixels' edges
        y, x = ((np.arange(n) + 0.5) / 8 - 0.5 for n in fine.shape)
        axes.contour(x, y, fine, levels=[0.5], colors="white", linewidths=0.8)
    axes.tick_params(labelsize=8, colors=INK)
    bar = figure.colorbar(drawn, cax=figure.add_axes((0.86, 0.07, 0.03, 0.76)))
    bar.ax.tick_params(labelsize=8)
    return figure
