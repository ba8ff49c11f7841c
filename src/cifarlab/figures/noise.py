"""How noisy the gradients are, and what that says of the batch size."""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from cifarlab.figures.layers import (
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
from cifarlab.figures.style import BLUE, GREEN, INK, ORANGE, inline, style_chart

if TYPE_CHECKING:
    import altair as alt


def draw_noise(
    steps: ArrayLike, scale: ArrayLike, cosine: ArrayLike, *, steps_per_epoch: int | None = None, batch_size: int | None = None,
    title: str = "Gradient noise",
) -> "alt.VConcatChart":  # fmt: skip
    """Simple gradient noise scale tr(Σ)/‖G‖² in images, beside the batch size, and the cosine between successive gradients.

    steps: (n,), rising; scale, cosine: (n,), NaN or masked where they were not measured. Lines are medians of bins of
    neighbouring steps, the faint bands the middle 80 % of each bin. The estimate of the scale is unbiased in both its parts but
    itself noisy, so that single values may be below 0: they count as the lowest in the medians, cannot be drawn, and are
    counted.

    How to read: the noise scale is about the batch size beyond which larger batches stop paying off. It grows while training,
    often tenfold or more, as the true gradient shrinks. A line far above the batch size (orange): steps are mostly noise, a
    larger batch, or a lower rate, gives more progress a step. A line far below: batches are larger than needed, and half the
    size would train about as well in half the computation. The cosine is near 0 in healthy training with small batches. Well
    above 0, steps agree and a higher rate would be borne; well below 0, each step undoes the last one: the rate is too
    high, and the net jumps across a valley.

    Source: McCandlish et al. 2018, arXiv:1812.06162.
    Raises InputError when the lengths differ.
    """
    import altair as alt

    count = np.asarray(steps).size
    scales, scale_broken = take_measured(scale, (count,), "scale")
    cosines, cosine_broken = take_measured(cosine, (count,), "cosine")
    if not (np.isfinite(scales).any() or np.isfinite(cosines).any()):
        return draw_nothing(title)  # type: ignore[no-any-return]
    bins = bin_steps(steps, 100, steps_per_epoch)
    x = time_axis(bins, steps_per_epoch, grid=False)
    hidden = time_axis(bins, steps_per_epoch, grid=False, labels=False).title(None)

    low, middle, high = (quantile(in_bins(scales, bins), q, 1) for q in (0.1, 0.5, 0.9))
    domain = log_domain(np.concatenate([low, middle, high, [batch_size or np.nan]]), least=10)
    y = alt.Y("y:Q", title="noise scale (images)", axis=log_axis(*domain, grid=True, minExtent=46),
              scale=alt.Scale(type="log", domain=list(domain), nice=False))  # fmt: skip
    upper = [
        alt.Chart(inline(band_rows(bins, low, high, domain))).mark_area(color=BLUE, opacity=0.2).encode(
            hidden, y, alt.Y2("y2:Q"), detail="part:N"),
        alt.Chart(inline(line_rows(bins, middle[:, None], ["scale"], domain))).mark_line(
            color=BLUE, **line_style(bins)).encode(hidden, y, detail="part:N"),
    ]  # fmt: skip
    told = []
    if batch_size:
        rule = alt.Chart(inline([{"y": batch_size, "told": f"batch size {batch_size:,}"}]))
        upper += [rule.mark_rule(color=ORANGE, strokeWidth=2).encode(y),
                  rule.mark_text(color=ORANGE, align="right", dy=-8, fontSize=12).encode(
                      y, x=alt.value(616), text="told:N")]  # fmt: skip
    end = quantile(scales[-max(1, count // 10) :], 0.5, 0)
    if np.isfinite(end):
        told.append(f"median noise scale of the last tenth {tell_amount(float(end))}")
        told[0] += f", {tell_amount(float(end) / batch_size)} times the batch size" if batch_size and end > 0 else ""

    low, middle, high = (quantile(in_bins(cosines, bins), q, 1) for q in (0.1, 0.5, 0.9))
    reach = min(1.0, 1.1 * float(np.nanmax(np.abs(np.concatenate([low, high])), initial=0.09)))
    at_y = alt.Y("y:Q", title=["cosine of successive", "gradients"], scale=alt.Scale(domain=[-reach, reach], nice=False),
                 axis=alt.Axis(minExtent=46, tickCount=5))  # fmt: skip
    lower = [
        alt.Chart(inline([{"y": 0}])).mark_rule(color=INK, strokeWidth=1).encode(at_y),
        alt.Chart(inline(band_rows(bins, low, high, (-reach, reach)))).mark_area(color=GREEN, opacity=0.2, clip=True).encode(
            x, at_y, alt.Y2("y2:Q"), detail="part:N"),
        alt.Chart(inline(band_rows(bins, middle, middle, (-reach, reach)))).mark_line(color=GREEN, **line_style(bins)).encode(
            x, at_y, detail="part:N"),
    ]  # fmt: skip
    broken = scale_broken | cosine_broken
    notes = [bins.told("each point the median"), "faint: the middle 80 %" if bins.size > 1 else "",
             f"{int((scales <= 0).sum()):,} noise scales not above 0" if (scales <= 0).any() else "",
             f"{int(broken.sum()):,} measurements not finite" if broken.any() else ""]  # fmt: skip
    if any(notes):
        told.append("; ".join(note for note in notes if note))
    panels = [alt.layer(*upper).properties(width=620, height=230), alt.layer(*lower).properties(width=620, height=130)]
    return style_chart(alt.vconcat(*panels, spacing=14), title, told)  # type: ignore[no-any-return]
