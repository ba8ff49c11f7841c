"""What the figures over a net's layers share: names that fit, steps in bins, logarithmic axes, and the order of the worst."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cifarlab.config import InputError
from cifarlab.figures.style import BLUE, GREEN, INK, ORANGE, PURPLE, inline, label_names, plain_text, style_chart

if TYPE_CHECKING:
    import altair as alt

Array = NDArray[np.float64]
PALE = "#C9D3DB"  # of the many layers behind the few that are named
RAMP = ["#E3EEF8", "#B7D4EA", "#6AAED6", "#2E7EBC", "#08306B"]  # one hue: orange and black stand out of it in any colour vision
NAMED = [ORANGE, BLUE, GREEN, PURPLE, "#E69F00", "#56B4E9"]  # the worst layer first
DASHES = [[1, 0], [7, 3], [2, 3], [9, 3, 2, 3], [4, 2], [12, 3]]
SMALLEST, LARGEST = 1e-300, 1e300  # of what is drawn: a log axis leaves room above and below


def label_layers(names: Sequence[str], longest: int = 34) -> list[str]:
    """Names of layers to print: as label_names, but cut in the middle, since both ends of a dotted name tell what it is."""
    labels = []
    for k, name in enumerate(names):
        label = plain_text(name) or f"layer {k}"
        half = (longest - 1) // 2
        labels.append(label if len(label) <= longest else f"{label[: longest - 1 - half]}…{label[-half:]}")
    return label_names(labels, longest=longest)


def take_measured(values: ArrayLike, shape: tuple[int, ...], what: str) -> tuple[Array, NDArray[np.bool_]]:
    """The values as floats, NaN where there is nothing to draw, and where they were measured but are not finite.

    A masked entry (numpy.ma) was not measured, as a frozen layer's gradient. Raises InputError when the shape differs.
    """
    masked = np.ma.getmaskarray(values) if np.ma.isMaskedArray(values) else False
    array = np.array(np.ma.getdata(values), dtype=float)
    if array.size == 0 == int(np.prod(shape)):
        return np.zeros(shape), np.zeros(shape, dtype=bool)
    if array.shape != shape:
        raise InputError(f"{what} {array.shape} does not fit: {' × '.join(map(str, shape))} values are needed")
    broken = ~np.isfinite(array) & ~np.asarray(masked)
    array[~np.isfinite(array) | masked] = np.nan
    return array, broken


class Bins(NamedTuple):
    """Runs of `size` neighbouring measurements: rows [starts[k], starts[k + 1]), on the axis from left to right."""

    starts: NDArray[np.intp]
    left: Array
    right: Array
    middle: Array
    size: int

    @property
    def domain(self) -> list[float]:
        """Ends of the axis."""
        return [float(self.left[0]), float(self.right[-1])] if len(self.starts) else [0.0, 1.0]

    def x(self, k: "int | np.integer[Any]") -> float:
        """Where bin k's point stands."""
        return round(float(self.middle[k]), 6)

    def ends(self, k: int) -> dict[str, Any]:
        """Where bin k's cell begins and ends."""
        return {"x": round(float(self.left[k]), 6), "x2": round(float(self.right[k]), 6)}

    def told(self, how: str) -> str:
        """What a figure says of its bins; empty when nothing was binned."""
        return f"{how} of every {self.size:,} measurements" if self.size > 1 else ""


def bin_steps(steps: ArrayLike, at_most: int, steps_per_epoch: int | None = None) -> Bins:
    """At most that many bins of equally many measurements, in order; the axis is in epochs when steps_per_epoch is given.

    A measurement stands for the time since the one before it: update n is what happened between n − 1 and n.
    """
    x = np.asarray(steps, dtype=float).ravel() / (steps_per_epoch or 1)
    size = max(1, -(-len(x) // max(at_most, 1)))
    starts = np.arange(0, len(x), size)
    if not len(x):
        return Bins(starts, x, x, x, size)
    stops = np.append(starts[1:], len(x))
    right = x[stops - 1]
    gap = x[1] - x[0] if len(x) > 1 else 1 / (steps_per_epoch or 1)
    left = np.append(max(x[0] - gap, 0.0), right[:-1])
    return Bins(starts, left, right, np.add.reduceat(x, starts) / (stops - starts), size)


def in_bins(values: Array, bins: Bins) -> Array:
    """(n, …) measurements as (bins, size, …), the last bin filled up with NaN."""
    padded = np.full((len(bins.starts) * bins.size, *values.shape[1:]), np.nan)
    padded[: len(values)] = values
    return padded.reshape(len(bins.starts), bins.size, *values.shape[1:])


def quantile(values: Array, q: float, axis: int) -> Array:
    """The q-quantile of the entries that are not NaN, NaN where there is none; numpy's own warns then."""
    if not values.shape[axis]:
        return np.full(np.delete(values.shape, axis), np.nan)
    ordered = np.moveaxis(np.sort(values, axis=axis), axis, -1)
    place = q * np.maximum((~np.isnan(ordered)).sum(axis=-1, keepdims=True) - 1, 0)
    low, high = (np.take_along_axis(ordered, f(place).astype(np.intp), -1)[..., 0] for f in (np.floor, np.ceil))
    part = (place - np.floor(place))[..., 0]
    result: Array = low * (1 - part) + high * part
    return result


def rank_worst(broken: NDArray[np.bool_], score: Array) -> list[int]:
    """Layers, worst first: those with entries that are not finite by when that began, then the others by falling score.

    Where most layers broke, only those that did so first come first: the others were only drawn into it, and their score tells
    more. broken: (steps, layers); score: (layers,), NaN last. Equals stay in the order of the net.
    """
    first = np.where(broken.any(axis=0), broken.argmax(axis=0), len(broken))
    if np.mean(first < len(broken)) > 0.5:
        first = np.where(first == first.min(), first, len(broken))
    return [int(k) for k in np.lexsort((-np.where(np.isnan(score), -np.inf, score), first))]


def log_domain(values: Array, least: float = 4.0) -> tuple[float, float]:
    """Ends of a logarithmic axis for the positive ones of the values, at least a factor of `least` apart."""
    good = values[np.isfinite(values) & (values > 0)]
    low, high = (float(np.clip(f(good), SMALLEST, LARGEST)) for f in (np.min, np.max)) if good.size else (0.1, 1.0)
    low, high = low / 1.25, high * 1.25
    short = max(1.0, (least * low / high) ** 0.5)
    return low / short, high * short


def log_axis(low: float, high: float, most: int = 8, **options: Any) -> "alt.Axis":
    """Axis of a logarithmic scale with at most that many numbers: powers of ten, or 1, 2, 5 and their like on a short axis."""
    import altair as alt

    powers = [k for k in range(-307, 308) if low <= 10.0**k <= high]
    if len(powers) > 1:
        shown = [k for k in powers if k % -(-len(powers) // most) == 0]
        signs = ",".join(f"'{k}':'{tell_amount(10.0**k)}'" for k in shown)
        label = f"{{{signs}}}[round(log(datum.value) / LN10)]"
        return alt.Axis(values=[10.0**k for k in shown], labelExpr=label, **options)
    at = int(np.floor(np.log10(low)))
    digits = (1, 2, 5) if high / low > 8 else (1, 1.5, 2, 3, 5, 7)
    ticks = [float(f"{digit}e{k}") for k in range(at, at + 3) for digit in digits]
    return alt.Axis(values=[tick for tick in ticks if low <= tick <= high], format="~g", **options)


def tell_amount(value: float) -> str:
    """A positive number in two or three digits, as people write it: 0.031, 3.2, 3,200, 3.2e-7.

    Letters of every font only: raised digits, ▼ or ‖ would change the font of the whole line where a renderer lacks them.
    """
    if not 0 < value < np.inf or 0.001 <= value < 99_950:
        return f"{float(f'{value:.3g}'):,.0f}" if 99.5 <= value < np.inf else f"{value:.2g}"
    digits, _, exponent = f"{value:.1e}".partition("e")
    return f"{digits.removesuffix('.0')}e{int(exponent)}"


def tell_factor(ratio: float) -> str:
    """A ratio as what one has to multiply or divide by: × 12, ÷ 3,200."""
    return f"× {tell_amount(ratio)}" if ratio >= 1 else f"÷ {tell_amount(1 / max(ratio, SMALLEST))}"


def count_layers(n: int, kind: str = "layer") -> str:
    return f"{n:,} {kind}{'s' * (n != 1)}"


def time_axis(bins: Bins, steps_per_epoch: int | None, **options: Any) -> "alt.X":
    """The axis of steps or epochs, and nothing but the time measured."""
    import altair as alt

    unit = f"epoch (of {steps_per_epoch:,} steps)" if steps_per_epoch else "step"
    if not steps_per_epoch:
        options["tickMinStep"] = 1
    axis = alt.Axis(tickCount=8, **options)
    return alt.X("x:Q", title=unit, scale=alt.Scale(domain=bins.domain, nice=False), axis=axis)


def line_style(bins: Bins, width: float = 2.0, color: str = "") -> dict[str, Any]:
    """How lines over the bins are drawn: with dots while there are few, since a line of one point cannot be seen.

    color: of all lines, where no encoding gives them one; dots do not take a line's by themselves.
    """
    own = {"color": color} if color else {}
    return {"strokeWidth": width, "strokeCap": "round",
            "point": {"size": 28, "filled": True} | own if len(bins.starts) <= 12 else False} | own  # fmt: skip


def draw_nothing(title: str, why: str = "") -> Any:
    """The figure of a run that measured nothing that could be drawn."""
    import altair as alt

    text = alt.Chart(inline([{"told": why or "nothing measured"}])).mark_text(fontSize=13, color=INK).encode(text="told:N")
    return style_chart(alt.layer(text).properties(width=520, height=160), title)


def line_rows(bins: Bins, values: Array, labels: Sequence[str], domain: tuple[float, float]) -> list[dict[str, Any]]:
    """Points of a line per column of values (bins, layers), `part` counting up at each gap, where a line must not be joined."""
    rows: list[dict[str, Any]] = []
    for k, label in enumerate(labels):
        drawn = np.isfinite(values[:, k]) & (values[:, k] > 0)
        part = np.cumsum(~drawn)
        rows += [{"layer": label, "x": bins.x(i), "y": min(max(float(values[i, k]), SMALLEST), LARGEST),
                  "part": f"{k}.{part[i]}"} for i in np.flatnonzero(drawn)]  # fmt: skip
    low, high = domain
    return [row | {"y": float(f"{row['y']:.6g}")} for row in rows if low * 0.999 <= row["y"] <= high * 1.001]


def band_rows(bins: Bins, low: Array, high: Array, domain: tuple[float, float] | None = None) -> list[dict[str, Any]]:
    """An area between two lines (bins,), cut off at the domain, `part` counting up at each gap."""
    drawn = np.isfinite(low) & np.isfinite(high)
    if domain:
        drawn &= (high > domain[0]) & (low < domain[1])
        low, high = np.clip(low, *domain), np.clip(high, *domain)
    part = np.cumsum(~drawn)
    return [{"x": bins.x(i), "y": float(low[i]), "y2": float(high[i]), "part": int(part[i])} for i in np.flatnonzero(drawn)]


def mark_edges(
    bins: Bins, zero: NDArray[np.bool_], broken: NDArray[np.bool_], labels: Sequence[str], domain: tuple[float, float],
    *encodings: Any,
) -> list[Any]:  # fmt: skip
    """Marks on the edges of the picture, (bins, layers), for what a log axis cannot hold: see tell_edges."""
    import altair as alt

    layers = []
    for at, shape, y in ((zero, "triangle-down", domain[0]), (broken, "cross", domain[1])):
        rows = [{"layer": labels[k], "x": bins.x(i), "y": y} for i, k in np.argwhere(at)]
        if rows:
            mark = alt.Chart(inline(rows)).mark_point(shape=shape, filled=True, size=60, opacity=1, angle=45 * (shape == "cross"))
            layers.append(mark.encode(*encodings))
    return layers


def tell_edges(zero: NDArray[np.bool_], broken: NDArray[np.bool_]) -> list[str]:
    """What those marks mean, as far as there are any."""
    return ["triangles: zero"] * bool(zero.any()) + ["crosses: not finite"] * bool(broken.any())


def name_lines(labels: Sequence[str], told: Sequence[str], columns: int = 2, title: str | None = None) -> dict[str, Any]:
    """Colour and dash of the named lines with one legend for both, which says something about each."""
    import altair as alt

    words = ",".join(f"{quote(label)}:{quote(f'{label}: {said}')}" for label, said in zip(labels, told, strict=True))
    legend = alt.Legend(orient="bottom", columns=columns, labelLimit=420, symbolSize=300, symbolType="stroke", title=title,
                        titleLimit=420, titleOrient="top", labelExpr=f"{{{words}}}[datum.label]",
                        labelFontSize=11) if labels else None  # fmt: skip
    return {
        "color": alt.Color("layer:N", scale=alt.Scale(domain=list(labels), range=NAMED[: len(labels)]), legend=legend),
        "strokeDash": alt.StrokeDash("layer:N", scale=alt.Scale(domain=list(labels), range=DASHES[: len(labels)]),
                                     legend=legend),
    }  # fmt: skip


def quote(text: str) -> str:
    """The text as a string of Vega's expressions."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def row_height(n: int) -> int:
    """Pixels of one layer among n, from a comfortable line down to the smallest that can be read."""
    return 18 if n <= 24 else 13 if n <= 80 else 10


def layer_axis(labels: Sequence[str], **options: Any) -> "alt.Y":
    """The layers from top to bottom, each of them named."""
    import altair as alt

    size = {18: 11, 13: 10, 10: 9}[row_height(len(labels))]
    axis = alt.Axis(labelOverlap=False, ticks=False, labelFontSize=size, labelLimit=260, domain=False)
    return alt.Y("layer:N", title=None, sort=list(labels), scale=alt.Scale(domain=list(labels), **options), axis=axis)
