"""Several runs side by side: curves over each other, what differs between them, and whether a difference is shown."""

from collections.abc import Iterator, Sequence
from typing import Any

from cifarlab.figures import draw_arm_curves
from cifarlab.gallery import collect_curves
from cifarlab.report.charts import Chart, take_chart
from cifarlab.report.findings import find
from cifarlab.report.paired import compare
from cifarlab.report.section import Section, make_section
from cifarlab.report.summary import STATES, WORDS, read_facts
from cifarlab.runs import Run

MOST = 8  # runs whose lines can be told apart
CURVES = [("test/accuracy", "test accuracy (%)", 100.0), ("val/accuracy", "validation accuracy (%)", 100.0),
          ("train/loss", "training loss", 1.0), ("test/loss", "test loss", 1.0), ("lr", "learning rate", 1.0)]  # fmt: skip


def show_several(runs: Sequence[Run]) -> Iterator[Section]:
    found = compare(runs)
    rows = []
    for k, (run, name) in enumerate(zip(runs, found.names, strict=True)):
        results = {key: values[k] for key, values in found.results.items()}
        rows.append({
            "letter": letter(k), "name": name, "state": STATES.get(str(run.result.get("state", "")), ""),
            "accuracy": results.get("test/accuracy"), "loss": results.get("test/loss"), "seconds": results.get("train_seconds"),
            "alarms": len(run.alarms), "parameters": results.get("parameters"),
            "findings": [finding for finding in find(run) if finding.severity in ("problem", "warning")],
        })  # fmt: skip
    sentences = [*(pair.sentence for pair in found.seeds), *(pair.sentence for pair in found.images)]
    yield make_section("summary", "Summary", "several.html", runs=rows, sentences=sentences,
                       settings=list(found.settings.items()), words=WORDS)  # fmt: skip
    charts = [chart for key, axis, scale in CURVES if (chart := _overlay(runs, found.names, key, axis, scale))]
    if charts:
        left_out = f" Of {len(runs)} runs the first {MOST} are drawn." if len(runs) > MOST else ""
        yield make_section("curves", "Curves", "charts.html", *charts,
                           intro=f"One line a run, each with the letter of the table above.{left_out}")  # fmt: skip


def _overlay(runs: Sequence[Run], names: Sequence[str], key: str, axis: str, scale: float) -> Chart | None:
    curves: dict[str, Any] = {}
    for k, (run, name) in enumerate(zip(runs[:MOST], names, strict=False)):
        per_epoch = int(read_facts(run, "environment.json").get("steps_per_epoch", 1))
        known = collect_curves(run)
        if "lr" in run.metrics:
            known["lr"] = run.metrics.steps("lr") / per_epoch, run.metrics["lr"]
        if key in known:
            curves[f"{letter(k)}  {name}"] = [(known[key][0], scale * known[key][1])]
    if not curves:
        return None
    last = "{:.2f}" if scale > 1 else "" if key == "lr" else "{:.3g}"
    return take_chart(f"over-{key.replace('/', '-')}", draw_arm_curves(curves, axis=axis, title=axis.capitalize(), last=last),
                      draw_arm_curves)  # fmt: skip


def letter(k: int) -> str:
    return chr(ord("A") + k) if k < 26 else letter(k // 26 - 1) + letter(k % 26)
