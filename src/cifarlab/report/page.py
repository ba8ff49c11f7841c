"""Finished or running runs in, one self-contained HTML page out. No torch, no network, nothing beside the file."""

import base64
import hashlib
from collections.abc import Iterator, Sequence
from datetime import datetime
from functools import cache
from importlib.resources import files
from pathlib import Path

from markupsafe import Markup

from cifarlab import __version__
from cifarlab.figures.style import unchecked
from cifarlab.gallery import no_harm
from cifarlab.report.alarms import show_alarms
from cifarlab.report.charts import bundle_vega, pack_section, to_json
from cifarlab.report.cost import show_cost
from cifarlab.report.curves import show_curves, show_schedule
from cifarlab.report.evaluation import show_evaluation
from cifarlab.report.flow import show_flows
from cifarlab.report.model_card import write_model_card
from cifarlab.report.section import Section, render
from cifarlab.report.setup import show_configuration, show_environment
from cifarlab.report.several import show_several
from cifarlab.report.summary import say_under, summarise
from cifarlab.runs import Run, write_atomically

FILE = "report.html"


def write_report(runs: Sequence[Run], path: Path, *, studies: Sequence[Section] = ()) -> Path:
    """The page of one run, or of several side by side, with studies behind them; whole or not at all.

    Raises InputError when a folder is damaged or the file cannot be written.
    """
    write_atomically(path, build_page(runs, studies=studies).encode())
    return path


def leave_report(run: Run) -> None:
    """report.html and MODEL_CARD.md in the folder of a run that has just ended; what goes wrong is said and passed over."""
    with no_harm(run, f"{FILE} could not be written"):
        write_report([run], run.path / FILE)
    if run.result.get("state") == "finished" and not run.is_watched:
        with no_harm(run, "MODEL_CARD.md could not be written"):
            write_model_card(run)


def build_page(runs: Sequence[Run], *, studies: Sequence[Section] = (), home: bool = False) -> str:
    """The page's HTML. Its policy lets nothing in and runs no script but the two that stand in it, known by their hashes.

    home: with a link to the board's table.
    """
    with unchecked():
        sections = [*(show_run(runs[0]) if len(runs) == 1 else show_several(runs) if runs else ()), *studies]
    if len(runs) == 1:
        title, under = runs[0].path.resolve().name, say_under(runs[0])
    else:
        title = f"{len(runs)} runs side by side" if runs else "Studies" if len(studies) > 1 else studies[0].title
        under = [run.path.resolve().name for run in runs]
    parts = [(section.id, section.title, section.html) for section in sections]
    data = [(section.id, to_json(pack_section(section.charts, section.more)))
            for section in sections if section.charts or section.more]  # fmt: skip
    return assemble(title, under, parts, data, home=home)


def assemble(title: str, under: Sequence[str], parts: Sequence[tuple[str, str, str]], data: Sequence[tuple[str, str]] = (), *,
             home: bool = False, follow: str = "", known: str = "", has_charts: bool = True) -> str:  # fmt: skip
    """The page of sections (id, title, HTML) and their data (id, JSON).

    home: with a link to the board's table. follow: a script that may ask the page's own server; known: JSON that it starts from.
    """
    scripts = [*([bundle_vega()] if has_charts else []), read_own("page.js"), *([follow] if follow else [])]
    scripts, style = [_closed(script) for script in scripts], read_own("style.css")
    sections = [{"id": name, "title": told, "html": Markup(html)} for name, told, html in parts]
    return render(
        "page.html", title=title, under=under, sections=sections,
        data=[(name, Markup(json)) for name, json in data], scripts=[Markup(script) for script in scripts], style=Markup(style),
        script_hashes=[_hash(script) for script in scripts], style_hash=_hash(style), version=__version__,
        written=f"{datetime.now():%Y-%m-%d %H:%M}", home=home, follow=bool(follow), known=Markup(known),
    )  # fmt: skip


def show_run(run: Run) -> Iterator[Section]:
    """Every section of a single run's page, in order; those without numbers are left out."""
    parts = [show_curves(run), show_schedule(run), *show_flows(run), show_alarms(run), show_cost(run), *show_evaluation(run),
             show_configuration(run), show_environment(run)]  # fmt: skip
    others = [section for section in parts if section]
    yield summarise(run, [section.id for section in others])
    yield from others


@cache
def read_own(name: str, room: str = "report") -> str:
    """A script, style or template that stands beside the code of a room."""
    return files(f"cifarlab.{room}").joinpath(name).read_text(encoding="utf-8")


@cache
def _closed(script: str) -> str:
    """A script in which nothing reads as its own end."""
    return script.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _hash(content: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
