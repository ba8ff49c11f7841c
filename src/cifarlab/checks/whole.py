"""The recipe check as a whole: of a config, of a run, of somebody's own objects, and at the start of a training."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from cifarlab.checks import Remark, Setup, check_settings, judge
from cifarlab.checks.network import check_network, check_training
from cifarlab.checks.setup import Triple
from cifarlab.config import TrainConfig, WatchConfig
from cifarlab.data.cifar import CIFARS
from cifarlab.data.dataset import Dataset
from cifarlab.data.load import load_dataset
from cifarlab.data.splits import BUILT_IN
from cifarlab.distributed import has_native_bf16, pick_device
from cifarlab.models import create_model
from cifarlab.runs import Run, load_run


def check(
    what: TrainConfig | Run | str | Path, watch: WatchConfig | None = None, *, mean: Triple | None = None,
    std: Triple | None = None,
) -> list[Remark]:  # fmt: skip
    """Known mistakes in a config, or in a run (its folder), mistakes first; nothing is trained, downloaded or changed.

    Of built-in data sets the published facts are used, so they need not be there; a folder of one's own is read. mean, std:
    what one's own pipeline normalises with. Raises InputError for settings that cannot be used at all.
    """
    watch = watch or WatchConfig()
    run = None if isinstance(what, TrainConfig) else what if isinstance(what, Run) else load_run(what)
    config = what if isinstance(what, TrainConfig) else run.config  # type: ignore[union-attr]
    dataset = None
    if config.data not in BUILT_IN and run is None:
        dataset = load_dataset(config.data, data_dir=watch.data_dir, labels=config.labels, image_size=config.image_size,
                               statistics=config.statistics)  # fmt: skip
    device = pick_device(watch.device)
    runs_dir, num_classes, side = watch.runs_dir, 100 if config.data == "cifar100" and config.labels == "fine" else 10, 32
    if config.data == "cifar100" and config.labels == "coarse":
        num_classes = 20
    if config.data not in CIFARS:
        side = config.image_size
    if dataset is not None:
        num_classes = dataset.num_classes
    if run is not None:
        runs_dir = run.path.parent
        num_classes, side = len(run.dataset["class_names"]), run.dataset["image_size"]
    setup = Setup.of(config, dataset, runs_dir=runs_dir, bf16=has_bf16(device), path=run.path if run else None)
    if run is not None:
        result, steps = run.result, [int(row["step"]) for row in run.metrics.rows if "train/loss" in row]
        setup = replace(setup, mean=run.dataset["mean"], std=run.dataset["std"], rows=run.metrics.rows,
                        reported_step=result.get("reported_step"), last_step=steps[-1] if steps else None)  # fmt: skip
    setup = replace(setup, mean=setup.mean if mean is None else mean, std=setup.std if std is None else std)
    if std is not None and setup.mean is None:
        setup = replace(setup, mean=setup.own_mean or (0.5, 0.5, 0.5))
    model = create_model(config.model, num_classes)
    return judge([*check_settings(setup), *check_network(model, (3, side, side), fields=("model",))], config)


def check_objects(
    model: nn.Module, shape: tuple[int, ...] = (3, 32, 32), optimizer: Optimizer | None = None,
    scheduler: LRScheduler | None = None, *, num_steps: int = 0, steps_per_epoch: int = 0,
) -> list[Remark]:  # fmt: skip
    """Known mistakes in somebody's own model, optimizer and scheduler, none of which is changed; shape: one image's, C×H×W."""
    remarks = check_network(model, shape)
    remarks += check_training(model, optimizer, scheduler, num_steps=num_steps, steps_per_epoch=steps_per_epoch)
    return sorted(remarks, key=lambda remark: not remark.is_mistake)


def check_start(config: TrainConfig, dataset: Dataset, model: nn.Module, device: torch.device, path: Path) -> list[str]:
    """The recipe check at the start of a training: a line each. It never stops one, whatever goes wrong in it."""
    try:
        setup = Setup.of(config, dataset, runs_dir=path.parent, bf16=has_bf16(device), path=path)
        shape = (3, *dataset.train.images.shape[2:])
        remarks = judge([*check_settings(setup), *check_network(model, shape, fields=("model",))], config)
    except Exception as error:
        return [f"not all could be checked ({type(error).__name__}: {' '.join(str(error).split())[:120]})"]
    return [str(remark) for remark in remarks]


def has_bf16(device: torch.device) -> bool:
    """Whether the device computes in bf16; a CPU does, if not faster than in fp32 everywhere."""
    return device.type == "cpu" or has_native_bf16(device)
