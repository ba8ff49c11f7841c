"""What a mirror shows, made from the run folder alone: live, and by `cifarlab sync` later, it is the same. No torch here."""

import hashlib
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cifarlab.config import InputError
from cifarlab.environment import scrub
from cifarlab.evaluate import load_samples
from cifarlab.records import SUFFIX, Table, read_table
from cifarlab.runs import Row, Run, read_json, read_rows

LAYERS_EVERY = 100
"""Steps between two sendings of the numbers of each layer: a thousand series at every step would drown any mirror."""
AT_ONCE = 1000
"""Steps that are put together at once: all of a long run's would fill the memory."""
WHOLE = ("curvature", "noise")  # probes of the whole network: their names need no item


@dataclass(frozen=True)
class Histogram:
    """counts[i] entries lie from edges[i] to (excluding) edges[i + 1]."""

    edges: NDArray[np.float64]
    counts: NDArray[np.int64]


@dataclass(frozen=True)
class Picture:
    """A PNG file's content, and words for under it."""

    png: bytes
    caption: str = ""


@dataclass(frozen=True)
class Sheet:
    """A table for people. chart: how to draw it where that can be done: "confusion", "bar" or ""."""

    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]
    chart: str = ""


@dataclass
class Entry:
    """All that there is to show of one optimizer step; it is sent once, as a whole."""

    step: int
    scalars: dict[str, float] = field(default_factory=dict)
    histograms: dict[str, Histogram] = field(default_factory=dict)
    pictures: dict[str, list[Picture]] = field(default_factory=dict)
    sheets: dict[str, Sheet] = field(default_factory=dict)
    alarms: list[dict[str, Any]] = field(default_factory=list)
    weights: Path | None = None


@dataclass
class Position:
    """How far a mirror has got: the last step sent, alarms (each rule raises one), and the content of files that were sent."""

    step: int = 0
    alarms: list[str] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, values: dict[str, Any]) -> "Position":
        """The position that a mirror noted; raises TypeError for what cannot be one."""
        position = cls(**values)
        if type(position.step) is not int or not isinstance(position.alarms, list) or not isinstance(position.files, dict):
            raise TypeError("a position is a step, a list of alarms and an object of files")
        return position


class Feed:
    """Reads what is new in a run's folder, as entries in order of their steps.

    An entry is made of a step's row, the row of the evaluation after it, and, where they are due, the numbers of each layer and
    the histograms: at step 1, at every LAYERS_EVERY-th step (every `--probe-every`-th, if that is less), and at evaluations.
    Nothing is kept but the last row: while a run has no result, more may come to its last step, so that one waits.
    Memory and time do not grow with the rows that were read before.
    """

    def __init__(self, path: Path, position: Position, *, with_weights: bool = False) -> None:
        self.position = position
        self._path, self._with_weights = path, with_weights
        self._offset = 0
        self._held: Row = {}
        self._hashes: dict[str, tuple[tuple[int, int], str]] = {}

    def read(self) -> list[Entry]:
        """New entries, not too many at once (none: that was all); `self.position` is where a mirror that has taken them is."""
        run = Run(self._path)
        is_over = run.is_finished  # before the rows are read: then nothing can come after them
        rows, is_all = self._complete_rows(is_over)
        is_over = is_over and is_all
        entries = []
        if rows:
            every = min(int(run.probed.get("every", LAYERS_EVERY)), LAYERS_EVERY)
            tables = {path.stem: read_table(path) for path in sorted(self._path.glob(f"probes/*{SUFFIX}"))}
            sizes = {p["name"]: int(np.prod(p["shape"], dtype=np.int64)) for p in run.probed.get("parameters", ())}
            entries = [_entry(row, tables, sizes, every) for row in rows]
            self.position.step = entries[-1].step
        self._add_alarms(run, entries, is_over)
        if is_all:
            self._add_files(run, entries, is_over)
        return entries

    def _complete_rows(self, is_over: bool) -> tuple[list[Row], bool]:
        """(rows of each step since the last call, merged, AT_ONCE at most, without what was sent before; whether that is all)."""
        merged: list[Row] = []
        for offset, row in read_rows(self._path / "metrics.jsonl", self._offset):
            self._offset = offset
            if self._held and row["step"] > self._held["step"]:
                merged.append(self._held)
                self._held = {}
            if row["step"] > self.position.step:
                self._held = self._held | row
            if len(merged) == AT_ONCE:
                return merged, False
        if is_over and self._held:
            merged.append(self._held)
            self._held = {}
        return merged, True

    def _add_alarms(self, run: Run, entries: list[Entry], is_over: bool) -> None:
        if not entries and not is_over:
            return
        for alarm in run.alarms:
            if alarm["rule"] in self.position.alarms:
                continue
            noticed = [entry for entry in entries if entry.step >= alarm.get("noticed", alarm["step"])]
            if noticed or is_over:
                (noticed[0] if noticed else self._last(entries)).alarms.append(alarm)
                self.position.alarms.append(alarm["rule"])

    def _add_files(self, run: Run, entries: list[Entry], is_over: bool) -> None:
        """Figures that were drawn anew, the costs, and, of a run that is over, its evaluation, with the newest entry."""
        if not entries and not is_over:
            return
        for path in sorted(self._path.glob("figures/*.png")):
            if self._is_new(path):
                self._last(entries).pictures[f"figures/{path.stem}"] = [Picture(path.read_bytes())]
        if self._is_new(self._path / "cost.json"):
            self._last(entries).sheets["model/layers"] = layer_sheet(_json(self._path / "cost.json"))
        if is_over and self._is_new(self._path / "evaluation.json"):
            entry, evaluation = self._last(entries), run.evaluation
            entry.sheets |= evaluation_sheets(evaluation)
            entry.pictures |= sample_pictures(self._path)
        if is_over and self._is_new(self._path / "result.json"):
            self._last(entries)  # an entry without rows, so that the summary is sent
        if is_over and self._with_weights and self._is_new(self._path / "model.safetensors"):
            self._last(entries).weights = self._path / "model.safetensors"

    def _last(self, entries: list[Entry]) -> Entry:
        if not entries:
            entries.append(Entry(self.position.step))
        return entries[-1]

    def _is_new(self, path: Path) -> bool:
        """Whether the file is there with another content than was sent; notes it as sent."""
        try:
            status = path.stat()
        except OSError:
            return False
        mark, name = (status.st_size, status.st_mtime_ns), str(path.relative_to(self._path))
        if name not in self._hashes or self._hashes[name][0] != mark:
            self._hashes[name] = (mark, hashlib.sha256(path.read_bytes()).hexdigest()[:16])
        is_new = self.position.files.get(name) != self._hashes[name][1]
        self.position.files[name] = self._hashes[name][1]
        return is_new


# ---- a step --------------------------------------------------------------------------------------------------------------


def _entry(row: Row, tables: dict[str, Table], sizes: dict[str, int], every: int) -> Entry:
    step = int(row["step"])
    entry = Entry(step, {key: value for key, value in row.items() if key != "step"})
    is_due = step == 1 or step % every == 0 or "epoch" in row
    for name, table in tables.items():
        k = bisect_left(table.steps, step)  # touches a few records, whereas numpy's would read the whole file
        if k == len(table.steps) or table.steps[k] != step:
            continue
        if name == "distributions":
            entry.histograms |= histograms(table, table.values[k], sizes)
        elif is_due or name not in ("gradient_flow", "weight_flow", "update_flow"):  # those measure at every step
            entry.scalars |= layer_scalars(table, table.values[k])
    return entry


def layer_scalars(table: Table, values: NDArray[np.float32]) -> dict[str, float]:
    """{"gradient_flow/norm/layer1.0.conv1.weight": …}: the numbers of each layer, less those that say nothing.

    Left out: gradients after clipping where nothing was clipped, counts of NaN that are 0, and parameters without gradient.
    """
    found: dict[str, float] = {}
    place = {column: c for c, column in enumerate(table.columns)}
    for item, numbers in zip(table.items, values.tolist(), strict=True):
        for column, number in zip(table.columns, numbers, strict=True):
            is_repeated = column.startswith("clipped_") and number == numbers[place[column.removeprefix("clipped_")]]
            if is_repeated or number != number or (column == "non_finite" and not number):
                continue
            found[f"{table.name}/{column}" if table.name in WHOLE else f"{table.name}/{column}/{item}"] = number
    return found


def histograms(table: Table, values: NDArray[np.float32], sizes: dict[str, int]) -> dict[str, Histogram]:
    """{"distributions/gradient/layer1.0.conv1.weight": …}: entries by value; the bins are powers of two, 0 has one of its own.

    What is beyond the table's smallest and largest power is in the bins at the ends; NaN and Inf are in none, and counted by
    `gradient_flow/non_finite`.
    """
    exponents = np.array([int(column[3:]) for column in table.columns if column.startswith("+2^")], float)
    positive = np.exp2(np.append(exponents, exponents[-1] + 1))
    edges = np.concatenate([-positive[::-1], positive])  # the bin between the two halves is that of 0
    found = {}
    for item, shares in zip(table.items, values, strict=True):
        numel = sizes.get(item.partition("/")[2], 0)
        counts = np.rint(shares[:-1].astype(float) * numel).astype(np.int64)
        filled = np.flatnonzero(counts)
        if len(filled):
            first, last = int(filled[0]), int(filled[-1])
            found[f"distributions/{item}"] = Histogram(edges[first : last + 2], counts[first : last + 1])
    return found


# ---- a whole run ---------------------------------------------------------------------------------------------------------


def describe(run: Run) -> dict[str, Any]:
    """What was run, where, and on what, as a flat object without secrets: a mirror's config."""
    found: dict[str, Any] = dict(_json(run.path / "watch.json")) if run.is_watched else run.config.to_dict()
    environment = dict(_json(run.path / "environment.json"))
    git = environment.pop("git", None) or {}
    environment.pop("command", None)
    dataset = {f"dataset_{key}": value for key, value in _json(run.path / "dataset.json").items()}
    clean: dict[str, Any] = scrubbed(found | environment | dataset)
    return clean | {f"git_{key}": value for key, value in git.items()}  # 40 hex digits, as of a key, but none


def check_content(run: Run) -> None:
    """Raises InputError, naming the file, where what is shown of a whole run cannot be made of it: before anything is sent."""
    parts: tuple[tuple[str, Callable[[], Any]], ...] = (
        ("config.json", lambda: describe(run)),
        ("result.json", lambda: summarize(run)),
        ("evaluation.json", lambda: run.evaluation and evaluation_sheets(run.evaluation)),
        ("samples.npz", lambda: sample_pictures(run.path)),
        ("cost.json", lambda: (run.path / "cost.json").exists() and layer_sheet(_json(run.path / "cost.json"))),
        ("alarms.jsonl", lambda: [(str(alarm["rule"]), alarm.get("noticed", 0) + alarm["step"]) for alarm in run.alarms]),
    )
    for name, make in parts:
        try:
            make()
        except InputError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:
            told = f"{run.path / name} is damaged ({type(error).__name__}): remove it, and all else can be sent"
            raise InputError(told) from None


def summarize(run: Run) -> dict[str, Any]:
    """How the run ended, with its scores: a mirror's summary. Empty while it has not ended."""
    if not run.is_finished:
        return {}
    evaluation = run.evaluation
    found = dict(run.result)
    for kind in ("macro", "weighted"):
        found |= {f"{evaluation['split']}/{kind}_{key}": value for key, value in evaluation.get(kind, {}).items()}
    found |= {f"{evaluation['split']}/class_accuracy/{row['name']}": row["accuracy"] for row in evaluation.get("per_class", ())}
    environment = _json(run.path / "environment.json")
    if "forward_macs" in environment:
        found |= {"model/parameters": environment["parameters"], "model/forward_macs": environment["forward_macs"],
                  "model/forward_flops": 2 * environment["forward_macs"]}  # fmt: skip
    clean: dict[str, Any] = scrubbed(found)
    return clean


def scrubbed(value: Any) -> Any:
    """The same without secrets in any of its texts."""
    if isinstance(value, str):
        return scrub(value)
    if isinstance(value, dict):
        return {scrub(key): scrubbed(item) for key, item in value.items()}
    return [scrubbed(item) for item in value] if isinstance(value, list | tuple) else value


def layer_sheet(cost: dict[str, Any]) -> Sheet:
    """Layer by layer: output shape, parameters, MAC and FLOP of one image forward, and the layer's share of them."""
    total = max(cost["total"]["forward_macs"], 1)
    rows = [
        (layer["name"] or "(itself)", layer["kind"], "×".join(map(str, (layer["output_shape"] or [])[1:])), layer["parameters"],
         layer["forward_macs"], layer["forward_flops"], round(100 * layer["forward_macs"] / total, 2))
        for layer in cost["layers"]
    ]  # fmt: skip
    rows.append(("total", cost["model"], "", cost["total"]["parameters"], cost["total"]["forward_macs"],
                 cost["total"]["forward_flops"], 100.0))  # fmt: skip
    return Sheet(("layer", "kind", "output C×H×W", "parameters", "forward MAC", "forward FLOP", "share of MAC, %"), rows)


def evaluation_sheets(evaluation: dict[str, Any]) -> dict[str, Sheet]:
    """The scores of each class (the classification report), and the confusion matrix as (actual, predicted, count)."""
    names, split = [row["name"] for row in evaluation["per_class"]], evaluation["split"]
    keys = ("accuracy", "precision", "f1", "support")
    scores = [(row["name"], *(float(row[key]) for key in keys)) for row in evaluation["per_class"]]
    counts = [(names[t], names[p], n) for t, line in enumerate(evaluation["confusion"]) for p, n in enumerate(line)]
    return {
        f"{split}/classes": Sheet(("class", *keys), scores, "bar"),
        f"{split}/confusion_matrix": Sheet(("Actual", "Predicted", "nPredictions"), counts, "confusion"),
    }


def sample_pictures(path: Path) -> dict[str, list[Picture]]:
    """Some images that were classified rightly, and some wrongly: with what they are, what they were taken for, how surely."""
    found: dict[str, list[Picture]] = {}
    for sample in load_samples(path):
        is_right = sample.true == sample.predicted
        taken = f"{sample.true}" if is_right else f"{sample.true} taken for {sample.predicted}"
        picture = Picture(encode_png(sample.image), f"{taken}, {100 * sample.probability:.1f} % sure")
        found.setdefault("samples/right" if is_right else "samples/wrong", []).append(picture)
    return found


def encode_png(image: NDArray[np.uint8]) -> bytes:
    """A PNG of an image 3×H×W."""
    import io

    from PIL import Image

    content = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))).save(content, format="png")
    return content.getvalue()


def _json(path: Path) -> dict[str, Any]:
    """The object in that file; empty where there is none, as of a run that was watched."""
    return read_json(path) if path.exists() else {}
