"""What the rules look at: a config, and what is known of its data, machine and past runs. No torch here."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

from cifarlab.config import InputError, TrainConfig
from cifarlab.data.cifar import CIFARS
from cifarlab.data.dataset import Dataset, measure_statistics
from cifarlab.data.load import IMAGENET_MEAN, IMAGENET_STD
from cifarlab.data.splits import BUILT_IN, count_train_images
from cifarlab.lr_curve import LrRange, find_range
from cifarlab.optim.schedules import Schedule, build_schedule
from cifarlab.runs import Row

Triple = Sequence[float]
MOST_RUNS = 200  # of a runs folder, the newest, whose configs are read
MEASURED = 2000  # images that the statistics of somebody's own data are measured on


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A config and its surroundings; what is None or empty is not known, and rules that need it keep silent.

    num_images: training images. mean, std: what images are normalised with; own_mean, own_std: those of the data. bf16: whether
    the device computes in it. range_test: the newest of the family. others: configs of finished runs of the same model on the
    same data. rows, reported_step, last_step: of a run that is looked at, or that is running.
    """

    config: TrainConfig
    num_images: int | None = None
    mean: Triple | None = None
    std: Triple | None = None
    own_mean: Triple | None = None
    own_std: Triple | None = None
    bf16: bool | None = None
    range_test: LrRange | None = None
    others: tuple[TrainConfig, ...] = ()
    rows: Sequence[Row] = field(default=(), repr=False)
    reported_step: int | None = None
    last_step: int | None = None

    @classmethod
    def of(cls, config: TrainConfig, dataset: Dataset | None = None, *, runs_dir: Path | None = None, bf16: bool | None = None,
           path: Path | None = None) -> Self:  # fmt: skip
        """The surroundings of a config: of built-in data by what is known of them, so that nothing is read or downloaded.

        path: the run's own folder, which is not among the others.
        """
        setup = cls(config=config, bf16=bf16)
        if dataset is not None or config.data in BUILT_IN:
            setup = replace(setup, num_images=count_train_images(config, dataset))
        if config.data in CIFARS:
            setup = replace(setup, own_mean=CIFARS[config.data].mean, own_std=CIFARS[config.data].std)
        elif dataset is not None:
            images = dataset.train.images
            own_mean, own_std = measure_statistics(images[:: max(1, len(images) // MEASURED)])
            setup = replace(setup, own_mean=own_mean, own_std=own_std)
        if dataset is not None:
            setup = replace(setup, mean=dataset.mean, std=dataset.std)
        elif config.statistics == "imagenet":
            setup = replace(setup, mean=IMAGENET_MEAN, std=IMAGENET_STD)
        if runs_dir is not None and runs_dir.is_dir():
            setup = replace(setup, range_test=find_range(runs_dir, config.to_dict()), others=find_others(runs_dir, config, path))
        return setup

    @property
    def schedule(self) -> Schedule | None:
        """The plan of the learning rate, where the number of images is known; of its length any number of steps tells enough."""
        per_epoch = max(1, -(-(self.num_images or 0) // self.config.batch_size))
        return build_schedule(self.config, per_epoch, max(1, round(self.config.epochs * per_epoch))) if self.num_images else None


def find_others(runs_dir: Path, config: TrainConfig, path: Path | None) -> tuple[TrainConfig, ...]:
    """Configs of finished runs of the same model on the same data that report a test accuracy, but for the run in `path`."""
    found = []
    paths = sorted(runs_dir.glob("*/config.json"), key=lambda each: each.stat().st_mtime_ns, reverse=True)
    for each in paths[:MOST_RUNS]:
        try:
            other = TrainConfig.from_dict(json.loads(each.read_bytes()))
            result = json.loads((each.parent / "result.json").read_bytes())
            is_alike = all(getattr(other, name) == getattr(config, name) for name in ("data", "labels", "model"))
            if is_alike and "test/accuracy" in result and (path is None or each.parent.resolve() != path.resolve()):
                found.append(other)
        except (InputError, OSError, ValueError, TypeError, AttributeError, RecursionError):
            continue  # another version's run, an unfinished or a damaged one
    return tuple(found)
