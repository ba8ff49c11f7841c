"""What stride and padding make of an image: a table of small pictures, strides down, paddings across."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cifarlab.config import InputError
from cifarlab.figures.page import LETTER, TOP, Page, finite, signed_range
from cifarlab.figures.style import plain_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_geometry(
    strides: Sequence[int],
    paddings: Sequence[int],
    maps: Sequence[Sequence[ArrayLike]],
    captions: Sequence[Sequence[str]],
    *,
    image: NDArray[np.uint8] | None = None,
    true_size: bool = False,
    subtitle: str = "",
    title: str = "Stride and padding",
) -> "Figure":
    """A map for each stride (rows) and padding (columns), with a caption of up to three lines (divided by newlines).

    maps[i][j]: (h, w), of stride i and padding j, in whatever size: how often each pixel of the image is used, or the features
    that are left of it. image: uint8 3×H×W, shown at the upper left, what they were made from. true_size: maps are drawn as
    large as they are in pixels, so that their shrinking is seen; else each fills its place. Each map has its own scale, from
    black = 0 to its largest value; blue and red where there are negative ones.

    How to read: of usage maps, an even grey is healthy: all pixels count alike. A dark frame is what lies near the border and
    counts less, black is what is never read, and nothing warns of it. Stripes come from a stride: pixels that more windows
    share count more. More padding lightens the frame, at the price of windows that look at zeros. Of feature maps,
    look at which details survive: with each doubling of the stride three of four positions go.

    Source: Dumoulin & Visin 2016, arXiv:1603.07285 (the arithmetic). Raises InputError when the tables do not fit.
    """
    if any(len(table) != len(strides) or any(len(row) != len(paddings) for row in table) for table in (maps, captions)):
        raise InputError(f"maps and captions do not fit {len(strides)} strides and {len(paddings)} paddings: give one of each")
    drawn = [[np.asarray(cell, dtype=float) for cell in row] for row in maps]
    if any(cell.ndim != 2 or not cell.size for row in drawn for cell in row):
        raise InputError("a map must be h×w numbers, at least one")
    side, left = 1.7, 1.15 if image is None else 2.2
    largest = max((max(cell.shape) for row in drawn for cell in row), default=1)
    sizes = [[[side * n / (largest if true_size else max(cell.shape)) for n in cell.shape] for cell in row] for row in drawn]
    heights = [max([0.5, *(height for height, _ in row)]) + 0.68 for row in sizes]  # of each row, with its captions
    page = Page(left + (side + 0.35) * len(paddings) + 0.1, TOP + 0.3 + max(sum(heights), 1.7), title, subtitle)
    if image is not None:
        page.picture(0.15, TOP + 0.28, 1.2, 1.2, image.transpose(1, 2, 0))
        page.write(0.15, TOP + 1.51, f"image, {image.shape[1]}×{image.shape[2]}", size=8.5)
    for j, padding in enumerate(paddings):
        page.write(left + (side + 0.35) * j, TOP + 0.02, f"padding {padding}", size=10, weight="bold")
    for i, stride in enumerate(strides):
        top = TOP + 0.28 + sum(heights[:i])
        page.write(left - 0.78, top + (heights[i] - 0.68) / 2 - 0.08, f"stride {stride}", size=10, weight="bold")
        for j in range(len(paddings)):
            cell, x, (height, width) = drawn[i][j], left + (side + 0.35) * j, sizes[i][j]
            page.picture(x, top, width, height, finite(cell), **signed_range(cell))
            for k, line in enumerate(str(captions[i][j]).split("\n")[:3]):
                page.write(x, top + height + 0.04 + 0.16 * k, plain_text(line, int((side + 0.3) / LETTER)), size=8.5)
    return page.figure
