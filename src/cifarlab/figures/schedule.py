"""The learning-rate plan of a run."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cifarlab.figures.style import BLUE, INK, NAMED_MARKS, ORANGE, inline, plain_text, style_chart, thin, wrap_text

if TYPE_CHECKING:
    import altair as alt


def draw_lr(
    steps: ArrayLike,
    lr: ArrayLike,
    momentum: ArrayLike | None = None,
    *,
    steps_per_epoch: int | None = None,
    title: str = "Learning rate",
    marks: Sequence[tuple[int, str]] | None = None,
    momentum_name: str = "momentum",
) -> "alt.VConcatChart":
    """Learning rate over steps, and under it the momentum (SGD, RMSprop) or beta1 (Adam) when it is given.

    steps: number of each update, from 1; lr, momentum: the value that update used. With steps_per_epoch the axis is in epochs,
    and with marks, (step, name) of warm-up's end, peak or restarts (there may be none), in steps too.

    How to read: compare it with the learning curves. Loss that jumps where the rate peaks means too high a peak; loss
    still falling steeply at the end means the run was too short; a rate near 0 for a long tail is time without learning. In a
    one-cycle run with cycled momentum the two lines mirror each other.
    """
    import altair as alt

    names: dict[str, list[int]] = {}
    for step, name in marks or ():
        names.setdefault(plain_text(name, 40), []).append(step)
    positions, rates = np.asarray(steps, dtype=float), np.asarray(lr, dtype=float)
    unit = f"epoch (of {steps_per_epoch:,} steps)" if steps_per_epoch else "step"
    x = positions / steps_per_epoch if steps_per_epoch else positions
    subtitle = ""
    if len(rates):
        top = int(rates.argmax())
        place = f"step {positions[top]:,.0f}" + (f" (epoch {x[top]:.3g})" if steps_per_epoch else "")
        subtitle = f"highest {rates[top]:.4g} at {place}, last {rates[-1]:.4g}"
    both = steps_per_epoch if marks is not None else None
    panels = [_draw_line(alt, x, rates, unit if momentum is None else "", "learning rate", BLUE, 240, both)]
    if momentum is not None:
        panels.append(_draw_line(alt, x, np.asarray(momentum, dtype=float), unit, momentum_name, ORANGE, 120, both))
    told = [subtitle]
    if names:
        panels = [alt.layer(panel, *_draw_marks(alt, names, steps_per_epoch or 1, k == 0)) for k, panel in enumerate(panels)]
        told += wrap_text([f"{name} at {_tell_steps(where, steps_per_epoch)}" for name, where in names.items()])
    return style_chart(alt.vconcat(*panels, spacing=12), title, told)  # type: ignore[no-any-return]


def _tell_steps(steps: Sequence[int], steps_per_epoch: int | None) -> str:
    """`step 490 (epoch 5)`; of many the first few."""
    told = [f"{step:,}" + (f" (epoch {step / steps_per_epoch:.3g})" if steps_per_epoch else "") for step in steps[:4]]
    more = f" and {len(steps) - 4} more" if len(steps) > 4 else ""
    return f"step{'s' * (len(steps) > 1)} {', '.join(told)}{more}"


def _draw_marks(alt: Any, names: dict[str, list[int]], steps_per_epoch: int, is_named: bool) -> list[Any]:
    """Upright lines at the steps, the first of each kind with its name."""
    layers = []
    for k, (name, steps) in enumerate(names.items()):
        color, dash = NAMED_MARKS[(k + 1) % len(NAMED_MARKS)]
        chart = alt.Chart(inline([{"x": step / steps_per_epoch} for step in steps[:200]]))
        layers.append(chart.mark_rule(color=color, strokeDash=dash, strokeWidth=1.5).encode(x="x:Q"))
        if is_named:
            first = alt.Chart(inline([{"x": steps[0] / steps_per_epoch, "told": name}]))
            text = first.mark_text(align="left", dx=5, fontSize=12, color=INK)
            layers.append(text.encode(x="x:Q", y=alt.value(-8 - 15 * k), text="told:N"))
    return layers


def _draw_line(
    alt: Any, x: NDArray[np.float64], y: NDArray[np.float64], x_title: str, y_title: str, color: str, height: int,
    steps_per_epoch: int | None = None,
) -> Any:  # fmt: skip
    rows = [{"x": float(x[i]), "y": float(y[i])} for i in thin(x, 2000) if np.isfinite(y[i])]
    scale = alt.Scale(zero=y_title == "learning rate")
    if y_title != "learning rate" and len(y) and y.min() == y.max():  # a line held at 0.9 would stand on an axis that says 1
        scale = alt.Scale(domain=[float(y[0]) - 0.05, float(y[0]) + 0.05], nice=False)
    x_axis = alt.X("x:Q", title=x_title or None, scale=alt.Scale(domain=[0, float(x.max(initial=1))], nice=False),
                   axis=_time_axis(alt, bool(x_title), steps_per_epoch))  # fmt: skip
    y_axis = alt.Y("y:Q", title=y_title, scale=scale, axis=alt.Axis(minExtent=46, tickCount=5))
    line = alt.Chart(inline(rows)).mark_line(color=color, strokeWidth=2)
    return line.encode(x_axis, y_axis).properties(width=620, height=height)


def _time_axis(alt: Any, is_labelled: bool, steps_per_epoch: int | None) -> Any:
    """Epochs, and under each its step where steps_per_epoch is given."""
    if not is_labelled or not steps_per_epoch:
        return alt.Axis(labels=is_labelled)
    both = f"[datum.label, 'step ' + format(round(datum.value * {steps_per_epoch}), ',')]"
    return alt.Axis(labelExpr=both, tickCount=7)
