"""What the probes saw inside the network: gradients, updates and weights of each layer, activations, curvature, noise."""

from collections.abc import Callable, Iterator
from typing import Any

from cifarlab.figures import (
    draw_activations,
    draw_distributions,
    draw_flow_map,
    draw_gradient_flow,
    draw_noise,
    draw_sharpness,
    draw_update_ratio,
    draw_weight_magnitude,
)
from cifarlab.gallery import MOST_RECORDS, PROBE_FIGURES, SHOWN, table_to_draw
from cifarlab.report.charts import Chart, take_chart
from cifarlab.report.section import Section, make_section
from cifarlab.runs import Run

DRAWN_BY: dict[str, Callable[..., Any]] = {  # figure of gallery.py -> whose "How to read" is its
    "gradient_flow": draw_gradient_flow,
    "gradient_flow_over_time": draw_flow_map,
    "update_ratio": draw_update_ratio,
    "update_flow_over_time": draw_flow_map,
    "weight_magnitude": draw_weight_magnitude,
    "weight_flow_over_time": draw_flow_map,
    "activations": draw_activations,
    "sharpness": draw_sharpness,
    "noise": draw_noise,
    "distributions_weight": draw_distributions,
    "distributions_gradient": draw_distributions,
    "distributions_update": draw_distributions,
}

SECTIONS = [  # id, title, probes
    ("gradient-flow", "Gradient flow", ("gradient_flow",)),
    ("update-flow", "Update flow", ("update_flow",)),
    ("weight-flow", "Weight flow", ("weight_flow",)),
    ("inside", "Activations, curvature, noise", ("activations", "curvature", "noise")),
    ("distributions", "Distributions", ("distributions",)),
]


def show_flows(run: Run) -> Iterator[Section]:
    """A section for each group of probes that measured something."""
    for name, title, probes in SECTIONS:
        charts = [chart for probe in probes for chart in _charts(run, probe)]
        if charts:
            most = max(len(run.tables[probe]) for probe in probes if probe in run.tables)
            every = -(-most // MOST_RECORDS)
            told = (f"Of {most:,} records every {every}{'nd' if every == 2 else 'rd' if every == 3 else 'th'} is drawn, the last "
                    f"{SHOWN}, and those at whose steps an alarm was raised.") if every > 1 else ""  # fmt: skip
            yield make_section(name, title, "charts.html", *charts, intro=told)


def _charts(run: Run, probe: str) -> list[Chart]:
    if probe not in run.tables or not len(table := table_to_draw(run, probe)):
        return []
    # The maps first: what is worst over the whole run, and the step at which that began.
    figures = sorted(PROBE_FIGURES[probe](run, table).items(), key=lambda pair: not pair[0].endswith("_over_time"))
    return [take_chart(name, figure, DRAWN_BY[name]) for name, figure in figures]
