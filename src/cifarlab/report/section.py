"""A section of the page: its HTML from a template, its charts, and what its controls need."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from cifarlab.listing import format_time
from cifarlab.report.charts import Chart


@dataclass(frozen=True)
class Section:
    """id: its anchor, which findings link to; more: what page.js needs beside the charts, see pack_section."""

    id: str
    title: str
    html: Markup
    charts: tuple[Chart, ...] = ()
    more: Mapping[str, Any] = field(default_factory=dict)


def make_section(name: str, title: str, template: str, *charts: Chart, more: Mapping[str, Any] | None = None,
                 **context: Any) -> Section:  # fmt: skip
    """The section that a template makes of its context; charts are there by their ids too."""
    html = render(template, id=name, charts=charts, chart={chart.id: chart for chart in charts}, **context)
    return Section(name, title, html, charts, more or {})


def render(template: str, **context: Any) -> Markup:
    """A template's HTML: whatever is put in is escaped, so that names stay text."""
    return Markup(_templates().get_template(template).render(**context))  # the template has escaped what it was given


@cache
def _templates() -> Environment:
    environment = Environment(loader=PackageLoader("cifarlab.report"), autoescape=True, undefined=StrictUndefined,
                              trim_blocks=True, lstrip_blocks=True)  # fmt: skip
    environment.filters |= {"percent": percent, "count": count, "duration": format_time, "amount": amount, "cell": cell,
                            "marked": marked}  # fmt: skip
    return environment


def marked(text: str) -> Markup:
    """Text with the marks that our own sentences are written in: `code`, **strong** and *emphasis*; all else is escaped."""
    html = str(escape(text))
    for pattern, tag in ((r"`([^`]+)`", "code"), (r"\*\*([^*]+)\*\*", "strong"), (r"\*([^*\s][^*]*)\*", "em")):
        html = re.sub(pattern, rf"<{tag}>\1</{tag}>", html)
    return Markup(html)  # of escaped text and these three tags


def percent(share: float | None, digits: int = 2) -> str:
    return "–" if share is None or share != share else f"{100 * share:.{digits}f} %"


def count(number: float | None) -> str:
    return "–" if number is None else f"{number:,.0f}"


def amount(number: float | None, digits: int = 4) -> str:
    return "–" if number is None or number != number else f"{number:,.{digits}g}"


def cell(value: Any) -> str:
    """A value of any kind in a table."""
    if value is None or value == "":
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"
