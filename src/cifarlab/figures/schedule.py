"""The learning-rate plan of a run."""

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cifarlab.figures.style import BLUE, ORANGE, inline, style_chart, thin

if TYPE_CHECKING:
    import altair as alt


def draw_lr(
    steps: ArrayLike,
    lr: ArrayLike,
    momentum: ArrayLike | None = None,
    *,
    steps_per_epoch: int | None = None,
    title: str = "Learning rate",
) -> "alt.VConcatChart":
    """Learning rate over steps, and under it the momentum (SGD, RMSprop) or beta1 (Adam) when it is given.

    steps: number of each update, from 1; lr, momentum: the value that update used. With steps_per_epoch the axis is in epochs.

    How to read: compare it with the learning curves. Loss that jumps where the rate peaks means too high a peak; loss
    still falling steeply at the end means the run was too short; a rate near 0 for a long tail is time without learning. In a
    one-cycle run with cycled momentum the two lines mirror each other.
    """
    import altair as alt

    positions, rates = np.asarray(steps, dtype=float), np.asarray(lr, dtype=float)
    unit = f"epoch (of {steps_per_epoch:,} steps)" if steps_per_epoch else "step"
    x = positions / steps_per_epoch if steps_per_epoch else positions
    subtitle = ""
    if len(rates):
        top = int(rates.argmax())
        place = f"step {positions[top]:,.0f}" + (f" (epoch {x[top]:.3g})" if steps_per_epoch else "")
        subtitle = f"highest {rates[top]:.4g} at {place}, last {rates[-1]:.4g}"
    panels = [_draw_line(alt, x, rates, unit if momentum is None else "", "learning rate", BLUE, 240)]
    if momentum is not None:
        panels.append(_draw_line(alt, x, np.asarray(momentum, dtype=float), unit, "momentum", ORANGE, 120))
    return style_chart(alt.vconcat(*panels, spacing=12), title, subtitle)  # type: ignore[no-any-return]


def _draw_line(
    alt: Any, x: NDArray[np.float64], y: NDArray[np.float64], x_title: str, y_title: str, color: str, height: int
) -> Any:
    rows = [{"x": float(x[i]), "y": float(y[i])} for i in thin(x, 2000) if np.isfinite(y[i])]
    scale = alt.Scale(zero=y_title == "learning rate")
    x_axis = alt.X("x:Q", title=x_title or None, scale=alt.Scale(domain=[0, float(x.max(initial=1))], nice=False),
                   axis=alt.Axis(labels=bool(x_title)))  # fmt: skip
    y_axis = alt.Y("y:Q", title=y_title, scale=scale, axis=alt.Axis(minExtent=46, tickCount=5))
    line = alt.Chart(inline(rows)).mark_line(color=color, strokeWidth=2)
    return line.encode(x_axis, y_axis).properties(width=620, height=height)
