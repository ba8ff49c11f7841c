"""How steep the loss is bent, beside the steepest bend that the learning rate bears."""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from cifarlab.figures.layers import (
    LARGEST,
    band_rows,
    bin_steps,
    draw_nothing,
    in_bins,
    line_rows,
    line_style,
    log_axis,
    log_domain,
    quantile,
    take_measured,
    tell_amount,
    time_axis,
)
from cifarlab.figures.style import BLUE, ORANGE, inline, style_chart

if TYPE_CHECKING:
    import altair as alt


def draw_sharpness(
    steps: ArrayLike, sharpness: ArrayLike, edge: ArrayLike, *, steps_per_epoch: int | None = None,
    uncertainty: ArrayLike | None = None, title: str = "Sharpness and the edge of stability", edge_name: str = "2/lr",
) -> "alt.LayerChart":  # fmt: skip
    """λ_max of the loss Hessian over time, beside the largest one that the learning rate bears, on a logarithmic axis.

    steps: (n,), rising; sharpness: (n,); edge: (n,) or one number: 2/lr for gradient descent, (2 + 2β)/lr with momentum β;
    edge_name says which. uncertainty: (n,), half the width of the band around λ_max. In orange: where a quadratic loss would
    diverge. Values that are not finite or not above 0 are left out and counted; long runs are binned, by the median.

    How to read: in full-batch training sharpness rises until it meets the edge and then hovers there, while the loss goes on
    falling, unevenly: that is the usual edge of stability, not a fault. With small batches it settles below the edge; there,
    sharpness that crosses into the orange and stays comes with a loss that jumps or diverges: lower the learning rate,
    warm up longer, or clip. Far below the edge all along, a larger rate would be borne and is likely to be faster. As the
    learning rate falls the edge rises and sharpness may follow. Adam's edge lies elsewhere, since it rescales every coordinate.

    Source: Cohen et al. 2021, arXiv:2103.00065. The bound is that of a quadratic with one learning rate for all weights.
    Raises InputError when the lengths differ.
    """
    import altair as alt

    count = np.asarray(steps).size
    values, broken = take_measured(sharpness, (count,), "sharpness")
    given = np.broadcast_to(np.asarray(edge, dtype=float), (count,)) if np.ndim(edge) == 0 else edge
    edges, _ = take_measured(given, (count,), "edge")
    edges[np.isposinf(np.ma.getdata(given))] = LARGEST  # a learning rate of 0 bears anything
    width, _ = take_measured(np.full(count, np.nan) if uncertainty is None else uncertainty, (count,), "uncertainty")
    if not (values > 0).any():
        return draw_nothing(title, "nothing above 0, and not finite" if broken.any() else "nothing above 0" if count else "")  # type: ignore[no-any-return]
    bins = bin_steps(steps, 250, steps_per_epoch)
    values[~(values > 0)] = np.nan
    lost = int((np.isnan(values)).sum())
    middle, limit, half = (quantile(in_bins(part, bins), 0.5, 1) for part in (values, edges, np.abs(width)))
    near = max(30 * np.nanmax(middle), np.nanmin(limit, initial=np.inf))  # at the end of a schedule the edge goes to infinity
    domain = log_domain(np.concatenate([middle, limit[limit <= near], (middle + half)[half > 0]]), least=10)
    domain = (domain[0], domain[1] * 1.5)  # room for the orange above the edge

    x = time_axis(bins, steps_per_epoch, grid=False)
    y = alt.Y("y:Q", title="λ max of the loss Hessian", axis=log_axis(*domain, grid=True),
              scale=alt.Scale(type="log", domain=list(domain), nice=False))  # fmt: skip
    above = band_rows(bins, limit, np.full(len(limit), LARGEST), domain)
    if above and above[0]["x"] == bins.x(0):  # the first point stands for the time before it, too
        above.insert(0, above[0] | {"x": bins.domain[0]})
    if above and above[-1]["x"] == bins.x(-1):
        above.append(above[-1] | {"x": bins.domain[1]})
    names = ["λ max, measured", f"{edge_name}, the edge of stability"]
    color = alt.Color("layer:N", title=None, scale=alt.Scale(domain=names, range=[BLUE, ORANGE]),
                      legend=alt.Legend(orient="bottom", labelLimit=400, symbolType="stroke"))  # fmt: skip
    line = line_style(bins)
    measured = line_rows(bins, middle[:, None], names[:1], domain)
    layers = [
        alt.Chart(inline(above)).mark_area(color=ORANGE, opacity=0.12).encode(x, y, alt.Y2("y2:Q")),
        alt.Chart(inline(band_rows(bins, middle - half, middle + half, domain))).mark_area(color=BLUE, opacity=0.2).encode(
            x, y, alt.Y2("y2:Q"), detail="part:N"),
        alt.Chart(inline(line_rows(bins, limit[:, None], names[1:], domain))).mark_line(
            strokeDash=[6, 3], **line).encode(x, y, color, detail="part:N"),
        alt.Chart(inline(measured)).mark_line(**line).encode(x, y, color, detail="part:N"),
    ]  # fmt: skip
    both = np.flatnonzero(~np.isnan(values) & (edges > 0))
    at = int(np.flatnonzero(~np.isnan(values))[-1])
    told = [f"last λ max {tell_amount(float(values[at]))} at step {np.asarray(steps).ravel()[at]:,.0f}"]
    if 0 < edges[at] < LARGEST:
        told[0] += f", {tell_amount(float(values[at] / edges[at]))} of {edge_name}"
    if len(both):
        told[0] += f"; above the edge at {int((values[both] > edges[both]).sum()):,} of {len(both):,} measurements"
    notes = [bins.told("each point the median"), f"{lost} not finite or not above 0, left out" if lost else ""]
    if any(notes):
        told.append("; ".join(note for note in notes if note))
    chart = alt.layer(*layers).properties(width=660, height=330)
    return style_chart(chart, title, told)  # type: ignore[no-any-return]
