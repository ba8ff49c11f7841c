"""The loss along a line of weights, over a plane as contours, and as a surface."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cifarlab.config import InputError
from cifarlab.figures.layers import draw_nothing
from cifarlab.figures.page import TOP, Page
from cifarlab.figures.style import BLUE, GREEN, INK, ORANGE, PURPLE, inline, label_names, plain_text, style_chart

if TYPE_CHECKING:
    import altair as alt
    from matplotlib.figure import Figure

Panel = Mapping[str, Any]  # name, xs, ys, loss, and perhaps path: points (T, 2)
Array = NDArray[np.float64]
COLOURS = [BLUE, ORANGE, GREEN, PURPLE]


def draw_landscape_line(
    xs: ArrayLike,
    losses: Mapping[str, ArrayLike],
    *,
    errors: Mapping[str, ArrayLike] | None = None,
    shape_errors: Mapping[str, ArrayLike] | None = None,
    x_name: str = "distance along the direction",
    marks: Mapping[str, float] | None = None,
    title: str = "Loss along a line",
) -> "alt.LayerChart":
    """Loss at the weights along a line, a curve for each name, with bands of the 95 % interval of the sampling error.

    xs: (n,), rising; losses: up to four, (n,) each, NaN where not finite. errors, shape_errors: standard errors, (n,), of the
    loss, and of its difference to that of the centre: the light band and the dark one. marks: names of points on the axis.
    The axis is logarithmic where the losses span more than a factor of 20.

    How to read: the light band says how far the whole curve may lie elsewhere with other images of the same kind, the dark one
    how well its shape is known: only dips and bumps that stick out of the dark band are there. A trained network sits in a
    valley whose walls rise on both sides; how wide it is in units of the filters' own length can be compared between networks,
    since the directions are normalised. A flat line with no valley is a network before training. A curve with frozen batch norm
    that rises much more steeply than the one with recomputed statistics tells of the statistics, not of the weights. Between
    two runs, a hump is a barrier. Crosses at the top are points where the loss is not finite.

    Source: Goodfellow et al. 2015, arXiv:1412.6544; Li et al. 2018, arXiv:1712.09913. Raises InputError when lengths differ.
    """
    import altair as alt

    at = np.asarray(xs, dtype=float)
    if len(losses) > len(COLOURS):
        raise InputError(f"{len(losses)} curves do not fit into one figure: give up to {len(COLOURS)}")
    curves = {name: np.asarray(values, dtype=float) for name, values in losses.items()}
    bands = [
        {name: np.asarray(values, dtype=float) for name, values in (given or {}).items()} for given in (errors, shape_errors)
    ]
    for name, values in [*curves.items(), *bands[0].items(), *bands[1].items()]:
        if at.ndim != 1 or values.shape != at.shape:
            raise InputError(f"{name!r} of shape {values.shape} does not fit xs {at.shape}: give one number a point")
    known = [values[np.isfinite(values)] for values in curves.values()]
    if not any(len(values) for values in known):
        return draw_nothing(title, "nothing finite" if len(at) and curves else "")  # type: ignore[no-any-return]
    labels = dict(zip(curves, label_names(list(curves), 60), strict=True))
    all_known = np.concatenate(known)
    positive = all_known[all_known > 0]
    is_log = len(positive) == len(all_known) and positive.max() > 20 * positive.min()
    low, high = float(all_known.min()), float(all_known.max())
    domain = [low / 1.25, high * 1.25] if is_log else [low - 0.06 * (high - low or 1), high + 0.06 * (high - low or 1)]

    def rows(name: str, half: NDArray[np.float64] | None = None) -> list[dict[str, Any]]:
        found = []
        part = 0
        for k, value in enumerate(curves[name]):
            if not np.isfinite(value):
                part += 1  # the line is broken there, not drawn across
                continue
            row = {"x": float(at[k]), "y": float(np.clip(value, domain[0], domain[1])), "curve": labels[name], "part": part}
            if half is not None and np.isfinite(half[k]):
                edges = np.clip([value - 1.96 * half[k], value + 1.96 * half[k]], domain[0], domain[1])
                row |= {"y": float(edges[0]), "y2": float(edges[1])}
            elif half is not None:
                continue
            found.append(row)
        return found

    legend = alt.Legend(orient="bottom", labelLimit=420, columns=2, symbolType="stroke", symbolOpacity=1)
    domain_of_names = alt.Scale(domain=list(labels.values()), range=COLOURS)
    color = alt.Color("curve:N", title=None, sort=list(labels.values()), scale=domain_of_names,
                      legend=legend)  # fmt: skip
    x = alt.X("x:Q", title=plain_text(x_name), scale=alt.Scale(domain=[float(at.min()), float(at.max())], nice=False))
    kind: Any = "log" if is_log else "linear"
    y = alt.Y("y:Q", title="loss" + (" (logarithmic)" if is_log else ""), scale=alt.Scale(type=kind, domain=domain, nice=False))
    layers: list[Any] = []
    for given, opacity in zip(bands, (0.15, 0.3), strict=True):
        drawn = [row for name in curves if name in given for row in rows(name, given[name])]
        if drawn:
            layers.append(
                alt.Chart(inline(drawn)).mark_area(opacity=opacity).encode(x, y, alt.Y2("y2:Q"), color, detail="part:N")
            )
    lines = alt.Chart(inline([row for name in curves for row in rows(name)]))
    layers.append(lines.mark_line(strokeWidth=2).encode(x, y, color, detail="part:N"))
    layers.append(lines.mark_point(filled=True, size=22, opacity=1).encode(x, y, color))
    broken: list[dict[str, Any]] = [
        {"x": float(at[k]), "curve": labels[name]} for name in curves for k in np.flatnonzero(~np.isfinite(curves[name]))
    ]
    if broken:
        layers.append(alt.Chart(inline(broken)).mark_point(shape="cross", size=70, angle=45, strokeWidth=1.5).encode(
            x, y=alt.value(8), color=color))  # fmt: skip
    if marks:
        ends = alt.Chart(inline([{"x": float(place), "name": plain_text(name, 30)} for name, place in marks.items()]))
        layers.insert(0, ends.mark_rule(color=INK, opacity=0.35, strokeDash=[3, 3]).encode(x))
        layers.append(ends.mark_text(color=INK, fontSize=11, dy=-8, align="center").encode(x, y=alt.value(0), text="name:N"))
    lowest = [f"{labels[name]} {values[np.isfinite(values)].min():.4g} at {at[np.nanargmin(values)]:.3g}"
              for name, values in curves.items() if np.isfinite(values).any()]  # fmt: skip
    told = ["lowest: " + "; ".join(lowest[k : k + 2]) for k in range(0, len(lowest), 2)]
    if bands[0] or bands[1]:
        words = ("light: where the curve lies", "dark: its difference to the centre")
        told.append("bands, 95 %: " + "; ".join(what for what, given in zip(words, bands, strict=True) if given))
    if broken:
        told.append(f"✕ not finite: {len(broken)} points, from {min(row['x'] for row in broken):.3g} on")
    chart = alt.layer(*layers).properties(width=660, height=340)
    return style_chart(chart, title, told)  # type: ignore[no-any-return]


def draw_landscape_contour(panels: Sequence[Panel], *, x_name: str = "x", y_name: str = "y", columns: int = 2,
                           title: str = "Loss landscape") -> "Figure":  # fmt: skip
    """Loss over a plane of weights as contours, panels side by side with the same levels, logarithmic from lowest to highest.

    panels: each with name, xs (X,), ys (Y,), loss (Y, X), NaN where not finite; perhaps path (T, 2), a trajectory over the
    plane, drawn in white from its ring to its star. Without a path, a plus marks the centre, (0, 0).

    How to read: wide, evenly spaced ovals around the centre are a smooth, well-conditioned valley; long thin ones say that one
    direction is much steeper than the other; islands and kinks say that the net is hard to train. Compare panels by their
    colours, which mean the same. Where frozen and recomputed batch norm differ much, only the recomputed one tells of the
    weights. The loss under a trajectory is that of its shadow on the plane, not of the points themselves: the less of the
    movement the plane holds, the less it says. Grey crosses are points where the loss is not finite.

    Source: Li et al. 2018, arXiv:1712.09913. Raises InputError when shapes do not fit.
    """
    given, levels = _check(panels), _levels(panels)
    columns = max(1, min(columns, len(given)))
    width, height = 3.6, 3.1
    rows = -(-len(given) // columns)
    signs = ["ring: where training began, star: where it ended"] * any(path is not None and len(path) for *_, path in given)
    signs += ["plus: the network"] * any(path is None or not len(path) for *_, path in given)
    told = "; ".join([*_told(given, levels), *signs])
    page = Page(columns * (width + 0.85) + 1.0, TOP + rows * (height + 0.95), title, told)
    drawn = None
    for k, (name, xs, ys, loss, path) in enumerate(given):
        row, column = divmod(k, columns)
        axes = page.place(0.75 + column * (width + 0.85), TOP + 0.32 + row * (height + 0.95), width, height)
        axes.set_title(_heading(name, loss), fontsize=10, color=INK, loc="left", parse_math=False)
        if levels is not None and min(loss.shape) > 1 and np.isfinite(loss).sum() > 3:
            masked = np.ma.masked_invalid(loss)
            drawn = axes.contourf(xs, ys, masked, levels=levels, cmap="viridis", norm=_norm(levels), extend="both")
            lines = axes.contour(
                xs, ys, masked, levels=levels[::2], colors="white", linewidths=0.5, alpha=0.7, norm=_norm(levels)
            )
            axes.clabel(lines, fontsize=7, fmt=lambda level: f"{level:.3g}")
        broken = np.argwhere(~np.isfinite(loss))
        if len(broken):
            axes.plot(xs[broken[:, 1]], ys[broken[:, 0]], "x", color="#999999", markersize=3, markeredgewidth=0.8)
        if path is not None and len(path):
            axes.plot(path[:, 0], path[:, 1], "-", color="white", linewidth=1.6)
            axes.plot(path[:, 0], path[:, 1], ".", color=ORANGE, markersize=4)
            axes.plot(*path[0], "o", markerfacecolor="none", markeredgecolor="white", markersize=9, markeredgewidth=1.6)
            axes.plot(*path[-1], "*", color="white", markeredgecolor=INK, markersize=12, markeredgewidth=0.6)
        elif xs.min() <= 0 <= xs.max() and ys.min() <= 0 <= ys.max():
            axes.plot(0, 0, "+", color="white", markersize=10, markeredgewidth=1.6)
        axes.set_xlim(xs.min() - (xs.min() == xs.max()), xs.max())
        axes.set_ylim(ys.min() - (ys.min() == ys.max()), ys.max())
        axes.set_xlabel(plain_text(x_name, 50), fontsize=9, color=INK, parse_math=False)
        axes.set_ylabel(plain_text(y_name, 40), fontsize=9, color=INK, labelpad=1, parse_math=False)
        axes.tick_params(labelsize=8, colors=INK)
    if drawn is not None:
        bar = page.figure.colorbar(drawn, cax=page.place(page.width - 0.95, TOP + 0.32, 0.16, height), format="%.3g")
        bar.ax.tick_params(labelsize=8)
        bar.set_label("loss", fontsize=9, color=INK, labelpad=2)
    return page.figure


def draw_landscape_surface(panels: Sequence[Panel], *, x_name: str = "x", y_name: str = "y",
                           title: str = "Loss surface") -> "Figure":  # fmt: skip
    """The same as `draw_landscape_contour`, as surfaces: height and colour are the loss, on one logarithmic scale for all panels.

    How to read: for the overall shape only: bowl, ridge or plateau; take numbers from the contours. Heights can be compared
    between panels. What looks steep here is steep by factors, since the scale is logarithmic. Holes are points where the loss
    is not finite.

    Source: Li et al. 2018, arXiv:1712.09913. Raises InputError when shapes do not fit.
    """
    given, levels = _check(panels), _levels(panels)
    columns = max(1, min(2, len(given)))
    rows = -(-len(given) // columns)
    width, height = 4.4, 3.9
    page = Page(columns * width + 0.5, TOP + rows * height, title, _told(given, levels))
    for k, (name, xs, ys, loss, _) in enumerate(given):
        row, column = divmod(k, columns)
        left, top = 0.1 + column * (width + 0.1), TOP + row * height
        page.write(left + 0.25, top + 0.02, _heading(name, loss), size=10)
        if levels is None or min(loss.shape) < 2:
            page.write(left + 0.25, top + 0.3, "nothing to draw")
            continue
        axes: Any = page.place(left, top, width, height, projection="3d", computed_zorder=False)
        is_log = _is_log(levels)
        heights, (low, high) = (np.log10(v) if is_log else v for v in (np.where(loss > 0, loss, np.nan) if is_log else loss,
                                                                        levels[[0, -1]]))  # fmt: skip
        across, down = np.meshgrid(xs, ys)
        axes.plot_surface(across, down, np.ma.masked_invalid(heights), cmap="viridis", vmin=low, vmax=high, rstride=1, cstride=1,
                          linewidth=0.15, edgecolor="white", antialiased=True)  # fmt: skip
        axes.set_zlim(low, high)
        ticks = np.linspace(low, high, 5)
        axes.set_zticks(ticks, [f"{10**t if is_log else t:.3g}" for t in ticks])
        axes.set_xlabel(plain_text(x_name, 26), fontsize=8, labelpad=-4, parse_math=False)
        axes.set_ylabel(plain_text(y_name, 26), fontsize=8, labelpad=-4, parse_math=False)
        axes.tick_params(labelsize=7, pad=-2)
        axes.view_init(elev=32, azim=-58)
        axes.set_box_aspect((1, 1, 0.75), zoom=0.95)
    return page.figure


def _check(panels: Sequence[Panel]) -> list[tuple[str, Array, Array, Array, Array | None]]:
    """(name, xs, ys, loss, path) of each."""
    found = []
    for panel in panels:
        xs, ys, loss = (np.asarray(panel[key], dtype=float) for key in ("xs", "ys", "loss"))
        if xs.ndim != 1 or ys.ndim != 1 or loss.shape != (len(ys), len(xs)) or not loss.size:
            raise InputError(f"loss {loss.shape} does not fit xs {xs.shape} and ys {ys.shape}: give (len(ys), len(xs))")
        path = None if panel.get("path") is None else np.asarray(panel["path"], dtype=float)
        if path is not None and (path.ndim != 2 or path.shape[1] != 2):
            raise InputError(f"a path of shape {path.shape} does not fit a plane: give points, (T, 2)")
        found.append((str(panel["name"]), xs, ys, np.where(np.isfinite(loss), loss, np.nan), path))
    return found


def _told(given: Sequence[tuple[Any, ...]], levels: Array | None) -> list[str]:
    if levels is None:
        return ["nothing finite" if given else "nothing measured"]
    broken = sum(int((~np.isfinite(loss)).sum()) for _, _, _, loss, _ in given)
    scale = f"one {'logarithmic ' if _is_log(levels) else ''}scale for all panels"
    return [f"{scale}; {broken} points not finite (×)" if broken else scale]


def _heading(name: str, loss: Array) -> str:
    known = loss[np.isfinite(loss)]
    return plain_text(name, 36) + (f": {known.min():.3g} to {known.max():.3g}" if len(known) else "")


def _levels(panels: Sequence[Panel]) -> NDArray[np.float64] | None:
    """17 levels from the lowest to the highest loss of all panels: logarithmic where they span a factor of 5 or more."""
    values = np.concatenate([np.ravel(np.asarray(panel["loss"], dtype=float)) for panel in panels]) if panels else np.zeros(0)
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    low, high = float(values.min()), float(values.max())
    if low > 0 and high >= 5 * low:
        return np.geomspace(low, high, 17)
    if not high - low > 1e-9 * max(abs(low), abs(high)):
        low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
    return np.linspace(low, high, 17)


def _is_log(levels: NDArray[np.float64]) -> bool:
    return bool(levels[0] > 0 and levels[-1] >= 5 * levels[0] * (1 - 1e-12))


def _norm(levels: NDArray[np.float64]) -> Any:
    from matplotlib.colors import LogNorm, Normalize

    return (LogNorm if _is_log(levels) else Normalize)(levels[0], levels[-1])
