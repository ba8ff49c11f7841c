"""Training batches as a function of the step: the set lies on the device as uint8, and nothing is carried from step to step."""

import hashlib
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cifarlab.config import InputError, TrainConfig
from cifarlab.data import augment
from cifarlab.data.dataset import Split
from cifarlab.data.splits import count_steps

ADJUSTMENTS = {
    "brightness": augment.adjust_brightness,
    "contrast": augment.adjust_contrast,
    "saturation": augment.adjust_saturation,
    "hue": augment.adjust_hue,
}
"""Colour jitter, in the order applied. torchvision shuffles the four for each image; a fixed order lets them run batched."""

Draws = dict[str, NDArray[np.generic]]
"""What is random in a batch, one row an image; an augmentation that is off is absent."""


class Batches:
    """`at(step)`: the augmented batch of a step, the same pixels whatever came before and however many ranks share it.

    Order and augmentation are drawn on the CPU for the whole batch, from generators keyed by (seed, purpose, step or epoch);
    rank r of W then makes images n·r//W … n·(r+1)//W of the n. So a resume in mid-epoch is exact, and switching one augmentation
    on or off leaves the others' draws alone. An epoch shows every image once, except that a last batch of one image is left out
    (batch norm cannot use it), or with `drop_last` any last batch that is not full. A batch larger than the set is the whole set.

    Memory: the training images, padded, as uint8 on the device: 240 MB for CIFAR with padding 4.
    Raises InputError where set, batch size, ranks and image size do not fit together.
    """

    def __init__(
        self,
        split: Split,
        config: TrainConfig,
        *,
        num_classes: int,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.config, self.num_classes, self.mean, self.std, self.device = config, num_classes, tuple(mean), tuple(std), device
        self.rank, self.world_size = rank, world_size
        self.num_images = len(split)
        self.height, self.width = split.images.shape[2:]
        self.steps_per_epoch = count_steps(self.num_images, config, world_size)
        smallest = min(self.height, self.width)
        if config.cutout > smallest:
            raise InputError(
                f"cutout={config.cutout} does not fit into images of {self.height}×{self.width} pixels: choose at most {smallest}"
            )
        if config.crop_mode == "reflect" and config.crop_padding >= smallest:
            raise InputError(
                f"crop_padding={config.crop_padding} is too much to reflect in images of {self.height}×{self.width} pixels: "
                f"choose at most {smallest - 1}, or crop_mode='zeros'"
            )
        self.num_steps = self.steps_in(config.epochs)
        for side, _ in config.stages:
            if side > smallest:
                raise InputError(f"small_sides={config.small_sides!r} enlarges images of {self.height}×{self.width} pixels: "
                                 f"choose sides of at most {smallest}")  # fmt: skip
        self.images = _resident(split.images, config, device)
        self.labels = torch.tensor(split.labels, device=device)
        self._order: tuple[int, NDArray[np.int64]] = (-1, np.empty(0, np.int64))  # epoch and its permutation: only a cache
        if config.flip == "alternating":
            self._first_flip = self._generator("first flip", 0).integers(0, 2, self.num_images, dtype=np.bool_)

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """Images and labels of update `step`, counted from 1: this rank's slice of them.

        images: float32, N×3×H×W, normalised, on the device, channels_last if the config says so; H×W is `shape_at(step)`.
        labels: int64, N; with MixUp or CutMix soft targets, float32, N×K.
        """
        indices = self.indices_at(step).numpy()
        draws = self._draw(step, indices)
        n = len(indices)
        mine = np.arange(n * self.rank // self.world_size, n * (self.rank + 1) // self.world_size)
        images, labels = self._build(indices, draws, mine)
        if not self.config.is_mixing:
            return self._resize(images, step), labels

        # A partner may belong to another rank's slice, so partners are built anew, with their own crop, flip and so on.
        random = self._generator("mix", step)
        partners, partner_labels = self._build(indices, draws, random.permutation(n)[mine])
        use_mixup = random.random() < 0.5 if self.config.cutmix_alpha > 0 else True
        if self.config.mixup_alpha > 0 and use_mixup:
            share = random.beta(self.config.mixup_alpha, self.config.mixup_alpha)
            images = augment.mixup(images, partners, share)
        else:
            share = random.beta(self.config.cutmix_alpha, self.config.cutmix_alpha)
            center = int(random.integers(self.height)), int(random.integers(self.width))
            box, share = augment.cutmix_box(share, center, self.height, self.width)
            images = augment.cutmix(images, partners, box)
        return self._resize(images, step), augment.mix_labels(labels, partner_labels, share, self.num_classes)

    def range(self, start: int, stop: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of the updates start+1 … stop, for a run that has done `start` updates."""
        for step in range(start + 1, stop + 1):
            yield self.at(step)

    def steps_in(self, epochs: float) -> int:
        """The number of steps nearest to so many epochs: at least one, but 0 for 0."""
        return max(1, round(epochs * self.steps_per_epoch)) if epochs else 0

    def shape_at(self, step: int) -> tuple[int, int]:
        """Height and width of the images of update `step`: in a config's first stages they are smaller than the set's.

        A side given there is that of the shorter edge.
        """
        for side, until in self.config.stages:
            if step - 1 < until * self.num_steps:
                smallest = min(self.height, self.width)
                return round(self.height * side / smallest), round(self.width * side / smallest)
        return self.height, self.width

    def stages(self, after: int = 0) -> list[tuple[tuple[int, int], Sequence[int]]]:
        """((height, width), the updates whose images have that size), of the updates after + 1 … num_steps, in order."""
        found: list[tuple[tuple[int, int], Sequence[int]]] = []
        for until in (*(until for _, until in self.config.stages), 1.0):
            last = math.ceil(until * self.num_steps)  # the last step with step − 1 < until · num_steps
            if last > after:
                found.append((self.shape_at(last), range(after + 1, last + 1)))
                after = last
        return found

    def images_at(self, step: int) -> int:
        """How many images the batch of update `step` has over all ranks."""
        position = (step - 1) % self.steps_per_epoch
        return min(self.config.batch_size, self.num_images - position * self.config.batch_size)

    def indices_at(self, step: int) -> Tensor:
        """Which images of the set make up the batch of update `step` over all ranks: int64, on the CPU."""
        if step < 1:
            raise ValueError(f"steps are counted from 1, not {step}")
        epoch, position = divmod(step - 1, self.steps_per_epoch)
        if self._order[0] != epoch:
            self._order = (epoch, self._generator("order", epoch).permutation(self.num_images))
        first = position * self.config.batch_size
        return torch.from_numpy(self._order[1][first : first + self.config.batch_size])

    def _resize(self, images: Tensor, step: int) -> Tensor:
        shape = self.shape_at(step)
        return images if shape == images.shape[2:] else augment.resize(images, *shape)

    def _generator(self, purpose: str, number: int) -> np.random.Generator:
        # torch's CPU generator keeps 32 bits of its seed: among a million draws some hundred would coincide. Philox has 128.
        digest = hashlib.sha256(f"{self.config.seed} {purpose} {number}".encode()).digest()
        return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))

    def _draw(self, step: int, indices: NDArray[np.int64]) -> Draws:
        config, n = self.config, len(indices)
        draws: Draws = {}
        if config.crop_padding > 0:
            draws["crop"] = self._generator("crop", step).integers(0, 2 * config.crop_padding, (n, 2), endpoint=True)
        if config.flip == "random":
            draws["flip"] = self._generator("flip", step).integers(0, 2, n, dtype=np.bool_)
        elif config.flip == "alternating":
            epoch = (step - 1) // self.steps_per_epoch
            draws["flip"] = self._first_flip[indices] ^ (epoch % 2 == 1)
        for name in ADJUSTMENTS:
            strength = getattr(config, name)
            if strength > 0:
                center, least = (0.0, -strength) if name == "hue" else (1.0, max(0.0, 1 - strength))
                draws[name] = self._generator(name, step).uniform(least, center + strength, n).astype(np.float32)
        if config.cutout > 0:
            room = (self.height - config.cutout, self.width - config.cutout)
            draws["cutout"] = self._generator("cutout", step).integers(0, room, (n, 2), endpoint=True)
        return draws

    def _build(self, indices: NDArray[np.int64], draws: Draws, chosen: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Augmented images and labels of these places in the batch."""
        config = self.config
        rows = self._send(indices[chosen])
        draw = {name: self._send(values[chosen]) for name, values in draws.items()}
        offsets = draw["crop"] if "crop" in draw else torch.zeros(len(chosen), 2, dtype=torch.int64, device=self.device)
        images = augment.cut_windows(self.images, rows, offsets, self.height, self.width)
        if "flip" in draw:
            images = augment.flip(images, draw["flip"])
        images = images.contiguous(memory_format=augment.memory_format(config.channels_last))  # cheapest while they are bytes
        if ADJUSTMENTS.keys() & draw.keys():
            images = images.float() * (1 / 255)  # a GPU would divide by a constant so too, a CPU would not
            for name, adjust in ADJUSTMENTS.items():
                if name in draw:
                    images = adjust(images, draw[name])
        images = augment.normalize(images, self.mean, self.std)
        if "cutout" in draw:
            images = augment.cutout(images, draw["cutout"], config.cutout)
        return images, self.labels[rows]

    def _send(self, array: NDArray[np.generic]) -> Tensor:
        tensor = torch.from_numpy(array)
        if self.device.type != "cuda":
            return tensor.to(self.device)
        return tensor.pin_memory().to(self.device, non_blocking=True)  # from unpinned memory it would wait for the GPU


def _resident(images: NDArray[np.uint8], config: TrainConfig, device: torch.device) -> Tensor:
    """The padded set on the device, N×3×H×W in channels_last memory, filled in pieces so that no second copy is ever whole."""
    n, channels, height, width = images.shape
    extra = 2 * config.crop_padding
    resident = torch.empty(
        (n, channels, height + extra, width + extra), dtype=torch.uint8, device=device, memory_format=torch.channels_last
    )
    for first in range(0, n, 4096):
        piece = torch.tensor(images[first : first + 4096]).to(device)
        resident[first : first + 4096] = augment.pad(piece, config.crop_padding, config.crop_mode)
    return resident
