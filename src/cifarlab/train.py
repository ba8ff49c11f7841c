"""The training loop.

`train(config)` is one page: build, loop, update, measure, evaluate, log, save. Plain training, resume, several ranks and
every study go through this one loop.
"""

import hashlib
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any, get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cifarlab.checkpoint import (
    find_checkpoints,
    load_checkpoint,
    load_evaluated,
    load_newest,
    prune_checkpoints,
    save_checkpoint,
    save_weights,
    step_of,
)
from cifarlab.config import InputError, TrainConfig, WatchConfig
from cifarlab.data.augment import normalize_batch
from cifarlab.data.batches import Batches
from cifarlab.data.dataset import Dataset, Split, balanced_subset
from cifarlab.data.load import load_dataset
from cifarlab.data.splits import CLEAN_IMAGES, split_dataset
from cifarlab.distributed import Ranks, autocast, open_ranks, pick_precision
from cifarlab.environment import scrub
from cifarlab.evaluate import (
    Evaluation,
    build_evaluation,
    predict_logits,
    predict_views,
    quick_scores,
    save_evaluation,
    save_samples,
)
from cifarlab.gallery import draw_recorded_figures, draw_run_figures, no_harm
from cifarlab.lr_curve import Climb
from cifarlab.memory import freed_memory_kept
from cifarlab.models import create_model
from cifarlab.models.airbench import Airbench
from cifarlab.optim.ema import WeightAverage, recompute_batch_norm
from cifarlab.optim.optimizers import build_optimizer, set_lr, was_skipped
from cifarlab.optim.schedules import build_schedule
from cifarlab.out_of_memory import memory_explained
from cifarlab.probes import choose_probes
from cifarlab.probes.open import open_panel
from cifarlab.probes.panel import Panel, choose_parameters
from cifarlab.report.page import leave_report
from cifarlab.runs import Followed, Row, Run, RunFolder, claim_folder, find_unfinished, is_torn_start, load_run
from cifarlab.thumbnails import FILE as THUMBNAILS
from cifarlab.thumbnails import save_thumbnails
from cifarlab.trackers.open import open_trackers


class Interrupted(KeyboardInterrupt):
    """A signal asked the training to end; its state is saved (if the disk took it), and a resume continues it."""

    def __init__(self, number: int, run: Run, *, is_saved: bool = True) -> None:
        where = "" if is_saved else " from the checkpoint before"
        super().__init__(f"stopped by {signal.Signals(number).name}; continue{where} with: cifarlab train --resume {run.path}")
        self.number = number
        self.run = run


@dataclass
class State:
    """What the loop carries from step to step beside weights and optimizer; all of it is in a checkpoint."""

    step: int = 0  # updates done
    seconds: float = 0.0  # spent in training; evaluation, saving and the pause before a resume are not counted
    probe_seconds: float = 0.0  # of these, in probes
    best_step: int = 0  # of the best validation accuracy so far; 0 = none
    best_accuracy: float = -1.0

    @classmethod
    def of(cls, values: dict[str, Any]) -> "State":
        """The state that a checkpoint holds; raises TypeError or ValueError for one that no loop can have been in."""
        state = cls(**values)
        if not all(type(getattr(state, name)) is kind for name, kind in get_type_hints(cls).items()):
            raise TypeError("a number is of another type")
        if not (state.step >= 0 and 0 <= state.best_step <= state.step):
            raise ValueError("a step is out of range")
        return state


@dataclass(frozen=True)
class Due:
    """When something is due: every so many steps, and at the last one; `every` 0 is only the last."""

    step: int
    last: int

    def now(self, every: int) -> bool:
        return self.step == self.last or (every > 0 and self.step % every == 0)


def train(config: TrainConfig, watch: WatchConfig | None = None) -> Run:
    """The finished run of a config: trains, evaluates, and leaves a folder.

    A run whose loss stops being finite ends there, with the state "diverged" in its result; one whose loss climbs above
    `stop_loss` times its lowest with "climbed"; a range test that reaches its end with "swept". SIGINT and SIGTERM save a
    checkpoint and raise Interrupted.

    Raises InputError for what the user can mend: settings, data, a folder in use; Failure where memory is not enough, the folder
    is moved or removed meanwhile, or another rank has ended.
    """
    watch = watch or WatchConfig()
    with ExitStack() as stack:
        ranks = stack.enter_context(open_ranks(watch.device))
        ranks.check_sync_batch_norm(config.sync_batch_norm)
        config = settle_precision(config, watch, ranks)
        stack.enter_context(_torch_settings(config, watch, ranks))

        # ---- build ---------------------------------------------------------------------------------------------------
        create_model(config.model)  # a wrong name is found before any data is read
        choose_probes(watch.probes)
        dataset = load_dataset(config.data, data_dir=watch.data_dir, data_url=watch.data_url, labels=config.labels,
                               image_size=config.image_size, statistics=config.statistics)  # fmt: skip
        splits = split_dataset(dataset, config)
        batches = Batches(splits["train"], config, num_classes=dataset.num_classes, mean=dataset.mean, std=dataset.std,
                          device=ranks.device, rank=ranks.rank, world_size=ranks.world_size)  # fmt: skip
        num_steps = batches.steps_in(config.epochs)
        schedule = build_schedule(config, batches.steps_per_epoch, num_steps)
        torch.manual_seed(fold_seed(config.seed, "weights"))
        model = create_model(config.model, dataset.num_classes)
        if isinstance(model, Airbench):  # its first layer is made from training images
            model.whiten(clean_batches(splits["train"], dataset, config, ranks))
        model = model.to(ranks.device)
        model = model.to(memory_format=torch.channels_last if config.channels_last else torch.contiguous_format)  # type: ignore[call-overload]
        choose_parameters(model.named_parameters(), watch.probe_include, watch.probe_exclude)  # refused before a folder is made
        optimizer = build_optimizer(model, config)
        scaler = torch.amp.GradScaler(ranks.device.type, enabled=config.precision == "fp16")
        average = WeightAverage(model, config.ema_decay) if config.ema_decay else None
        evaluated = average.module if average else model  # whose numbers are reported

        run, folder, state = open_run(config, watch, ranks, stack)
        if run.is_finished:
            return run
        probes = open_panel(config, watch, folder, model, optimizer, splits["train"], dataset, batches, num_steps)
        if state is None:
            state = restore(run, ranks, config, dataset, model, optimizer, scaler, average, probes)
        if folder and (last := folder.forget_after(state.step)) < state.step:
            print(f"cifarlab: {run.path / 'metrics.jsonl'} has lost its rows of steps {last + 1:,} to {state.step:,}: the run "
                  "goes on without them", file=sys.stderr)  # fmt: skip
        eval_steps, save_steps = batches.steps_in(config.eval_every), batches.steps_in(watch.save_every)
        figure_steps, trajectory_steps = batches.steps_in(watch.figures_every), batches.steps_in(watch.trajectory_every)
        stack.enter_context(memory_explained(config, model, batches))
        followed = Followed(run.path)
        past = followed.look().metrics.rows
        tracked = open_trackers(config, watch, folder, dataset, model, schedule, batches, step=state.step, seconds=state.seconds,
                                eval_steps=eval_steps, past=past)  # fmt: skip
        stack.enter_context(tracked)
        wrapped = ranks.wrap(model, sync_batch_norm=config.sync_batch_norm)
        forward = torch.compile(wrapped) if config.compile else wrapped

        # ---- loop ----------------------------------------------------------------------------------------------------
        stop = stack.enter_context(StopSignal())
        climb = Climb(config.stop_loss, num_steps, past, until=state.step, halfway=config.is_range_test)
        log_every = 1 if config.is_range_test else watch.log_every  # what it asks for is the very step
        if folder and trajectory_steps and state.step == 0:
            save_trajectory(folder, 0, evaluated)
        diverged_at, state_at_end = 0, "diverged"
        test_logits: Tensor | None = None  # of the last evaluation
        pending: list[tuple[Row, Tensor]] = []
        last_save = clock = time.perf_counter()
        for images, labels in batches.range(state.step, num_steps):
            state.step += 1  # row n describes update n
            due = Due(state.step, num_steps)
            lr, momentum = schedule.lr_at(state.step), schedule.momentum_at(state.step)
            set_lr(optimizer, lr, momentum)
            torch.manual_seed(fold_seed(config.seed, "dropout", state.step, ranks.rank))  # so that a resume draws the same

            # update: a piece's loss is its share of the whole batch's mean; ranks average their gradients
            measured = torch.zeros(3, device=ranks.device)  # loss, accuracy, whether the scaler skipped the update
            share = ranks.world_size / batches.images_at(state.step)
            size = config.micro_batch_size or len(images)
            pieces = list(zip(torch.split(images, size), torch.split(labels, size), strict=True))
            for piece, targets in pieces:
                with ranks.hold_gradients(wrapped, piece is not pieces[-1][0]):
                    with autocast(ranks.device, config.precision):
                        logits = forward(piece).float()
                        loss = share * F.cross_entropy(logits, targets, reduction="sum", label_smoothing=config.label_smoothing)
                    scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
                measured[0] += loss.detach()
                if not config.is_mixing:
                    measured[1] += share * (logits.detach().argmax(1) == targets).sum()
            scaler.unscale_(optimizer)
            if config.clip_norm or config.clip_value:
                probes.before_clip()
            if config.clip_norm:
                nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
            if config.clip_value:
                nn.utils.clip_grad_value_(model.parameters(), config.clip_value)
            probes.before_update(state.step)
            measured[2] += was_skipped(scaler, optimizer)
            scaler.step(optimizer)
            scaler.update()
            probes.after_update(state.step)
            optimizer.zero_grad(set_to_none=True)
            if average:
                average.update(model)

            # log: the only place where the device is waited for
            pending.append(({"step": state.step, "lr": lr} | ({} if momentum is None else {"momentum": momentum}), measured))
            # Ranks must save and leave at the same step: they agree on it here, by the CPU.
            overdue = int(0 < 60 * watch.save_minutes < time.perf_counter() - last_save)
            stopping, overdue = divmod(ranks.max(2 * stop.number + overdue), 2)
            if due.now(log_every) or due.now(eval_steps) or due.now(save_steps) or stopping or overdue:
                rows, reading = read_rows(pending, config, ranks), probes.read()
                state.seconds += time.perf_counter() - clock
                state.probe_seconds += reading.seconds
                spent = tracked.rows(rows, seconds=state.seconds, reading=reading)  # on probes, which are part of a training
                state.seconds, state.probe_seconds = state.seconds + spent, state.probe_seconds + spent
                clock = time.perf_counter()
                diverged_at, state_at_end = climb.find_end(rows)
                if diverged_at:
                    break

            # evaluate, the clock paused
            if due.now(eval_steps):
                ranks.average_buffers(model, evaluated)
                if average and config.ema_batch_norm == "recompute":
                    recompute_batch_norm(average.module, clean_batches(splits["train"], dataset, config, ranks))
                scores, test_logits = evaluate_splits(evaluated, splits, dataset, config, ranks)
                is_best = scores.get("val/accuracy", -1.0) > state.best_accuracy
                if is_best:
                    state.best_step, state.best_accuracy = state.step, scores["val/accuracy"]
                tracked.epoch(scores, eval_seconds=time.perf_counter() - clock, is_best=is_best)
                clock = time.perf_counter()
                if not all(map(math.isfinite, scores.values())):  # the last update's harm shows here first
                    diverged_at, state_at_end = state.step, "diverged"
                    break

            # draw what there is so far, for whoever looks on
            if folder and watch.figures and figure_steps and state.step % figure_steps == 0 and state.step < num_steps:
                with no_harm(run):
                    draw_recorded_figures(followed.look())
                clock = time.perf_counter()

            # save: weights for a landscape; all that a resume needs, when it is due, asked for, or the best so far
            if folder and trajectory_steps and due.now(trajectory_steps):
                save_trajectory(folder, state.step, evaluated)
            if due.now(save_steps) or stopping or overdue or state.best_step == state.step:
                ranks.average_buffers(model, evaluated)
                keeps = folder is not None and not config.is_range_test  # that one is begun anew rather than gone on with
                is_saved = ranks.agree(
                    save(folder, state, config, dataset, model, optimizer, scaler, average, probes) if folder and keeps else True)
                if not is_saved and state.best_step == state.step:
                    state.best_step, state.best_accuracy = 0, -1.0  # the next is the best that can be reported
                last_save = clock = time.perf_counter()
            if stopping and state.step < num_steps:
                raise Interrupted(stopping, run, is_saved=is_saved)

        # ---- report --------------------------------------------------------------------------------------------------
        stop.release()
        if folder:
            newest = [step_of(path) for path in find_checkpoints(folder.path / "checkpoints")[:1]]
            prune_checkpoints(folder.path / "checkpoints", keep={*newest, state.best_step})
        if diverged_at or config.is_range_test:
            if folder and watch.figures:
                draw_recorded_figures(run)
            tracked.finish({"state": state_at_end if diverged_at else "swept", "step": diverged_at or state.step,
                            "train_seconds": state.seconds})  # fmt: skip
            if folder and watch.figures:
                leave_report(Run(run.path))
            ranks.agree(None)  # the result is there for all
            return Run(run.path)
        lost = 0  # the step that was best on validation, where its checkpoint cannot be read any more
        if state.best_step and state.best_step != state.step:
            ranks.agree(None)  # that checkpoint is on the disk for all
            if best := load_best(run, state, ranks):
                evaluated.load_state_dict(best)
                test_logits = None
            else:
                lost, state.best_step = state.best_step, state.step
                scores, test_logits = evaluate_splits(evaluated, splits, dataset, config, ranks)
                state.best_accuracy = scores["val/accuracy"]
        if test_logits is None:  # also when a resume found every step done
            test_logits = predict_split(evaluated, splits["test"], dataset, config, ranks)
        if folder:
            evaluation = build_evaluation("test", test_logits, dataset.test.labels)
            save_evaluation(folder.path, evaluation, dataset.class_names)
            save_samples(folder.path, evaluation, splits["test"].images, dataset.class_names)
            with no_harm(run, f"{THUMBNAILS} could not be written"):  # pictures for the report
                save_thumbnails(folder.path, evaluation, splits["test"].images)
            save_weights(evaluated.state_dict(), folder.path / "model.safetensors")
            if watch.figures:
                draw_run_figures(run, evaluation, splits["test"].images, dataset.class_names)
            tracked.finish({"state": "finished", "step": state.step, "reported_step": state.best_step or state.step,
                            "test/loss": evaluation.loss, "test/accuracy": evaluation.top1, "test/top5": evaluation.top5,
                            **score_views(evaluated, evaluation, splits["test"], dataset, config, ranks),
                            "val/accuracy": state.best_accuracy if state.best_step else None,
                            "train_seconds": state.seconds,
                            "probe_share": state.probe_seconds / state.seconds if state.seconds else 0.0}
                           | ({"probes_lost": probes.lost} if probes.lost else {})
                           | ({"best_lost": lost} if lost else {}))  # fmt: skip
            if watch.figures:
                leave_report(Run(run.path))
        ranks.agree(None)  # the folder is whole for all
        return Run(run.path)


# ---- the parts, in the order of their use --------------------------------------------------------------------------------


class StopSignal:
    """Notes the first SIGINT or SIGTERM for the loop to act on at the end of its step; a second one acts at once."""

    def __init__(self) -> None:
        self.number = 0

    def __enter__(self) -> "StopSignal":
        self._previous: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():  # Python lets no other thread set handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Gives the signals back to whoever had them before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number:
            self.release()
            os.kill(os.getpid(), number)
        self.number = number


@contextmanager
def _torch_settings(config: TrainConfig, watch: WatchConfig, ranks: Ranks) -> Iterator[None]:
    """torch's process-wide switches for the time of a run, put back afterwards; the caller's random state too."""
    was_flushing = sys.float_info.min / 2 == 0  # torch cannot be asked
    torch.set_flush_denormal(True)  # denormals slow a CPU convolution a hundredfold; takes hold before the first parallel op
    threads, deterministic, benchmark = (
        torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    )  # fmt: skip
    if watch.threads:
        torch.set_num_threads(watch.threads)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(config.deterministic)
    torch.backends.cudnn.benchmark = not config.deterministic
    try:
        with (torch.random.fork_rng([ranks.device] if ranks.device.type == "cuda" else []),
              freed_memory_kept() if ranks.device.type == "cpu" else nullcontext()):  # fmt: skip
            yield
    finally:
        torch.set_flush_denormal(was_flushing)
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
        torch.backends.cudnn.benchmark = benchmark


def fold_seed(seed: int, *purpose: str | int) -> int:
    """A seed that is a function of (seed, purpose) and unlike that of any other purpose."""
    digest = hashlib.sha256(" ".join(map(str, (seed, *purpose))).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def settle_precision(config: TrainConfig, watch: WatchConfig, ranks: Ranks) -> TrainConfig:
    """The config with `auto` replaced by this device's precision, or by that of the run to resume: another machine's perhaps."""
    if config.precision != "auto":
        return config
    begun = find_begun(config, watch)
    here = begun.config.precision if begun else pick_precision("auto", ranks.device)
    return replace(config, precision=ranks.agree(here))


def find_begun(config: TrainConfig, watch: WatchConfig) -> Run | None:
    """The run to resume, if one is asked for and there."""
    if watch.resume == "auto" and not watch.name:
        return find_unfinished(watch.runs_dir, config)
    if watch.resume == "auto":
        path = watch.runs_dir / watch.name
        return load_run(path) if (path / "config.json").exists() else None
    return load_run(watch.resume) if watch.resume else None


def open_run(
    config: TrainConfig, watch: WatchConfig, ranks: Ranks, stack: ExitStack
) -> tuple[Run, RunFolder | None, State | None]:
    """(run, its folder on rank 0, fresh state); the state is None where a checkpoint is to be restored."""
    if scrub(watch.name) != watch.name:
        raise InputError("--name holds what looks like a key or token, which all files of the run would show: choose another")
    path = watch.runs_dir / watch.name
    found = find_begun(config, watch)
    if found and (differing := config.differing(found.config)):
        told = ", ".join(f"{name}={getattr(found.config, name)!r}" for name in differing)
        raise InputError(f"{found.path} was begun with {told}, and a resume cannot change that: "
                         "leave the setting out, or start a new run")  # fmt: skip
    if not found and not watch.name and ranks.is_main:
        path = claim_folder(watch.runs_dir, config)
    path = ranks.agree(found.path if found else path)
    run = Run(path)
    if not found and ranks.is_main and path.is_dir() and not is_torn_start(path):
        remedy = f", or continue it with --resume {path}" if (path / "config.json").exists() else ""
        raise InputError(f"run folder {path} exists already: choose another --name{remedy}")
    has_checkpoint = ranks.agree(bool(found and find_checkpoints(path / "checkpoints")))
    if run.is_finished or not ranks.is_main:
        return run, None, None if has_checkpoint else State()
    folder = stack.enter_context(RunFolder(path))
    if not found:
        folder.write_json("config.json", config.to_dict())
    return run, folder, None if has_checkpoint else State()


def save(folder: RunFolder, state: State, config: TrainConfig, dataset: Dataset, model: nn.Module,
         optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, average: WeightAverage | None,
         probes: Panel) -> bool:  # fmt: skip
    """A checkpoint of this step; of the older ones the best on validation is kept, and the one before in case this gets damaged.

    False, after saying so, where the disk does not take it: the checkpoint before stays, and the run goes on.
    """
    trainer = {
        "config": config.hash,
        "data": dataset.fingerprint,
        "state": vars(state),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "average": average.state_dict() if average else None,
        "probes": probes.state_dict(),
    }
    checkpoints = folder.path / "checkpoints"
    folder.check_is_there()
    try:
        folder.sync()  # the rows up to this step must not be lost when the checkpoint is not
        save_checkpoint(checkpoints, state.step, model.state_dict(), trainer)
    except OSError as error:
        print(f"cifarlab: no checkpoint of step {state.step:,} in {folder.path} ({error.strerror}): the one before stays, and "
              "the run goes on", file=sys.stderr)  # fmt: skip
        return False
    before = [step_of(path) for path in find_checkpoints(checkpoints) if step_of(path) < state.step]
    prune_checkpoints(checkpoints, keep={state.step, state.best_step, *before[:1]})
    return True


def save_trajectory(folder: RunFolder, step: int, evaluated: nn.Module) -> None:
    """trajectory/step-….safetensors: the evaluated weights of this step alone, in float32 as they are (26 MB of ResNet-9).

    What the disk does not take is said, and passed over: the run is worth more than a point of its path.
    """
    path = folder.path / "trajectory" / f"step-{step:08d}.safetensors"
    try:
        path.parent.mkdir(exist_ok=True)
        save_weights(evaluated.state_dict(), path)
    except OSError as error:
        print(f"cifarlab: {path} cannot be written ({error.strerror}): the landscape of this run will lack that step",
              file=sys.stderr)  # fmt: skip


def restore(run: Run, ranks: Ranks, config: TrainConfig, dataset: Dataset, model: nn.Module, optimizer: torch.optim.Optimizer,
            scaler: torch.amp.GradScaler, average: WeightAverage | None, probes: Panel) -> State:  # fmt: skip
    """Puts everything back as it was at the run's newest whole checkpoint, and gives the loop's state there."""
    found = None
    if ranks.is_main:
        found = load_newest(run.path / "checkpoints", rows_until=run.last_step)
    newest = ranks.agree(found and found[0])
    weights, trainer = found[1:] if found else load_checkpoint(newest)
    if trainer.get("config") != config.hash:
        raise InputError(f"the checkpoint in {run.path} belongs to another config ({trainer.get('config')}, not {config.hash}): "
                         "start a new run")  # fmt: skip
    if trainer.get("data") != dataset.fingerprint:
        raise InputError(f"{config.data} is not the data that {run.path} was begun on (its content differs): bring that back, "
                         "or start a new run")  # fmt: skip
    try:
        model.load_state_dict(weights)
        optimizer.load_state_dict(trainer["optimizer"])
        scaler.load_state_dict(trainer["scaler"])
        if average:
            average.load_state_dict(trainer["average"])
        probes.load_state_dict(trainer["probes"])
        return State.of(trainer["state"])
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        if "out of memory" in str(error):
            raise
        raise InputError(f"checkpoint {newest} does not fit the run's model and optimizer ({type(error).__name__}): it is "
                         "damaged, so remove the folder to go on from the one before") from None  # fmt: skip


def load_best(run: Run, state: State, ranks: Ranks) -> dict[str, Tensor] | None:
    """The weights that were best on validation; None, after saying so, where a rank cannot read them: all is there but these."""
    try:
        weights, why = load_evaluated(run.path / "checkpoints" / f"step-{state.best_step:08d}"), ""
    except InputError as error:
        weights, why = None, str(error).partition("; ")[0].partition(": it is damaged")[0]
    if not ranks.max(int(weights is None)):
        return weights
    if why:
        print(f"cifarlab: the weights of step {state.best_step:,}, best on validation, are lost ({why}): those of the last step, "
              f"{state.step:,}, are reported instead", file=sys.stderr)  # fmt: skip
    return None


def read_rows(pending: list[tuple[Row, Tensor]], config: TrainConfig, ranks: Ranks) -> list[Row]:
    """The pending steps' rows with what was measured in them, by one copy from the device; `pending` is emptied."""
    values = ranks.sum(torch.stack([measured for _, measured in pending])).div_(ranks.world_size).tolist()
    rows: list[Row] = []
    for (row, _), (loss, accuracy, skipped) in zip(pending, values, strict=True):
        # Of blended images no label is right, so no accuracy is claimed; `clean/accuracy` tells it instead.
        scores = {"train/loss": loss} | ({} if config.is_mixing else {"train/accuracy": accuracy})
        rows.append(row | scores | ({"train/skipped": 1.0} if skipped else {}))
    pending.clear()
    return rows


def clean_batches(split: Split, dataset: Dataset, config: TrainConfig, ranks: Ranks) -> Iterator[Tensor]:
    """Training images without augmentation, normalised, in batches of the size that batch norm sees in training."""
    # Not the first ones: a folder's images are sorted by class.
    chosen = balanced_subset(split.labels, min(CLEAN_IMAGES, len(split)), config.seed)
    for piece in torch.split(torch.tensor(split.images[chosen]), config.micro_batch_size or config.batch_size):
        yield normalize_batch(piece, dataset.mean, dataset.std, ranks.device, config.channels_last)


def evaluate_splits(model: nn.Module, splits: dict[str, Split], dataset: Dataset, config: TrainConfig,
                    ranks: Ranks) -> tuple[Row, Tensor]:  # fmt: skip
    """(`split/loss` and `split/accuracy` of every split but train, logits on test). The test set chooses nothing."""
    scores: Row = {}
    logits = torch.empty(0)
    for name, split in splits.items():  # test is the last
        if name != "train":
            logits = predict_split(model, split, dataset, config, ranks)
            scores |= {f"{name}/{key}": value for key, value in quick_scores(logits, torch.tensor(split.labels)).items()}
    return scores, logits


def score_views(model: nn.Module, evaluation: Evaluation, split: Split, dataset: Dataset, config: TrainConfig,
                ranks: Ranks) -> Row:  # fmt: skip
    """`test/tta_accuracy` where the config asks for it; it is reported beside the plain accuracy, never for it."""
    if not config.tta_share:
        return {}
    alone = replace(ranks, rank=0, world_size=1)
    logits = predict_views(evaluation, split.images, config.tta_share, lambda views: predict_split(
        model, replace(split, images=views), dataset, config, alone).numpy())  # fmt: skip
    return {"test/tta_accuracy": build_evaluation("test", logits, split.labels).top1}


def predict_split(model: nn.Module, split: Split, dataset: Dataset, config: TrainConfig, ranks: Ranks) -> Tensor:
    return predict_logits(model, split.images, mean=dataset.mean, std=dataset.std, device=ranks.device,
                          precision=config.precision, channels_last=config.channels_last,
                          rank=ranks.rank, world_size=ranks.world_size)  # fmt: skip
