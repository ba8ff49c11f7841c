"""A study as a section of the report, and the report of runs and studies together. No torch here."""

import base64
import io
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cifarlab.config import InputError
from cifarlab.figures import (
    draw_arm_curves,
    draw_arms,
    draw_exciting,
    draw_feature_maps,
    draw_filters,
    draw_geometry,
    draw_importance,
    draw_landscape_contour,
    draw_landscape_line,
    draw_landscape_surface,
    draw_pairs,
    draw_saliency,
    how_to_read,
)
from cifarlab.figures.style import unchecked
from cifarlab.report.charts import take_chart
from cifarlab.report.page import FILE, write_report
from cifarlab.report.section import Section, make_section
from cifarlab.runs import Run, load_run
from cifarlab.studies.conduct import find_study
from cifarlab.studies.plan import load_results

DRAWN_BY: dict[str, Callable[..., Any]] = {  # how a study's figures are called, or begin -> whose "How to read" is theirs
    "accuracy": draw_arms,
    "validation-curves": draw_arm_curves,
    "convergence": draw_arm_curves,
    "learning-rates": draw_arm_curves,
    "pairs": draw_pairs,
    "importance": draw_importance,
    "filters": draw_filters,
    "maps": draw_feature_maps,
    "exciting": draw_exciting,
    "saliency": draw_saliency,
    "landscape_plane": draw_landscape_contour,
    "landscape_trajectory": draw_landscape_contour,
    "landscape_surface": draw_landscape_surface,
    "landscape": draw_landscape_line,
    "geometry": draw_geometry,
}


def report(*runs: str | Path | Run, studies: Sequence[str | Path] = (), path: str | Path | None = None) -> Path:
    """Writes the page of a run, of several side by side, of studies, or of all together, and gives its path.

    path: where to; by default report.html in the run's (or the only study's) folder, or in the working folder. Opens by double
    click, without a network. Raises InputError when nothing is named, or a folder is none of ours or damaged.
    """
    opened = [run if isinstance(run, Run) else load_run(run) for run in runs]
    if not opened and not studies:
        raise InputError("name a run folder or more, or a study's folder, to report on")
    alone = opened[0].path if len(opened) == 1 and not studies else Path(studies[0]) if len(studies) == 1 and not opened else None
    target = Path(path) if path else (alone or Path()) / FILE
    if path and not target.parent.is_dir():  # before seconds of drawing
        raise InputError(f"{target} cannot be written (there is no folder {target.parent}): give another with -o")
    sections = [show_study(folder, number) for number, folder in enumerate(studies)]
    try:
        return write_report(opened, target, studies=sections)
    except OSError as error:
        raise InputError(f"{target} cannot be written ({error.strerror}): give another with -o") from None


def show_study(folder: str | Path, number: int = 0) -> Section:
    """Question, conclusion and figures of a study's folder, finished or not."""
    results = load_results(folder)
    found = find_study(str(results.record["study"]))
    name = f"study-{number + 1}"
    charts, pictures = [], []
    if results.record["search"] and not results.outcomes:  # begun, and stopped before it had tried anything
        told = [Block("paragraph", "No training of it has begun yet: `cifarlab study` goes on with it.")]
        return make_section(name, f"Study: {found.name}", "study.html", blocks=told, pictures=[], question=found.question,
                            source=found.source, answer=found.answer, trainings=0)  # fmt: skip
    with unchecked():
        for title, figure in found.draw(results).items():
            draw = _drawn_by(title)
            if hasattr(figure, "savefig"):
                pictures.append(Picture(title.replace("_", " "), _to_uri(figure), how_to_read(draw)))
            else:
                charts.append(take_chart(f"{name}-{title}", figure, draw))
    return make_section(name, f"Study: {found.name}", "study.html", *charts, blocks=list(read_markdown(found.conclude(results))),
                        pictures=pictures, question=found.question, source=found.source, answer=found.answer,
                        trainings=len({outcome.run.path for outcome in results.outcomes}))  # fmt: skip


def _drawn_by(title: str) -> Callable[..., Any]:
    return next((draw for begin, draw in DRAWN_BY.items() if title.startswith(begin)), draw_arms)


@dataclass(frozen=True)
class Picture:
    title: str
    uri: str
    how: str


def _to_uri(figure: Any) -> str:
    """A Matplotlib figure as a picture within the page."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"


@dataclass(frozen=True)
class Block:
    """A part of a conclusion: paragraph, list, table or head(ing)."""

    kind: str
    text: str = ""
    entries: list[str] = field(default_factory=list)
    head: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)


def read_markdown(text: str) -> Iterator[Block]:
    """The blocks of the Markdown that conclusions are written in; what stands within a line is left to the page."""
    for part in re.split(r"\n\s*\n", text.strip()):
        lines = part.strip().splitlines()
        if all(line.startswith("|") for line in lines) and len(lines) > 2:
            cells = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines]
            yield Block("table", head=cells[0], rows=cells[2:])
        elif all(line.startswith(("- ", "  ")) for line in lines):
            yield Block("list", entries=[entry.replace("\n", " ") for entry in re.split(r"\n?^- ", part.strip(), flags=re.M)[1:]])
        elif lines and lines[0].startswith("#"):
            yield Block("head", lines[0].lstrip("# "))
            if rest := " ".join(lines[1:]):
                yield Block("paragraph", rest)
        elif lines:
            yield Block("paragraph", " ".join(lines))
