"""What comes out of each layer: how large, how spread, how much of it dead or saturated."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from cifarlab.figures.layers import (
    PALE,
    Array,
    Bins,
    bin_steps,
    count_layers,
    draw_nothing,
    in_bins,
    label_layers,
    layer_axis,
    line_style,
    name_lines,
    quantile,
    row_height,
    take_measured,
    tell_amount,
    time_axis,
)
from cifarlab.figures.style import BLUE, GREY, INK, ORANGE, inline, style_chart

if TYPE_CHECKING:
    import altair as alt


def draw_activations(
    steps: ArrayLike, names: Sequence[str], mean: ArrayLike, std: ArrayLike, dead: ArrayLike, saturated: ArrayLike, *,
    steps_per_epoch: int | None = None, title: str = "Activations", worst: int = 6,
) -> "alt.HConcatChart":  # fmt: skip
    """Mean ± standard deviation of each layer's output at the last measurement, and dead and saturated shares over time.

    steps: (n,), rising; names: L layers in the order of the net; mean, std, dead, saturated: (n, L), shares 0…1. dead: units
    that are zero for every image of the batch; saturated: outputs at the flat ends of their nonlinearity. A share that is NaN
    or masked does not apply to its layer. Left, the numbers stand beside the bars, and bars far beyond the others are cut off
    at the edge; right, the worst layers are named, by the mean of their share over time, and all others are grey. Long runs are
    binned, each point the median of its bin.

    How to read: healthy layers have standard deviations of about the same size, some 0.3 to 3, from top to bottom. Deviations
    that shrink with depth make the signal, and with it the gradient, vanish: a larger (He) initialisation or normalisation
    helps; ones that grow explode. A mean many deviations from 0 is a shift that the next layer must undo: add batch
    norm. A few per cent of dead units are usual after ReLU, and more in wide late layers; a share that rises in steps means
    updates too large (lower the rate, use a leaky ReLU), and a layer all dead passes no gradient. A tanh or sigmoid layer
    saturated by more than a third learns slowly: smaller weights or inputs.

    Source: Glorot and Bengio, AISTATS 2010; He et al. 2015, arXiv:1502.01852; Lu et al., "Dying ReLU", arXiv:1903.06733.
    Raises InputError when the shapes differ.
    """
    import altair as alt

    shape = (np.asarray(steps).size, len(names))
    given = {"mean": mean, "std": std, "dead": dead, "saturated": saturated}
    arrays = {what: take_measured(values, shape, what) for what, values in given.items()}
    if not any(np.isfinite(array).any() or broken.any() for array, broken in arrays.values()) or not np.prod(shape):
        return draw_nothing(title)  # type: ignore[no-any-return]
    labels = label_layers(names, longest=30)
    broken = arrays["mean"][1] | arrays["std"][1]
    bins = bin_steps(steps, max(20, min(120, 3000 // len(names))), steps_per_epoch)
    left = _draw_last(alt, labels, arrays["mean"][0][-1], arrays["std"][0][-1], broken[-1])
    kinds = {"dead": "dead units (%)", "saturated": "saturated outputs (%)"}
    right = [_draw_share(alt, bins, labels, arrays[what][0], heading, worst, steps_per_epoch)
             for what, heading in kinds.items() if np.isfinite(arrays[what][0]).any()]  # fmt: skip
    last = np.asarray(steps).ravel()[-1]
    told = [f"{count_layers(len(names))}, the input's side at the top; left: at step {last:,.0f}"]
    told += [bins.told("right: each point the median")] if bins.size > 1 else []
    if broken.any():
        at = int(np.argmax(broken.any(axis=1)))
        told.append(f"not finite from step {np.asarray(steps).ravel()[at]:,.0f} on, there in {labels[int(broken[at].argmax())]}")
    told += [f"no {what} outputs are counted in these layers" for what in kinds if not np.isfinite(arrays[what][0]).any()]
    panels = [left, alt.vconcat(*right, spacing=18)] if right else [left]
    return style_chart(alt.hconcat(*panels, spacing=44), title, told)  # type: ignore[no-any-return]


def _draw_last(alt: Any, labels: list[str], mean: Array, std: Array, broken: Any) -> Any:
    low, high = mean - std, mean + std
    ends = np.abs(np.concatenate([low, high]))
    ends = ends[np.isfinite(ends)]
    reach = min(float(ends.max()), 6 * float(np.median(ends))) if ends.size else 1.0
    reach = 1.08 * reach if reach > 0 else 1.0
    bottom = -reach if (low < -0.02 * reach).any() else -0.02 * reach
    if np.isfinite(low).any():
        bottom = max(bottom, 1.08 * min(float(np.nanmin(low)), 0.0) - 0.02 * reach)
    drawn = np.flatnonzero(np.isfinite(low) & np.isfinite(high))
    rows: list[dict[str, Any]] = [
        {"layer": labels[k], "mean": float(mean[k]), "low": float(np.clip(low[k], bottom, reach)),
         "high": float(np.clip(high[k], bottom, reach))} for k in drawn
    ]  # fmt: skip
    dots = [row for row in rows if bottom <= row["mean"] <= reach]
    words = [{"layer": label, "told": f"{_tell(mean[k])} ± {_tell(std[k])}" if k in drawn else
              "not finite" if broken[k] else "not measured"} for k, label in enumerate(labels)]  # fmt: skip
    y = layer_axis(labels)
    x = alt.X("low:Q", title="mean ± standard deviation", scale=alt.Scale(domain=[bottom, reach], nice=False),
              axis=alt.Axis(tickCount=5))  # fmt: skip
    size = row_height(len(labels))
    color = alt.condition("datum.told == 'not finite'", alt.value(ORANGE), alt.value(INK))
    layers = [
        alt.Chart(inline([{"low": 0}])).mark_rule(color=GREY).encode(x),
        alt.Chart(inline(rows)).mark_bar(color=BLUE, opacity=0.4, height={"band": 0.6}).encode(y, x, alt.X2("high:Q")),
        alt.Chart(inline(dots)).mark_tick(color=INK, thickness=2, bandSize=0.8 * size).encode(y, alt.X("mean:Q")),
        alt.Chart(inline(words)).mark_text(align="left", fontSize=min(11, size - 2)).encode(
            y, color=color, x=alt.value(308), text="told:N"),
    ]  # fmt: skip
    heading = alt.TitleParams("at the last measurement", anchor="start", fontSize=13, frame="group")
    return alt.layer(*layers).properties(width=300, height=size * len(labels), title=heading)


def _tell(value: float) -> str:
    return f"{'−' if value < 0 else ''}{tell_amount(abs(float(value)))}"


def _draw_share(
    alt: Any, bins: Bins, labels: list[str], shares: Array, heading: str, worst: int, steps_per_epoch: int | None
) -> Any:
    shares = np.clip(shares, 0, 1)
    percent = 100 * quantile(in_bins(shares, bins), 0.5, 1)
    num = (~np.isnan(shares)).sum(axis=0)
    means = np.nansum(shares, axis=0) / np.maximum(num, 1)
    order = [int(k) for k in np.lexsort((-means,)) if num[k] and means[k] > 0][:worst]
    rest = [int(k) for k in np.flatnonzero(num) if k not in order]
    top = float(np.nanmax(percent, initial=1.0))
    x = time_axis(bins, steps_per_epoch, grid=False)
    y = alt.Y("y:Q", title=None, scale=alt.Scale(domain=[0, min(1.1 * top, 100.0)], nice=False))

    def rows(shown: list[int]) -> list[dict[str, Any]]:
        return [{"layer": labels[k], "x": bins.x(i), "y": round(float(percent[i, k]), 4)}
                for k in shown for i in np.flatnonzero(~np.isnan(percent[:, k]))]  # fmt: skip

    shown = [labels[k] for k in order]
    lasts = [percent[~np.isnan(percent[:, k]), k][-1] for k in order]
    lines = name_lines(shown, [f"{value:.3g} % at the end" for value in lasts], columns=2, title="worst first")
    behind = alt.Chart(inline(rows(rest)))
    layers = [behind.mark_line(**line_style(bins, 1, PALE)).encode(x, y, detail="layer:N")]
    if order:
        named = alt.Chart(inline(rows(order[::-1])))
        layers.append(named.mark_line(**line_style(bins, 1.8)).encode(x, y, **lines))
    said = "" if order else f"none in any of {count_layers(int((num > 0).sum()))}"
    title = alt.TitleParams(heading, subtitle=said, anchor="start", fontSize=13, subtitleFontSize=12)
    panel = alt.layer(*layers).resolve_scale(color="independent", strokeDash="independent")
    return panel.properties(width=460, height=170, title=title)
