"""How long a training will take on this machine, from a few measured steps."""

import copy
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from cifarlab.checkpoint import save_checkpoint
from cifarlab.config import TrainConfig, WatchConfig
from cifarlab.data.batches import Batches
from cifarlab.data.dataset import Dataset, Split
from cifarlab.data.load import load_dataset
from cifarlab.data.splits import CLEAN_IMAGES, split_dataset
from cifarlab.distributed import autocast, autocast_dtype, pick_device, pick_precision
from cifarlab.evaluate import predict_logits
from cifarlab.memory import freed_memory_kept
from cifarlab.models import create_model
from cifarlab.optim.ema import WeightAverage
from cifarlab.optim.optimizers import build_optimizer, set_lr
from cifarlab.probes import choose_probes
from cifarlab.probes.fixed_batch import FixedBatch
from cifarlab.probes.open import FIXED_IMAGES, LOSS_IMAGES
from cifarlab.probes.panel import Panel, choose_parameters
from cifarlab.profile.counting import count, random_states_kept
from cifarlab.profile.latency import wait_for

BUILT_IN = {"cifar10": (50_000, 10_000), "cifar100": (50_000, 10_000), "digits": (1437, 360)}  # training and test images


KNOWN_ERROR = 0.07
"""Forecasts of `quick` were off by up to this share on a quiet machine, whose clock rate alone moves by as much."""
LONGEST, LONG = 60.0, 20.0  # seconds of measuring
GROUPS = 8  # of consecutive steps, whose means give the interval


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What a run will cost on this machine.

    petaflops: 10¹⁵ FLOP of all updates (forward + backward, 2 a multiply-add), which no machine changes. train_seconds
    is the run's own `train_seconds`, the slow first step (warm_up_seconds of it) and probes (probe_seconds) included;
    eval_seconds are the evaluations between and the last one, save_seconds all checkpoints. Starting up and drawing are in none.
    images_per_second: of training. The parts of a full step (their means where image sizes differ): augment_seconds, pass_seconds
    (forward + backward), update_seconds (clipping, optimizer, averaging, and the probes of every step). rare_seconds: of one
    measurement of the probes of an interval.
    low_seconds, high_seconds: all of it if all went as in the fastest and the slowest of eight groups of
    consecutive steps, and at least 7 % to either side; a machine that changes later goes beyond. spread: (slowest − fastest) /
    mean of single steps. processor_seconds: of this process, all threads added up; they depend less
    on what else runs.
    waited: share of the threads' time that was measured in which they were not running, 0 on a quiet CPU (0.01 was measured on
    one), and 0 on other devices. load: the system's load average of the minute before, per processor.
    """

    petaflops: float
    train_seconds: float
    eval_seconds: float
    save_seconds: float
    probe_seconds: float
    low_seconds: float
    high_seconds: float
    processor_seconds: float
    num_steps: int
    num_evaluations: int
    num_checkpoints: int
    images_per_second: float
    augment_seconds: float
    pass_seconds: float
    update_seconds: float
    rare_seconds: float
    warm_up_seconds: float
    spread: float
    waited: float
    load: float

    @property
    def seconds(self) -> float:
        return self.train_seconds + self.eval_seconds + self.save_seconds

    @property
    def gflops(self) -> float:
        """10⁹ FLOP/s sustained over the training."""
        return 1e6 * self.petaflops / self.train_seconds

    @property
    def warning(self) -> str:
        """A line for a machine that does other work, or did until now; "" for a quiet one."""
        if self.waited > 0.1:
            return (f"the machine is busy: other work took {100 * self.waited:.0f} % of the time, so this is for one as busy as "
                    "now")  # fmt: skip
        if self.load > 0.5:
            return f"the machine was busy until now, load {self.load:.1f} per processor: measure again when it is quiet"
        return ""


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def forecast_run(config: TrainConfig, watch: WatchConfig | None = None, *, budget: float | None = None,
                 say: Callable[[str], None] = _say) -> Forecast:  # fmt: skip
    """The cost of a run by its config, from real steps done in about `budget` seconds behind a warm-up.

    A step is as in the training loop: augmented batch, forward and backward on it (pieces of it, for micro-batches), clipping,
    probes, optimizer, averaged weights; each on a batch of its own, with an evaluation of some images now and then, as a run has
    them. The probes that measure at an interval are timed apart, and so is one checkpoint, written to the system's folder for
    temporary files and removed. A step that is too long for the budget is measured on fewer images and scaled. budget: None is
    20 seconds, up to 60 for a run of an hour (a processor that was idle is faster in its first seconds), and not more than the
    run itself takes.

    The mean of all steps is taken, slow ones too: a run has its slow steps as well, and neither the median nor the fastest
    adds up to a sum.

    The built-in data sets are replaced by random images of their size, so nothing is loaded or downloaded; a folder is read.
    One process; no run folder is made, and the random states stay as they are. With a budget above 3 seconds, `say` gets one
    line beforehand: on standard error, unless another is given.

    Raises InputError for settings that do not fit together, as the run itself would.
    """
    watch = watch or WatchConfig()
    device = pick_device(watch.device)
    config = replace(config, precision=pick_precision(config.precision, device))
    load = os.getloadavg()[0] / (os.cpu_count() or 1) if hasattr(os, "getloadavg") else 0.0
    with _as_in_training(config, watch, device):
        dataset = _stand_in(config) if config.data in BUILT_IN else load_dataset(
            config.data, data_dir=watch.data_dir, data_url=watch.data_url, labels=config.labels, image_size=config.image_size,
            statistics=config.statistics)  # fmt: skip
        splits = split_dataset(dataset, config)
        batches = Batches(splits["train"], config, num_classes=dataset.num_classes, mean=dataset.mean, std=dataset.std,
                          device=device)  # fmt: skip
        model = create_model(config.model, dataset.num_classes)
        stages = batches.stages()  # of one image size each
        num_images = [sum(map(batches.images_at, steps)) for _, steps in stages]
        petaflops = 1e-15 * sum(count(model, (3, *shape)).training_flops * images
                                for (shape, _), images in zip(stages, num_images, strict=True))  # fmt: skip
        model = model.to(device).to(memory_format=torch.channels_last if config.channels_last else torch.contiguous_format)  # type: ignore[call-overload]
        num_steps, batch = batches.num_steps, batches.images_at(1)

        step = _Step(model, config, watch, device)
        tried = [step.try_out(*batches.at(steps[0])) for _, steps in stages]
        times = [per_image * images for (per_image, _), images in zip(tried, num_images, strict=True)]
        if budget is None:
            budget = _choose_budget(sum(times))
        if budget > 3:
            say(f"measuring training steps here, for up to about {budget:.0f} s")
        affordable = int(0.1 * budget / tried[-1][0])  # a forward pass is a third of a training step
        looked_at = splits["test"].images[: min(500, max(50, affordable))]  # 500 is an evaluation's batch
        measured = []
        for number, ((_, steps), (per_image, warm_up), time_of_stage) in enumerate(zip(stages, tried, times, strict=True), 1):
            whole = [k for k in steps[:1000] if batches.images_at(k) == batch] or steps  # an epoch's last batch may be smaller
            measured.append(step.measure(
                lambda k, whole=whole: batches.at(whole[k % len(whole)]), per_image,  # type: ignore[misc]
                budget * time_of_stage / sum(times),
                lambda: predict_logits(step.model, looked_at, mean=dataset.mean, std=dataset.std, device=device,
                                       precision=config.precision, channels_last=config.channels_last),
                warm_up=warm_up, takes_rare=number == len(stages),
            ))  # fmt: skip
        saving = step.save()
        threads = torch.get_num_threads()

    eval_steps = batches.steps_in(config.eval_every)
    num_evaluations = -(-num_steps // eval_steps) if eval_steps else 1
    per_evaluation = sum(len(split) for name, split in splits.items() if name != "train")
    if config.ema_decay and config.ema_batch_norm == "recompute":
        per_evaluation += min(CLEAN_IMAGES, len(splits["train"]))
    means = np.stack([part.rounds.mean(axis=0) for part in measured])  # (stages, 3, 2)
    share = np.array([len(steps) / num_steps for _, steps in stages])
    images = np.array(num_images)[:, None]
    rare = measured[-1].rare  # the probes of an interval look at whole images
    in_rare = _count_due(num_steps, watch.probe_every) * rare
    training = (images * (means[:, 0] + means[:, 1]) / batch + num_steps * share[:, None] * means[:, 2]
                + np.stack([part.warm_up for part in measured])).sum(axis=0) + in_rare  # fmt: skip
    in_probes = num_steps * float(share @ [part.probes for part in measured]) + in_rare[0]
    asides = np.concatenate([part.asides for part in measured])
    evaluating = num_evaluations * per_evaluation * asides.mean(axis=0) / len(looked_at)
    save_steps = batches.steps_in(watch.save_every)
    num_checkpoints = -(-num_steps // save_steps) if save_steps else 1
    seconds_of = [part.rounds[:, :, 0].sum(axis=1) for part in measured]  # by the wall's clock
    relative = np.concatenate([steps / steps.mean() for steps in seconds_of])
    groups = [group.mean() for group in np.array_split(relative, min(GROUPS, len(relative)))]
    total = training + evaluating + num_checkpoints * saving
    seconds = total[0]
    busy = sum(part.rounds[:, 1].sum(axis=0) for part in measured)  # of the passes, where all threads have work
    mean = share @ means[:, :, 0]
    return Forecast(
        petaflops=petaflops, train_seconds=float(training[0]), eval_seconds=float(evaluating[0]),
        save_seconds=float(num_checkpoints * saving[0]), probe_seconds=in_probes,
        low_seconds=float(seconds * min(1 - KNOWN_ERROR, *groups)), high_seconds=float(seconds * max(1 + KNOWN_ERROR, *groups)),
        processor_seconds=float(total[1]), num_steps=num_steps, num_evaluations=num_evaluations, num_checkpoints=num_checkpoints,
        images_per_second=sum(num_images) / float(training[0]), augment_seconds=float(mean[0]), pass_seconds=float(mean[1]),
        update_seconds=float(mean[2]), rare_seconds=float(rare[0]),
        warm_up_seconds=float(sum(part.warm_up[0] for part in measured)), spread=float(np.ptp(relative)),
        waited=max(0.0, 1 - float(busy[1] / busy[0]) / threads) if device.type == "cpu" else 0.0, load=load,
    )  # fmt: skip


def _count_due(num_steps: int, every: int) -> int:
    """How often the probes of an interval measure: at the first step, the last, and every so many."""
    return len({1, num_steps, *range(every, num_steps + 1, every)})


def _choose_budget(run_seconds: float) -> float:
    return min(run_seconds, max(LONG, min(LONGEST, run_seconds / 60)))


def measure_step(model: nn.Module, config: TrainConfig, shape: tuple[int, ...], num_classes: int, images: int,
                 device: torch.device, watch: WatchConfig | None = None, *, budget: float = 3.0) -> float:  # fmt: skip
    """Seconds of one update by `images` random images of that shape (C, H, W), measured on a copy within about `budget` seconds.

    For the line before a run: as in `forecast_run`, but torch.compile, augmentation, evaluation and checkpoints are not in it;
    the probes of `watch` are, those of an interval by their share. The random states stay as they are.
    """
    watch = watch or WatchConfig(probes="none")
    config = replace(config, precision=pick_precision(config.precision, device))
    with random_states_kept(device):
        inputs = torch.randn(images, *shape, device=device)
        inputs = inputs.contiguous(memory_format=torch.channels_last if config.channels_last else torch.contiguous_format)
        labels = torch.randint(num_classes, (images,), device=device)
        step = _Step(copy.deepcopy(model), config, watch, device, may_compile=False)
        measured = step.measure(lambda _: (inputs, labels), step.try_out(inputs, labels)[0], budget, most_rounds=50)
        return float(measured.rounds[:, :, 0].sum(axis=1).mean() + measured.rare[0] / watch.probe_every)


@dataclass(frozen=True)
class _Measured:
    """Everything in (seconds by the wall's clock, processor seconds), the last axis.

    rounds: (rounds, 3, 2), for a full batch: drawing it, the passes over it, the update. asides: (times, 2). rare: (2,), of one
    measurement of the probes of an interval. warm_up: (2,), what the first steps took longer. probes: seconds of a step that were
    the probes' own.
    """

    rounds: NDArray[np.float64]
    asides: NDArray[np.float64]
    rare: NDArray[np.float64]
    warm_up: NDArray[np.float64]
    probes: float


class _Step:
    """The loop's update, in its two parts: passes over the pieces of a batch, and the change of the weights."""

    def __init__(self, model: nn.Module, config: TrainConfig, watch: WatchConfig, device: torch.device, *,
                 may_compile: bool = True) -> None:  # fmt: skip
        self.model, self.config, self.device = model.train(), config, device
        self.forward = torch.compile(model) if config.compile and may_compile else model
        self.optimizer = build_optimizer(model, config)
        set_lr(self.optimizer, 0.0, None)  # the same gradient many times would run off to infinity
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
        self.average = WeightAverage(model, config.ema_decay) if config.ema_decay else None
        self.last: tuple[Tensor, Tensor] | None = None
        self.log_every = watch.log_every
        self.fixed: FixedBatch | None = None  # what the rare probes measure on
        self.panel = Panel(
            model, choose_parameters(model.named_parameters(), watch.probe_include, watch.probe_exclude),
            choose_probes(watch.probes), every=sys.maxsize, optimizer=self.optimizer, weights_are_ours=True,
            images=lambda: None if self.fixed is None else self.fixed.images, dtype=lambda: autocast_dtype(config.precision),
            batch=lambda: self.fixed and FixedBatch(self.fixed.images[:LOSS_IMAGES], self.fixed.labels[:LOSS_IMAGES]),
        )  # fmt: skip

    def try_out(self, images: Tensor, labels: Tensor) -> tuple[float, NDArray[np.float64]]:
        """(seconds that an image takes forward and backward, roughly; what the slow first pass took longer), on a few images."""
        few = min(len(images), 8)
        # Not compiled: that would be for a size that nobody needs.
        first, second = (self._take_time(lambda: self._pass(self.model, images[:few], labels[:few])) for _ in range(2))
        return float(second[0]) / few, np.maximum(first - second, 0)

    def measure(self, draw: Callable[[int], tuple[Tensor, Tensor]], per_image: float, budget: float,
                aside: Callable[[], object] | None = None, *, most_rounds: float = math.inf,
                warm_up: NDArray[np.float64] | None = None, takes_rare: bool = True) -> _Measured:  # fmt: skip
        """Steps on the batches draw(0), draw(1), … within the budget: drawn, passed over, updated, in turns.

        In turns, since one leaves the caches to the next. aside: what is done now and then between, for about a seventh of the
        time. takes_rare: whether the probes of an interval are timed. A GPU is given everything ten times before it is waited
        for, as the loop does not wait either.
        """
        images, labels = draw(0)
        if takes_rare:
            self._fix_batch(images, labels)
        size = min(len(images), self.config.micro_batch_size or len(images))
        if self.forward is self.model:  # a net compiled for one size must be measured at that size
            size = max(min(size, 8), min(size, int(budget / 6 / per_image)))  # six rounds at least
        asides: list[NDArray[np.float64]] = []
        rounds: list[NDArray[np.float64]] = []
        rare: list[NDArray[np.float64]] = []
        in_probes = 0.0
        times = 1 if self.device.type == "cpu" else 10
        begun = time.perf_counter()

        def draw_next() -> None:
            nonlocal images, labels
            images, labels = draw(len(rounds))

        def pass_over() -> None:
            self._pass(self.forward, images[:size], labels[:size])

        def update() -> None:
            self._update(len(rounds) + 2)  # at step 1 the probes of an interval measure too
            if times == 1:  # the next of ten would have nothing to do
                self.optimizer.zero_grad(set_to_none=True)

        def do_all() -> None:
            draw_next()
            pass_over()
            self._update(len(rounds) + 2)
            self.optimizer.zero_grad(set_to_none=True)

        def read() -> None:
            nonlocal in_probes
            in_probes += self.panel.read().seconds

        while len(rounds) < 2 or (len(rounds) < most_rounds and time.perf_counter() - begun < budget):
            parts = np.stack([self._take_time(part, times) for part in (draw_next, pass_over, update)])
            if times > 1:  # what the host does for one part runs beside the device's work on another
                parts *= self._take_time(do_all, times) / parts.sum(axis=0)
            rounds.append(parts)
            if len(rounds) % self.log_every == 0:
                parts[2] += self._take_time(read)
            is_first_slow = len(rare) == 1 and rare[0][0] < budget / 10
            if takes_rare and self.panel.names and (not rare or is_first_slow):
                read()
                pass_over()
                rare.append(self._take_time(lambda: self._update(1)))
                self.optimizer.zero_grad(set_to_none=True)
                self.panel.read()
            if aside and sum(took[0] for took in asides[1:]) < 0.15 * (time.perf_counter() - begun):
                if not asides:
                    asides.append(self._take_time(aside))  # the first is slow
                asides.append(self._take_time(aside))
        read()
        warm = np.stack(rounds[1:])
        surplus = (0 if warm_up is None else warm_up) + np.maximum(rounds[0] - warm.mean(axis=0), 0).sum(axis=0)
        if asides:
            surplus += np.maximum(asides[0] - np.mean(asides[1:], axis=0), 0)
        once = np.zeros(2)
        if rare:
            once = np.maximum(rare[-1] - warm[:, 2].mean(axis=0), 0)
            surplus += np.maximum(rare[0] - rare[-1], 0)
        warm[:, 1] *= len(images) / size
        return _Measured(warm, np.array(asides[1:]), once, surplus, in_probes / (len(rounds) * (1 if times == 1 else 2 * times)))

    def save(self) -> NDArray[np.float64]:
        """(seconds, processor seconds) of a checkpoint; (0, 0) where the temporary folder does not take one."""
        trainer = {"optimizer": self.optimizer.state_dict(), "probes": self.panel.state_dict(),
                   "average": self.average.state_dict() if self.average else None}  # fmt: skip
        try:
            with tempfile.TemporaryDirectory() as folder:
                return self._take_time(lambda: save_checkpoint(Path(folder), 0, self.model.state_dict(), trainer))
        except OSError:
            return np.zeros(2)

    def _fix_batch(self, images: Tensor, labels: Tensor) -> None:
        """As many random images as the probes of an interval measure on."""
        shape = (FIXED_IMAGES, *images.shape[1:])
        layout = torch.channels_last if self.config.channels_last else torch.contiguous_format
        classes = labels.argmax(1) if labels.ndim == 2 else labels
        self.fixed = FixedBatch(torch.randn(shape, device=self.device).contiguous(memory_format=layout),
                                classes[torch.arange(FIXED_IMAGES, device=self.device) % len(classes)])  # fmt: skip

    def _take_time(self, run: Callable[[], object], times: int = 1) -> NDArray[np.float64]:
        """(seconds, processor seconds) of one of so many times."""
        begun = time.perf_counter(), time.process_time()
        for _ in range(times):
            run()
        wait_for(self.device)
        return np.array([time.perf_counter() - begun[0], time.process_time() - begun[1]]) / times

    def _pass(self, forward: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> None:
        with autocast(self.device, self.config.precision):
            logits = forward(images).float()
            loss = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=self.config.label_smoothing)
        self.scaler.scale(loss / len(images)).backward()  # type: ignore[no-untyped-call]
        self.last = logits, loss  # held until the next, as the loop does: where memory is found decides on several per cent

    def _update(self, number: int) -> None:
        self.scaler.unscale_(self.optimizer)
        if self.config.clip_norm or self.config.clip_value:
            self.panel.before_clip()
        if self.config.clip_norm:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        if self.config.clip_value:
            nn.utils.clip_grad_value_(self.model.parameters(), self.config.clip_value)
        self.panel.before_update(number)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.panel.after_update(number)
        if self.average:
            self.average.update(self.model)


@contextmanager
def _as_in_training(config: TrainConfig, watch: WatchConfig, device: torch.device) -> Iterator[None]:
    """Threads, denormals, kernels and memory as the loop sets them, put back afterwards; the random states too."""
    was_flushing = sys.float_info.min / 2 == 0  # torch cannot be asked
    torch.set_flush_denormal(True)  # before the first parallel operation: then it takes hold in all threads
    threads, benchmark = torch.get_num_threads(), torch.backends.cudnn.benchmark
    if watch.threads:
        torch.set_num_threads(watch.threads)
    torch.backends.cudnn.benchmark = not config.deterministic
    try:
        with random_states_kept(device), freed_memory_kept() if device.type == "cpu" else nullcontext():
            yield
    finally:
        torch.set_flush_denormal(was_flushing)
        torch.set_num_threads(threads)
        torch.backends.cudnn.benchmark = benchmark


def _stand_in(config: TrainConfig) -> Dataset:
    """Random images in the number and size of a built-in data set: its pixels do not change the time."""
    side = config.image_size if config.data == "digits" else 32
    num_classes = 10 if config.data != "cifar100" else 100 if config.labels == "fine" else 20
    random = np.random.default_rng(0)
    splits = [Split(random.integers(0, 256, (n, 3, side, side), dtype=np.uint8), np.arange(n, dtype=np.int64) % num_classes)
              for n in BUILT_IN[config.data]]  # fmt: skip
    half = (0.5, 0.5, 0.5)
    return Dataset(config.data, "random images", splits[0], splits[1], tuple(map(str, range(num_classes))), half, half, "")
