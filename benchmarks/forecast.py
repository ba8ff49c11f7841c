"""Forecasts against runs: `cifarlab profile --recipe` and then the run itself, in turns.

    python benchmarks/forecast.py quick [--pairs 3] [--set epochs=2 --set train_images=500] [--threads 1] [--json]

Each forecast and each run is a process of its own, as a user starts them, with default settings except that no figures are drawn.
A run's time is that of its loop: training, evaluations and checkpoints, but not the start. "off by" is forecast / run − 1, in
seconds of the wall's clock and in processor seconds of all threads. On a machine that does other work the first says little, the
second more with --threads 1: of several threads those that wait for a delayed one spin, and neighbours fill the caches anyhow.
"""

import argparse
import importlib
import json
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import fields
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from cifarlab.config import TrainConfig, WatchConfig
from cifarlab.recipes import RECIPES, load_recipe

Times = dict[str, Any]


def take_forecast(recipe: str, changes: dict[str, Any], threads: int) -> Times:
    from cifarlab.forecast import forecast_run

    found = forecast_run(load_recipe(recipe, **changes), WatchConfig(threads=threads))
    return {"seconds": found.seconds, "low": found.low_seconds, "high": found.high_seconds, "train_seconds": found.train_seconds,
            "processor_seconds": found.processor_seconds, "warning": found.warning}  # fmt: skip


def take_run(recipe: str, changes: dict[str, Any], threads: int) -> Times:
    training = importlib.import_module("cifarlab.train")  # `cifarlab.train` is the function
    marks: list[tuple[float, float]] = []

    class Marked(training.StopSignal):  # type: ignore[misc, name-defined]  # held from the loop's first line to its last
        def __enter__(self) -> Any:
            marks.append((time.perf_counter(), time.process_time()))
            return super().__enter__()

        def release(self) -> None:
            marks.append((time.perf_counter(), time.process_time()))
            super().release()

    training.StopSignal = Marked  # type: ignore[attr-defined]
    with tempfile.TemporaryDirectory() as folder:
        watch = WatchConfig(runs_dir=Path(folder), progress="none", forecast=False, figures=False, threads=threads)
        result = training.train(load_recipe(recipe, **changes), watch).result
    begun, ended = marks[:2]
    return {"seconds": ended[0] - begun[0], "train_seconds": result["train_seconds"], "processor_seconds": ended[1] - begun[1]}


def parse_change(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    if name not in {field.name for field in fields(TrainConfig)} or not value:
        raise argparse.ArgumentTypeError(f"{text!r} is not field=value with a field of TrainConfig, such as epochs=2")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value  # a word


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipe", nargs="?", default="quick", choices=list(RECIPES))
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--set", type=parse_change, action="append", default=[], metavar="FIELD=VALUE", dest="changes")
    parser.add_argument("--threads", type=int, default=0, help="0 = torch's own choice")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    arguments = parser.parse_args()
    given = arguments.recipe, dict(arguments.changes), arguments.threads
    pairs: list[dict[str, Any]] = []
    for number in range(arguments.pairs):
        both = []
        for take in (take_forecast, take_run):
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:  # a fresh process: its first step is slow
                both.append(pool.submit(take, *given).result())
        forecast, run = both
        pairs.append({"forecast": forecast, "run": run} | {
            f"{key}_off_by": forecast[key] / run[key] - 1 for key in ("seconds", "train_seconds", "processor_seconds")
        } | {"is_inside": forecast["low"] <= run["seconds"] <= forecast["high"]})  # fmt: skip
        print(f"pair {number + 1} of {arguments.pairs} is done", file=sys.stderr, flush=True)

    if arguments.json:
        print(json.dumps({"recipe": given[0], "changes": given[1], "threads": given[2], "pairs": pairs}, indent=1))
        return
    print(f"{given[0]} {given[1] or ''}: forecast, then run; training, evaluations and checkpoints\n")
    print(f"{'forecast s':>11}{'interval':>16}{'run s':>9}{'off by':>9}{'inside':>8}{'processor s':>14}{'run':>8}{'off by':>9}")
    for pair in pairs:
        forecast, run = pair["forecast"], pair["run"]
        interval = f"{forecast['low']:.1f} to {forecast['high']:.1f}"
        print(f"{forecast['seconds']:11.1f}{interval:>16}{run['seconds']:9.1f}{100 * pair['seconds_off_by']:+7.0f} %"
              f"{'yes' if pair['is_inside'] else 'no':>8}{forecast['processor_seconds']:14.1f}{run['processor_seconds']:8.1f}"
              f"{100 * pair['processor_seconds_off_by']:+7.0f} %  {forecast['warning']}")  # fmt: skip


if __name__ == "__main__":
    main()
