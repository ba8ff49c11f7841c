"""A drawn figure as a file, and the words that go with it."""

import inspect
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cifarlab.config import InputError
from cifarlab.runs import write_atomically


def save_figure(figure: Any, path: str | Path) -> Path:
    """Writes an Altair chart or a Matplotlib figure as .png (two pixels to a point) or .svg, whole or not at all.

    Needs no browser and no network. Equal figures give equal PNG files. Raises InputError for another ending.
    """
    path = Path(path)
    if path.suffix not in (".png", ".svg"):
        raise InputError(f"a figure cannot be saved as {path.name!r}: end the name in .png or .svg")
    content = io.BytesIO()
    if hasattr(figure, "savefig"):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing from")  # a box is drawn: no reason to end a run
            figure.savefig(content, format=path.suffix[1:], dpi=144)
    elif path.suffix == ".png":
        from PIL import Image

        raw = io.BytesIO()
        figure.save(raw, format="png", scale_factor=2)
        Image.open(raw).convert("RGB").save(content, format="png")  # vl-convert packs badly: this is a quarter of its size
    else:
        text = io.StringIO()
        figure.save(text, format="svg")
        content.write(text.getvalue().encode())
    write_atomically(path, content.getvalue())
    return path


def how_to_read(draw: Callable[..., Any]) -> str:
    """The "How to read" paragraph of a figure's docstring, as one line of text; empty where there is none."""
    _, found, rest = (inspect.getdoc(draw) or "").partition("How to read: ")
    return " ".join(rest.split("\n\n")[0].split()) if found else ""
