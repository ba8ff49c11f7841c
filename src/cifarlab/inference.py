"""A run put to use: its network loaded again, evaluated again, asked about new images."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from cifarlab.checkpoint import averaged_or_plain, find_checkpoints, load_newest, load_weights
from cifarlab.config import InputError, WatchConfig
from cifarlab.data.dataset import Split
from cifarlab.data.folder import read_image
from cifarlab.data.load import load_dataset
from cifarlab.data.splits import split_dataset
from cifarlab.distributed import autocast, autocast_dtype, pick_device
from cifarlab.evaluate import Evaluation, build_evaluation, predict_logits
from cifarlab.models import create_model
from cifarlab.probes.incident import Located, load_incident, locate
from cifarlab.runs import Run, load_run


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of one image, best first, with their probabilities (0…1)."""

    image: Path
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]


def load_model(run: Run | str | Path) -> nn.Module:
    """The network behind a run's reported numbers, in evaluation mode on the CPU; of an unfinished run, the last checkpoint's.

    Raises InputError when the run has no weights, or weights of another network.
    """
    run = run if isinstance(run, Run) else load_run(run)
    final = run.path / "model.safetensors"
    if final.exists():
        weights = load_weights(final)
    else:
        found = find_checkpoints(run.path / "checkpoints")
        if not found:
            raise InputError(f"{run.path} has no weights yet, neither model.safetensors nor a checkpoint: train it on")
        _, plain, trainer = load_newest(run.path / "checkpoints")
        weights = averaged_or_plain(plain, trainer)
    model = create_model(run.config.model, len(run.dataset["class_names"]))
    try:
        model.load_state_dict(weights)
    except RuntimeError:
        told = f"the weights in {run.path} do not fit its model {run.config.model!r}: the folder mixes two runs, train anew"
        raise InputError(told) from None
    if run.config.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model.eval()


def name_weights(run: Run) -> str:
    """Which weights `load_model` takes of a run that has not finished."""
    if (run.path / "model.safetensors").exists():
        return "its last weights"
    return f"its checkpoint {load_newest(run.path / 'checkpoints', tells=False)[0].name}"


@dataclass(frozen=True)
class Replay:
    """A step done again: where its numbers first stopped being finite, or that they did not.

    images: numbers of the bad samples in the run's training set; parameters: those whose gradient is not finite.
    """

    step: int
    loss: float
    located: Located | None
    images: tuple[int, ...]
    parameters: tuple[str, ...]


def replay_incident(run: Run, step: int) -> Replay:
    """Forward and backward pass of a kept incident again, with its weights and batch, on the CPU.

    Raises InputError when that step was not kept, or the run was watched and so has no network to build.
    """
    if run.is_watched:
        raise InputError(f"{run.path} was recorded by cl.watch, so its network cannot be built here to replay step {step}: load "
                         "incidents/ with cifarlab.probes.incident.load_incident where your model is")  # fmt: skip
    from cifarlab.train import fold_seed

    config = run.config
    weights, batch, _ = load_incident(run.path, step)
    model = create_model(config.model, len(run.dataset["class_names"]))
    try:
        model.load_state_dict(weights)
        images, labels = batch["images"], batch["labels"]
        indices = batch.get("indices", torch.empty(len(images)))
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError
        if not len(images) == len(labels) == len(indices):
            raise ValueError
        if labels.dtype == torch.int64 and not 0 <= labels.min() <= labels.max() < len(run.dataset["class_names"]):
            raise ValueError
    except (RuntimeError, KeyError, ValueError, TypeError, IndexError):
        told = f"the incident of step {step} in {run.path} does not fit its model {config.model!r}: the folder mixes two runs"
        raise InputError(f"{told}, so name another step") from None
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    criterion = partial(F.cross_entropy, label_smoothing=config.label_smoothing)
    size = config.micro_batch_size or len(images)
    loss = 0.0
    with torch.random.fork_rng([]):
        torch.manual_seed(fold_seed(config.seed, "dropout", step, 0))
        for piece, targets in zip(torch.split(images, size), torch.split(labels, size), strict=True):
            with autocast(torch.device("cpu"), config.precision):
                part = criterion(model(piece).float(), targets, reduction="sum") / len(images)
            part.backward()  # type: ignore[no-untyped-call]
            loss += float(part.detach())
    bad = tuple(name for name, p in model.named_parameters() if p.grad is not None and not torch.isfinite(p.grad).all())
    located = None
    if bad or not np.isfinite(loss):
        located = locate(model, images, labels, criterion, sizes=[len(p) for p in torch.split(images, size)],
                         dtype=autocast_dtype(config.precision))  # fmt: skip
        if located.place == "unknown" and np.isfinite(loss):  # with dropout, as here, it is there all the same
            located = Located("backward", bad[-1])
    numbers = batch["indices"].tolist() if "indices" in batch else []
    return Replay(step, loss, located, tuple(numbers[k] for k in located.samples) if located and numbers else (), bad)


def evaluate_run(run: Run | str | Path, split: str = "test", watch: WatchConfig | None = None) -> tuple[Evaluation, Split]:
    """(all scores, the images scored) of a run's network on a split of its data: test, train, or val where one was held out.

    Training images are evaluated without augmentation. Raises InputError when the data is not at hand, or there is no such split.
    """
    run, watch = run if isinstance(run, Run) else load_run(run), watch or WatchConfig()
    config = run.config
    dataset = load_dataset(config.data, data_dir=watch.data_dir, data_url=watch.data_url, labels=config.labels,
                           image_size=config.image_size, statistics=config.statistics)  # fmt: skip
    if dataset.fingerprint != run.dataset["fingerprint"]:
        raise InputError(f"{config.data} is not the data that {run.path} was trained on (its content differs): bring that back, "
                         "or use predict for new images")  # fmt: skip
    splits = split_dataset(dataset, config)
    if split not in splits:
        raise InputError(f"{run.path} has no split {split!r}: choose {', '.join(splits)}")
    device = pick_device(watch.device)
    logits = predict_logits(load_model(run).to(device), splits[split].images, mean=dataset.mean, std=dataset.std, device=device,
                            precision=config.precision, channels_last=config.channels_last)  # fmt: skip
    return build_evaluation(split, logits, splits[split].labels), splits[split]


def predict(run: Run | str | Path, images: Sequence[str | Path], *, top: int = 5, device: str = "auto") -> list[Prediction]:
    """The `top` most probable classes of image files, each converted to RGB and resized as in training.

    Raises InputError for a file that is missing or no image.
    """
    if not images:
        return []
    run = run if isinstance(run, Run) else load_run(run)
    facts, where = run.dataset, pick_device(device)
    with warnings.catch_warnings(action="ignore"):  # Pillow's remarks on odd but readable files
        pixels = np.stack([read_image(Path(image), facts["image_size"]) for image in images])
    logits = predict_logits(load_model(run).to(where), pixels, mean=facts["mean"], std=facts["std"], device=where,
                            channels_last=run.config.channels_last)  # fmt: skip
    top = min(top, logits.shape[1])
    best = logits.softmax(1).topk(top)
    return [
        Prediction(Path(image), tuple(facts["class_names"][k] for k in classes), tuple(probabilities))
        for image, classes, probabilities in zip(images, best.indices.tolist(), best.values.tolist(), strict=True)
    ]
