"""How long a training will take on this machine, from a few measured steps."""

import copy
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from cifarlab.config import TrainConfig, WatchConfig
from cifarlab.data.batches import Batches
from cifarlab.data.dataset import Dataset, Split
from cifarlab.data.load import load_dataset
from cifarlab.data.splits import CLEAN_IMAGES, split_dataset
from cifarlab.distributed import autocast, pick_device
from cifarlab.evaluate import predict_logits
from cifarlab.models import create_model
from cifarlab.optim.ema import WeightAverage
from cifarlab.optim.optimizers import build_optimizer, set_lr
from cifarlab.profile.counting import count, random_states_kept
from cifarlab.profile.latency import wait_for

BUILT_IN = {"cifar10": (50_000, 10_000), "cifar100": (50_000, 10_000), "digits": (1437, 360)}  # training and test images


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What a run will cost on this machine.

    petaflops: 10¹⁵ FLOP of all updates (forward + backward, 2 a multiply-add), which no machine changes. train_seconds
    is the run's own `train_seconds`; eval_seconds are the evaluations between and the last one. Starting up, saving and
    drawing are in neither. images_per_second: of training. The parts of a full step: augment_seconds, pass_seconds
    (forward + backward), update_seconds (clipping, optimizer, averaging). spread: (slowest − fastest) / mean of the steps
    measured; of `quick`'s on a shared core 0.2 to 0.4 in processor seconds, and the run then took what was forecast to 6 %;
    0.5 to 0.7 in seconds while other programs came and went, and the forecast was 30 % too long.
    """

    petaflops: float
    train_seconds: float
    eval_seconds: float
    num_steps: int
    num_evaluations: int
    images_per_second: float
    augment_seconds: float
    pass_seconds: float
    update_seconds: float
    spread: float

    @property
    def seconds(self) -> float:
        return self.train_seconds + self.eval_seconds

    @property
    def gflops(self) -> float:
        """10⁹ FLOP/s sustained over the training."""
        return 1e6 * self.petaflops / self.train_seconds


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def forecast_run(config: TrainConfig, watch: WatchConfig | None = None, *, budget: float = 20.0,
                 say: Callable[[str], None] = _say) -> Forecast:  # fmt: skip
    """The cost of a run by its config, from real steps done in about `budget` seconds behind a warm-up.

    A step is as in the training loop: augmented batch, forward and backward on it (pieces of it, for micro-batches), clipping,
    optimizer, averaged weights. A step that is too long for the budget is measured on fewer images and scaled. Evaluation is
    measured on a few batches. The built-in data sets are replaced by random images of their size, so nothing is loaded or
    downloaded; a folder is read. One process; nothing is written, and the random states stay as they are. With a budget above
    3 seconds, `say` gets one line beforehand: on standard error, unless another is given.

    Raises InputError for settings that do not fit together, as the run itself would.
    """
    watch = watch or WatchConfig()
    device = pick_device(watch.device)
    if budget > 3:
        say(f"measuring training steps here, for up to about {budget:.0f} s")
    with _as_in_training(config, watch, device):
        dataset = _stand_in(config) if config.data in BUILT_IN else load_dataset(
            config.data, data_dir=watch.data_dir, data_url=watch.data_url, labels=config.labels, image_size=config.image_size,
            statistics=config.statistics)  # fmt: skip
        splits = split_dataset(dataset, config)
        batches = Batches(splits["train"], config, num_classes=dataset.num_classes, mean=dataset.mean, std=dataset.std,
                          device=device)  # fmt: skip
        model = create_model(config.model, dataset.num_classes)
        petaflops = 1e-15 * count(model, (3, batches.height, batches.width)).training_flops
        model = model.to(device).to(memory_format=torch.channels_last if config.channels_last else torch.contiguous_format)  # type: ignore[call-overload]

        images = batches.at(1)[0]
        step = _Step(model, config, device)
        rounds = step.measure(batches.at, 0.8 * budget)
        augment, pass_seconds, update = rounds.mean(axis=0).tolist()
        affordable = int(0.2 * budget * len(images) / pass_seconds)  # a forward pass is a third of a training step
        looked_at = splits["test"].images[: min(500, max(50, affordable))]  # 500 is an evaluation's batch
        evaluation = float(_time_rounds([lambda: predict_logits(
            step.model, looked_at, mean=dataset.mean, std=dataset.std, device=device, precision=config.precision,
            channels_last=config.channels_last)], device, 0.1 * budget).mean())  # fmt: skip

    num_steps = batches.steps_in(config.epochs)
    num_images = sum(batches.images_at(k + 1) for k in range(num_steps))
    train_seconds = num_images * (augment + pass_seconds) / len(images) + num_steps * update
    eval_steps = batches.steps_in(config.eval_every)
    num_evaluations = -(-num_steps // eval_steps) if eval_steps else 1
    per_evaluation = sum(len(split) for name, split in splits.items() if name != "train")
    if config.ema_decay and config.ema_batch_norm == "recompute":
        per_evaluation += min(CLEAN_IMAGES, len(splits["train"]))
    num_evaluated = num_evaluations * per_evaluation
    return Forecast(
        petaflops=petaflops * num_images, train_seconds=train_seconds, eval_seconds=num_evaluated * evaluation / len(looked_at),
        num_steps=num_steps, num_evaluations=num_evaluations, images_per_second=num_images / train_seconds,
        augment_seconds=augment, pass_seconds=pass_seconds, update_seconds=update,
        spread=float(np.ptp(rounds.sum(axis=1)) / rounds.sum(axis=1).mean()),
    )  # fmt: skip


def measure_step(model: nn.Module, config: TrainConfig, shape: tuple[int, ...], num_classes: int, images: int,
                 device: torch.device, *, budget: float = 3.0) -> float:  # fmt: skip
    """Seconds of one update by `images` random images of that shape (C, H, W), measured on a copy within about `budget` seconds.

    For the line before a run: as in `forecast_run`, but torch.compile, augmentation and evaluation are not in it. The random
    states stay as they are.
    """
    with random_states_kept(device):
        inputs = torch.randn(images, *shape, device=device)
        inputs = inputs.contiguous(memory_format=torch.channels_last if config.channels_last else torch.contiguous_format)
        labels = torch.randint(num_classes, (images,), device=device)
        step = _Step(copy.deepcopy(model), config, device, may_compile=False)
        return float(step.measure(lambda _: (inputs, labels), budget).sum(axis=1).mean())


class _Step:
    """The loop's update, in its two parts: passes over the pieces of a batch, and the change of the weights."""

    def __init__(self, model: nn.Module, config: TrainConfig, device: torch.device, *, may_compile: bool = True) -> None:
        self.model, self.config, self.device = model.train(), config, device
        self.forward = torch.compile(model) if config.compile and may_compile else model
        self.optimizer = build_optimizer(model, config)
        set_lr(self.optimizer, 0.0, None)  # the same gradient many times would run off to infinity
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
        self.average = WeightAverage(model, config.ema_decay) if config.ema_decay else None

    def measure(self, draw: Callable[[int], tuple[Tensor, Tensor]], budget: float) -> NDArray[np.float64]:
        """Seconds of drawing a full batch, of the passes over it, of the update after them: (rounds, 3), in about the budget."""
        images, labels = draw(1)
        piece = min(len(images), self.config.micro_batch_size or len(images))
        if self.forward is self.model:  # a net compiled for one size must be measured at that size
            piece = self._affordable(images, labels, piece, budget)
        rounds: NDArray[np.float64] = _time_rounds(
            [lambda: draw(1), lambda: self._pass(images[:piece], labels[:piece]), self._update], self.device, budget
        )
        rounds[:, 1] *= len(images) / piece
        return rounds

    def _affordable(self, images: Tensor, labels: Tensor, piece: int, budget: float) -> int:
        """That many images, or so few that six passes are within the budget."""
        few = min(piece, 8)
        self._pass(images[:few], labels[:few])  # the first pass of all is slow
        begun = time.perf_counter()
        self._pass(images[:few], labels[:few])
        wait_for(self.device)
        per_image = (time.perf_counter() - begun) / few
        return max(few, min(piece, int(budget / 6 / per_image)))

    def _pass(self, images: Tensor, labels: Tensor) -> None:
        with autocast(self.device, self.config.precision):
            logits = self.forward(images).float()
            loss = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=self.config.label_smoothing)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss / len(images)).backward()  # type: ignore[no-untyped-call]

    def _update(self) -> None:
        self.scaler.unscale_(self.optimizer)
        if self.config.clip_norm:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        if self.config.clip_value:
            nn.utils.clip_grad_value_(self.model.parameters(), self.config.clip_value)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average:
            self.average.update(self.model)


def _time_rounds(parts: list[Callable[[], object]], device: torch.device, budget: float) -> NDArray[np.float64]:
    """Seconds of each part in at most 50 rounds behind a warm-up: (rounds, parts). In turns: one leaves the caches to the next.

    To be averaged, and by the mean, not the median, since a run too has its slow steps. A GPU is given each part ten times
    before it is waited for, as the loop does not wait either.
    """
    runs = 1 if device.type == "cpu" else 10
    end = time.perf_counter() + budget
    for part in parts:
        part()
    wait_for(device)
    rounds: list[list[float]] = []
    while not rounds or (len(rounds) < 50 and time.perf_counter() < end):
        rounds.append([])
        for part in parts:
            begun = time.perf_counter()
            for _ in range(runs):
                part()
            wait_for(device)
            rounds[-1].append((time.perf_counter() - begun) / runs)
    return np.array(rounds)


@contextmanager
def _as_in_training(config: TrainConfig, watch: WatchConfig, device: torch.device) -> Iterator[None]:
    """Threads, denormals and kernels as the loop sets them, put back afterwards; the random states too."""
    was_flushing = sys.float_info.min / 2 == 0  # torch cannot be asked
    torch.set_flush_denormal(True)  # before the first parallel operation: then it takes hold in all threads
    threads, benchmark = torch.get_num_threads(), torch.backends.cudnn.benchmark
    if watch.threads:
        torch.set_num_threads(watch.threads)
    torch.backends.cudnn.benchmark = not config.deterministic
    try:
        with random_states_kept(device):
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
