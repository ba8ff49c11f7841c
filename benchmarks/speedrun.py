"""How fast cifarlab trains beside others, in interleaved pairs: four comparisons, each a word.

    python benchmarks/speedrun.py accuracy --data-dir FOLDER [--seeds 3]   `fast` against airbench94_muon in plain PyTorch
    python benchmarks/speedrun.py pace [--budget 30]                       the time of the same two, from a few steps of each
    python benchmarks/speedrun.py images [--recipes resnet18-cosine,…]     recipes against a plain script of the same network
    python benchmarks/speedrun.py start [--data-dir FOLDER]                from the command to the first step, and --help

Each measurement is a process of its own; the two of a pair take turns in going first, and medians of the pairs' ratios are
printed. --json prints all of it as one object. `--threads` is for both; 0 is torch's own choice. `--device cuda` takes a GPU for
both (accuracy, pace, images): the net of the port is compiled there before its clock starts, its Muon is not; processor
seconds then say little.

accuracy: whole trainings on CIFAR-10 (an hour a round on two cores; `--epochs` shortens them), without probes on our side, since
the port has none. pace: what they would take, by a forecast of ours and the median step of theirs, on random images: a minute
each, and nothing about accuracy. In both, ours has the recipe's own precision (auto), and the port runs in fp32 and in bf16.
images: a few steps on random images, the first left out; the plain script is what most people write: Pillow per image in a
DataLoader with two workers, NCHW, fp32, torch's optimizer with default settings; ours is `cifarlab train` as it is, probes
included. Processor seconds are those of the training process: with `--workers 0 --threads 1` they compare the work itself on a
machine that does other work too. start: processor seconds too, since imports are what it is made of.
"""

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook

from airbench94 import BATCH, EPOCHS, now, train_port
from cifarlab.config import TrainConfig, WatchConfig
from cifarlab.data.dataset import Dataset, Split
from cifarlab.recipes import RECIPES, load_recipe

LABS = ("resnet18-cosine", "simplecnn-adam", "resnet18-adam", "resnet9-onecycle", "resnet34-cifar100")
FIRST_STEP = """
import os, sys, time, traceback
begun = time.perf_counter(), time.process_time()
import torch
torch_done = time.perf_counter(), time.process_time()
from torch.optim.optimizer import register_optimizer_step_post_hook
def stop(*_):
    if any(frame.f_code.co_name == "measure_step" for frame, _ in traceback.walk_stack(None)):
        return  # a step of the forecast
    now = time.perf_counter(), time.process_time()
    print("MARKS", *(b - a for a, b in zip(begun, torch_done)), *(b - a for a, b in zip(torch_done, now)), flush=True)
    os._exit(0)
register_optimizer_step_post_hook(stop)
from cifarlab.cli import main
sys.exit(main(sys.argv[1:]))
"""


class EnoughSteps(Exception):
    """Ends a training from within."""


def time_steps(run: Callable[[], object], steps: int, images: int, device: torch.device) -> dict[str, float]:
    """Images a second by the median time between two updates of whatever `run` trains, the first two left out."""
    marks: list[tuple[float, float]] = []

    def note(*_: object) -> None:
        marks.append(now(device))
        if len(marks) > steps + 1:
            raise EnoughSteps

    handle = register_optimizer_step_post_hook(note)
    try:
        run()
    except EnoughSteps:
        pass
    finally:
        handle.remove()
    wall, processor = (statistics.median(b[k] - a[k] for a, b in pairwise(marks[1:])) for k in (0, 1))
    return {"images_per_second": images / wall, "images_per_processor_second": images / processor}


def random_images(config: TrainConfig) -> Dataset:
    """As many random images as CIFAR has: its pixels do not change the time."""
    random, half = np.random.default_rng(0), (0.5, 0.5, 0.5)
    splits = [Split(random.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8), np.arange(count) % 10)
              for count in (50_000, 10_000)]  # fmt: skip
    names = tuple(map(str, range(100 if config.data == "cifar100" else 10)))
    return Dataset(config.data, "random images", splits[0], splits[1], names, half, half, "")


def our_images(recipe: str, steps: int, device: torch.device, threads: int, precision: str) -> dict[str, float]:
    training = importlib.import_module("cifarlab.train")
    config = load_recipe(recipe, precision=precision)
    training.load_dataset = lambda *_, **__: random_images(config)  # type: ignore[attr-defined]
    with tempfile.TemporaryDirectory() as folder:
        watch = WatchConfig(runs_dir=Path(folder), device=str(device), progress="none", forecast=False, figures=False,
                            threads=threads)  # fmt: skip
        return time_steps(lambda: training.train(config, watch), steps, config.batch_size, device)


def plain_images(recipe: str, steps: int, device: torch.device, threads: int, workers: int) -> dict[str, float]:
    from augment import per_image_batches
    from cifarlab.models import create_model

    if threads:
        torch.set_num_threads(threads)
    config = load_recipe(recipe)
    dataset = random_images(config)
    model = create_model(config.model, dataset.num_classes).to(device)
    optimizer = plain_optimizer(model, config)

    def run() -> None:
        for images, labels in per_image_batches(dataset.train, config, device, workers):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels, label_smoothing=config.label_smoothing)
            loss.backward()  # type: ignore[no-untyped-call]
            if config.clip_value:
                torch.nn.utils.clip_grad_value_(model.parameters(), config.clip_value)
            optimizer.step()
            loss.item()  # as a progress bar does

    return time_steps(run, steps, config.batch_size, device)


def plain_optimizer(model: torch.nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    if config.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), lr=1e-4, weight_decay=config.weight_decay)
    return torch.optim.SGD(model.parameters(), lr=1e-4, momentum=config.momentum, weight_decay=config.weight_decay)


def our_accuracy(data_dir: Path, seed: int, epochs: float, device: torch.device, threads: int, precision: str) -> dict[str, Any]:
    training = importlib.import_module("cifarlab.train")
    changes = {"epochs": epochs} if epochs else {}
    config = load_recipe("fast", seed=seed, precision=precision, **changes)
    begun = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        watch = WatchConfig(runs_dir=Path(folder), data_dir=data_dir, device=str(device), progress="none", forecast=False,
                            figures=False, threads=threads, probes="none", save_every=0, save_minutes=0)  # fmt: skip
        result = training.train(config, watch).result
    # Start, data and evaluation are in the processor seconds, which are therefore an upper bound.
    return {"train_seconds": result["train_seconds"], "processor_seconds": time.process_time() - begun,
            "accuracy": result["test/accuracy"], "tta_accuracy": result["test/tta_accuracy"]}  # fmt: skip


def their_accuracy(data_dir: Path, seed: int, epochs: float, device: torch.device, threads: int,
                   precision: str) -> dict[str, Any]:  # fmt: skip
    from cifarlab.data.load import load_dataset

    if threads:
        torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    dataset = load_dataset("cifar10", data_dir=data_dir)
    splits = [(torch.tensor(split.images), torch.tensor(split.labels)) for split in (dataset.train, dataset.test)]
    return train_port(splits[0], splits[1], seed, epochs or EPOCHS, precision, device)


def our_pace(budget: float, device: torch.device, threads: int, precision: str) -> dict[str, float]:
    from cifarlab.forecast import forecast_run

    config, watch = load_recipe("fast", precision=precision), WatchConfig(device=str(device), threads=threads)
    found = forecast_run(config, watch, budget=budget, say=lambda _: None)
    # The forecast's processor seconds hold evaluations too, here one of ten thousand images: an upper bound.
    return {"seconds": found.train_seconds, "processor_seconds": found.processor_seconds}


def their_pace(budget: float, device: torch.device, threads: int, precision: str) -> dict[str, float]:
    if threads:
        torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    images, labels = torch.randint(256, (50_000, 3, 32, 32), dtype=torch.uint8), torch.randint(10, (50_000,))
    marks: list[tuple[float, float]] = []

    def note(*_: object) -> None:
        marks.append(now(device))
        if len(marks) > 2 and marks[-1][0] - marks[0][0] > budget:
            raise EnoughSteps

    handle = register_optimizer_step_post_hook(note)
    try:
        train_port((images, labels), (images[:1], labels[:1]), 0, precision=precision, device=device)
    except EnoughSteps:
        pass
    finally:
        handle.remove()
    steps = EPOCHS * (50_000 // BATCH)
    wall, processor = (steps * statistics.median(b[k] - a[k] for a, b in pairwise(marks[1:])) for k in (0, 1))
    return {"seconds": wall, "processor_seconds": processor}


def take_turns(ways: dict[str, Callable[[], Any]], rounds: list[dict[str, Callable[[], Any]]] | int) -> list[dict[str, Any]]:
    """Every way once a round, each time in a new process; the order turns round from one round to the next."""
    plans = [ways] * rounds if isinstance(rounds, int) else rounds
    taken = []
    for number, plan in enumerate(plans):
        found = {}
        for name in list(plan) if number % 2 == 0 else list(plan)[::-1]:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                found[name] = pool.submit(plan[name]).result()
            print(f"round {number + 1} of {len(plans)}: {name} {found[name]}", file=sys.stderr, flush=True)
        taken.append(found)
    return taken


def contest(arguments: argparse.Namespace, ours: Callable[..., Any], theirs: Callable[..., Any], *given: Any) -> dict[str, Any]:
    """What takes turns in a round: `fast`, and the port in each of the precisions asked for."""
    where = arguments.device, arguments.threads
    ways: dict[str, Callable[[], Any]] = {"fast": partial(ours, *given, *where, arguments.precision)}
    for precision in arguments.port_precisions.split(","):
        ways[f"airbench94_muon, {precision}"] = partial(theirs, *given, *where, precision)
    return ways


def compare_accuracy(arguments: argparse.Namespace) -> dict[str, Any]:
    rounds = [contest(arguments, our_accuracy, their_accuracy, arguments.data_dir, seed, arguments.epochs)
              for seed in range(arguments.seeds)]  # fmt: skip
    pairs = take_turns({}, rounds)
    from cifarlab.data.load import load_dataset

    medians = {
        name: {"train_seconds": statistics.median(pair["fast"]["train_seconds"] / pair[name]["train_seconds"] for pair in pairs)}
        | {key: statistics.median(pair["fast"][key] - pair[name][key] for pair in pairs) for key in ("accuracy", "tta_accuracy")}
        for name in pairs[0] if name != "fast"
    }  # fmt: skip
    return {"what": "accuracy", "data": load_dataset("cifar10", data_dir=arguments.data_dir).source, "pairs": pairs,
            "medians": medians}  # fmt: skip


def compare_pace(arguments: argparse.Namespace) -> dict[str, Any]:
    pairs = take_turns(contest(arguments, our_pace, their_pace, arguments.budget), arguments.rounds)
    medians = {
        name: {key: statistics.median(pair["fast"][key] / pair[name][key] for pair in pairs)
               for key in ("seconds", "processor_seconds")}
        for name in pairs[0] if name != "fast"
    }  # fmt: skip
    return {"what": "pace", "pairs": pairs, "medians": medians}


def compare_images(arguments: argparse.Namespace) -> dict[str, Any]:
    rows = []
    for recipe in arguments.recipes.split(","):
        ways: dict[str, Callable[[], Any]] = {
            name: partial(take, recipe, arguments.steps, arguments.device, arguments.threads, more)
            for name, take, more in (("cifarlab", our_images, arguments.precision), ("plain", plain_images, arguments.workers))
        }
        pairs = take_turns(ways, arguments.rounds)
        rows.append({"recipe": recipe, "pairs": pairs, "median_ratios": {
            key: statistics.median(pair["cifarlab"][key] / pair["plain"][key] for pair in pairs) for key in pairs[0]["plain"]
        }})  # fmt: skip
    return {"what": "images", "steps": arguments.steps, "workers": arguments.workers, "recipes": rows}


def compare_start(arguments: argparse.Namespace) -> dict[str, Any]:
    recipes: dict[str, list[str]] = {"quick": []}
    if arguments.data_dir:
        recipes["resnet18-cosine"] = ["--data-dir", str(arguments.data_dir)]
    helps, starts = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for recipe, more in recipes.items():
            command = [sys.executable, "-c", FIRST_STEP, "train", recipe, "--runs-dir", folder, "--progress", "none", *more]
            starts[recipe] = [_take_marks(command) for _ in range(arguments.rounds + 1)]
    for _ in range(arguments.rounds + 1):
        begun = time.perf_counter()
        subprocess.run([sys.executable, "-m", "cifarlab", "--help"], capture_output=True, check=True)
        helps.append(time.perf_counter() - begun)
    names = ("import_torch_seconds", "import_torch_processor_seconds", "to_first_step_seconds", "to_first_step_processor_seconds")
    # Of each the first is left out: it decodes the data, and measures the forecast's steps.
    medians = {recipe: dict(zip(names, map(statistics.median, zip(*taken[1:], strict=True)), strict=True))
               for recipe, taken in starts.items()}  # fmt: skip
    return {"what": "start", "medians": medians, "help_seconds": statistics.median(helps[1:]), "starts": starts, "helps": helps}


def _take_marks(command: list[str]) -> list[float]:
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [float(word) for word in told.partition("MARKS")[2].split()]


def tell(found: dict[str, Any]) -> None:
    if found["what"] == "accuracy":
        print(f"{found['data']}\n\n{'':24}{'train s':>10}{'processor s':>13}{'plain':>9}{'six views':>11}")
        for pair in found["pairs"]:
            for name, row in pair.items():
                print(f"{name:24}{row['train_seconds']:10.0f}{row['processor_seconds']:13.0f}{100 * row['accuracy']:8.2f} %"
                      f"{100 * row['tta_accuracy']:9.2f} %")  # fmt: skip
        for name, medians in found["medians"].items():
            print(f"\nfast takes {medians['train_seconds']:.2f} of the time of {name}; accuracy "
                  f"{100 * medians['accuracy']:+.2f}, with views "
                  f"{100 * medians['tta_accuracy']:+.2f} points (medians of pairs)")  # fmt: skip
    elif found["what"] == "pace":
        print(f"{'whole training':24}{'s':>8}{'processor s':>13}")
        for pair in found["pairs"]:
            for name, row in pair.items():
                print(f"{name:24}{row['seconds']:8.0f}{row['processor_seconds']:13.0f}")
        for name, medians in found["medians"].items():
            print(f"\nfast takes {medians['seconds']:.2f} of the time of {name}, {medians['processor_seconds']:.2f} of its "
                  "processor seconds (medians of pairs)")  # fmt: skip
    elif found["what"] == "images":
        print(f"{'images a second':20}{'cifarlab':>10}{'plain':>10}{'ratio':>8}{'a processor s':>16}{'plain':>10}{'ratio':>8}")
        for row in found["recipes"]:
            line = f"{row['recipe']:20}"
            for key, width in (("images_per_second", 10), ("images_per_processor_second", 16)):
                ours, plain = (statistics.median(pair[name][key] for pair in row["pairs"]) for name in ("cifarlab", "plain"))
                line += f"{ours:{width}.0f}{plain:10.0f}{row['median_ratios'][key]:8.2f}"
            print(line)
    else:
        for recipe, medians in found["medians"].items():
            wall, processor = medians["to_first_step_seconds"], medians["to_first_step_processor_seconds"]
            print(f"import torch {medians['import_torch_seconds']:.2f} s; from there to the first step of `cifarlab train "
                  f"{recipe}` {wall:.2f} s ({processor:.2f} processor seconds)")  # fmt: skip
        print(f"`cifarlab --help` {found['help_seconds']:.2f} s")


def device_of(name: str) -> torch.device:
    if torch.device(name).type not in ("cpu", "cuda"):
        raise ValueError
    return torch.device(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=["accuracy", "pace", "images", "start"])
    parser.add_argument("--data-dir", type=Path, help="where CIFAR-10 lies (accuracy; start: a recipe on it too)")
    parser.add_argument("--seeds", type=int, default=3, help="pairs of trainings (accuracy)")
    parser.add_argument("--epochs", type=float, default=0, help="of both, instead of their own (accuracy)")
    parser.add_argument("--budget", type=float, default=30, help="seconds of measuring each (pace)")
    parser.add_argument("--recipes", default=",".join(LABS), help=f"comma-separated, of {', '.join(RECIPES)} (images)")
    parser.add_argument("--steps", type=int, default=5, help="that are timed (images)")
    parser.add_argument("--workers", type=int, default=2, help="of the plain script's DataLoader (images)")
    parser.add_argument("--rounds", type=int, default=3, help="(pace, images, start)")
    parser.add_argument("--precision", default="auto", help="of cifarlab (accuracy, pace, images)")
    parser.add_argument("--port-precisions", default="fp32,bf16", help="comma-separated, of the port (accuracy, pace)")
    parser.add_argument("--device", type=device_of, default="cpu", help="cpu, cuda or cuda:1 (accuracy, pace, images)")
    parser.add_argument("--threads", type=int, default=0, help="0 = torch's own choice")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    arguments = parser.parse_args()
    compare = {"accuracy": compare_accuracy, "pace": compare_pace, "images": compare_images,
               "start": compare_start}[arguments.what]  # fmt: skip
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    found = compare(arguments)
    from machine import describe_machine

    machine = describe_machine(arguments.device) | {"load_before": load}
    if arguments.json:
        print(json.dumps({"machine": machine} | found, indent=1))
        return
    print(", ".join(f"{name} {value}" for name, value in machine.items() if value is not None) + "\n")
    tell(found)


if __name__ == "__main__":
    main()
