"""Mistakes that show in the settings. Each rule gives its remark, or None."""

import math

from cifarlab.checks.remark import Remark
from cifarlab.checks.setup import Setup, Triple

COPIED_STD = (0.2023, 0.1994, 0.2010)  # the mean of the images' own stds, copied from repository to repository
CIFAR10_STD = (0.2470, 0.2435, 0.2616)
FLAT = 0.9  # share of the run from which on a peak leaves no time to anneal
UNFINISHED = 0.5  # of its height, at which a last cycle of restarts is cut


def wrong_statistics(setup: Setup) -> Remark | None:
    """Images are normalised with another data set's mean and std, or with the std that is often copied."""
    mean, std, config = setup.mean, setup.std, setup.config
    if mean is None or std is None:
        return None
    fields = ("statistics", "data")
    remedy = "leave --statistics at dataset" if config.statistics == "imagenet" else "use the data's own"
    if setup.own_mean is not None and setup.own_std is not None:
        remedy += f": mean {_triple(setup.own_mean)}, std {_triple(setup.own_std)}"
    if max(*mean, *std) > 1:
        return Remark(kind="mistake", rule="wrong_statistics", place="mean and std", remedy="divide both by 255",
                      told=f"{_triple(mean)} and {_triple(std)} are of pixels in 0…255, and ours are in 0…1")  # fmt: skip
    if all(math.isclose(a, b, abs_tol=0.0006) for a, b in zip(std, COPIED_STD, strict=True)):
        return Remark(kind="mistake", rule="wrong_statistics", place="std",
                      told=f"{_triple(COPIED_STD)} is the mean of single images' stds, not CIFAR-10's std",
                      remedy=f"use {_triple(CIFAR10_STD)}")  # fmt: skip
    if setup.own_mean is not None and setup.own_std is not None:
        shift = max(abs(a - b) for a, b in zip(mean, setup.own_mean, strict=True))
        scale = max(max(a / b, b / a) if min(a, b) > 0 else math.inf for a, b in zip(std, setup.own_std, strict=True))
        if shift > 0.1 or scale > 1.25:
            return Remark(kind="mistake", rule="wrong_statistics", place="mean and std", fields=fields, remedy=remedy,
                          told=f"{_triple(mean)} and {_triple(std)} are not those of {config.data}")  # fmt: skip
    if config.statistics == "imagenet":
        return Remark(kind="note", rule="wrong_statistics", place="--statistics", fields=fields, remedy=remedy,
                      told=f"ImageNet's mean and std on {config.data}, not its own")  # fmt: skip
    return None


def batch_too_large(setup: Setup) -> Remark | None:
    """A batch holds more images than there are."""
    if setup.num_images is None or setup.config.batch_size <= setup.num_images:
        return None
    return Remark(kind="mistake", rule="batch_too_large", place="--batch-size", fields=("batch_size", "data", "train_images"),
                  told=f"{setup.config.batch_size:,} is more than the {setup.num_images:,} training images: an epoch is one step",
                  remedy=f"choose at most {max(1, setup.num_images // 10):,}")  # fmt: skip


def schedule_does_not_fit(setup: Setup) -> Remark | None:
    """A one-cycle that is stepped per epoch, or a schedule whose turns lie beyond the run."""
    config, fields = setup.config, ("schedule", "schedule_per", "epochs")
    rule = "schedule_does_not_fit"
    if config.schedule == "one-cycle" and config.schedule_per == "epoch":
        return Remark(kind="mistake", rule=rule, place="--schedule-per", fields=fields, remedy="use --schedule-per step",
                      told="one-cycle moves at every step; held for an epoch it is a staircase")  # fmt: skip
    if config.schedule == "one-cycle":
        peak = config.warmup_epochs + config.peak_at * (config.epochs - config.warmup_epochs)
        if peak > FLAT * config.epochs:
            return Remark(kind="mistake", rule=rule, place="--peak-at", fields=(*fields, "peak_at", "warmup_epochs"),
                          told=f"the cycle is longer than the run: its peak at epoch {peak:.3g} of {config.epochs:g} leaves no "
                               "time to anneal", remedy="use --peak-at 0.3")  # fmt: skip
    if config.schedule == "step" and config.decay_epochs + config.warmup_epochs >= config.epochs:
        return Remark(kind="mistake", rule=rule, place="--decay-epochs", fields=(*fields, "decay_epochs"),
                      told=f"the first decay, after {config.decay_epochs:g} epochs, is beyond the run of {config.epochs:g}",
                      remedy=f"use --decay-epochs {max(1, config.epochs // 3):g}")  # fmt: skip
    if config.schedule == "restarts" and (plan := setup.schedule) is not None:
        last, turns = plan.lr_at(plan.num_steps), [1, *(step for step, _ in plan.marks())]
        height = (last - config.min_lr) / (config.lr - config.min_lr) if config.lr > config.min_lr else 0.0
        if height > UNFINISHED:
            return Remark(kind="note", rule=rule, place="--restart-epochs", fields=(*fields, "restart_epochs", "restart_growth"),
                          told=f"the run ends {plan.num_steps - turns[-1] + 1:,} steps into its last cycle, "
                               f"at {100 * height:.0f} % of the peak", remedy="let a cycle end with the run")  # fmt: skip
    return None


def lr_outside_range_test(setup: Setup) -> Remark | None:
    """The learning rate lies where the last range test of this model, data, batch size and optimizer found no ground."""
    config, test = setup.config, setup.range_test
    if test is None or config.is_range_test:
        return None
    where = str(test.path) if test.path else "the last range test"
    better = f"it suggests --lr {test.best.lr:.2g}" if test.best else "run cifarlab lr-range again"
    if config.lr >= test.diverged_at:
        told = f"{config.lr:g} is above {test.diverged_at:.2g}, where {where} broke away"
        return Remark(kind="mistake", rule="lr_outside_range_test", place="--lr", told=told, remedy=better, fields=("lr",))
    lowest = min((found.lr for found in test.suggestions), default=0.0) / 10
    if config.lr < max(lowest, test.start) or config.lr > test.end:
        told = (f"{config.lr:g} lies outside {test.start:g} … {test.end:g}, which {where} tried" if not
                test.start <= config.lr <= test.end else f"{config.lr:g} is over ten times below all that {where} suggests")
        return Remark(kind="note", rule="lr_outside_range_test", place="--lr", told=told, remedy=better, fields=("lr",))
    return None


def smoothing_with_mixing(setup: Setup) -> Remark | None:
    """Targets are softened twice: by label smoothing, and by blending images."""
    config = setup.config
    if not (config.label_smoothing and config.is_mixing):
        return None
    mixing = "MixUp" if config.mixup_alpha else "CutMix"
    return Remark(kind="note", rule="smoothing_with_mixing", place="--label-smoothing",
                  fields=("label_smoothing", "mixup_alpha", "cutmix_alpha"),
                  told=f"{mixing} softens the targets already, so they are softened twice",
                  remedy="try it with one of the two")  # fmt: skip


def fp16_where_bf16_runs(setup: Setup) -> Remark | None:
    """fp16, with its loss scaling and skipped steps, on a device that has bf16."""
    if setup.config.precision != "fp16" or not setup.bf16:
        return None
    return Remark(kind="note", rule="fp16_where_bf16_runs", place="--precision", fields=("precision",),
                  told="fp16 needs loss scaling and skips updates that overflow; this device has bf16, with fp32's range",
                  remedy="use --precision bf16")  # fmt: skip


def norms_decay(setup: Setup) -> Remark | None:
    """Weight decay pulls batch norm's scales and all biases to 0 too."""
    config = setup.config
    if not (config.weight_decay and config.decay_norms):
        return None
    return Remark(kind="note", rule="norms_decay", place="--weight-decay", fields=("weight_decay", "decay_norms"),
                  told=f"{config.weight_decay:g} is on batch-norm parameters and biases too, as in plain PyTorch",
                  remedy="--no-decay-norms spares them")  # fmt: skip


def _triple(values: Triple) -> str:
    return " ".join(f"{value:.4f}" for value in values)
