"""Many runs at a glance: a list of those in a folder, and what differs between some of them. No torch here.

Folders are read sparingly (a few small files each, and the end of the rows), so that hundreds are listed at once; what is
damaged in one is said, and the others are listed all the same.
"""

import csv
import json
import math
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from cifarlab.config import InputError
from cifarlab.runs import JSON_LIMIT, TAIL, is_held, last_step

OWN_FILES = ("config.json", "watch.json", "metrics.jsonl", "result.json")  # one of them makes a folder a run's
READ = (*OWN_FILES, "environment.json", "evaluation.json", "results.csv", "alarms.jsonl")
DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError, csv.Error)  # what it raises
Sorting = Literal["accuracy", "time", "name", "started"]


@dataclass(frozen=True, kw_only=True)
class Listed:
    """A run in one line. accuracy: on test, 0…1, of the last evaluation while it runs; None where there has been none.

    state: running (a process holds its folder), finished, diverged, interrupted. step, num_steps: 0 where that is not known.
    """

    name: str
    path: str
    recipe: str
    model: str
    data: str
    accuracy: float | None
    train_seconds: float | None
    state: str
    step: int
    num_steps: int
    alarms: int
    started: str


def list_runs(folder: Path) -> tuple[list[Listed], list[str]]:
    """(the runs in that folder, in no order; for each damaged one a sentence). Raises InputError when there is no such folder."""
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}: name the one that holds the run folders")
    found, damaged = [], []
    for path in sorted(folder.iterdir()):
        if path.is_dir() and any((path / name).exists() for name in OWN_FILES):
            try:
                found.append(read_listed(path))
            except DAMAGE as error:
                damaged.append(f"{path} is damaged ({' '.join(f'{type(error).__name__}: {error}'.split())[:120]})")
    return found, damaged


def read_listed(path: Path) -> Listed:
    """That run in one line; raises one of DAMAGE when its folder is damaged."""
    for entry in path.iterdir():  # a pipe would be waited for without end, and a link may lead to one
        if entry.name in READ and not entry.is_file():
            raise ValueError(f"{entry.name} is no file")
    begun = path / "config.json"
    if begun.exists():
        config = _object(begun)
        recipe, model, data = (str(config[key]) for key in ("recipe", "model", "data"))
    elif not (path / "watch.json").exists():
        raise ValueError("it has no config.json")
    else:
        begun = path / "watch.json"
        recipe, model, data = "(watched)", str(_object(begun)["model"]), "–"
    environment, result = _object(path / "environment.json", {}), _object(path / "result.json", {})
    step, accuracy, seconds = 0, None, None
    if result:
        state, step, seconds = str(result["state"]), int(result["step"]), _number(result["train_seconds"])
        accuracy = _number(result.get("test/accuracy"))
    else:
        state = "running" if is_held(path) else "interrupted"
        step = last_step(path / "metrics.jsonl")
    if accuracy is None:
        scores = _last_scores(path / "results.csv")
        accuracy = _number(scores.get("test/accuracy"))
        seconds = seconds if result else _number(scores.get("time/train_seconds"))
    alarms = path / "alarms.jsonl"
    return Listed(name=path.name, path=str(path), recipe=recipe, model=model, data=data, accuracy=accuracy, train_seconds=seconds,
                  state=state, step=step, num_steps=int(environment.get("num_steps", 0)),
                  alarms=alarms.read_bytes().count(b"\n") if alarms.exists() else 0,
                  started=when_begun(environment, begun))  # fmt: skip


def when_begun(environment: dict[str, Any], begun: Path) -> str:
    """Date and time to the second; where environment.json does not tell it, that of the file that is written first."""
    told = environment.get("begun")
    with suppress(TypeError, ValueError):
        return datetime.fromisoformat(told).isoformat(sep=" ", timespec="seconds")  # type: ignore[arg-type]
    return datetime.fromtimestamp(begun.stat().st_mtime).isoformat(sep=" ", timespec="seconds")


def sort_runs(runs: Sequence[Listed], by: Sorting) -> list[Listed]:
    """Best accuracy, shortest time or newest first, or by name; what lacks the number comes last."""
    if by == "name":
        return sorted(runs, key=lambda run: run.name)
    if by == "started":
        return sorted(runs, key=lambda run: (run.started, run.name), reverse=True)
    sign, name = (-1, "accuracy") if by == "accuracy" else (1, "train_seconds")
    return sorted(runs, key=lambda run: (math.inf if getattr(run, name) is None else sign * getattr(run, name), run.name))


def format_runs(runs: Sequence[Listed], width: int = 100) -> str:
    """A table of at most that width. Where it would be wider, what the names tell already goes first, and the names last.

    So a recipe is left out where the run's name begins with it, then the time of the start (lists are sorted by it), then
    recipes, models and data lose their middle, and at last the names do.
    """
    table = [("run", "recipe", "model", "data", "accuracy", "time", "state", "alarms", "started")]
    for run in runs:
        progress = f" {100 * run.step // run.num_steps} %" if run.state == "running" and run.num_steps else ""
        table.append((run.name, run.recipe, run.model, run.data, "" if run.accuracy is None else f"{100 * run.accuracy:.2f} %",
                      format_time(run.train_seconds), run.state + progress, str(run.alarms or ""),
                      run.started[2:16]))  # fmt: skip
    columns = {column[0]: list(column) for column in zip(*table, strict=True)}
    if _width(list(columns.values())) > width:
        told = ["" if run.name.startswith(run.recipe) else run.recipe for run in runs]
        columns["recipe"][1:] = told
        if not any(told):
            del columns["recipe"]
    if _width(list(columns.values())) > width:
        del columns["started"]
    for names, least in ((("recipe", "model", "data"), 10), (("run",), 8)):
        while _width(list(columns.values())) > width:
            name = max((name for name in names if name in columns), key=lambda name: max(map(len, columns[name])))
            narrower = max(map(len, columns[name])) - 1
            if narrower < least:
                break
            columns[name] = [shorten(cell, narrower) for cell in columns[name]]
    return _aligned(list(columns.values()), right={"accuracy", "time", "alarms"})


def shorten(text: str, width: int) -> str:
    """The text with its middle left out where it is wider: names of runs differ at both ends."""
    tail = min(15, width // 2)  # a date and a time, 20260131-120000
    return text if len(text) <= width else f"{text[: width - 1 - tail]}…{text[len(text) - tail :]}"


def format_time(seconds: float | None) -> str:
    if seconds is None or not math.isfinite(seconds):
        return ""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


# ---- comparison ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """runs: their paths; settings, results: name -> a value for each run; of settings only those that differ."""

    runs: list[str]
    settings: dict[str, list[Any]]
    results: dict[str, list[Any]]


PLACES = ("device", "threads", "ranks")
VERSIONS = ("cifarlab", "python", "torch")


def compare_runs(paths: Sequence[Path]) -> Comparison:
    """The settings in which these runs differ (with machine, versions and commit), and their results.

    Raises InputError when there are fewer than two, or one is no run folder or damaged.
    """
    if len(paths) < 2:
        raise InputError("name two run folders or more to compare")
    settings, results = [], []
    for path in paths:
        try:
            listed = read_listed(path)
            config = _object(path / "config.json", {}) or {"model": listed.model, "watched": True}
            environment, evaluation = _object(path / "environment.json", {}), _object(path / "evaluation.json", {})
            place = {f"({key})": environment.get(key) for key in PLACES}
            versions = {f"({key})": environment.get("versions", {}).get(key) for key in VERSIONS}
            commit = {"(git commit)": str((environment.get("git") or {}).get("commit", ""))[:10]}
            settings.append(config | place | versions | commit)
            result = _object(path / "result.json", {})
            of_result = {key: _number(result.get(key)) for key in ("test/loss", "test/top5", "val/accuracy", "probe_share")}
            macro = evaluation.get("macro") or {}
            results.append({
                "state": listed.state, "step": listed.step, "test/accuracy": listed.accuracy} | of_result | {
                "test/macro_f1": _number(macro.get("f1")), "test/macro_recall": _number(macro.get("recall")),
                "train_seconds": listed.train_seconds, "alarms": listed.alarms, "parameters": environment.get("parameters"),
                "forward_macs": environment.get("forward_macs")})  # fmt: skip
        except DAMAGE as error:
            if not path.is_dir():
                raise InputError(f"there is no run folder {path}: name two or more to compare") from None
            why = f"it is damaged or no run folder ({' '.join(f'{type(error).__name__}: {error}'.split())[:120]})"
            raise InputError(f"{path} cannot be compared: {why}, so leave it out") from None
    names = list(dict.fromkeys(key for values in settings for key in values))
    columns = {name: [values.get(name) for values in settings] for name in names}
    differing = {name: values for name, values in columns.items() if any(value != values[0] for value in values)}
    measured = {name: [values[name] for values in results] for name in results[0]}
    known = {name: values for name, values in measured.items() if any(value is not None for value in values)}
    return Comparison([str(path) for path in paths], differing, known)


def format_comparison(found: Comparison, width: int = 100) -> str:
    """Runs as letters, named first; then settings and results, as many runs side by side as fit."""
    letters = [_letter(k) for k in range(len(found.runs))]
    lines = [f"{letter}  {path}" for letter, path in zip(letters, found.runs, strict=True)]
    if not found.settings:
        lines += ["", "No setting differs."]
    for title, rows in (("differing settings", found.settings), ("results", found.results)):
        if not rows:
            continue
        texts = {name: [_cell(name, value) for value in values] for name, values in rows.items()}
        shown: list[tuple[str, ...]] = [(title, *texts)]
        shown += [(letter, *(shorten(cells[k], 40) for cells in texts.values())) for k, letter in enumerate(letters)]
        start = 1
        while start < len(shown):
            stop = start + 1
            while stop < len(shown) and _width([shown[0], *shown[start : stop + 1]]) <= width:
                stop += 1
            lines += ["", _aligned([shown[0], *shown[start:stop]], right=set(letters))]
            start = stop
    return "\n".join(lines)


FIELDS = tuple(field.name for field in fields(Listed))


# ---- parts ---------------------------------------------------------------------------------------------------------------


def _cell(name: str, value: Any) -> str:
    if value is None or value == "":
        return "–"
    if isinstance(value, float) and ("accuracy" in name or name in ("test/top5", "probe_share") or name.startswith("test/macro")):
        return f"{100 * value:.2f} %"
    if name == "train_seconds":
        return format_time(value)
    if isinstance(value, float):
        return f"{value:.4g}" if name.startswith("test/") else f"{value:g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _letter(k: int) -> str:
    return chr(ord("A") + k) if k < 26 else _letter(k // 26 - 1) + _letter(k % 26)


def _width(columns: Sequence[Sequence[str]]) -> int:
    return sum(max(map(len, column)) for column in columns) + 2 * (len(columns) - 1)


def _aligned(columns: Sequence[Sequence[str]], right: set[str]) -> str:
    widths = [max(map(len, column)) for column in columns]
    lines = []
    for row in zip(*columns, strict=True):
        cells = zip(row, widths, columns, strict=True)
        lines.append("  ".join(cell.rjust(w) if column[0] in right else cell.ljust(w) for cell, w, column in cells).rstrip())
    return "\n".join(lines)


def _object(path: Path, otherwise: dict[str, Any] | None = None) -> dict[str, Any]:
    if otherwise is not None and not path.exists():
        return otherwise
    if path.stat().st_size > JSON_LIMIT:
        raise ValueError(f"{path.name} has more than {JSON_LIMIT >> 20} MiB")
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:  # which does not say in which file
        raise ValueError(f"{path.name}: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} holds no JSON object")
    return value


def _number(value: Any) -> float | None:
    """JSON has no nan, and CSV no numbers: they are strings there."""
    return None if value is None else float(value)


def _last_scores(path: Path) -> dict[str, str | None]:
    """The last whole line of results.csv: the last evaluation; empty without any. Reads the file's two ends only."""
    if not path.exists():
        return {}
    with path.open("rb") as file:
        head = file.readline(TAIL)
        start = file.seek(max(len(head), file.seek(0, os.SEEK_END) - TAIL))
        lines = file.read(TAIL).split(b"\n")
    if start > len(head) and len(lines) < 3:  # the first is cut off, and the last is empty or torn
        raise ValueError("results.csv has a line that is too long")
    if len(lines) < 2:
        return {}
    names, values = csv.reader([head.decode(), lines[-2].decode()])
    return {key: value or None for key, value in zip(names, values, strict=False)}
