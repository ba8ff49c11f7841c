"""What a network costs: FLOP by layer, and each layer under the machine's two roofs."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from cifarlab.config import InputError
from cifarlab.figures.style import BLUE, GREY, INK, ORANGE, inline, label_names, style_chart

if TYPE_CHECKING:
    import altair as alt

WIDTH, HEIGHT = 620, 380  # of the roofline, in pixels


def draw_flops(
    names: Sequence[str], forward_macs: ArrayLike, backward_macs: ArrayLike | None = None, *, title: str = "FLOP by layer",
    most: int = 48,
) -> "alt.LayerChart":  # fmt: skip
    """FLOP of each layer in the order of the net, with its share of the whole; 2 FLOP a multiply-add.

    names: layers; forward_macs, backward_macs: (layers,), multiply-adds for one image. Layers without any are left out; of
    more than `most`, the largest are shown and the others summed in one last bar.

    How to read: a bar is a layer's work in the forward pass and, in orange, in the backward pass, usually twice as much (the
    first layer's is less, since nobody needs the gradient of the image). Bars of a well-shaped net are about equal: stages
    halve the image's sides as they double the channels. A bar far above the rest is the layer to make thinner or to
    place after a stride; layers of a few permille can be made wider for free. FLOP are not seconds: see the roofline.

    Raises InputError when the lengths differ.
    """
    import altair as alt

    forward = np.asarray(forward_macs, dtype=float)
    backward = np.zeros_like(forward) if backward_macs is None else np.asarray(backward_macs, dtype=float)
    if forward.shape != (len(names),) or backward.shape != forward.shape:
        raise InputError(f"{len(names)} names, forward_macs {forward.shape} and backward_macs {backward.shape} do not fit "
                         "together: give one of each per layer")  # fmt: skip
    total = 2 * (forward + backward)
    whole = max(float(total.sum()), 1.0)
    shown = [int(k) for k in np.sort(np.argsort(-total, kind="stable")[:most]) if total[k] > 0]
    labels = label_names([names[k] or "(the net itself)" for k in shown])
    bars = [(labels[i], forward[k], backward[k]) for i, k in enumerate(shown)]
    rest = np.setdiff1d(np.flatnonzero(total > 0), shown)
    if len(rest):
        bars.append((f"({len(rest)} smaller layers)", forward[rest].sum(), backward[rest].sum()))
    unit, scale = _unit(max((2 * (f + b) for _, f, b in bars), default=1.0))
    rows = [{"layer": name, "pass": phase, "flop": 2 * macs / scale, "order": order}
            for name, f, b in bars for order, (phase, macs) in enumerate((("forward", f), ("backward", b))) if macs]  # fmt: skip
    shares = [{"layer": name, "flop": 2 * (f + b) / scale, "share": f"{200 * (f + b) / whole:.1f} %"} for name, f, b in bars]

    order = [name for name, *_ in bars]
    step = 22 if len(bars) <= 24 else 14
    y = alt.Y("layer:N", title=None, sort=order, scale=alt.Scale(domain=order, paddingInner=0.25),
              axis=alt.Axis(labelOverlap=False, labelFontSize=11 if step > 20 else 10, ticks=False))  # fmt: skip
    largest = max((row["flop"] for row in shares), default=1.0)
    x = alt.X("flop:Q", title=f"{unit} for one image", scale=alt.Scale(domain=[0, 1.1 * largest], nice=False), stack="zero")
    seen = ["forward", "backward"] if backward.any() else ["forward"]
    color = alt.Color("pass:N", title=None, scale=alt.Scale(domain=seen, range=[BLUE, ORANGE][: len(seen)]),
                      legend=alt.Legend(orient="bottom") if len(seen) > 1 else None)  # fmt: skip
    layers = [
        alt.Chart(inline(rows)).mark_bar().encode(y, x, color, order=alt.Order("order:O")),
        alt.Chart(inline(shares)).mark_text(align="left", dx=4, fontSize=11 if step > 20 else 10, color=INK).encode(
            y, alt.X("flop:Q"), text="share:N"
        ),
    ]  # fmt: skip
    told = f"forward {_amount(2 * forward.sum())}, {forward.sum() / 1e9:.4g} GMAC"
    if backward.any():
        told += f"; forward + backward {_amount(whole)}, of which shares are given"
    chart = alt.layer(*layers).properties(width=520, height=step * max(len(bars), 1))
    return style_chart(chart, title, f"{told} (convolutions, linear layers, matrix products)")  # type: ignore[no-any-return]


def draw_roofline(
    names: Sequence[str], intensity: ArrayLike, gflops: ArrayLike, weight: ArrayLike, passes: Sequence[str] | None = None, *,
    peak_gflops: float, peak_gbytes_per_second: float, title: str = "Roofline", labelled: int = 6,
) -> "alt.LayerChart":  # fmt: skip
    """Achieved GFLOP/s of each layer against its FLOP per byte, under this machine's measured roofs; both axes logarithmic.

    names, intensity (FLOP/byte), gflops: (layers,); weight: (layers,), what a dot's area shows, such as the layer's
    milliseconds; the largest are labelled. passes: "forward" or "backward" of each, shown as circles and triangles; a layer
    may be there once for either. Layers that are zero or not finite in one of them are left out.

    How to read: the slope is memory's roof, the flat line arithmetic's, and a dot's distance below is what is lost. Dots under
    the slope (blue) wait for memory: fuse them, use a narrower type or a larger batch, for fewer FLOP would not help. Dots near
    the flat line (orange) are as fast as they can be: only fewer FLOP help. Large dots far below both are worth a look:
    too small a batch, a bad memory order, or a slow kernel. A dot above the slope had its data in a cache; one above the flat
    line has a kernel that beats the library's matrix product, or the machine was busy while that was measured. A backward pass
    does about twice the work of its forward pass on about twice the bytes: so its triangle should be at the height of its circle.
    Far below it, look for a layer whose gradient has a slow kernel (grouped convolutions, strided poolings).

    Source: Williams, Waterman and Patterson, CACM 52 (2009).
    Raises InputError when the lengths differ or a peak is not above 0.
    """
    import altair as alt

    x, y, size = (np.asarray(values, dtype=float) for values in (intensity, gflops, weight))
    kinds = ["forward"] * len(names) if passes is None else list(passes)
    if not x.shape == y.shape == size.shape == (len(names),) == (len(kinds),):
        raise InputError(f"{len(names)} names, intensity {x.shape}, gflops {y.shape}, weight {size.shape} and {len(kinds)} "
                         "passes do not fit together: give one of each per layer")  # fmt: skip
    if not set(kinds) <= {"forward", "backward"}:
        raise InputError(f"passes {sorted(set(kinds) - {'forward', 'backward'})} cannot be drawn: give forward or backward")
    if not (peak_gflops > 0 and peak_gbytes_per_second > 0):
        told = f"peaks of {peak_gflops:g} GFLOP/s and {peak_gbytes_per_second:g} GB/s"
        raise InputError(f"{told} make no roof: both must be above 0")
    ridge = peak_gflops / peak_gbytes_per_second
    good = np.isfinite(x) & np.isfinite(y) & np.isfinite(size) & (x > 0) & (y > 0) & (size > 0)
    kept = [int(k) for k in np.flatnonzero(good)]
    low_x, high_x = min([ridge / 10, *(x[kept] / 1.6)]), max([ridge * 10, *(x[kept] * 2.5)])
    low_y, high_y = min([peak_gflops / 1e3, *(y[kept] / 2)]), max([peak_gflops * 2, *(y[kept] * 1.6)])
    labels = label_names([names[k] or "(the net itself)" for k in kept])
    bounds = ["limited by memory", "limited by arithmetic"]
    dots = [{"layer": labels[i], "x": x[k], "y": y[k], "size": size[k], "bound": bounds[int(x[k] >= ridge)],
             "pass": kinds[k]} for i, k in enumerate(kept)]  # fmt: skip
    dots.sort(key=lambda dot: -dot["size"])  # small ones on top

    def place(dot: dict[str, Any]) -> tuple[float, float]:
        return (WIDTH * float(np.log(dot["x"] / low_x) / np.log(high_x / low_x)),
                HEIGHT * float(1 - np.log(dot["y"] / low_y) / np.log(high_y / low_y)))  # fmt: skip

    tags = _spread([(*place(dot), dot["layer"]) for dot in dots], labelled, place({"x": ridge, "y": peak_gflops})[1])
    at_x, at_y = (
        encoding(field, title=title, scale=alt.Scale(type="log", domain=[low, high], nice=False),
                 axis=alt.Axis(format="~g", values=[10.0**k for k in range(-6, 9)]))
        for encoding, field, title, low, high in ((alt.X, "x:Q", "FLOP per byte moved", low_x, high_x),
                                                  (alt.Y, "y:Q", "GFLOP/s", low_y, high_y))
    )  # fmt: skip
    start = max(low_x, low_y / peak_gbytes_per_second)
    roof = [{"x": start, "y": start * peak_gbytes_per_second}, {"x": ridge, "y": peak_gflops}, {"x": high_x, "y": peak_gflops}]
    color = alt.Color("bound:N", title=None, scale=alt.Scale(domain=bounds, range=[BLUE, ORANGE]),
                      legend=alt.Legend(orient="bottom", symbolOpacity=1))  # fmt: skip
    # Grey in the legend: the color tells the roof.
    legend = alt.Legend(orient="bottom", symbolFillColor=GREY, symbolStrokeWidth=0) if passes is not None else None
    shape = alt.Shape("pass:N", title=None, legend=legend,
                      scale=alt.Scale(domain=["forward", "backward"], range=["circle", "triangle-up"]))  # fmt: skip
    layers = [
        alt.Chart(inline(roof)).mark_line(color=INK, strokeWidth=2).encode(at_x, at_y),
        alt.Chart(inline([{"x": ridge, "y": peak_gflops}])).mark_rule(color=GREY, strokeDash=[3, 3]).encode(at_x),
        alt.Chart(inline(dots)).mark_point(filled=True, opacity=0.65, stroke="white", strokeWidth=0.8).encode(
            at_x, at_y, color, shape, size=alt.Size("size:Q", legend=None, scale=alt.Scale(range=[25, 700]))
        ),
    ]  # fmt: skip
    for left, top, right, bottom, name in tags:
        line = alt.Chart(inline([{}])).mark_rule(color=GREY, strokeWidth=0.7)
        layers.append(line.encode(x=alt.value(left), y=alt.value(top), x2=alt.value(right), y2=alt.value(bottom)))
        text = alt.Chart(inline([{"name": name}])).mark_text(align="left", baseline="middle", fontSize=11, color=INK, dx=3)
        layers.append(text.encode(x=alt.value(right), y=alt.value(bottom), text="name:N"))
    subtitle = [f"measured here: {peak_gflops:,.4g} GFLOP/s in matrix products, {peak_gbytes_per_second:,.4g} GB/s; "
                f"they meet at {ridge:.3g} FLOP/byte (dashed)"]  # fmt: skip
    if beaten := int((y[kept] > peak_gflops).sum()):
        subtitle.append(f"{beaten} layer{'s' * (beaten > 1)} beat the matrix products")
    if len(kept) < len(names):
        subtitle.append(f"{len(names) - len(kept)} layers without arithmetic or time are left out")
    return style_chart(alt.layer(*layers).properties(width=WIDTH, height=HEIGHT), title, subtitle)  # type: ignore[no-any-return]


def _spread(
    points: list[tuple[float, float, str]], labelled: int, roof: float
) -> list[tuple[float, float, float, float, str]]:
    """(dot x, dot y, text x, text y, text) in pixels for the first points.

    Each text is at the nearest height above or below its dot where it covers no other text, no dot and not the flat roof.
    """
    placed: list[tuple[float, float, float, float, str]] = []
    for left, top, name in sorted(points[:labelled], key=lambda point: (point[1], point[0])):
        width = _text_width(name)
        at = min(left + 16, WIDTH - width)
        for step in range(120):
            height = top + 7 * (step // 2) * (-1 if step % 2 else 1)
            free = all(abs(height - other) > 13 or at > x + _text_width(text) or x > at + width
                       for _, _, x, other, text in placed)  # fmt: skip
            clear = all(abs(height - y) > 18 or not at - 14 < x < at + width for x, y, _ in points)
            if free and clear and abs(height - roof) > 9 and 6 < height < HEIGHT - 6:
                break
        placed.append((left, top, at, height, name))
    return placed


def _text_width(text: str) -> float:
    return 6.2 * len(text) + 8


def _unit(largest: float) -> tuple[str, float]:
    units = (("TFLOP", 1e12), ("GFLOP", 1e9), ("MFLOP", 1e6), ("kFLOP", 1e3))
    return next(((name, scale) for name, scale in units if largest >= scale), units[-1])


def _amount(flop: float) -> str:
    unit, scale = _unit(flop)
    return f"{flop / scale:.4g} {unit}"
