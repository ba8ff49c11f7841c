"""The learning-rate range test: the one training loop with a rising learning rate, or anybody's own objects on a copy of them."""

import copy
import inspect
import json
import random
import shutil
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any, Literal, cast

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader

from cifarlab.config import InputError, TrainConfig, WatchConfig
from cifarlab.data.load import load_dataset
from cifarlab.data.splits import count_steps, count_train_images
from cifarlab.distributed import autocast, open_ranks, unwrap
from cifarlab.gallery import draw_range_figures
from cifarlab.lr_curve import FILE, MAX_POINTS, Climb, Curve, LrRange
from cifarlab.optim.optimizers import was_skipped
from cifarlab.profile.counting import random_states_kept
from cifarlab.runs import Row, Run, is_held, write_atomically
from cifarlab.train import train

STEPS, SEEDS = 200, 3
STEP_RANGE, LADDER_RANGE = (1e-7, 10.0), (1e-4, 1e-2)  # learning rates, where none are given
STOP_LOSS = 4.0  # times the lowest smoothed loss, as in fastai
VAL_IMAGES, VAL_POINTS = 1000, 40  # held out for `val` where the config holds out none; how often they are looked at

Mode = Literal["exponential", "linear"]


def lr_range(
    config: TrainConfig, watch: WatchConfig | None = None, *, start: float | None = None, end: float | None = None,
    steps: int | None = None, epochs: int | None = None, mode: Mode = "exponential", seeds: int | Sequence[int] = SEEDS,
    val: bool = False, say: Callable[[str], None] | None = None,
) -> LrRange:  # fmt: skip
    """Which learning rates the network, data and optimizer of a config bear: short runs whose rate rises from start to end.

    steps: a step test of so many updates (200), the rate rising at each, 1e-7 … 10 unless told otherwise. epochs: a ladder
    instead, each rate held for an epoch, 1e-4 … 1e-2. mode: exponential or linear. seeds: how many (0, 1, …), or which; every
    seed draws weights, data order and augmentation anew. val: hold images out and go by their loss instead of the batches'
    (a tenth of the training images, 1,000 at most, where the config holds out none). say: called with a line per seed.

    Each is a run of `train` on a network of its own, so there is nothing to put back. It ends at once when the loss is not
    finite, or its smoothed value exceeds 4 times the lowest and is more than halfway back to the first. The test set is never
    looked at. The config's schedule and warm-up are left aside, and so are averaging of weights and smaller images.

    Leaves a folder `lr-range-…` in the runs folder (or `watch.name`): lr_range.json, figures, a run folder per seed.
    Raises InputError for what the user can mend.

    Source: Smith 2015, arXiv:1506.01186; the exponential form is fast.ai's.
    """
    watch = watch or WatchConfig()
    if steps is not None and epochs is not None:
        raise InputError(f"steps={steps} and epochs={epochs} are two kinds of range test: give one of them")
    low, high = LADDER_RANGE if epochs is not None else STEP_RANGE
    start, end = low if start is None else start, high if end is None else end
    points = STEPS if steps is None and epochs is None else int(steps if epochs is None else epochs)  # type: ignore[arg-type]
    _check(start, end, points, mode)
    chosen = _choose_seeds(seeds)
    with open_ranks(watch.device) as ranks:
        dataset = load_dataset(config.data, data_dir=watch.data_dir, data_url=watch.data_url, labels=config.labels,
                               image_size=config.image_size, statistics=config.statistics)  # fmt: skip
        fraction = config.val_fraction
        if val and not fraction:
            fraction = min(0.1, VAL_IMAGES / len(dataset.train))
        plan = replace(config, schedule=cast(Any, f"range-{mode}"), schedule_per="epoch" if epochs else "step", lr=end,
                       min_lr=start, warmup_epochs=0.0, stop_loss=STOP_LOSS, ema_decay=0.0, val_fraction=fraction,
                       small_sides="")  # fmt: skip
        steps_per_epoch = count_steps(count_train_images(plan, dataset), plan, ranks.world_size)
        if epochs:
            # Of blended images no accuracy is known: clean ones tell it, after each epoch.
            plan = replace(plan, epochs=float(epochs), eval_every=1.0 if val or config.is_mixing else 0.0)
        else:
            every = max(1, points // VAL_POINTS) if val else 0
            plan = replace(plan, epochs=points / steps_per_epoch, eval_every=every / steps_per_epoch)
            points = points // every if every else points
        when = datetime.now()
        folder = watch.runs_dir / (watch.name or f"lr-range-{config.recipe}-{config.hash[:6]}-{when:%Y%m%d-%H%M%S}")
        folder = ranks.agree(folder)
        _refuse_taken(folder, "--name")
        if ranks.is_main:
            _clear_unfinished(folder)
        quiet = replace(watch, runs_dir=folder, progress="none", forecast=False, figures=False, probes="none", figures_every=0.0,
                        save_every=0.0, save_minutes=0.0, wandb=False, resume="")  # fmt: skip
        curves = []
        for seed in chosen:
            run = train(replace(plan, seed=seed), replace(quiet, name=f"seed-{seed}"))
            curves.append(_read_curve(run, seed, steps_per_epoch if epochs else 0, "val" if val else "train"))
            if say and ranks.is_main:
                say(_tell_seed(curves[-1]))
        found = LrRange(mode=mode, per="epoch" if epochs else "step", start=start, end=end, points=points,
                        split="val" if val else "train", curves=tuple(curves), config=config.to_dict(), recipe=config.recipe,
                        path=folder)  # fmt: skip
        if ranks.is_main:
            _save(found, folder, figures=watch.figures)
        ranks.agree(None)  # the folder is whole for all
    return found


def lr_range_on(
    model: nn.Module, optimizer: Optimizer, loader: Iterable[Any],
    criterion: Callable[[Any, Any], Tensor] = F.cross_entropy, *, start: float = STEP_RANGE[0], end: float = STEP_RANGE[1],
    steps: int = STEPS, mode: Mode = "exponential", seeds: int | Sequence[int] = 1,
    scaler: torch.amp.GradScaler | None = None, precision: Literal["", "fp32", "bf16", "fp16"] = "",
    unpack: Callable[[Any], tuple[Any, Any]] | None = None, folder: str | Path | None = None,
) -> LrRange:  # fmt: skip
    """The range test of somebody's own model, optimizer and data, of which nothing is changed.

    All updates happen on a deep copy of model, optimizer and criterion (where that is a module) together. So there is nothing to
    reset: weights, buffers, gradients, training flags, optimizer and its scheduler, scaler, the generators of Python, numpy,
    torch, the loader and the criterion (samplers' and data set's too), and the attributes of loader, samplers, data set and
    transforms, such as a counter, are afterwards as they were, bit by bit, after an error too: training after it is training
    without it.

    loader: gives (inputs, labels), as often as it is asked; criterion(model(inputs), labels) is the mean loss. It is gone
    through again when it ends early. unpack: makes (inputs, labels) of a batch that is something else, such as
    `lambda batch: (batch["image"], batch["label"])`. scaler: the fp16 scaler of the training; precision: autocast, by default
    fp16 with a scaler and fp32 without. seeds: how many or which; all begin at the weights given, and differ by data order and
    dropout. Parameter groups keep the ratios of their learning rates; the rates told are those of the fastest group. A frozen
    layer that is in eval mode in a training model stays so. An optimizer whose step() demands a closure (LBFGS) gets one. DDP's
    and torch.compile's wrappers are taken off: each rank measures for itself. folder: where lr_range.json and lr_range.png go.

    What a data set changes inside its lists, arrays or files cannot be put back, nor what hooks on the model write elsewhere:
    they run on the copy too. Takes twice the memory of model and optimizer. Raises InputError for an iterator that can be used
    only once, and for a model that cannot be copied.
    """
    _check(start, end, steps, mode)
    if folder is not None:
        _refuse_taken(Path(folder), "folder")
    dataset = getattr(loader, "dataset", None)
    if isinstance(loader, Iterator) or isinstance(dataset, Iterator):
        what = type(loader if isinstance(loader, Iterator) else dataset).__name__
        raise InputError(f"the loader is an iterator ({what}) that the test would use up: give a DataLoader or a list instead")
    if not hasattr(optimizer, "param_groups"):
        raise InputError(f"the optimizer is a {type(optimizer).__name__} without param_groups: give one optimizer at a time")
    net = unwrap(model)
    if dist.is_available() and dist.is_initialized() and any(isinstance(m, nn.SyncBatchNorm) for m in net.modules()):
        raise InputError("SyncBatchNorm makes ranks wait for one another, and they may stop at different steps: "
                         "test before converting to it, or on one rank")  # fmt: skip
    held = {id(p) for p in net.parameters()}
    if not any(id(p) in held for group in optimizer.param_groups for p in group["params"]):
        raise InputError("the optimizer holds no parameter of this model: give the pair that is to be trained together")
    device = next((p.device for p in net.parameters()), torch.device("cpu"))
    is_scaled = scaler is not None and scaler.is_enabled()
    if is_scaled and _demands_closure(optimizer):
        raise InputError(f"{type(optimizer).__name__} evaluates the loss several times an update, which an fp16 scaler cannot "
                         "follow: leave the scaler out")  # fmt: skip
    how = precision or ("fp16" if is_scaled else "fp32")
    curves: list[Curve] = []
    with (random_states_kept(device), _gradients_kept(net, optimizer, criterion),
          _loader_kept(loader, net, criterion) as generators, torch.enable_grad()):  # fmt: skip
        for seed in _choose_seeds(seeds):
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.manual_seed(seed)
            for generator in generators:
                _reseed(generator, seed)
            copies = _copy(net, optimizer, criterion, model)
            curves.append(_sweep(*copies, loader, unpack, scaler, seed, device, how, start, end, steps, mode))
    found = LrRange(mode=mode, per="step", start=start, end=end, points=steps, split="train", curves=tuple(curves),
                    shares=tuple(_lr_shares(optimizer)), path=Path(folder) if folder is not None else None)  # fmt: skip
    if found.path is not None:
        found.path.mkdir(parents=True, exist_ok=True)
        _save(found, found.path)
    return found


def _refuse_taken(folder: Path, word: str) -> None:
    if (folder / FILE).exists():
        raise InputError(f"{folder} holds a range test already: choose another {word}")


def _clear_unfinished(folder: Path) -> None:
    """Removes the runs of a test that was stopped before its end: it is begun anew, under its name too."""
    for path in folder.glob("seed-*"):
        try:
            is_left = Run(path).config.is_range_test and not path.is_symlink()
        except (InputError, OSError):
            continue  # none of ours; `train` will say what it is
        if is_held(path):
            raise InputError(f"{folder} is in use by another process: wait for it, or choose another --name")
        if is_left:
            shutil.rmtree(path)


def _save(found: LrRange, folder: Path, *, figures: bool = True) -> None:
    write_atomically(folder / FILE, (json.dumps(found.to_dict(), indent=2) + "\n").encode())
    if figures:
        draw_range_figures(found, folder)


# ---- the runs of a config ------------------------------------------------------------------------------------------------


def _check(start: float, end: float, points: int, mode: str) -> None:
    if mode not in ("exponential", "linear"):
        raise InputError(f"mode={mode!r} cannot be used: it must be exponential or linear")
    if not (0 <= start < end < float("inf")) or (mode == "exponential" and start == 0):
        raise InputError(f"a range test from {start:g} to {end:g} cannot be made: it must rise, and begin above 0 where it is "
                         "exponential")  # fmt: skip
    if not 2 <= points <= MAX_POINTS:
        raise InputError(f"a range test of {points} point(s) cannot be made: it must have at least 2, at most {MAX_POINTS:,}")


def _choose_seeds(seeds: int | Sequence[int]) -> tuple[int, ...]:
    chosen = tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds)
    if not chosen or len(set(chosen)) < len(chosen):
        raise InputError(f"seeds={seeds!r} cannot be used: it must be a number from 1, or different seeds")
    return chosen


def _read_curve(run: Run, seed: int, steps_per_epoch: int, split: str) -> Curve:
    """The points of a run; steps_per_epoch: 0 for a step test. A rung that was not finished is none."""
    rows, state = run.metrics.rows, run.result
    steps = [row for row in rows if "train/loss" in row]
    skipped = sum("train/skipped" in row for row in steps)
    made = [row for row in steps if "train/skipped" not in row and np.isfinite(row["train/loss"])]
    evaluations = {int(row["step"]): row for row in rows if "epoch" in row}
    lr_at = {int(row["step"]): row["lr"] for row in steps}
    points: list[tuple[float, float, float]] = []
    if steps_per_epoch:
        for epoch in range(int(state["step"]) // steps_per_epoch):
            last = (epoch + 1) * steps_per_epoch
            of_epoch = [row for row in made if last - steps_per_epoch < row["step"] <= last]
            scores = evaluations.get(last, {})
            loss, accuracy = scores.get("val/loss"), scores.get("val/accuracy")
            if split == "train" and of_epoch:
                loss, accuracy = _mean(of_epoch, "train/loss"), _mean(of_epoch, "train/accuracy")
                accuracy = scores.get("clean/accuracy") if accuracy is None else accuracy
            is_whole = state["state"] == "swept" or last < state["step"]
            if loss is not None and np.isfinite(loss) and is_whole:
                points.append((lr_at[last], loss, float("nan") if accuracy is None else accuracy))
    elif split == "val":
        points = [(lr_at[step], row["val/loss"], 0.0) for step, row in evaluations.items()
                  if np.isfinite(row.get("val/loss", np.nan))]  # fmt: skip
    else:
        points = [(row["lr"], row["train/loss"], 0.0) for row in made]
    lrs, losses, accuracies = zip(*points, strict=True) if points else ((), (), ())
    is_known = steps_per_epoch > 0 and bool(np.isfinite(accuracies).all())
    return Curve(seed=seed, lrs=lrs, losses=losses, accuracies=accuracies if is_known else (), end=state["state"],
                 skipped=skipped)  # fmt: skip


def _mean(rows: list[Row], key: str) -> float | None:
    values = [row[key] for row in rows if key in row]
    return sum(values) / len(values) if values else None


def _tell_seed(curve: Curve) -> str:
    if not curve.lrs:
        return f"  seed {curve.seed}: {curve.end} before the first point"
    lowest = int(np.argmin(curve.losses))
    ended = {"swept": "to the end", "climbed": "stopped: the loss climbed", "diverged": "stopped: the loss is not finite"}
    return (f"  seed {curve.seed}: {len(curve.lrs)} points, lowest single loss {curve.losses[lowest]:.4g} at "
            f"{curve.lrs[lowest]:.2g}; {ended[curve.end]} at {curve.lrs[-1]:.2g}")  # fmt: skip


# ---- somebody's own objects ----------------------------------------------------------------------------------------------


def _sweep(net: nn.Module, optimizer: Optimizer, criterion: Callable[[Any, Any], Tensor], loader: Iterable[Any],
           unpack: Callable[[Any], tuple[Any, Any]] | None, scaler: torch.amp.GradScaler | None, seed: int,
           device: torch.device, precision: str, start: float, end: float, steps: int, mode: str) -> Curve:  # fmt: skip
    """One seed's curve; net, optimizer and criterion are copies."""
    if not net.training:
        net.train()
    scaler = copy.deepcopy(scaler) if scaler is not None else torch.amp.GradScaler(device.type, enabled=False)
    shares, parameters = _lr_shares(optimizer), [*net.parameters(), *_parameters_of(optimizer)]
    demands_closure = _demands_closure(optimizer)
    climb, lrs, losses, skipped, ended = Climb(STOP_LOSS, steps, halfway=True), [], [], 0, ""
    with _batches(loader, unpack) as batches:
        for step, (inputs, labels) in zip(range(1, steps + 1), batches, strict=False):
            share = (step - 1) / (steps - 1)
            lr = start + (end - start) * share if mode == "linear" else start * (end / start) ** share
            for group, part in zip(optimizer.param_groups, shares, strict=True):
                _set(group, part * lr)
            inputs, labels = _send(inputs, device), _send(labels, device)

            def evaluate(inputs: Any = inputs, labels: Any = labels) -> Tensor:
                for parameter in parameters:
                    parameter.grad = None
                with autocast(device, precision):
                    loss = criterion(net(inputs), labels)
                if loss.numel() != 1:
                    raise InputError(f"the criterion gave {loss.numel()} losses for a batch: it must give their mean")
                scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
                return loss

            loss = evaluate()
            scaler.unscale_(optimizer)
            is_skipped = bool(was_skipped(scaler, optimizer))
            if demands_closure:
                optimizer.step(evaluate)  # type: ignore[arg-type]
            else:
                scaler.step(optimizer)
            scaler.update()
            row = {"step": step, "train/loss": float(loss.detach())} | ({"train/skipped": 1.0} if is_skipped else {})
            _, ended = climb.find_end([row])
            skipped += is_skipped
            if ended != "diverged" and not is_skipped:
                lrs.append(lr)
                losses.append(row["train/loss"])
            if ended:
                break
    return Curve(seed=seed, lrs=tuple(lrs), losses=tuple(losses), end=ended or "swept", skipped=skipped)


def _copy(net: nn.Module, optimizer: Any, criterion: Any, wrapped: nn.Module) -> tuple[nn.Module, Any, Any]:
    """All three, with the copied optimizer and criterion holding the copied weights; wrapped: what the model was given as.

    A criterion is copied where it is a module, or a module's method: it may hold weights and buffers of its own.
    """
    memo: dict[int, Any] = {}
    try:
        if isinstance(optimizer, Optimizer):  # whose own way of copying leaves out what a class of its own adds
            twin = memo[id(optimizer)] = object.__new__(type(optimizer))
        net = copy.deepcopy(net, memo)
        memo[id(wrapped)] = net
        if isinstance(optimizer, Optimizer):
            # Hooks are the user's; a step() of the instance is a scheduler's, and would move the original.
            held = {name: value for name, value in vars(optimizer).items() if "hook" not in name and name != "step"}
            twin.__setstate__({"defaults": {}} | copy.deepcopy(held, memo))
        else:
            twin = copy.deepcopy(optimizer, memo)
        owner = criterion.__self__ if isinstance(criterion, MethodType) else criterion
        return net, twin, copy.deepcopy(criterion, memo) if isinstance(owner, nn.Module | partial) else criterion
    except Exception as error:
        told = " ".join(str(error).split())[:200]
        raise InputError(f"{type(net).__name__} and {type(optimizer).__name__} cannot be copied ({told}): run the test before "
                         "what cannot be copied is put into them") from error  # fmt: skip


def _parameters_of(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _demands_closure(optimizer: Optimizer) -> bool:
    """Whether step() cannot be called without a function that evaluates the loss anew, as LBFGS's."""
    parameters = inspect.signature(type(optimizer).step).parameters
    return "closure" in parameters and parameters["closure"].default is inspect.Parameter.empty


@contextmanager
def _gradients_kept(net: nn.Module, optimizer: Optimizer, criterion: Any) -> Iterator[None]:
    """Puts every gradient aside for the time: a criterion that is a closure over the model would add to it."""
    own = criterion.parameters() if isinstance(criterion, nn.Module) else ()
    kept = [(parameter, parameter.grad) for parameter in (*net.parameters(), *_parameters_of(optimizer), *own)]
    for parameter, _ in kept:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in kept:
            parameter.grad = gradient


def _lr_shares(optimizer: Optimizer) -> list[float]:
    """Each group's learning rate as a share of the highest; a scheduler's starting point where it has set one."""
    rates = [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]
    return [rate / max(rates) if max(rates) > 0 else 1.0 for rate in rates]


def _set(group: dict[str, Any], lr: float) -> None:
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(lr)
    else:
        group["lr"] = lr


def _send(value: Any, device: torch.device) -> Any:
    """All tensors in it, in whatever lists and dicts, on the device."""
    return tree_map_only(Tensor, lambda tensor: tensor.to(device, non_blocking=True), value)


@contextmanager
def _batches(
    loader: Iterable[Any], unpack: Callable[[Any], tuple[Any, Any]] | None = None
) -> Iterator[Iterator[tuple[Any, Any]]]:
    """The loader's batches without end. Workers are its copy's own: those kept from epoch to epoch are left as they are."""
    workers: Any = None
    if isinstance(loader, DataLoader):
        loader = workers = copy.copy(loader)
        workers._iterator = None

    def run() -> Generator[tuple[Any, Any], None, None]:
        while True:
            given = False
            for batch in loader:
                given = True
                batch = unpack(batch) if unpack else batch
                if not isinstance(batch, tuple | list) or len(batch) < 2:
                    keys = f" of {', '.join(map(str, batch))}"[:80] if isinstance(batch, dict) else ""
                    raise InputError(f"the loader gave a {type(batch).__name__}{keys}: it must give pairs (inputs, labels), or "
                                     "unpack=lambda batch: (…, …) make them")  # fmt: skip
                yield batch[0], batch[1]
            if not given:
                raise InputError("the loader gave no batch: the test needs at least one")

    batches = run()
    try:
        yield batches
    finally:
        batches.close()  # ends the copy's workers
        if hasattr(getattr(workers, "_iterator", None), "_shutdown_workers"):
            workers._iterator._shutdown_workers()  # only a loader with persistent_workers keeps hold of them


Chance = torch.Generator | np.random.Generator | np.random.RandomState | random.Random


@contextmanager
def _loader_kept(*owners: Any) -> Iterator[list[Chance]]:
    """All generators that these objects hold, at whatever depth; they are put back at the end.

    So are the attributes of what can be iterated, indexed or called: loaders, samplers, data sets and transforms, which may
    count. Iterators are left alone: they are under way, and half of one put back would be worse.
    """
    found: dict[int, Chance] = {}
    attributes: list[tuple[dict[str, Any], dict[str, Any]]] = []
    seen: set[int] = set()
    waiting = list(owners)
    while waiting and len(seen) < 100_000:  # a data set may be a list of a million file names
        value = waiting.pop()
        if id(value) in seen or isinstance(value, str | bytes | int | float | type | Tensor | np.ndarray | None):
            continue
        seen.add(id(value))
        if isinstance(value, Chance):
            found[id(value)] = value
        elif isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list | tuple | set):
            waiting += list(value)[:1000]
        elif isinstance(value, FunctionType):
            waiting += [cell.cell_contents for cell in value.__closure__ or () if cell != CellType()]
        elif isinstance(value, partial):
            waiting += [value.func, *value.args, *value.keywords.values()]
        elif isinstance(value, MethodType):
            waiting.append(value.__self__)
        elif hasattr(value, "__dict__") and not isinstance(value, ModuleType):
            waiting += vars(value).values()
            if not isinstance(value, Iterator) and any(hasattr(value, f"__{name}__") for name in ("iter", "getitem", "call")):
                attributes.append((vars(value), dict(vars(value))))
    generators = list(found.values())
    states = [_state(generator) for generator in generators]
    try:
        yield generators
    finally:
        for now, before in attributes:
            if now.keys() != before.keys() or any(now[name] is not value for name, value in before.items()):
                now.clear()
                now.update(before)
        for generator, state in zip(generators, states, strict=True):
            _put_back(generator, state)


def _state(generator: Chance) -> Any:
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, np.random.Generator):
        return copy.deepcopy(generator.bit_generator.state)
    return generator.get_state()


def _put_back(generator: Chance, state: Any) -> None:
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    else:
        generator.set_state(state)


def _reseed(generator: Chance, seed: int) -> None:
    if isinstance(generator, torch.Generator):
        generator.manual_seed(seed)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = type(generator.bit_generator)(seed).state
    else:
        generator.seed(seed % 2**32)
