"""Images per second of the batched augmentation, beside the usual way: PIL per image in a torch DataLoader.

    python benchmarks/augment.py [--json] [--device cuda] [--batch-size 512]

Pixels are random bytes at 3×32×32; nothing is downloaded. The ways take turns, so that a slow moment of the machine hits all
alike, and the median over the rounds is printed. Takes under a minute; on a busy machine the figures mean little.
"""

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cifarlab.config import TrainConfig
from cifarlab.data.augment import mix_labels, mixup
from cifarlab.data.batches import Batches
from cifarlab.data.dataset import Split
from machine import describe_machine

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
JITTER_CUTOUT = {"brightness": 0.2, "contrast": 0.2, "saturation": 0.2, "cutout": 16}
CHAINS: dict[str, dict[str, float]] = {
    "crop + flip + normalise": {},
    "… + jitter + cutout": JITTER_CUTOUT,
    "… + mixup": {**JITTER_CUTOUT, "mixup_alpha": 1.0},
}


class PerImage(Dataset[tuple[Tensor, int]]):
    """What people write: every image through PIL, by itself, when the loader asks for it."""

    def __init__(self, split: Split, config: TrainConfig) -> None:
        self.split, self.config = split, config
        self.mean, self.std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        config, p, draw = self.config, self.config.crop_padding, torch.rand(7).tolist()
        image = Image.fromarray(np.ascontiguousarray(self.split.images[index].transpose(1, 2, 0)))
        height, width = image.height, image.width
        y, x = (int(u * (2 * p + 1)) for u in draw[:2])
        image = ImageOps.expand(image, p).crop((x, y, x + width, y + height))
        if draw[2] < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if config.brightness > 0:
            image = ImageEnhance.Brightness(image).enhance(1 + config.brightness * (2 * draw[3] - 1))
            image = ImageEnhance.Contrast(image).enhance(1 + config.contrast * (2 * draw[4] - 1))
            image = ImageEnhance.Color(image).enhance(1 + config.saturation * (2 * draw[5] - 1))
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div_(255).sub_(self.mean).div_(self.std)
        if config.cutout > 0:
            top, left = int(draw[6] * (height - config.cutout + 1)), int(draw[0] * (width - config.cutout + 1))
            pixels[:, top : top + config.cutout, left : left + config.cutout] = 0
        return pixels, int(self.split.labels[index])


def per_image_batches(split: Split, config: TrainConfig, device: torch.device, workers: int) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of the DataLoader; its workers end with it."""
    pinned = device.type == "cuda"
    loader = DataLoader(PerImage(split, config), config.batch_size, shuffle=True, num_workers=workers, pin_memory=pinned)
    for batch, classes in loader:
        images, labels = batch.to(device, non_blocking=True), classes.to(device, non_blocking=True)
        if config.mixup_alpha > 0:
            share, partner = float(np.random.beta(config.mixup_alpha, config.mixup_alpha)), torch.randperm(len(images))
            labels = mix_labels(labels, labels[partner], share, 10)
            images = mixup(images, images[partner], share)
        yield images, labels


def timed(batches: Iterator[object], ahead: int, seconds: float, batch_size: int, device: torch.device) -> float:
    """Images per second over about this many seconds, after the batches that workers make ahead of demand."""
    for _ in range(ahead + 1):
        next(batches)
    if device.type == "cuda":
        torch.cuda.synchronize()
    count, start = 0, time.perf_counter()
    while count < 3 or time.perf_counter() - start < seconds:
        next(batches)
        count += 1
        if device.type == "cuda" and count % 50 == 0:
            torch.cuda.synchronize()  # else the clock would see only how fast work is queued
    if device.type == "cuda":
        torch.cuda.synchronize()
    return count * batch_size / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument("--device", default="cpu", help="where our batches are made and the DataLoader's are sent")
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    device, size = torch.device(arguments.device), arguments.batch_size
    warnings.filterwarnings("ignore", message=".*worker processes.*")  # two workers on one core: slow, but what was asked for

    random = np.random.default_rng(0)
    num_images = max(50_000, 64 * size)  # an epoch longer than any turn
    images = random.integers(0, 256, (num_images, 3, 32, 32), dtype=np.uint8)
    split = Split(images, random.integers(0, 10, num_images))
    ours = "batched"
    makers: dict[tuple[str, str], tuple[Callable[[], Iterator[object]], int]] = {}
    for chain, fields in CHAINS.items():
        config = TrainConfig(batch_size=size, drop_last=True, **fields)  # type: ignore[arg-type]  # only floats and ints here
        batches = Batches(split, config, num_classes=10, mean=MEAN, std=STD, device=device)
        makers[chain, ours] = (partial(batches.range, 0, 10**9), 0)
        for workers in (0, 2):
            theirs = partial(per_image_batches, split, config, device, workers)
            makers[chain, f"DataLoader, {workers} workers"] = (theirs, 2 * workers)  # two batches a worker lie ready

    speeds: dict[tuple[str, str], list[float]] = {key: [] for key in makers}
    for _ in range(arguments.rounds):
        for key, (start, ahead) in makers.items():
            speeds[key].append(timed(start(), ahead, 0.3, size, device))  # its workers end before the next begins
    medians = {key: statistics.median(values) for key, values in speeds.items()}

    machine = describe_machine(device)
    if arguments.json:
        rows = [
            {"chain": chain, "way": way, "images_per_second": round(speed), "batched_over_this": medians[chain, ours] / speed,
             "rounds": [round(value) for value in speeds[chain, way]]}
            for (chain, way), speed in medians.items()
        ]  # fmt: skip
        print(json.dumps({"machine": machine, "device": str(device), "batch_size": size, "results": rows}, indent=1))
        return
    print(", ".join(f"{name} {value}" for name, value in machine.items() if value is not None))
    print(f"device {device}, batch {size} at 3×32×32, median of {arguments.rounds} rounds in turns, images per second\n")
    for (chain, way), speed in medians.items():
        note = "" if way == ours else f"   batched is {medians[chain, ours] / speed:.1f} times as fast"
        print(f"{chain if way == ours else '':26}{way:24}{speed:>11,.0f}{note}")


if __name__ == "__main__":
    main()
