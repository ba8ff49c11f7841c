"""What a reader wants to know first: how good, how long, how much, on what; and what the numbers say."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from cifarlab.listing import format_time, when_begun
from cifarlab.report.facts import interval
from cifarlab.report.findings import find
from cifarlab.report.section import Section, amount, count, make_section, percent
from cifarlab.runs import Run

WORDS = {"problem": "Problem", "warning": "Warning", "note": "Note", "good": "Good"}
STATES = {"finished": "finished", "diverged": "diverged", "climbed": "stopped: the loss climbed", "swept": "range test, done",
          "stopped": "stopped by an error", "": "not finished"}  # fmt: skip


def summarise(run: Run, others: Collection[str] = ()) -> Section:
    """others: ids of the page's other sections; a finding whose evidence is in none of them has no link: nothing was measured."""
    return make_section("summary", "Summary", "summary.html", tiles=_tiles(run), sentences=_sentences(run), findings=find(run),
                        words=WORDS, others=others)  # fmt: skip


def say_under(run: Run) -> list[str]:
    """The line under the page's heading: recipe, network, data, state, date."""
    state = STATES.get(str(run.result.get("state", "")), str(run.result.get("state", "")))
    begun = run.path / ("watch.json" if run.is_watched else "config.json")
    date = when_begun(read_facts(run, "environment.json"), begun)[:16]
    if run.is_watched:
        return ["recorded by cl.watch around a loop of its own", state, date]
    return [f"recipe {run.config.recipe}", run.config.model, run.config.data, state, date]


def _tiles(run: Run) -> list[tuple[str, str, str]]:
    """(name, value, a line below) of each number that is known."""
    result, environment = run.result, read_facts(run, "environment.json")
    tiles: list[tuple[str, str, str]] = []
    scores = _last(run, "test/accuracy") if result.get("test/accuracy") is None else float(result["test/accuracy"])
    if scores is not None:
        number = read_facts(run, "dataset.json").get("num_test", 0)
        low, high = interval(round(scores * number), number) if number else (None, None)
        told = "so far" if not result else f"95 % interval {percent(low, 1)} to {percent(high, 1)}" if low is not None else ""
        tiles.append(("Test accuracy", percent(scores), told))
    if result.get("val/accuracy") is not None:
        told = "chose the step that is reported"
        if "best_lost" in result:
            told = "of the last step: the weights of the best one were lost"
        tiles.append(("Validation accuracy", percent(float(result["val/accuracy"])), told))
    if (loss := result.get("test/loss")) is not None:
        top5 = result.get("test/top5")
        tiles.append(("Test loss", amount(float(loss)), f"top-5 accuracy {percent(float(top5), 1)}" if top5 is not None else ""))
    seconds = result.get("train_seconds", _last(run, "time/train_seconds"))
    if seconds is not None:
        probes = f"{percent(float(result['probe_share']), 1)} of it in probes" if result.get("probe_share") else ""
        tiles.append(("Training time", format_time(float(seconds)), probes))
    last = int(run.metrics.rows[-1]["step"]) if run.metrics.rows else 0
    planned = environment.get("num_steps")
    of = f" of {planned:,}" if planned and planned != last else ""
    tiles.append(("Optimizer steps", f"{last:,}{of}", f"batch {run.config.batch_size}, {run.config.epochs:g} epochs"
                  if not run.is_watched else ""))  # fmt: skip
    if macs := environment.get("forward_macs"):
        tiles.append(("FLOPs of an image", say_flops(2.0 * macs), f"forward = {macs / 1e9:.4g} GMAC"))
        if not run.is_watched and last:
            whole = say_flops(6.0 * macs * last * run.config.batch_size)
            tiles.append(("FLOPs of the training", whole, "forward + backward, about three times forward"))
    if parameters := environment.get("parameters"):
        tiles.append(("Parameters", count(parameters), ""))
    if run.alarms:
        tiles.append(("Alarms", str(len(run.alarms)), "see below, with cause and remedy"))
    return tiles


def say_flops(number: float) -> str:
    """`1.11 GFLOP`, `2.73 PFLOP`."""
    units = ("MFLOP", 1e6), ("GFLOP", 1e9), ("TFLOP", 1e12), ("PFLOP", 1e15), ("EFLOP", 1e18)
    name, size = next((unit for unit in reversed(units) if number >= unit[1]), units[0])
    return f"{number / size:.3g} {name}"


def _sentences(run: Run) -> list[str]:
    told = []
    if data := read_facts(run, "dataset.json"):
        side = data["image_size"]
        told.append(f"Data: {data['source']}; {data['num_train']:,} training and {data['num_test']:,} test images of "
                    f"{side}×{side} pixels, {len(data['class_names'])} classes.{_say_share(run)}")  # fmt: skip
    environment = read_facts(run, "environment.json")
    if environment.get("device"):
        versions = environment.get("versions", {})
        ranks = f", {environment['ranks']} processes" if environment.get("ranks", 1) > 1 else ""
        told.append(f"Machine: {environment['device']}{ranks}; torch {versions.get('torch', '?')}, "
                    f"Python {versions.get('python', '?')}.")  # fmt: skip
    return told


def _say_share(run: Run) -> str:
    """What the run has not trained on, of the set's training images."""
    if run.is_watched:
        return ""
    used, held = run.config.train_images, run.config.val_fraction
    told = [*([f"{100 * held:g} % of the training images were held out"] if held else []),
            *([f"at most {used:,} were trained on" if held else f"{used:,} of the training images were used"] if used else [])]
    return f" {' and '.join(told).capitalize()}." if told else ""


def _last(run: Run, key: str) -> float | None:
    return float(run.metrics[key][-1]) if key in run.metrics else None


def read_facts(run: Run, name: str) -> dict[str, Any]:
    """environment.json or dataset.json; empty where a watched or a torn run has none."""
    if not (Path(run.path) / name).exists():
        return {}
    return run.environment if name == "environment.json" else run.dataset
