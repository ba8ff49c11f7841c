"""How large the optimizer's steps are, beside the weights they change."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cifarlab.config import InputError
from cifarlab.figures.layers import (
    band_rows,
    bin_steps,
    count_layers,
    draw_nothing,
    in_bins,
    label_layers,
    line_rows,
    line_style,
    log_axis,
    log_domain,
    mark_edges,
    name_lines,
    quantile,
    rank_worst,
    take_measured,
    tell_amount,
    tell_edges,
    time_axis,
)
from cifarlab.figures.style import GREEN, GREY, INK, inline, style_chart

if TYPE_CHECKING:
    import altair as alt


def draw_update_ratio(
    steps: ArrayLike, names: Sequence[str], ratio: ArrayLike, *, steps_per_epoch: int | None = None,
    healthy: tuple[float, float] = (1e-4, 1e-2), title: str = "Update ratio", worst: int = 6,
) -> "alt.LayerChart":  # fmt: skip
    """‖Δw‖₂/‖w‖₂ of each layer over time on a logarithmic axis, with the healthy band in green and the worst layers by name.

    steps: (n,), rising; names: L layers; ratio: (n, L), of the optimizer's true step; masked entries were not measured, and
    inf is what a layer of zero weights has, which is left out. Thick: the median layer; grey: the middle 80 % of layers.
    Long runs are binned, each point the median of its bin. Worst: NaN first, in the order in which it came, then the mean number
    of decades outside the band over all steps, a zero counting as ten. Layers that never leave the band are not named.

    How to read: about 1e-3 is a good ratio, and the green band around it is healthy; it is usually highest in the warm-up and
    falls with the learning rate. All layers above the band: the learning rate is too high, and weights are replaced rather than
    refined. All below: too low a rate, or training is over. One layer above: its weights are small or its gradients
    large, so give it its own rate, or normalise it. One layer below, or zero (triangles): it hardly learns: see its gradients,
    and whether it is frozen. Biases and batch-norm shifts start at zero, so their ratios begin high, which is no fault.

    Source: the ratio of 1e-3 is a rule of thumb of Karpathy, CS231n notes "Neural Networks Part 3", §ratio of
    weights to updates; a band of one decade on either side is ours.
    Raises InputError when the shapes differ, or the band is not 0 < low < high.
    """
    import altair as alt

    if not 0 < healthy[0] < healthy[1] < np.inf:
        raise InputError(f"healthy {healthy} is no band: give 0 < low < high")
    array, broken = take_measured(ratio, (np.asarray(steps).size, len(names)), "ratio")
    infinite = np.isposinf(np.ma.getdata(ratio)).reshape(array.shape) & broken  # zero weights, not a broken step
    broken &= ~infinite
    if not array.size or not (np.isfinite(array) | broken).any():
        return draw_nothing(title)  # type: ignore[no-any-return]
    labels = label_layers(names, longest=30)
    with np.errstate(divide="ignore"):
        logs = np.log10(np.where(array < 0, np.nan, array))
    outside = np.clip(np.maximum(np.log10(healthy[0]) - logs, logs - np.log10(healthy[1])), 0, 10)
    num = np.maximum((~np.isnan(array)).sum(axis=0), 1)
    score = np.nansum(outside, axis=0) / num
    order = [k for k in rank_worst(broken, score) if score[k] > 0 or broken[:, k].any()][:worst]

    bins = bin_steps(steps, 200, steps_per_epoch)
    grouped = in_bins(array, bins)
    medians = quantile(grouped[:, :, order], 0.5, 1)
    bad = np.logical_or.reduceat(broken[:, order], bins.starts)
    pooled = grouped.reshape(len(bins.starts), -1)
    low, middle, high = (quantile(pooled, q, 1) for q in (0.1, 0.5, 0.9))
    domain = log_domain(np.concatenate([medians.ravel(), low, middle, high, np.array(healthy)]), least=10)

    x = time_axis(bins, steps_per_epoch, grid=False)
    y = alt.Y("y:Q", title="update norm / weight norm", axis=log_axis(*domain, grid=True),
              scale=alt.Scale(type="log", domain=list(domain), nice=False))  # fmt: skip
    ends = bins.domain
    green = [{"x": ends[0], "x2": ends[1], "y": healthy[0], "y2": healthy[1]}]
    layers = [
        alt.Chart(inline(green)).mark_rect(color=GREEN, opacity=0.13).encode(x, y, alt.X2("x2:Q"), alt.Y2("y2:Q")),
        alt.Chart(inline(band_rows(bins, low, high, domain))).mark_area(color=GREY, opacity=0.35).encode(
            x, y, alt.Y2("y2:Q"), detail="part:N"),
        alt.Chart(inline(line_rows(bins, middle[:, None], ["median layer"], domain))).mark_line(
            color=INK, **line_style(bins, 2.5)).encode(x, y, detail="part:N"),
    ]  # fmt: skip
    shown = [labels[k] for k in order]
    told = [f"{count_layers(len(names))}: thick the median, grey the middle 80 %; green the healthy band "
            f"{tell_amount(healthy[0])} to {tell_amount(healthy[1])}"]  # fmt: skip
    if shown:
        above = (array > healthy[1]).sum(axis=0) / num
        below = (array < healthy[0]).sum(axis=0) / num
        zero = (array == 0).sum(axis=0) / num
        said = [_tell_outside(float(above[k]), float(below[k]), float(zero[k]), broken[:, k], steps) for k in order]
        lines = name_lines(shown, said, title="layers outside the band, worst first")
        rows = line_rows(bins, medians, shown, domain)
        layers.append(alt.Chart(inline(rows)).mark_line(**line_style(bins, 1.6)).encode(
            x, y, detail="part:N", **lines))  # fmt: skip
        layers += mark_edges(bins, medians == 0, bad, shown, domain, x, y, lines["color"])
    else:
        told.append("no layer left the band" if (array > 0).any() else "nothing positive measured")
    notes = [bins.told("each point the median"), *tell_edges(medians == 0, bad)]
    if num_empty := int(infinite.any(axis=0).sum()):
        notes.append(f"{count_layers(num_empty)} left out while the weights were zero")
    if any(notes):
        told.append("; ".join(note for note in notes if note))
    return style_chart(alt.layer(*layers).properties(width=660, height=330), title, told)  # type: ignore[no-any-return]


def _tell_outside(above: float, below: float, zero: float, broken: NDArray[np.bool_], steps: ArrayLike) -> str:
    if broken.any():
        return f"not finite from step {np.asarray(steps).ravel()[int(broken.argmax())]:,.0f}"
    where = "above" if above >= below else "zero" if zero > below / 2 else "below"
    share = 100 * (zero if where == "zero" else max(above, below))
    return f"{where} in {f'{share:.2g}' if share < 99.5 else '100'} % of steps"
