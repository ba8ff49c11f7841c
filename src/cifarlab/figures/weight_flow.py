"""How the weights grow or shrink while a net is trained."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from cifarlab.figures.layers import (
    NAMED,
    PALE,
    bin_steps,
    count_layers,
    draw_nothing,
    in_bins,
    label_layers,
    layer_axis,
    line_rows,
    line_style,
    log_axis,
    log_domain,
    mark_edges,
    quantile,
    rank_worst,
    row_height,
    take_measured,
    tell_edges,
    tell_factor,
    time_axis,
)
from cifarlab.figures.style import GREY, INK, inline, style_chart

if TYPE_CHECKING:
    import altair as alt


def draw_weight_magnitude(
    steps: ArrayLike, names: Sequence[str], mean_abs: ArrayLike, *, steps_per_epoch: int | None = None,
    title: str = "Weight magnitude", named: int = 6, worst: int = 12,
) -> "alt.HConcatChart":  # fmt: skip
    """Mean |w| of each layer over time on a logarithmic axis, and beside it the layers that changed most, worst first.

    steps: (n,), rising; names: L layers; mean_abs: (n, L); masked entries were not measured. Long runs are binned, each point
    the median of its bin. Change is the last bin over the first one. Worst: values that are not finite, in the order in which
    that came, then weights that became zero, then the largest factor, of growth or decay alike. The worst `named` are in
    colour in both panels, all others grey.

    How to read: healthy weights drift slowly, by a factor of two or three in a whole run, and level off as the learning rate
    goes to 0. With weight decay most convolutions shrink at first, then settle where decay and gradient balance. A layer that
    grows without end lacks decay or normalisation behind it, or its rate is too high; one that shrinks towards zero is
    decayed faster than it learns: weaken the decay, or the layer is not needed. A jump at one step is a bad update, see the
    update ratio there. Biases and batch-norm shifts start near zero, so that growth by a large factor is usual for them.

    Source: van Laarhoven, "L2 regularization versus batch and weight normalization", arXiv:1706.05350.
    Raises InputError when the shapes differ.
    """
    import altair as alt

    array, broken = take_measured(mean_abs, (np.asarray(steps).size, len(names)), "mean_abs")
    if not array.size or not (np.isfinite(array) | broken).any():
        return draw_nothing(title)  # type: ignore[no-any-return]
    labels = label_layers(names)
    bins = bin_steps(steps, max(20, min(120, 6000 // len(names))), steps_per_epoch)
    medians = quantile(in_bins(array, bins), 0.5, 1)
    bad = np.logical_or.reduceat(broken, bins.starts)
    factor = np.array([_change(medians[:, k]) for k in range(len(names))])
    with np.errstate(divide="ignore"):
        order = rank_worst(broken, np.abs(np.log(factor)))
    order = [k for k in order if broken[:, k].any() or not np.isnan(factor[k])][:worst]
    front = order[:named]
    domain = log_domain(medians)

    x = time_axis(bins, steps_per_epoch, grid=False)
    y = alt.Y("y:Q", title="mean |w|", axis=log_axis(*domain, grid=True),
              scale=alt.Scale(type="log", domain=list(domain), nice=False))  # fmt: skip
    rest = [k for k in range(len(names)) if k not in front]
    shown = [labels[k] for k in front]
    color = alt.Color("layer:N", legend=None, scale=alt.Scale(domain=shown, range=NAMED[: len(shown)]))
    behind = alt.Chart(inline(line_rows(bins, medians[:, rest], [labels[k] for k in rest], domain)))
    before = alt.Chart(inline(line_rows(bins, medians[:, front][:, ::-1], shown[::-1], domain)))
    layers = [
        behind.mark_line(**line_style(bins, 1, PALE)).encode(x, y, detail="part:N"),
        before.mark_line(**line_style(bins, 2.2)).encode(x, y, color, detail="part:N"),
    ]
    zero, lost = (medians == 0)[:, front], bad[:, front]
    layers += mark_edges(bins, zero, lost, shown, domain, x, y, color)
    panels: list[Any] = [alt.layer(*layers).properties(width=470, height=300)]
    if order:
        panels.append(_draw_changes(order, labels, factor, broken.any(axis=0), len(front)))
    told = [f"{count_layers(len(names))}; change from the first to the last of {count_layers(len(bins.starts), 'point')}"]
    notes = [bins.told("each point the median"), *tell_edges(zero, lost)]
    told += ["; ".join(note for note in notes if note)] if any(notes) else []
    return style_chart(alt.hconcat(*panels, spacing=26), title, told)  # type: ignore[no-any-return]


def _draw_changes(order: list[int], labels: list[str], factor: Any, broken: Any, num_named: int) -> Any:
    import altair as alt

    drawn = [k for k in order if 0 < factor[k] < np.inf and not broken[k]]
    reach = float(np.exp(max([np.log(2.0), *np.abs(np.log(factor[drawn]))])))
    domain = (1 / reach / 1.1, reach * 1.1)
    rows = [{"layer": labels[k], "factor": float(f"{factor[k]:.6g}"), "one": 1.0,
             "color": NAMED[place] if place < num_named else GREY} for place, k in enumerate(order) if k in drawn]  # fmt: skip
    words = [{"layer": labels[k], "told": "not finite" if broken[k] else "became zero" if factor[k] == 0 else
              "from zero" if factor[k] == np.inf else tell_factor(float(factor[k]))} for k in order]  # fmt: skip
    y = layer_axis([labels[k] for k in order], paddingInner=0.25)
    x = alt.X("factor:Q", title="last / first", axis=log_axis(*domain, most=5),
              scale=alt.Scale(type="log", domain=list(domain), nice=False))  # fmt: skip
    layers = [
        alt.Chart(inline(rows)).mark_bar().encode(y, x, alt.X2("one:Q"), alt.Color("color:N", scale=None)),
        alt.Chart(inline([{"factor": 1.0}])).mark_rule(color=INK, strokeWidth=1).encode(x),
        alt.Chart(inline(words)).mark_text(align="left", fontSize=11, color=INK).encode(y, x=alt.value(158), text="told:N"),
    ]
    heading = alt.TitleParams("changed most, worst first (colours as left)", anchor="start", fontSize=13, frame="group")
    return alt.layer(*layers).properties(width=150, height=row_height(len(order)) * len(order), title=heading)


def _change(values: Any) -> float:
    """The last value over the first, inf from zero, NaN where there is nothing to compare."""
    drawn = values[np.isfinite(values)]
    if not len(drawn) or (drawn[0] == 0 == drawn[-1]):
        return float("nan")
    if drawn[0] > 0 and drawn[-1] > 0:
        return float(np.exp(np.clip(np.log(drawn[-1]) - np.log(drawn[0]), -690, 690)))  # no overflow, 1e±300 at most
    return 0.0 if drawn[0] > 0 else float("inf")
