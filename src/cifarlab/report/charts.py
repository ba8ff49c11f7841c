"""Figures as parts of a page: specification, data and words apart, and the JavaScript that draws them.

A figure is drawn once, by `figures/`: what a PNG file shows and what the page shows is the same chart. Here its title becomes a
heading, its rows become packed columns that equal charts share, and the rest stays Vega-Lite, drawn by the browser.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from cifarlab.data.cache import cache_folder
from cifarlab.figures import how_to_read
from cifarlab.runs import write_atomically

Rows = Sequence[Mapping[str, Any]]

@cache
def bundle_vega() -> str:
    """vega-embed with Vega, Vega-Lite and the interpreter of expressions, as one script (0.9 MB): vl-convert's own copy.

    So nothing is downloaded, and the page draws by the very versions that drew the PNG files. Of the three that a snippet can
    name only vega-embed is there (vl-convert 1.9); it holds the interpreter too, without which a page that forbids
    `unsafe-eval` could not draw. Putting it together takes a second, so it is kept in the cache folder, under a name that holds
    its hash: what is torn or altered there is made anew.
    """
    from importlib.metadata import version as find_version

    import altair as alt
    import vl_convert

    version = ".".join(alt.SCHEMA_VERSION.lstrip("v").split(".")[:2])
    begin = f"vega-{version}-{find_version('vl-convert-python')}-"
    for path in cache_folder().glob(f"{begin}*.js"):
        with suppress(OSError, UnicodeDecodeError):
            kept = path.read_text(encoding="utf-8")
            if path.name == f"{begin}{hash_text(kept)}.js":
                return kept
    made = str(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", version))
    with suppress(OSError):  # a cache that cannot be written costs time, no more
        cache_folder().mkdir(parents=True, exist_ok=True)
        write_atomically(cache_folder() / f"{begin}{hash_text(made)}.js", made.encode())
    return made


def hash_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Chart:
    """A figure on a page. specs: name -> Vega-Lite without data, the first being what is shown at first; data: name -> rows.

    title, told: its heading and the lines under it; how: how to read it; all plain text. `usermeta.roles` of a specification
    says which data are called what in its figure.
    """

    id: str
    title: str
    told: tuple[str, ...]
    how: str
    specs: dict[str, dict[str, Any]]
    data: dict[str, Rows] = field(repr=False)

    @property
    def alternative(self) -> str:
        """What a screen reader says in place of the picture: the words that stand around it, numbers included."""
        return " ".join(f"{part}." for part in ("Chart: " + self.title, *self.told))


def take_chart(name: str, figure: Any, draw: Callable[..., Any], **variants: Any) -> Chart:
    """The chart of an Altair figure that `draw` made; variants: the same drawn otherwise, such as on a logarithmic axis."""
    specs: dict[str, dict[str, Any]] = {}
    data: dict[str, Rows] = {}
    heading: dict[str, Any] = {}
    for variant, drawn in {"": figure, **variants}.items():
        spec = drawn.to_dict(validate=False)
        if not variant:
            heading = spec.get("title", {})
        for useless in ("title", "background", "padding"):  # said in HTML, and the page's own business
            spec.pop(useless, None)
        roles: dict[str, str] = {}
        data |= spec.pop("datasets", {})
        for node in _walk(spec):
            if "values" in node.get("data", {}) and isinstance(node["data"].get("values"), list | tuple):
                rows = node["data"]["values"]
                role = node["data"].get("name", "")  # what has a role may get other rows: it must not share them
                key = f"data-{hash_text(role + json.dumps(rows, default=str))[:32]}"
                if role:
                    roles[role] = key
                data[key] = rows
                node["data"] = {"name": key}
        spec["usermeta"] = {"roles": roles}
        specs[variant] = spec
    told = heading.get("subtitle", [])
    told = [told] if isinstance(told, str) else told
    text = heading.get("text", "")
    title = " ".join(text) if isinstance(text, list) else str(text)
    return Chart(name, title, tuple(line for line in told if line), how_to_read(draw), specs, data)


def _walk(node: Any) -> Iterator[dict[str, Any]]:
    """Every object in a specification, but not in data."""
    if isinstance(node, dict):
        yield node
        for key, value in node.items():
            if key not in ("values", "datasets"):
                yield from _walk(value)
    elif isinstance(node, list):
        for value in node:
            yield from _walk(value)


def pack_section(charts: Sequence[Chart], more: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What page.js needs of a section: {"charts": …, "data": …, "more": …}; equal data are there once."""
    return {
        "charts": {chart.id: {"specs": chart.specs} for chart in charts},
        "data": {name: pack_rows(rows) for chart in charts for name, rows in chart.data.items()},
        "more": dict(more or {}),
    }


def pack_rows(rows: Rows) -> dict[str, Any]:
    """Rows as columns: {"n": rows, "columns": {name: values}}, what is repeated often as {"of": distinct values, "at": numbers}.

    A third of the size of rows. JSON has no word for what is not finite, and Vega draws none: null.
    """
    columns = {}
    for key in dict.fromkeys(key for row in rows for key in row):
        values = [_finite(row.get(key)) for row in rows]
        place: dict[Any, int] = {}
        for value in values:
            place.setdefault((type(value), value) if not isinstance(value, list) else str(value), len(place))
        if len(values) > 8 and len(place) < len(values) / 2 and not any(isinstance(value, list) for value in values):
            columns[key] = {"of": [value for _, value in place], "at": [place[type(value), value] for value in values]}
        else:
            columns[key] = values  # type: ignore[assignment]
    return {"n": len(rows), "columns": columns}


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_json(value: Any) -> str:
    """JSON that can stand in a page: nothing in it ends a script or begins a comment there."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False, default=_plain)
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def _plain(value: Any) -> Any:
    """numpy's numbers as Python's."""
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{type(value).__name__} is no JSON")
