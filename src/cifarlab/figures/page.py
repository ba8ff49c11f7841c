"""A Matplotlib page for grids of images: title, subtitle, and pictures placed in inches from the upper left corner."""

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cifarlab.figures.style import GREY, INK, plain_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TOP = 0.85  # inches that title and subtitle take
LETTER = 0.068  # inches that a letter of 9 points takes: names are cut by it


class Page:
    """`page.place(left, top, width, height)` gives axes; `page.figure` is what is drawn on.

    An object of its own instead of pyplot's: nothing global, no window, safe in a thread. Text is never read as a formula.
    """

    def __init__(self, width: float, height: float, title: str, subtitle: str | list[str] = "") -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.width, self.height = max(width, 6.4), max(height, 2.4)
        self.figure = Figure(figsize=(self.width, self.height), facecolor="white")
        FigureCanvasAgg(self.figure)
        self.write(0.15, 0.13, plain_text(title, int((self.width - 0.3) / 0.105)), size=13, weight="bold")
        for k, line in enumerate([subtitle] if isinstance(subtitle, str) else subtitle):
            self.write(0.15, 0.43 + 0.19 * k, plain_text(line, int((self.width - 0.3) / LETTER)), size=9.5, color="#555555")

    def write(self, left: float, top: float, text: str, *, size: float = 9, color: str = INK, **more: Any) -> None:
        more = {"va": "top", "parse_math": False, **more}
        self.figure.text(left / self.width, 1 - top / self.height, text, fontsize=size, color=color, **more)

    def place(self, left: float, top: float, width: float, height: float, **more: Any) -> "Axes":
        at = (left / self.width, 1 - (top + height) / self.height, width / self.width, height / self.height)
        return self.figure.add_axes(at, **more)

    def picture(self, left: float, top: float, width: float, height: float, pixels: ArrayLike, **more: Any) -> "Axes":
        """Pixels as they are, not smoothed, with a thin frame and without ticks."""
        axes = self.place(left, top, width, height)
        axes.imshow(np.asarray(pixels), interpolation="nearest", aspect="auto", **more)
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set_color(GREY)
            spine.set_linewidth(0.6)
        return axes


def finite(values: ArrayLike) -> NDArray[np.float64]:
    """As float64, with 0 for what is not finite; a picture of nothing else must still be drawn."""
    given = np.asarray(values, dtype=float)
    return np.where(np.isfinite(given), given, 0.0)


def signed_range(values: ArrayLike) -> dict[str, Any]:
    """How imshow colours these values: grey from 0 where none is negative, else blue through white to red around 0."""
    given = finite(values)
    largest = float(np.abs(given).max(initial=0)) or 1.0
    if given.min(initial=0) >= 0:
        return {"cmap": "gray", "vmin": 0.0, "vmax": largest}
    return {"cmap": "RdBu_r", "vmin": -largest, "vmax": largest}
