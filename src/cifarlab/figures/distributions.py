"""How weights, gradients or updates are distributed, by sign and power of two, over time."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cifarlab.config import InputError
from cifarlab.figures.layers import (
    RAMP,
    Array,
    Bins,
    bin_steps,
    count_layers,
    draw_nothing,
    label_layers,
    rank_worst,
    take_measured,
    tell_amount,
    time_axis,
)
from cifarlab.figures.style import ORANGE, inline, style_chart

if TYPE_CHECKING:
    import altair as alt


def draw_distributions(
    steps: ArrayLike, names: Sequence[str], counts: ArrayLike, exponents: ArrayLike, *, quantity: str = "gradient",
    not_finite: ArrayLike | None = None, steps_per_epoch: int | None = None, title: str | None = None, most: int = 8,
    worst_first: bool = True,
) -> "alt.ConcatChart":  # fmt: skip
    """Share of a layer's entries in each power of two, negative ones below, zero in the middle, positive ones above, over time.

    steps: (n,), rising; names: L layers; exponents: (E,), consecutive and rising, where exponent e holds 2^e ≤ |x| < 2^(e+1),
    the first one also what is smaller and the last what is larger. counts: (n, L, 2E + 1), in the order of the number line:
    negative entries from the last exponent to the first, exact zeros, positive entries from the first exponent to the last.
    not_finite: (n, L), entries that are NaN or infinite, a row of its own at the top. One panel a layer, at most `most`; shares
    are logarithmic colours. In long runs the counts of neighbouring steps are added, and of many exponents so are pairs or more.
    Worst first: not finite, by when that began, then how far, in factors of two, the mass moved from the first to the
    last point; zeros lie one step below the smallest exponent. worst_first=False shows the first layers in the order of the net.

    How to read: a healthy layer is a pair of smooth mirrored humps a few powers of two wide, that move slowly. Humps that drift
    towards the middle are vanishing, outwards exploding. Gradients whose humps touch the zero row, in float16 below 2⁻²⁴, are
    lost: scale the loss or use bfloat16. A strong zero row is dead units or frozen weights. A hump on one side only means all
    entries have one sign (batch-norm weights are so by nature; elsewhere activations that are never negative). Thin tails far
    from the hump are outliers: clip, or see which images cause them.

    Source: the bins are cheap since the exponent is a field of a float; the picture is TensorBoard's histogram dashboard on a
    logarithmic axis.
    Raises InputError when the shapes differ or the exponents are not consecutive.
    """
    import altair as alt

    title = title or f"Distribution of {quantity}s"
    powers = np.asarray(exponents, dtype=int).ravel()
    if (np.diff(powers) != 1).any():
        raise InputError("exponents must be consecutive whole numbers, rising")
    shape = (np.asarray(steps).size, len(names))
    array, _ = take_measured(counts, (*shape, 2 * len(powers) + 1), "counts")
    bad, _ = take_measured(np.zeros(shape) if not_finite is None else not_finite, shape, "not_finite")
    array, bad = np.maximum(np.nan_to_num(array), 0), np.maximum(np.nan_to_num(bad), 0)
    if not array.sum() + bad.sum() > 0:
        return draw_nothing(title)  # type: ignore[no-any-return]
    labels = label_layers(names, longest=40)
    bins = bin_steps(steps, 40, steps_per_epoch)
    summed, broken = np.add.reduceat(array, bins.starts), np.add.reduceat(bad, bins.starts)
    totals = summed.sum(axis=2) + broken
    summed, powers, width = _trim(summed, powers)
    shares = summed / np.maximum(totals, 1)[:, :, None]
    moved = _moved(shares)
    order = rank_worst(broken > 0, moved * width) if worst_first else list(range(len(names)))
    order = [k for k in order if totals[:, k].any()][:most]

    has_lost = bool(broken[:, order].any())
    panels = []
    for place, k in enumerate(order):
        said = f"{tell_amount(float(totals[:, k].max()) / bins.size)} entries"
        zero, lost = (float(part[-1, k] / max(totals[-1, k], 1)) for part in (summed[:, :, len(powers)], broken))
        said += f", moved by {moved[k] * width:.2g} powers of two" if len(bins.starts) > 1 else ""
        said += f", zero {tell_amount(100 * zero)} % at the end" if zero else ""
        said += f", not finite {100 * lost:.2g} %" if lost else ", not finite for a time" if broken[:, k].any() else ""
        rest = broken[:, k] / np.maximum(totals[:, k], 1)
        heading = alt.TitleParams(labels[k], subtitle=said, anchor="start", fontSize=12, subtitleFontSize=11, frame="group")
        panels.append(_draw_panel(alt, bins, shares[:, k], rest, powers, width, steps_per_epoch, place == 0,
                                  has_lost, place >= len(order) - 2).properties(title=heading))  # fmt: skip
    told = [f"{count_layers(len(order))} of {len(names):,}, " + ("worst first" if worst_first else "in the order of the net")
            + "; negative below, positive above, each row a factor of " + f"{2.0**width:.3g}"]  # fmt: skip
    if bins.size > 1:
        told.append(f"each column the sum of {bins.size:,} measurements")
    return style_chart(alt.concat(*panels, columns=2, spacing={"row": 14, "column": 26}), title, told)  # type: ignore[no-any-return]


def _trim(counts: Array, powers: NDArray[np.int_]) -> tuple[Array, NDArray[np.int_], int]:
    """Counts of the exponents in use, so many of them added up that at most 24 a side are left; the lowest of each; how many."""
    num = len(powers)
    sides = counts[:, :, :num][:, :, ::-1], counts[:, :, num + 1 :]
    used = np.flatnonzero((sides[0] + sides[1]).sum(axis=(0, 1)))
    if not len(used):
        return counts[:, :, [num]], powers[:0], 1
    low, high = int(used[0]), int(used[-1]) + 1
    width = -(-(high - low) // 24)
    starts = np.arange(0, high - low, width)
    negative, positive = (np.add.reduceat(side[:, :, low:high], starts, axis=2) for side in sides)
    return np.concatenate([negative[:, :, ::-1], counts[:, :, [num]], positive], axis=2), powers[low:high][starts], width


def _moved(shares: Array) -> Array:
    """(layers,), how many rows further from zero or nearer to it the entries of the last point lie than the first one's."""
    num = shares.shape[2] // 2
    sizes = np.concatenate([shares[:, :, [num]], shares[:, :, :num][:, :, ::-1] + shares[:, :, num + 1 :]], axis=2)
    full = sizes.sum(axis=2)
    result = np.zeros(shares.shape[1])
    for k in range(shares.shape[1]):
        measured = np.flatnonzero(full[:, k] > 0)
        if len(measured):
            first, last = (np.cumsum(sizes[i, k] / full[i, k]) for i in (measured[0], measured[-1]))
            result[k] = np.abs(last - first).sum()
    return result


def _draw_panel(
    alt: Any, bins: Bins, shares: Array, broken: Array, powers: NDArray[np.int_], width: int, steps_per_epoch: int | None,
    has_legend: bool, has_lost: bool, has_unit: bool,
) -> Any:  # fmt: skip
    num = len(powers)
    rows = [bins.ends(i) | {"y": row - num - 0.5, "y2": row - num + 0.5, "share": float(f"{shares[i, row]:.4g}")}
            for i, row in np.argwhere(shares > 0).tolist()]  # fmt: skip
    lost = [bins.ends(int(i)) | {"y": num + 0.5, "y2": num + 1.5} for i in np.flatnonzero(broken > 0)]
    every = max(1, -(-num // 3))
    signs = {0: "0"}
    for row in range(every - 1, num, every):
        signs |= {row + 1: f"+2^{powers[row]}", -row - 1: f"−2^{powers[row]}"}
    top = num + (1.5 if has_lost else 0.5)
    if has_lost:
        signs[num + 1] = "not finite"
        signs.pop(num, None)
    words = ",".join(f"'{at}':'{sign}'" for at, sign in signs.items())
    y = alt.Y("y:Q", title=None, scale=alt.Scale(domain=[-num - 0.5, top], nice=False),
              axis=alt.Axis(values=sorted(signs), labelExpr=f"{{{words}}}[datum.value]", grid=False, minExtent=52))  # fmt: skip
    x = time_axis(bins, steps_per_epoch, grid=False)
    x = x if has_unit else x.title(None)
    colors = alt.Scale(type="log", domain=[float(v) for v in np.geomspace(1e-4, 1, len(RAMP))], range=RAMP, clamp=True)
    words = "datum.value < 0.0002 ? '≤ 0.01 %' : datum.value * 100 + ' %'"
    legend = alt.Legend(title="share of entries", values=[1e-4, 1e-3, 1e-2, 1e-1, 1], gradientLength=130, labelExpr=words)
    layers = [
        alt.Chart(inline(rows)).mark_rect(x2Offset=0.6, clip=True).encode(
            x, y, alt.X2("x2:Q"), alt.Y2("y2:Q"), alt.Color("share:Q", scale=colors, legend=legend if has_legend else None)),
        alt.Chart(inline(lost)).mark_rect(x2Offset=0.6, color=ORANGE, clip=True).encode(x, y, alt.X2("x2:Q"), alt.Y2("y2:Q")),
    ]  # fmt: skip
    return alt.layer(*layers).properties(width=320, height=150)
