"""Images with what the model said about them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cifarlab.config import InputError
from cifarlab.figures.style import BLUE, INK, ORANGE, plain_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# For names that Matplotlib's own letters (DejaVu Sans) lack; only those that the machine has are asked for.
_FALLBACK_FONTS = ("Noto Sans CJK JP", "Noto Sans CJK SC", "WenQuanYi Zen Hei", "PingFang SC", "Hiragino Sans", "Microsoft YaHei")


def draw_samples(
    images: NDArray[np.uint8],
    true: ArrayLike,
    predicted: ArrayLike,
    probability: ArrayLike,
    class_names: Sequence[str],
    *,
    title: str = "Predictions",
    columns: int = 6,
) -> "Figure":
    """A grid of images in the given order, each with its true class, the predicted one and that one's probability.

    images: uint8 N×3×H×W, N up to about 60; true, predicted: class numbers, (N,); probability: of the predicted class, 0…1, (N,).
    Right predictions have a blue frame and ✓, wrong ones an orange frame and ✗. Pixels are shown as they are, not smoothed.

    How to read: of the surest mistakes, ask for each whether you would have known better. If not, or if the label is wrong, the
    model is near what this data allows; if yes, look for what such images share (pose, background, crop) and whether training
    shows it. Of the most doubtful images, many that are easy for a person mean training that is not finished.

    Raises InputError when the lengths differ or a class number has no name.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.font_manager import fontManager
    from matplotlib.transforms import Bbox, TransformedBbox

    truth, guess = np.asarray(true, dtype=int), np.asarray(predicted, dtype=int)
    chance = np.asarray(probability, dtype=float)
    n = len(images)
    if images.ndim != 4 or images.shape[1] != 3 or not len(truth) == len(guess) == len(chance) == n:
        raise InputError(f"images {images.shape}, true {truth.shape}, predicted {guess.shape} and probability {chance.shape} do "
                         "not fit together: give N×3×H×W images and N of each")  # fmt: skip
    if n and not 0 <= min(truth.min(), guess.min()) <= max(truth.max(), guess.max()) < len(class_names):
        raise InputError(f"a class number outside 0…{len(class_names) - 1} cannot be drawn: give one name for each class")

    installed = {font.name for font in fontManager.ttflist}
    fonts = ["DejaVu Sans", *(name for name in _FALLBACK_FONTS if name in installed)]
    columns = max(1, min(columns, n))
    num_rows = max(1, -(-n // columns))
    width, height = max(1.62 * columns + 0.3, 6.0), 2.12 * num_rows + 0.75
    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)  # an object of its own instead of pyplot's: nothing global, no window, safe in a thread
    # parse_math off: a class called "$x$" is a name, not a formula.
    figure.text(0.15 / width, 1 - 0.15 / height, plain_text(title, 90), fontsize=13, fontweight="bold", color=INK, va="top",
                parse_math=False, fontfamily=fonts)  # fmt: skip
    num_right = int((truth == guess).sum())
    counts = f"{n} images: {num_right} right (✓ blue), {n - num_right} wrong (✗ orange)" if n else "No such images."
    figure.text(0.15 / width, 1 - 0.43 / height, counts, fontsize=9.5, color="#555555", va="top")
    for i in range(n):
        row, column = divmod(i, columns)
        left, top = 0.15 + 1.62 * column + 0.08, 0.75 + 2.12 * row  # inches from the upper left corner
        axes = figure.add_axes((left / width, 1 - (top + 1.46) / height, 1.46 / width, 1.46 / height))
        axes.imshow(images[i].transpose(1, 2, 0), interpolation="nearest")
        axes.set_xticks([])
        axes.set_yticks([])
        right = truth[i] == guess[i]
        color = BLUE if right else ORANGE
        for spine in axes.spines.values():
            spine.set_color(color)
            spine.set_linewidth(2.5)
        name = plain_text(class_names[guess[i]], 17) or f"class {guess[i]}"
        lines = [(f"{'✓' if right else '✗'} {name}", color, "bold"), (f"{100 * chance[i]:.1f} % sure", INK, "normal")]
        if not right:
            lines.insert(1, (f"is {plain_text(class_names[truth[i]], 17) or f'class {truth[i]}'}", INK, "normal"))
        for k, (text, ink, weight) in enumerate(lines):
            label = figure.text((left + 0.02) / width, 1 - (top + 1.52 + 0.155 * k) / height, text, fontsize=8.5, color=ink,
                                va="top", fontweight=weight, parse_math=False, fontfamily=fonts)  # fmt: skip
            # In shares of the figure, which move along when a notebook cuts its white edges off (bbox_inches="tight").
            label.set_clip_box(TransformedBbox(Bbox.from_bounds(left / width, 0, 1.56 / width, 1), figure.transFigure))
            label.set_clip_on(True)
    return figure
