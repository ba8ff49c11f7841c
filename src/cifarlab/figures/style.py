"""One look for all charts: colours, letter sizes, and names made safe to print.

Source of the colours: Okabe and Ito, "Color Universal Design" (2008), told apart with any colour vision.
"""

import textwrap
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import altair as alt

BLUE, ORANGE, GREEN, PURPLE, GREY, INK = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#8A8A8A", "#222222"
NAMED_MARKS = [(ORANGE, [1, 0]), (GREEN, [7, 3]), (PURPLE, [2, 3]), ("#E69F00", [9, 3, 2, 3])]  # colour and dash of upright lines
SPLITS = {"train": BLUE, "clean": PURPLE, "val": ORANGE, "test": GREEN}


def style_chart(chart: Any, title: str, subtitle: str | list[str] = "") -> Any:
    """The finished chart: title, and letters that can be read at 100 %. Set on the chart, not as a global theme."""
    import altair as alt

    heading = alt.TitleParams(plain_text(title), subtitle=subtitle, anchor="start", offset=14)
    return (
        chart.properties(title=heading, background="white", padding=12)
        .configure_title(fontSize=16, subtitleFontSize=12, subtitleColor="#555555", color=INK)
        .configure_axis(labelFontSize=11, titleFontSize=12, titleFontWeight="normal", gridColor="#E6E6E6", domainColor=GREY,
                        tickColor=GREY, labelColor=INK, titleColor=INK, labelLimit=220)
        .configure_legend(labelFontSize=12, titleFontSize=12, symbolStrokeWidth=2.5)
        .configure_view(stroke=None)
    )  # fmt: skip


def unchecked() -> AbstractContextManager[None]:
    """Within it Altair makes charts without holding each part against Vega-Lite's schema, which takes longer than drawing them.

    Tests draw with these checks; what a run draws has passed them.
    """
    from altair.utils.schemapi import debug_mode

    return debug_mode(False)


def inline(rows: list[dict[str, Any]], name: str = "") -> "alt.InlineData":
    """Rows as a chart's own data. InlineData, since Altair cuts off plain lists at a global limit of 5,000 rows.

    name: what a page calls data that it feeds anew, such as a smoothed curve's.
    """
    import altair as alt

    # Altair copies a list row by row whenever a chart is put together, a tuple not.
    return alt.InlineData(values=tuple(rows), name=name or alt.Undefined)


def plain_text(text: str, longest: int = 200) -> str:
    """The text on one line, without control characters, cut to that many characters."""
    text = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    return text if len(text) <= longest else text[: longest - 1].rstrip() + "…"


def wrap_text(lines: Sequence[str], width: int = 100) -> list[str]:
    """The lines, printable and none longer than that many characters."""
    return [piece for line in lines for piece in textwrap.wrap(plain_text(line, 1000), width)]


def label_names(class_names: Sequence[str], longest: int = 26) -> list[str]:
    """Class names to print: short, one line, never empty and all different (an axis merges equal ones)."""
    labels: list[str] = []
    for k, name in enumerate(class_names):
        label = plain_text(name, longest) or f"class {k}"
        while label in labels:
            label = f"{label} ({k})"
        labels.append(label)
    return labels


def thin(x: NDArray[Any], at_most: int) -> NDArray[np.intp]:
    """Indices of at most that many evenly spaced entries, first and last among them."""
    return np.unique(np.linspace(0, len(x) - 1, min(len(x), at_most)).round().astype(np.intp))
