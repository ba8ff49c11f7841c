"""How long the report of a long run takes, and how large it is: 30 epochs of ResNet-18 on CIFAR-10, every step probed.

    python benchmarks/report.py [FOLDER]

The run folder is made up (smooth curves with noise, no training): 23,460 steps × 62 parameter tensors, 10,000 test images.
Limits: 5 seconds from the start of the process, without torch, and 8 MB. Prints a line for each of three processes, and how many
characters each section's data take. docs/performance.md has the numbers.
"""

import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cifarlab.evaluate import build_evaluation, save_evaluation
from cifarlab.recipes import load_recipe
from cifarlab.records import Measured
from cifarlab.runs import RunFolder
from cifarlab.thumbnails import save_thumbnails

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
GRADIENT = ("mean_abs", "max_abs", "norm", "clipped_mean_abs", "clipped_max_abs", "clipped_norm", "zero_share", "non_finite")
UPDATE = ("norm", "ratio", "mean", "mean_abs", "max_abs", "variance")
WEIGHT = ("mean", "mean_abs", "max_abs", "norm", "variance")


def resnet18_shapes() -> dict[str, list[int]]:
    """Parameter tensors of ResNet-18 with the CIFAR stem, in order."""
    shapes: dict[str, list[int]] = {"conv1.weight": [64, 3, 3, 3], "bn1.weight": [64], "bn1.bias": [64]}
    before = 64
    for stage, width in enumerate((64, 128, 256, 512), start=1):
        for block in (0, 1):
            name = f"layer{stage}.{block}"
            for k, channels in ((1, before), (2, width)):
                shapes |= {f"{name}.conv{k}.weight": [width, channels, 3, 3], f"{name}.bn{k}.weight": [width],
                           f"{name}.bn{k}.bias": [width]}  # fmt: skip
            if before != width:
                shapes |= {f"{name}.shortcut.0.weight": [width, before, 1, 1], f"{name}.shortcut.1.weight": [width],
                           f"{name}.shortcut.1.bias": [width]}  # fmt: skip
            before = width
    return shapes | {"linear.weight": [10, 512], "linear.bias": [10]}


def make_run(path: Path, *, steps: int = 23_460, per_epoch: int = 782, shapes: dict[str, list[int]] | None = None,
             class_names: Sequence[str] = CLASSES, num_test: int = 10_000, side: int = 32, name: str = "cifar10",
             alarms: Sequence[dict[str, Any]] = (), seed: int = 0) -> Path:  # fmt: skip
    """A finished run's folder with made-up numbers of the right sizes and shapes."""
    rng = np.random.default_rng(seed)
    shapes = resnet18_shapes() if shapes is None else shapes
    config = replace(load_recipe("resnet18-adam"), epochs=steps / per_epoch, seed=seed)
    names, at = tuple(shapes), np.arange(1, steps + 1)
    loss = 2.3 * np.exp(-3 * at / steps) * np.exp(rng.normal(0, 0.1, steps))
    lr = 1e-3 * (1 + np.cos(np.pi * at / steps)) / 2
    rows = [{"step": int(k), "lr": float(rate), "train/loss": float(value), "train/accuracy": float(min(1, np.exp(-value)))}
            for k, rate, value in zip(at, lr, loss, strict=True)]  # fmt: skip
    epochs = [{"step": k, "epoch": k / per_epoch, "train_epoch/loss": float(loss[k - per_epoch : k].mean()),
               "train_epoch/accuracy": 0.8, "test/loss": float(1.1 * loss[k - 1]), "test/accuracy": 0.5 + 0.4 * k / steps,
               "time/train_seconds": 0.05 * k, "time/images_per_second": 1000.0, "time/epoch_seconds": 0.055 * per_epoch}
              for k in range(per_epoch, steps + 1, per_epoch)]  # fmt: skip
    with RunFolder(path) as folder:
        folder.write_json("config.json", config.to_dict())
        folder.write_json("environment.json", {
            "versions": {"python": "3.11.7", "cifarlab": "0.1.0", "torch": "2.13.0"}, "device": "one imagined processor",
            "processor": "imagined", "cores": 2, "platform": "nowhere", "threads": 1, "ranks": 1, "git": None,
            "command": ["cifarlab", "train", "resnet18-adam"], "parameters": 11_173_962, "forward_macs": 555_422_720,
            "input_shape": [3, side, side], "num_steps": steps, "steps_per_epoch": per_epoch})  # fmt: skip
        folder.write_json("dataset.json", {
            "name": name, "source": "made up", "fingerprint": "0", "class_names": list(class_names), "mean": [0.5] * 3,
            "std": [0.25] * 3, "image_size": side, "num_train": 50_000, "num_test": num_test})  # fmt: skip
        folder.write_json("probes.json", {
            "probes": ["gradient_flow", "update_flow", "weight_flow"], "every": 200, "num_classes": len(class_names),
            "parameters": [{"name": key, "shape": shape, "trainable": True} for key, shape in shapes.items()]})  # fmt: skip
        base = np.exp(rng.normal(-6, 1, len(names)))
        for table, columns in (("gradient_flow", GRADIENT), ("update_flow", UPDATE), ("weight_flow", WEIGHT)):
            values = np.empty((steps, len(names), len(columns)))
            noise = np.exp(rng.normal(0, 0.3, (steps, len(names))))
            for k, column in enumerate(columns):
                values[:, :, k] = 0 if column in ("zero_share", "non_finite") else base * noise * (1 + k)
            folder.table(Measured(table, names, columns, at.astype(np.int64), values))
        both = sorted([*rows, *epochs], key=lambda row: (row["step"], len(row) > 5))
        folder.rows(both)
        for alarm in alarms:
            folder.alarm(alarm)
        layers = [_layer(key.removesuffix(".weight"), shape) for key, shape in shapes.items() if len(shape) > 1]
        whole = sum(layer["forward_flops"] for layer in layers)
        fields = {layer["name"]: {"size": [3 + 2 * k, 3 + 2 * k], "stride": [1 + k // 8] * 2} for k, layer in enumerate(layers)}
        folder.write_json("cost.json", {
            "model": "ResNet", "rule": "1 MAC (multiply-add) = 2 FLOP", "input_shapes": [[1, 3, side, side]], "notes": [],
            "layers": layers, "receptive_fields": fields,
            "total": {"parameters": 11_173_962, "forward_flops": whole, "forward_macs": whole // 2}})  # fmt: skip
        labels = np.arange(num_test) % len(class_names)
        logits = rng.normal(0, 1.5, (num_test, len(class_names)))
        logits[np.arange(num_test), labels] += 4
        evaluation = build_evaluation("test", logits, labels)
        images = rng.integers(0, 256, (num_test, 3, 8, 8), dtype=np.uint8).repeat(side // 8, 2).repeat(side // 8, 3)
        save_evaluation(path, evaluation, class_names)
        save_thumbnails(path, evaluation, images)
        folder.write_json("result.json", {
            "state": "finished", "step": steps, "reported_step": steps, "test/loss": evaluation.loss,
            "test/accuracy": evaluation.top1, "test/top5": evaluation.top5, "val/accuracy": None,
            "train_seconds": 0.05 * steps, "probe_share": 0.008})  # fmt: skip
    return path


def _layer(name: str, shape: list[int]) -> dict[str, Any]:
    macs = int(np.prod(shape, dtype=np.int64)) * 64
    return {"name": name, "kind": "Conv2d" if len(shape) == 4 else "Linear", "what": "", "output_shape": [1, shape[0], 8, 8],
            "calls": 1, "parameters": macs // 64, "forward_macs": macs, "forward_flops": 2 * macs}  # fmt: skip


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(temporary) / "resnet18"
        if not (place / "result.json").exists():
            make_run(place)
        code = ("import sys; from cifarlab.cli import main; main(sys.argv[1:]); "
                "sys.exit('torch was imported' if 'torch' in sys.modules else 0)")  # fmt: skip
        for number in range(3):
            begun = time.perf_counter()
            subprocess.run([sys.executable, "-c", code, "report", str(place)], check=True, stdout=subprocess.DEVNULL)
            size = (place / "report.html").stat().st_size
            print(f"process {number + 1}: {time.perf_counter() - begun:.2f} s, {size / 1e6:.2f} MB")
        page = (place / "report.html").read_text(encoding="utf-8")
        for section, data in re.findall(r'<script type="application/json" id="data-([a-z-]+)">(.*?)</script>', page):
            print(f"  {section:16} {len(data):9,} characters, {len(json.loads(data)['charts'])} charts")


if __name__ == "__main__":
    main()
