"""Run folders as a training leaves them, made of numbers in milliseconds."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cifarlab.config import TrainConfig
from cifarlab.evaluate import build_evaluation, save_evaluation, save_samples
from cifarlab.records import Measured
from cifarlab.runs import Run, RunFolder
from cifarlab.thumbnails import save_thumbnails

NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
LAYERS = {"conv1.weight": (8, 3, 3, 3), "conv2.weight": (8, 8, 3, 3), "bn.weight": (8,), "fc.weight": (10, 8), "fc.bias": (10,)}
# Rises until the eighth epoch, then moves up and down by a tenth of a point: neither a plateau nor still improving.
CURVE = (0.50, 0.60, 0.68, 0.74, 0.79, 0.83, 0.87, 0.899, 0.900, 0.899, 0.901, 0.900)


def calibrated_logits(n: int = 2000, num_classes: int = 10, seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """(logits, labels) of a model that is right on 90 % and means what it says: labels are drawn from its probabilities."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, num_classes))
    logits[np.arange(n), rng.integers(0, num_classes, n)] += rng.uniform(2, 12, n)
    labels = (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)
    return logits.astype(np.float32), labels


def make_run(
    folder: Path, *, config: TrainConfig | None = None, curve: Sequence[float] = CURVE, train: float = 0.91,
    logits: Any = None, labels: Any = None, names: Sequence[str] = NAMES, images: Any = None,
    ratio: Mapping[str, float] | None = None, gradient: Mapping[str, float] | None = None,
    alarms: Sequence[dict[str, Any]] = (), result: Mapping[str, Any] | None = None,
    environment: Mapping[str, Any] | None = None, dataset: Mapping[str, Any] | None = None, speeds: Sequence[float] = (),
    epoch_seconds: float = 10.5, is_finished: bool = True, thumbnails: bool = True,
) -> Run:  # fmt: skip
    """A finished training of ten steps an epoch on CIFAR-10, healthy but for what is given.

    curve: test accuracy after each epoch (the last is replaced by the evaluation's); train: training accuracy at the end;
    ratio, gradient: ‖Δw‖/‖w‖ and mean |g| of layers that are not at 1e-3.
    """
    config = config or TrainConfig(epochs=float(len(curve)), recipe="custom")
    if logits is None:
        logits, labels = calibrated_logits(num_classes=len(names))
    evaluation = build_evaluation("test", logits, labels)
    steps = np.arange(1, 10 * len(curve) + 1)
    probed = [{"name": name, "shape": list(shape), "trainable": True} for name, shape in LAYERS.items()]
    layers = [{"name": "conv1", "kind": "Conv2d", "forward_macs": 1_000_000}, {"name": "conv2", "kind": "Conv2d",
               "forward_macs": 3_000_000}, {"name": "bn", "kind": "BatchNorm2d", "forward_macs": 0}]  # fmt: skip
    with RunFolder(folder) as run:
        run.write_json("config.json", config.to_dict())
        run.write_json("environment.json", {
            "versions": {"cifarlab": "0.1.0", "torch": "2.13.0", "python": "3.11.7"}, "device": "a CPU", "parameters": 874,
            "forward_macs": 4_000_000, "num_steps": len(steps), "steps_per_epoch": 10, "command": ["cifarlab", "train"],
            "git": {"commit": "0123456789abcdef", "changed": False}, **(environment or {})})  # fmt: skip
        run.write_json("dataset.json", {
            "name": "cifar10", "source": "CIFAR-10, python version, in /data", "fingerprint": "f" * 32,
            "class_names": list(names), "mean": [0.5] * 3, "std": [0.25] * 3, "image_size": 32, "num_train": 640,
            "num_test": len(evaluation.labels),
            **(dataset or {})})  # fmt: skip
        run.write_json("probes.json", {"probes": ["gradient_flow", "update_flow"], "every": 200, "parameters": probed})
        run.write_json("cost.json", {"layers": layers})
        for step in steps.tolist():
            run.rows([{"step": step, "lr": 0.1, "train/loss": 1 / step, "train/accuracy": train}])
            if step % 10 == 0:
                epoch, last = step // 10, step == len(steps)
                scores = evaluation.top1 if last and is_finished else curve[epoch - 1]
                run.rows([{"step": step, "epoch": float(epoch), "train_epoch/accuracy": train, "train_epoch/loss": 1 / step,
                           "test/loss": 1 / step, "test/accuracy": scores, "time/train_seconds": 10.0 * epoch,
                           "time/images_per_second": speeds[epoch - 1] if speeds else 64.0,
                           "time/epoch_seconds": epoch_seconds}])  # fmt: skip
        for name, column, given in (("update_flow", "ratio", ratio), ("gradient_flow", "mean_abs", gradient)):
            values = np.array([(given or {}).get(layer, 1e-3) for layer in LAYERS])
            run.table(Measured(name, tuple(LAYERS), (column,), steps, np.tile(values, (len(steps), 1))[:, :, None]))
        for alarm in alarms:
            run.alarm(alarm)
        if is_finished:
            save_evaluation(folder, evaluation, names)
            if images is not None:
                save_samples(folder, evaluation, images, names)
                if thumbnails:
                    save_thumbnails(folder, evaluation, images)
            run.write_json("result.json", {
                "state": "finished", "step": len(steps), "reported_step": len(steps), "test/accuracy": evaluation.top1,
                "test/loss": evaluation.loss, "test/top5": evaluation.top5, "val/accuracy": None,
                "train_seconds": 10.0 * len(curve), "probe_share": 0.01, **(result or {})})  # fmt: skip
        elif result is not None:
            run.write_json("result.json", dict(result))
    return Run(folder)

