"""Opens what looks on at a run: says what is about to happen, and gives the loop one place to report to."""

import time
from collections.abc import Sequence
from datetime import datetime
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cifarlab import __version__
from cifarlab.checks.whole import check_start
from cifarlab.config import InputError, TrainConfig, WatchConfig
from cifarlab.data.batches import Batches
from cifarlab.data.dataset import Dataset
from cifarlab.diagnosis import Diagnosis, Facts
from cifarlab.environment import describe_environment, processor_name
from cifarlab.forecast import measure_step
from cifarlab.lr_curve import FILE, load_range
from cifarlab.optim.schedules import Schedule
from cifarlab.profile.counting import count, count_parameters
from cifarlab.profile.receptive import receptive_fields
from cifarlab.profile.report import to_json
from cifarlab.recipes import RECIPES
from cifarlab.runs import Row, Run, RunFolder, read_json, write_atomically
from cifarlab.trackers.fanout import Fanout, Tracker
from cifarlab.trackers.local import Local
from cifarlab.trackers.mirror import LiveMirror
from cifarlab.trackers.step_times import StepTimes, name_step, note_times, recall_times
from cifarlab.trackers.tensorboard import Tensorboard
from cifarlab.trackers.terminal import Terminal, TerminalTracker, format_seconds
from cifarlab.trackers.wandb import Wandb, is_wanted

LONG_RUN = 600.0  # seconds of forecast from which on faster recipes are named


def open_trackers(config: TrainConfig, watch: WatchConfig, folder: RunFolder | None, dataset: Dataset, model: nn.Module,
                  schedule: Schedule, batches: Batches, *, step: int, seconds: float, eval_steps: int,
                  past: Sequence[Row]) -> Fanout:  # fmt: skip
    """The run's trackers, after telling the user what is about to be done; none where `folder` is None (ranks but the first).

    step, seconds, past: updates done, training time spent and rows written before a resume.
    """
    past = past if folder else ()
    trackers: list[Tracker] = []
    mirrors: list[LiveMirror] = []
    diagnosis = None
    if folder:
        run = Run(folder.path)
        diagnosis = Diagnosis(Facts.from_dict(run.probed | {"num_classes": dataset.num_classes}), incident=run.incident)
        diagnosis.see(past, list(run.tables.values()))  # what it raises is in alarms.jsonl already
    costs: list[int] = []  # of each step, in forward MACs of an image where their sizes differ
    for side, steps in batches.stages():
        costs += len(steps) * [count(model, (3, *side), backward=False).forward_macs if config.stages else 1]
    fanout = Fanout(trackers, num_steps=schedule.num_steps, steps_per_epoch=batches.steps_per_epoch, eval_steps=eval_steps,
                    images_at=batches.images_at, seconds=seconds, past=past, diagnosis=diagnosis, mirrors=mirrors,
                    work=[0, *accumulate(costs)])  # fmt: skip
    if folder is None:
        return fanout
    shape = (3, batches.height, batches.width)
    cost = count(model, shape, backward=False)
    macs = cost.forward_macs
    facts = {"parameters": count_parameters(model), "forward_macs": macs, "input_shape": list(shape),
             "num_steps": schedule.num_steps, "steps_per_epoch": batches.steps_per_epoch,
             "threads": torch.get_num_threads(), "ranks": batches.world_size}  # fmt: skip
    device = name_device(batches.device)
    if not step or not is_whole(folder.path / "environment.json"):
        folder.write_json("environment.json", describe_environment(device) | facts)
    if not step or not is_whole(folder.path / "dataset.json"):
        folder.write_json("dataset.json", describe_dataset(dataset))
    if not step or not is_whole(folder.path / "cost.json"):
        fields = describe_fields(model, shape) if watch.figures else {}  # only the report shows them, and they take a second
        write_atomically(folder.path / "cost.json", (to_json(cost, more={"receptive_fields": fields}) + "\n").encode())
    found = keep_range_test(config, folder)

    terminal = Terminal(watch.progress, num_steps=schedule.num_steps, steps_per_epoch=batches.steps_per_epoch)
    trackers.append(TerminalTracker(terminal))
    going_on = f" · going on after step {step:,}" if step else ""
    terminal.say(f"cifarlab {__version__} · {config.recipe} · {folder.path}{going_on}")
    compiled = " · compiled" if config.compile else ""
    terminal.say(f"  device  {device} · torch {torch.__version__} · {config.precision}{compiled}")
    terminal.say(f"  data    {dataset.source}; training on {batches.num_images:,} images, {dataset.num_classes} classes")
    terminal.say(f"  model   {config.model}: {facts['parameters']:,} parameters; {macs / 1e9:.4f} GMAC = "
                 f"{2 * macs / 1e9:.4f} GFLOP forward on {'×'.join(map(str, shape))} (conv + linear)")  # fmt: skip
    terminal.say(f"  lr      {describe_schedule(config, schedule)}")
    if found:
        terminal.say(f"          {found}")
    if not config.is_range_test:
        for remark in check_start(config, dataset, model, batches.device, folder.path):
            terminal.say(f"  check   {remark}")
    begun = {key: Run(folder.path).environment.get(key) for key in ("device", "threads", "ranks")}
    if begun != {"device": device, "threads": facts["threads"], "ranks": facts["ranks"]}:
        was = ", ".join(f"{key} {value}" for key, value in begun.items())
        terminal.say(f"  note    begun elsewhere ({was}): sums are in another order here, so the last digits will differ")
    if config.is_mixing:
        terminal.say("  note    training images are blends, so accuracy is measured on clean training images (clean/accuracy)")
    if watch.forecast:
        for line in forecast(config, watch, batches, model, step, batches.device):
            terminal.say(line)
    trackers.append(Local(folder, past))
    if is_wanted(watch):
        mirrors.append(LiveMirror(folder.path, Wandb(watch)))
    if watch.tensorboard:
        mirrors.append(LiveMirror(folder.path, Tensorboard()))
    return fanout


def describe_fields(model: nn.Module, shape: tuple[int, ...]) -> dict[str, Any]:
    """The receptive field of each layer, "size" and "stride" in pixels; empty where a net cannot be followed."""
    try:
        found = receptive_fields(model, shape)
    except Exception:  # an operation that the walk does not know must not end a training
        return {}
    return {name: {"size": field.size, "stride": field.stride} for name, field in found.items()}


def is_whole(path: Path) -> bool:
    """Whether a resume finds that file as it was written: what it can make again must not stop it."""
    try:
        return bool(read_json(path))
    except InputError:
        return False


def describe_dataset(dataset: Dataset) -> dict[str, Any]:
    """What is needed to use the run's network without its data, and to know the data again."""
    return {
        "name": dataset.name,
        "source": dataset.source,
        "fingerprint": dataset.fingerprint,
        "class_names": list(dataset.class_names),
        "mean": list(dataset.mean),
        "std": list(dataset.std),
        "image_size": dataset.test.images.shape[-1],
        "num_train": len(dataset.train),
        "num_test": len(dataset.test),
    }


def keep_range_test(config: TrainConfig, folder: RunFolder) -> str:
    """Copies the range test that found the learning rate into the run's folder, and says what it was; else an empty string."""
    if not config.lr_from:
        return ""
    if not (folder.path / FILE).exists():
        try:
            folder.write_json(FILE, load_range(config.lr_from).to_dict())
        except InputError:
            return f"found by a range test in {config.lr_from}, which is not there any more"
    test = load_range(folder.path)
    name = f"{test.best.name}: {test.best.reason}" if test.best else "by hand"
    return f"found by a range test of {len(test.curves)} seeds in {config.lr_from} ({name})"


def describe_schedule(config: TrainConfig, schedule: Schedule) -> str:
    """One line: `0.15 at first, 0 at the end (cosine, per step), 19,550 steps = 25 epochs of 782`."""
    rates = [schedule.lr_at(step) for step in range(1, schedule.num_steps + 1)]
    peak = max(range(len(rates)), key=rates.__getitem__)
    told = f"{rates[0]:.4g}"
    if rates[peak] > rates[0]:
        told += f" → {rates[peak]:.4g} at epoch {peak / schedule.steps_per_epoch:.1f}"
    if rates[-1] != rates[peak]:
        told += f" → {rates[-1]:.2g}"
    epochs = f"{config.epochs:g} epoch{'s' * (config.epochs != 1)}"
    return (f"{told} ({config.schedule}, per {config.schedule_per}; {config.optimizer}) over {schedule.num_steps:,} steps = "
            f"{epochs} of {schedule.steps_per_epoch}, batch {config.batch_size}")  # fmt: skip


def forecast(config: TrainConfig, watch: WatchConfig, batches: Batches, model: nn.Module, step: int,
             device: torch.device) -> list[str]:  # fmt: skip
    """How long the rest will take here, measured on a few steps; for a long run also which recipes on this data are faster.

    What was measured within a day, before another run of such steps, is taken from then: that saves three seconds.
    """
    stages = batches.stages(step)  # none is left where the last step was done
    shapes, steps_of = [(3, *shape) for shape, _ in stages], [len(steps) for _, steps in stages]
    images = batches.images_at(1) // batches.world_size
    name = name_step(config, watch, count_parameters(model), shapes, images, name_device(device))
    known = recall_times(name, len(shapes))
    flops = known.flops if known else tuple(float(count(model, shape).training_flops) for shape in shapes)
    petaflops = 1e-15 * batches.images_at(1) * sum(each * steps for each, steps in zip(flops, steps_of, strict=True))
    if petaflops < 0.01:  # seconds on anything: measuring would cost more than it tells
        return []
    times = known or StepTimes(tuple(
        measure_step(model, config, shape, batches.num_classes, images, device, watch, budget=3.0 / len(shapes))
        for shape in shapes), flops, time.time())  # fmt: skip
    if known is None:
        note_times(name, times)
    seconds = sum(each * steps for each, steps in zip(times.seconds, steps_of, strict=True))
    when = f", as measured at {datetime.fromtimestamp(times.measured):%H:%M}" if known else ""
    lines = [f"  time    about {format_seconds(seconds)} on this machine{when}, evaluation not counted ({petaflops:.3g} PFLOP)"]
    if seconds > LONG_RUN:
        is_known = any(recipe.build().data == config.data for recipe in RECIPES.values())
        faster = []
        for name, recipe in RECIPES.items():
            theirs = recipe.build()
            # On data of one's own a recipe takes its share of images: those of CIFAR were made for 50,000.
            work = recipe.petaflops * (1 if is_known else batches.num_images / 50_000)
            if work < petaflops / 1.2 and (theirs.data == config.data if is_known else theirs.data == "cifar10"):
                told = f"({recipe.expected})" if is_known else f"(with --data {config.data})"
                faster.append((seconds * work / petaflops, name, told))
        lines += [f"          faster: {name} about {format_seconds(took)} {told}" for took, name, told in sorted(faster)]
        if not faster:
            lines.append("          no recipe on this data is faster; fewer --epochs are")
    return lines


def name_device(device: torch.device) -> str:
    """The processor's own name, for people."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor_name()}, {torch.get_num_threads()} thread(s)" if device.type == "cpu" else device.type
