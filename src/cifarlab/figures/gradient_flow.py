"""How gradients, and other magnitudes, flow through the layers: at one moment as bars, over time as a map."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cifarlab.figures.layers import (
    RAMP,
    Array,
    Bins,
    bin_steps,
    count_layers,
    draw_nothing,
    in_bins,
    label_layers,
    layer_axis,
    log_axis,
    log_domain,
    quantile,
    rank_worst,
    row_height,
    take_measured,
    tell_amount,
    tell_factor,
    time_axis,
)
from cifarlab.figures.style import BLUE, INK, ORANGE, inline, plain_text, style_chart

if TYPE_CHECKING:
    import altair as alt

SKY = "#A9CFE8"


def draw_gradient_flow(
    names: Sequence[str], mean_abs: ArrayLike, max_abs: ArrayLike, *, title: str = "Gradient flow", subtitle: str = "",
    worst: int = 12,
) -> "alt.HConcatChart":  # fmt: skip
    """Mean and largest |g| of each parameter tensor in the order of the net, and beside them the worst ones, worst first.

    names: L parameter tensors, the input's side first; mean_abs, max_abs: (L,), of one step or the mean over many. Worst is
    what has values that are not finite, then what is zero everywhere, then what lies farthest from the median tensor (dashed),
    above or below, as a factor of its mean |g|. Masked entries were not measured.

    How to read: a healthy net's strong bars (mean) lie within a factor of some hundred of each other, without a trend from top
    to bottom, and the faint bars (largest) reach ten to a hundred times as far. Means that shrink steadily towards the top, the
    input's side, are a vanishing gradient: saturated activations, too small an initialisation, no normalisation or skip
    connections. Means that grow towards the top are an exploding one: lower the learning rate, warm up, clip, or normalise.
    A single tensor far below the dashed line hardly learns; one that is zero is cut off from the loss (a dead ReLU, a layer
    nobody uses, zero weights behind it). A largest value thousands of times the mean is a few outliers that drive the update:
    clip, or look at the images of that step. Biases and batch-norm weights usually lie above the convolutions.

    Source: Glorot and Bengio, "Understanding the difficulty of training deep feedforward neural networks", AISTATS 2010.
    Raises InputError when the lengths differ.
    """
    import altair as alt

    mean, mean_broken = take_measured(mean_abs, (len(names),), "mean_abs")
    largest, max_broken = take_measured(max_abs, (len(names),), "max_abs")
    if not len(names):
        return draw_nothing(title)  # type: ignore[no-any-return]
    labels = label_layers(names)
    broken = mean_broken | max_broken
    measured = (np.isfinite(mean) & np.isfinite(largest)) | broken
    mean[~measured], largest[~measured] = np.nan, np.nan
    logs = np.log10(np.where(mean > 0, mean, np.nan))
    middle = float(quantile(logs, 0.5, 0))
    distance = np.where((mean == 0) & measured, np.inf, np.abs(logs - middle))
    order = [k for k in rank_worst(broken[None], distance) if measured[k]][:worst]
    domain = log_domain(np.concatenate([mean, largest]))
    domain = (domain[0] / 2, domain[1])  # so that the smallest bar can be seen

    def tell(k: int) -> str:
        if not measured[k]:
            return "not measured"
        if broken[k]:
            return "not finite" if mean_broken[k] else "largest is not finite"
        return "zero" if largest[k] == 0 else "mean is zero" if mean[k] == 0 else ""

    def draw(shown: list[int], width: int, heading: str, numbers: bool) -> Any:
        bars = [{"layer": labels[k], "of": of, "value": float(np.clip(values[k], *domain)), "floor": domain[0], "order": place}
                for k in shown for place, (of, values) in enumerate((("largest |g|", largest), ("mean |g|", mean)))
                if values[k] > 0]  # fmt: skip
        ends = np.clip(np.fmax(np.fmax(mean, largest), domain[0]), *domain)
        tags = [{"layer": labels[k], "told": tell(k), "value": float(ends[k])} for k in shown if tell(k)]
        y = layer_axis([labels[k] for k in shown], paddingInner=0.2)
        x = alt.X("value:Q", title="|g| (logarithmic)", scale=alt.Scale(type="log", domain=list(domain), nice=False),
                  axis=log_axis(*domain, most=8 if width > 300 else 5))  # fmt: skip
        color = alt.Color("of:N", title=None, scale=alt.Scale(domain=["mean |g|", "largest |g|"], range=[BLUE, SKY]),
                          legend=alt.Legend(orient="bottom"))  # fmt: skip
        layers = [
            alt.Chart(inline([bar for bar in bars if bar["order"] == place])).mark_bar(clip=True).encode(
                y, x, color, x2=alt.X2("floor:Q")
            ) for place in (0, 1)
        ] + [
            alt.Chart(inline(tags)).mark_text(align="left", dx=4, color=ORANGE, fontWeight="bold", fontSize=10).encode(
                y, x, text="told:N"
            )
        ]  # fmt: skip
        if np.isfinite(middle):
            rule = alt.Chart(inline([{"value": float(np.clip(10**middle, *domain))}])).mark_rule(color=INK, strokeDash=[4, 3])
            layers.append(rule.encode(x))
        if numbers:
            far = [{"layer": labels[k], "told": tell_factor(float(10 ** (logs[k] - middle)))} for k in shown if mean[k] > 0]
            text = alt.Chart(inline(far)).mark_text(align="left", fontSize=11, color=INK)
            layers.append(text.encode(y, x=alt.value(width + 8), text="told:N"))
        panel = alt.TitleParams(heading, anchor="start", fontSize=13, frame="group")
        return alt.layer(*layers).properties(width=width, height=row_height(len(shown)) * len(shown), title=panel)

    told = [f"{count_layers(len(names), 'parameter tensor')}, the input's side at the top"]
    if np.isfinite(middle):
        told[0] += f"; the median tensor's mean |g| is {tell_amount(10**middle)} (dashed)"
    bad = [f"{int(count)} {what}" for count, what in ((broken.sum(), "not finite"), ((largest == 0).sum(), "zero"),
                                                      ((~measured).sum(), "not measured")) if count]  # fmt: skip
    if bad:
        told.append(", ".join(bad))
    panels = [draw(list(range(len(names))), 330, "in the order of the net", False)]
    if len(names) > 1:
        panels.append(draw(order, 210, "worst first: × or ÷ the median tensor's mean", True))
    return style_chart(alt.hconcat(*panels, spacing=24), title, [*([plain_text(subtitle)] if subtitle else []), *told])  # type: ignore[no-any-return]


def draw_flow_map(
    steps: ArrayLike, names: Sequence[str], values: ArrayLike, *, quantity: str = "gradient norm",
    steps_per_epoch: int | None = None, title: str = "Gradient flow over time", worst_first: bool = True,
) -> "alt.HConcatChart":  # fmt: skip
    """A magnitude of every layer at every step, as colours on a logarithmic scale: gradient, update or weight norm.

    Beside it the layers at one step, the framed one, worst first: the last, and in a page whichever its slider is moved to
    (the parameter `at`, a place on the axis).

    steps: (n,), rising; names: L layers; values: (n, L), from 0; masked entries were not measured and stay empty. quantity
    names the values. Long runs are binned: a cell is the largest value of its bin, orange when any in it is not finite, and of
    the legend's other colour when all are zero. Worst first: layers with values that are not finite in the order in which they
    broke, then by the share of zeros, then by how far they lie from the median layer of the same step, as a mean factor over
    the steps.

    How to read: a healthy map is calm: each row keeps about its colour, all rows fade together as the learning rate falls,
    and rows differ by less than a factor of a thousand. A row that fades while others do not stops learning; fading that
    spreads from the net's first layers (see worst_first=False) is a vanishing gradient. Strong upright stripes are steps at
    which all layers jumped: a bad batch, or too high a learning rate; a row that grows stronger step by step is about to
    explode. Orange marks the steps that were not finite, and the top row is the layer in which that began. What the legend
    calls zero is exactly that: a frozen, unused or dead layer.

    Source: cf. Schneider, Dangel and Hennig, "Cockpit", NeurIPS 2021, arXiv:2102.06604; ours shows every layer and step.
    Raises InputError when the shapes differ.
    """
    import altair as alt

    count = np.asarray(steps).size
    array, broken = take_measured(values, (count, len(names)), "values")
    if not array.size or not (np.isfinite(array) | broken).any():
        return draw_nothing(title)  # type: ignore[no-any-return]
    labels = label_layers(names)
    order = _rank_flow(array, broken) if worst_first else list(range(len(names)))
    bins = bin_steps(steps, max(20, min(100, 7000 // len(names))), steps_per_epoch)
    cells = quantile(in_bins(array, bins), 1.0, 1)
    bad = np.logical_or.reduceat(broken, bins.starts)
    low, high, note = _limit_colours(cells[cells > 0])

    shades: list[dict[str, Any]] = []
    special: list[dict[str, Any]] = []
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log10(np.where(cells > 0, cells, np.nan))
        off = np.abs(logs - quantile(logs, 0.5, 1)[:, None])  # decades from the median layer of that bin
    for i, k in np.argwhere(bad | np.isfinite(cells)):
        cell = {"layer": labels[k]} | bins.ends(int(i))
        if bad[i, k] or not cells[i, k] > 0:
            special.append(cell | {"kind": "not finite" if bad[i, k] else "zero"})
        else:
            shades.append(cell | {"value": float(f"{cells[i, k]:.4g}"), "off": round(float(off[i, k]), 3)})
    y = layer_axis([labels[k] for k in order], padding=0)
    x = time_axis(bins, steps_per_epoch, grid=False)
    scale = alt.Scale(type="log", domain=[float(v) for v in np.geomspace(low, high, len(RAMP))], range=RAMP, clamp=True)
    ticks = log_axis(low, high)
    height = row_height(len(names)) * len(names)
    words = {"format": "~g"} if ticks.labelExpr is alt.Undefined else {"labelExpr": ticks.labelExpr}
    legend = alt.Legend(gradientLength=min(240, max(height, 80)), values=ticks.values, **words)
    ends = (alt.Tooltip(f"{end}:Q", title=said, format=".4~g") for end, said in (("x", "after"), ("x2", "to")))
    tip = [alt.Tooltip("layer:N"), *ends]
    layers = [alt.Chart(inline(shades)).mark_rect(x2Offset=0.6, clip=True).encode(
        y, x, alt.X2("x2:Q"), alt.Color("value:Q", title=quantity, scale=scale, legend=legend),
        tooltip=[*tip, alt.Tooltip("value:Q", title=quantity, format=".3~g")])] if shades else []  # fmt: skip
    if special:
        kinds = [kind for kind in ("not finite", "zero") if any(cell["kind"] == kind for cell in special)]
        colors = alt.Scale(domain=kinds, range=[{"not finite": ORANGE, "zero": INK}[kind] for kind in kinds])
        color = alt.Color("kind:N", title=None, scale=colors, legend=alt.Legend(symbolType="square"))
        layers.append(alt.Chart(inline(special)).mark_rect(x2Offset=0.6, clip=True).encode(
            y, x, alt.X2("x2:Q"), color, tooltip=[*tip, alt.Tooltip("kind:N", title=quantity)]))  # fmt: skip
    told = [f"{count_layers(len(names))}, " + ("worst first" if worst_first else "the input's side at the top")]
    told[0] += "; " + bins.told("each cell the largest") if bins.size > 1 else ""
    if broken.any():
        at = int(np.argmax(broken.any(axis=1)))
        first = [labels[k] for k in np.flatnonzero(broken[at])]
        more = f" and {len(first) - 1} more" if len(first) > 1 else ""
        where = "every layer at once" if len(first) == len(names) > 1 else first[0] + more
        told.append(f"not finite from step {np.asarray(steps).ravel()[at]:,.0f} on, there in {where}")
    told += [note] if note else []
    if (~(np.isfinite(array) | broken)).any():
        told.append("empty: not measured")
    frames = [bins.ends(i) | {"told": _tell_bin(steps, bins, i, steps_per_epoch)} for i in range(len(bins.starts))]
    framed = alt.Chart(inline(frames, "bins")).transform_filter(_AT).mark_rect(fillOpacity=0, stroke=INK, strokeWidth=1.5)
    layers.append(framed.encode(x, alt.X2("x2:Q")))
    chart = alt.layer(*layers).resolve_scale(color="independent").properties(width=540, height=height)
    beside = _draw_moment(shades, special, frames, log_domain(cells[cells > 0]), quantity)
    moment = alt.param(name="at", value=(frames[-1]["x"] + frames[-1]["x2"]) / 2)
    # A parameter that stands in both parts is one of the whole.
    return style_chart(alt.hconcat(chart, beside, spacing=20).add_params(moment), title, told)  # type: ignore[no-any-return]


_AT = "datum.x < at && at <= datum.x2"  # the bin that is looked at
MOMENT = 14  # layers that are shown of it


def _tell_bin(steps: ArrayLike, bins: Bins, i: int, steps_per_epoch: int | None) -> str:
    """`steps 201 to 400 (epoch 3.1)`."""
    all_steps = np.asarray(steps).ravel()
    first, last = all_steps[bins.starts[i]], all_steps[min(bins.starts[i] + bins.size, len(all_steps)) - 1]
    told = f"step {first:,.0f}" if first == last else f"steps {first:,.0f} to {last:,.0f}"
    return told + (f" (epoch {last / steps_per_epoch:.3g})" if steps_per_epoch else "")


def _draw_moment(shades: list[dict[str, Any]], special: list[dict[str, Any]], frames: list[dict[str, Any]],
                 domain: tuple[float, float], quantity: str) -> Any:  # fmt: skip
    """The layers of one bin as bars: those without a finite number first, then by their distance from the median layer."""
    import altair as alt

    rank = {"not finite": 1e6, "zero": 1e5}
    rows = [cell | {"off": rank[cell["kind"]]} for cell in special] + shades
    least = domain[0] / 2
    base = alt.Chart(inline(rows)).transform_filter(_AT).transform_window(
        place="row_number()", sort=[alt.SortField("off", order="descending")]
    ).transform_filter(f"datum.place <= {MOMENT}")
    y = alt.Y("layer:N", title=None, sort=alt.EncodingSortField("place", op="min"),
              axis=alt.Axis(ticks=False, labelFontSize=10, labelLimit=180, domain=False))  # fmt: skip
    x = alt.X("shown:Q", title=quantity, axis=log_axis(*domain, most=4), scale=alt.Scale(type="log", domain=[least, domain[1]]))
    bars = base.transform_calculate(shown=f"clamp(datum.value, {least:.6g}, {domain[1]:.6g})", from_=f"{least:.6g}").mark_bar()
    tip = [alt.Tooltip("layer:N"), alt.Tooltip("value:Q", title=quantity, format=".3~g")]
    words = base.transform_calculate(told="isValid(datum.kind) ? datum.kind : format(datum.value, '.2~g')")
    heading = alt.Chart(inline(frames, "bins")).transform_filter(_AT).mark_text(align="left", fontSize=12, color=INK)
    return alt.layer(
        bars.encode(y, x, alt.X2("from_:Q"), color=alt.condition("isValid(datum.kind)", alt.value(ORANGE), alt.value(BLUE)),
                    tooltip=tip),
        words.mark_text(align="right", fontSize=10, color=INK).encode(y, x=alt.value(232), text="told:N"),
        heading.encode(text="told:N", x=alt.value(0), y=alt.value(-8)),
    ).properties(width=190, height={"step": 17})  # fmt: skip


def _rank_flow(array: Array, broken: NDArray[np.bool_]) -> list[int]:
    logs = np.log10(np.where(array > 0, array, np.nan))
    off = np.abs(logs - quantile(logs, 0.5, 1)[:, None])
    off[np.isnan(array)] = np.nan
    num = np.maximum((~np.isnan(off)).sum(axis=0), 1)
    zeros = (array == 0).sum(axis=0) / np.maximum((~np.isnan(array)).sum(axis=0), 1)
    return rank_worst(broken, np.nansum(off, axis=0) / num + 1000 * zeros)  # no factor has a thousand decades


def _limit_colours(values: Array) -> tuple[float, float, str]:
    """Ends of the colours: the middle 96 % of the values and a factor of ten to either side, so that few do not take them all."""
    low, high = log_domain(values, least=10.0)
    if not values.size:
        return low, high, ""
    inner = np.quantile(values, [0.02, 0.98])
    bounds = max(low, float(inner[0]) / 10), min(high, float(inner[1]) * 10)
    least, most = float(values.min()), float(values.max())
    if least >= bounds[0] and most <= bounds[1]:
        return *bounds, ""
    return *bounds, f"values from {tell_amount(least)} to {tell_amount(most)}; the colours end earlier, so that the others differ"
