"""What a run is made of: two frozen dataclasses, and nothing of torch.

TrainConfig holds all that can change a number; its hash is the run's identity.
WatchConfig holds all that cannot: folders, device, trackers, how much is printed.
"""

import dataclasses
import difflib
import hashlib
import json
import math
import re
import types
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints

MAX_EPOCHS = 1_000_000
MAX_THREADS = 1024  # beyond what a machine can start, OpenMP ends the process
MAX_IMAGE_SIZE = 4096  # pixels a side: far beyond small image classifiers, and an image of it takes 50 MB


class InputError(ValueError):
    """Bad input from outside (a setting, a file, an image): one sentence that names the thing, the place and the remedy.

    The command line prints it without a traceback and leaves with exit code 2.
    """


LATER = {"is_later": True}
"""Marks a field that came after the first runs: at its default it is not in the hash, so that older runs keep their identity."""


class Failure(RuntimeError):
    """What nobody's input is to blame for (memory, a disk, another process): one sentence that says what, where and what to do.

    The command line prints it without a traceback and leaves with exit code 1.
    """


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Every setting that can change a number of a run; equal configs give equal runs.

    Vary it with `dataclasses.replace`. Fractions are 0…1, lengths are in epochs unless the name says otherwise,
    and 0 turns an augmentation, clipping, averaging or limit off.

    Raises InputError (a ValueError) naming the field, its value and what is allowed.
    """

    recipe: str = field(default="custom", compare=False)
    """Name of the recipe that this started from: a label, not part of the run's identity."""
    lr_from: str = field(default="", compare=False)
    """Folder of the range test by which --lr auto found the learning rate: a label too."""

    data: str = "cifar10"
    """cifar10, cifar100, digits, or a folder of images or parquet files."""
    labels: Literal["fine", "coarse"] = "fine"
    """Which labels of CIFAR-100: its 100 classes or its 20 superclasses."""
    image_size: int = 32
    """Side in pixels that images of a folder are resized to (Lanczos filter)."""
    statistics: Literal["dataset", "imagenet"] = "dataset"
    """Mean and standard deviation for normalisation: the data set's own, or ImageNet's."""
    train_images: int = 0
    """Train on this many images only, classes in equal shares (0 = all)."""
    val_fraction: float = 0.0
    """Share of the training images held out, classes in equal shares; the best step on it is then the one reported."""

    model: str = "resnet18"
    """Architecture: a name of `cifarlab.list_models()`."""

    epochs: float = 25.0
    """Passes over the training images; may be a fraction."""
    batch_size: int = 64
    """Images per optimizer step, over all ranks together."""
    micro_batch_size: int = 0
    """Accumulate each step from pieces of this many images (0 = whole batch); batch-norm statistics are then per piece."""
    drop_last: bool = False
    """Leave out the last batch of an epoch when it is not full."""

    optimizer: Literal["sgd", "adam", "adamw", "rmsprop", "muon"] = "sgd"
    """Update rule."""
    lr: float = 0.1
    """Learning rate; the peak where the schedule has one."""
    momentum: float = 0.9
    """Momentum of SGD, RMSprop and Muon."""
    nesterov: bool = False
    """Nesterov's form of SGD's and Muon's momentum."""
    beta1: float = 0.9
    """Adam, AdamW: decay of the first moment."""
    beta2: float = 0.999
    """Adam, AdamW: decay of the second moment."""
    alpha: float = 0.99
    """RMSprop: decay of the squared gradient."""
    eps: float = 1e-8
    """Adam, AdamW, RMSprop: added to the denominator."""
    weight_decay: float = 0.0
    """L2 penalty (AdamW, Muon: decoupled decay)."""
    decay_norms: bool = True
    """Apply weight decay to batch-norm parameters and biases too, as plain PyTorch does."""
    bias_lr: float = field(default=1.0, metadata=LATER)
    """Learning rate of biases and batch-norm parameters, as a multiple of lr."""
    head_lr: float = field(default=1.0, metadata=LATER)
    """Learning rate of the last linear layer's weights, as a multiple of lr."""
    muon_steps: int = field(default=5, metadata=LATER)
    """Muon: Newton-Schulz steps that make an update orthogonal."""
    renormalize: bool = field(default=False, metadata=LATER)
    """Muon: scale each weight matrix to the norm √outputs before its update; lr is then the relative size of an update."""

    schedule: Literal[
        "constant", "step", "linear", "cosine", "restarts", "one-cycle", "range-exponential", "range-linear"
    ] = "cosine"
    """Learning rate over time: a pure function of the step. The two ranges are a test of learning rates (`cifarlab lr-range`)."""
    schedule_per: Literal["step", "epoch"] = "step"
    """Change the learning rate at every step, or hold it for an epoch."""
    min_lr: float = 0.0
    """linear, cosine, restarts: where the learning rate ends. range-…: where it begins, to rise to lr."""
    warmup_epochs: float = 0.0
    """Linear warm-up before the schedule proper."""
    warmup_start: float = 0.1
    """Share of the schedule's first learning rate at which the warm-up begins."""
    decay_epochs: float = 10.0
    """step: epochs between two decays."""
    decay_factor: float = 0.1
    """step: factor of each decay."""
    restart_epochs: float = 10.0
    """restarts: length of the first cycle."""
    restart_growth: int = 1
    """restarts: each cycle is this many times as long as the one before."""
    peak_at: float = 0.3
    """one-cycle: share of the run at which the peak is reached."""
    div_factor: float = 25.0
    """one-cycle: it begins at lr / div_factor."""
    final_div_factor: float = 1e4
    """one-cycle: it ends at lr / div_factor / final_div_factor."""
    anneal: Literal["cos", "linear"] = "cos"
    """one-cycle: shape of both slopes."""
    cycle_momentum: bool = False
    """one-cycle: move momentum (SGD, RMSprop) or beta1 (Adam) against the learning rate."""
    base_momentum: float = 0.85
    """one-cycle: momentum at the peak, when it is cycled."""
    max_momentum: float = 0.95
    """one-cycle: momentum at both ends, when it is cycled."""
    stop_loss: float = 0.0
    """Stop when the smoothed training loss exceeds this many times its lowest (0 = only when it is not finite)."""

    label_smoothing: float = 0.0
    """Share of the target spread evenly over all classes."""
    clip_norm: float = 0.0
    """Clip the gradient's global 2-norm to this (0 = off)."""
    clip_value: float = 0.0
    """Clip every gradient entry to ±this (0 = off)."""

    small_sides: str = field(default="", metadata=LATER)
    """Train on smaller images first: side in pixels and the share of the run up to which it holds, as in 20:0.15,24:0.5."""
    crop_padding: int = 4
    """Random crop after padding by this many pixels on each side."""
    crop_mode: Literal["zeros", "reflect"] = "zeros"
    """What the padding is filled with; zeros are black pixels."""
    flip: Literal["none", "random", "alternating"] = "random"
    """Horizontal flip; alternating flips each image every other epoch (arXiv:2404.00498)."""
    brightness: float = 0.0
    """Colour jitter: factor drawn from 1 ± this."""
    contrast: float = 0.0
    """Colour jitter: factor drawn from 1 ± this."""
    saturation: float = 0.0
    """Colour jitter: factor drawn from 1 ± this."""
    hue: float = 0.0
    """Colour jitter: turn drawn from ± this, in turns of the colour circle (at most 0.5)."""
    cutout: int = 0
    """Side in pixels of a square set to the mean colour, placed wholly inside the image."""
    mixup_alpha: float = 0.0
    """MixUp: Beta(alpha, alpha) of the mixing share (arXiv:1710.09412)."""
    cutmix_alpha: float = 0.0
    """CutMix: Beta(alpha, alpha) of the area share (arXiv:1905.04899); with MixUp too, each batch draws one of the two."""

    precision: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of forward and backward (autocast); fp16 scales the loss. auto: bf16 where the device computes in it natively,
    else fp16 on a GPU, else fp32; a run's config names the one that was taken."""
    compile: bool = False
    """torch.compile the model."""
    channels_last: bool = True
    """Memory order NHWC: about 1.5 times faster on a CPU."""
    ema_decay: float = 0.0
    """Evaluate an exponential moving average of the weights with this decay per step (0 = off)."""
    ema_batch_norm: Literal["average", "recompute"] = "recompute"
    """Batch-norm statistics of the averaged weights: measured anew on training images, or averaged too (lags in short runs)."""
    sync_batch_norm: bool = False
    """Batch-norm statistics over all ranks."""
    seed: int = 0
    """Seed of weights, data order, augmentation and dropout."""
    deterministic: bool = False
    """Only deterministic kernels: a CUDA run repeats bit for bit, slower. CPU runs always repeat."""

    eval_every: float = 1.0
    """Evaluate every so many epochs, and at the end (0 = only at the end)."""
    clean_images: int = 0
    """Also evaluate on this many training images without augmentation (0 = 2,000 with MixUp or CutMix, else none)."""
    tta_share: float = field(default=0.0, metadata=LATER)
    """Also report test accuracy with six views (mirrored, shifted) of this share of the images, the least sure ones (0 = no)."""

    def __post_init__(self) -> None:
        _check_types(self)
        for name in ("data", "model", "recipe"):
            _require(self, name, bool(getattr(self, name)), "a name that is not empty")
        _at_least(self, 1, "batch_size", "image_size", "restart_growth", "muon_steps")
        _at_least(self, 0, "train_images", "micro_batch_size", "seed", "crop_padding", "cutout", "clean_images")
        _at_least(self, 0.0, "lr", "weight_decay", "min_lr", "warmup_epochs", "clip_norm", "clip_value", "eval_every")
        _at_least(self, 0.0, "bias_lr", "head_lr")
        _at_least(self, 0.0, "stop_loss", "brightness", "contrast", "saturation", "mixup_alpha", "cutmix_alpha")
        _require(self, "image_size", self.image_size <= MAX_IMAGE_SIZE, f"at most {MAX_IMAGE_SIZE}")
        _require(self, "crop_padding", self.crop_padding <= MAX_IMAGE_SIZE, f"at most {MAX_IMAGE_SIZE}")
        _require(self, "epochs", self.epochs <= MAX_EPOCHS, f"at most {MAX_EPOCHS:,}")
        for name in ("epochs", "decay_epochs", "decay_factor", "restart_epochs", "div_factor", "final_div_factor", "eps"):
            _require(self, name, getattr(self, name) > 0, "a number above 0")
        for name in ("momentum", "beta1", "beta2", "alpha", "base_momentum", "max_momentum", "ema_decay",
                     "val_fraction", "label_smoothing"):  # fmt: skip
            _require(self, name, 0 <= getattr(self, name) < 1, "a number from 0 to below 1")
        for name in ("warmup_start", "peak_at"):
            _require(self, name, 0 < getattr(self, name) <= 1, "a number above 0, at most 1")
        _require(self, "tta_share", 0 <= self.tta_share <= 1, "a number from 0 to 1")
        _require(self, "small_sides", _are_small_sides(self.small_sides),
                 "sides in pixels with rising shares of the run between 0 and 1, such as 20:0.15,24:0.5")  # fmt: skip
        _require(self, "hue", 0 <= self.hue <= 0.5, "a number from 0 to 0.5, in turns of the colour circle")
        _require(self, "seed", self.seed < 2**63, "a whole number from 0 to below 2**63")
        _require(self, "warmup_epochs", self.warmup_epochs < self.epochs, f"less than epochs={self.epochs:g}")
        if self.is_range_test:
            least = 0.0 if self.schedule == "range-linear" else 5e-324
            _require(self, "min_lr", least <= self.min_lr < self.lr, f"below lr={self.lr:g} for a range test"
                     + ", and above 0 where it grows exponentially" * (least > 0))  # fmt: skip
            _require(self, "warmup_epochs", self.warmup_epochs == 0, "0 for a range test, which is a warm-up itself")
        _require(self, "crop_padding", self.crop_mode == "zeros" or self.crop_padding < self.image_size,
                 f"less than image_size={self.image_size} for reflect padding")  # fmt: skip
        _require(self, "nesterov", not self.nesterov or self.momentum > 0, "False when momentum is 0")
        _require(self, "micro_batch_size", self.micro_batch_size <= self.batch_size,
                 f"at most batch_size={self.batch_size}")  # fmt: skip

    @property
    def is_mixing(self) -> bool:
        """Whether training images are blends, so that accuracy on them means little."""
        return self.mixup_alpha > 0 or self.cutmix_alpha > 0

    @property
    def is_range_test(self) -> bool:
        """Whether this run asks which learning rates the network bears, and not for a trained network."""
        return self.schedule.startswith("range-")

    @property
    def stages(self) -> list[tuple[int, float]]:
        """`small_sides`, read: (side in pixels, share of the run up to which images have it); afterwards they are whole."""
        pairs = (stage.split(":") for stage in self.small_sides.split(",") if stage.strip())
        return [(int(side), float(until)) for side, until in pairs]

    @property
    def hash(self) -> str:
        """Identity of the run: 12 hex digits over every field but the labels `recipe` and `lr_from`.

        A field that came LATER is in it only where it is not at its default.
        """
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)
                  if f.compare and not (f.metadata and getattr(self, f.name) == f.default)}  # fmt: skip
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]

    def differing(self, other: "TrainConfig") -> list[str]:
        """Names of the settings in which they are not equal, but for those that do not count, such as the recipe's label."""
        return [f.name for f in dataclasses.fields(self) if f.compare and getattr(self, f.name) != getattr(other, f.name)]

    def matches(self, other: "TrainConfig", *, seed: bool = True) -> bool:
        """Whether a run of the one may be a run of the other: equal, but precision `auto` is any. seed: whether it counts."""
        left_out = {"precision"} if "auto" in (self.precision, other.precision) else set()
        return not set(self.differing(other)) - (left_out if seed else left_out | {"seed"})

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The config of a JSON object; raises InputError for fields that do not exist here, or hold what they cannot."""
        known = {f.name for f in dataclasses.fields(cls)}
        for name in values:
            if name not in known:
                raise InputError(f"{cls.__name__} has no field {name!r}{did_you_mean(name, known) or ': leave it out'}")
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class WatchConfig:
    """Every setting that cannot change a number of a run: where it happens and who looks on."""

    name: str = ""
    """Name of the run's folder (default: recipe, time and config hash)."""
    runs_dir: Path = Path("runs")
    """Folder that holds the run folders."""
    data_dir: Path | None = None
    """Where data sets are looked for first (default: $CIFARLAB_DATA, then the cache folder)."""
    data_url: str = ""
    """Download the data set from here instead of the known mirrors."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps, or auto."""
    threads: int = 0
    """CPU threads (0 = torch's own choice); another number sums in another order, so the last digits differ."""
    resume: str = ""
    """auto continues the newest unfinished run of the same config; a run folder continues that run."""
    log_every: int = 20
    """Steps between two writes of rows (every step has its row; this is how often the device is read)."""
    save_every: float = 1.0
    """Epochs between two checkpoints (0 = only at the end)."""
    save_minutes: float = 10.0
    """Also save a checkpoint when this many minutes have passed since the last (0 = never)."""
    trajectory_every: float = 0.0
    """Keep the weights alone every so many epochs, from the first on, for the study of the loss landscape (0 = never)."""
    progress: Literal["auto", "bar", "lines", "none"] = "auto"
    """Live bar, plain lines, or nothing; auto is a bar in a terminal and lines elsewhere."""
    forecast: bool = True
    """Measure a few steps first and say how long the run will take."""
    figures: bool = True
    """Draw the figures at the end, and write report.html."""
    figures_every: float = 5.0
    """Also draw them every so many epochs while the run runs (0 = only at the end)."""
    probes: str = "default"
    """What to measure inside the network: none, default, all, or names such as gradient_flow,curvature (see docs/probes.md)."""
    probe_every: int = 200
    """Steps between two measurements of the probes that cost passes of their own; the cheap ones measure every step."""
    probe_include: str = ""
    """Probe only parameters whose names match one of these globs (comma-separated; default: all)."""
    probe_exclude: str = ""
    """Leave out parameters whose names match one of these globs."""
    wandb: bool | None = None
    """Mirror the run to Weights & Biases (default: when a --wandb-… flag names something)."""
    wandb_project: str = ""
    """W&B project."""
    wandb_name: str = ""
    """W&B display name (default: the run's name)."""
    wandb_entity: str = ""
    """W&B user or team that the project belongs to (default: your own)."""
    wandb_tags: str = ""
    """W&B tags, comma-separated."""
    wandb_mode: Literal["online", "offline"] = "online"
    """offline writes W&B's files to the run folder and sends nothing."""
    wandb_weights: bool = False
    """Also send the final weights to W&B, as an artifact."""
    tensorboard: bool = False
    """Mirror the run to TensorBoard: `tensorboard --logdir runs` shows it."""

    def __post_init__(self) -> None:
        _check_types(self)
        _at_least(self, 1, "log_every", "probe_every")
        _require(self, "threads", self.threads <= MAX_THREADS, f"at most {MAX_THREADS}")
        _at_least(self, 0, "threads", "save_every", "save_minutes", "trajectory_every", "figures_every")
        _require(self, "name", is_plain_name(self.name), "a plain folder name")


def is_plain_name(name: str) -> bool:
    """Whether a folder of that name lies where it is put, on any system; also true of no name."""
    is_plain = name.isprintable() and not set(name) & set('/\\\0<>:"|?*') and name not in (".", "..")
    return is_plain and name == name.strip() and len(name.encode()) <= 200  # of the 255 bytes that file systems take


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'resnet18'?` when a known name is near, else an empty string."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""


def _are_small_sides(text: str) -> bool:
    """Whether it is `side:share,…` with shares that rise, above 0 and below 1, or nothing."""
    stages = [re.fullmatch(r"\s*0*([1-9]\d{0,3})\s*:\s*(0?\.\d+)\s*", stage) for stage in text.split(",")] if text else []
    shares = [0.0, *(float(stage[2]) for stage in stages if stage)]
    return all(stages) and all(low < high for low, high in pairwise(shares))


def _require(config: object, name: str, ok: bool, allowed: str) -> None:
    if not ok:
        raise InputError(f"{name}={getattr(config, name)!r} cannot be used: it must be {allowed}")


def _at_least(config: object, least: float, *names: str) -> None:
    for name in names:
        _require(config, name, getattr(config, name) >= least, f"at least {least:g}")


def _check_types(config: object) -> None:
    """Literal choices, finite numbers, and ints widened to float where a float is declared (so that 25 and 25.0 hash alike)."""
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if get_origin(hint) is Literal:
            near = did_you_mean(str(value), get_args(hint))
            _require(config, name, value in get_args(hint), "one of " + ", ".join(get_args(hint)) + near)
            continue
        if hint is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
            object.__setattr__(config, name, value)
        if hint is Path and isinstance(value, str):
            value = Path(value)
            object.__setattr__(config, name, value)
        if get_origin(hint) is types.UnionType:
            if Path in get_args(hint) and isinstance(value, str):
                value = Path(value)
                object.__setattr__(config, name, value)
            expected: Any = get_args(hint)
        else:
            expected = hint
        ok = isinstance(value, expected) and not (isinstance(value, bool) and expected in (int, float))
        _require(config, name, ok, f"of type {getattr(hint, '__name__', hint)}")
        if isinstance(value, float):
            _require(config, name, math.isfinite(value), "a finite number")
