"""A data set in memory: two splits of uint8 images, labels, class names and the statistics used. No torch here."""

from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

from cifarlab.config import InputError


@dataclass(frozen=True)
class Split:
    """Images and labels of one split.

    images: uint8, N×3×H×W (usually memory-mapped and read-only); labels: int64, N, each in 0…K−1.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: NDArray[np.int64]) -> Self:
        """The split made of these images, in this order."""
        return replace(self, images=self.images[indices], labels=self.labels[indices])


@dataclass(frozen=True)
class Dataset:
    """What `load_dataset` returns.

    mean, std: of the pixels in 0…1, per channel R, G, B: the statistics used for normalisation.
    source: a line for people, saying what was found and where.
    fingerprint: hash of the decoded content, so that a run can tell whether its data changed.
    """

    name: str
    source: str
    train: Split
    test: Split
    class_names: tuple[str, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    fingerprint: str

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


@dataclass(frozen=True)
class Decoded:
    """What a source gives before a choice of labels: the images of both splits and every set of labels it has.

    train_images, test_images: uint8, N×3×H×W. train_labels, test_labels, class_names: one entry for each set of labels,
    "fine" always, "coarse" for CIFAR-100. what: a few words for people (layout, number of images, official or not).
    """

    train_images: NDArray[np.uint8]
    test_images: NDArray[np.uint8]
    train_labels: dict[str, NDArray[np.int64]]
    test_labels: dict[str, NDArray[np.int64]]
    class_names: dict[str, tuple[str, ...]]
    what: str


MAX_BYTES = 16 << 30  # of a decoded set: it has to fit into memory


def check_size(num_images: int, image_size: int, where: str) -> None:
    """Raises InputError where so many images would take more than MAX_BYTES."""
    if num_images * 3 * image_size**2 > MAX_BYTES:
        raise InputError(
            f"{num_images:,} images of {where} at {image_size}×{image_size} need more than {MAX_BYTES >> 30} GiB: "
            "use a smaller image_size"
        )


def measure_statistics(images: NDArray[np.uint8]) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """(mean, std) of each channel over all pixels of all images, in 0…1; images: uint8, N×3×H×W, N ≥ 1.

    Exact: the 256 grey levels are counted, so no sum of floats depends on the order. Not the mean of per-image stds,
    the slip behind the often copied 0.2023 0.1994 0.2010 for CIFAR-10.
    """
    levels = np.arange(256) / 255
    mean, std = [], []
    for channel in range(3):
        counts = np.zeros(256, np.int64)
        for start in range(0, len(images), 4096):  # bincount widens its input to int64: in pieces, not 8 times the set
            counts += np.bincount(images[start : start + 4096, channel].ravel(), minlength=256)
        share = counts / counts.sum()
        mean.append(float(share @ levels))
        std.append(float(np.sqrt(share @ (levels - mean[-1]) ** 2)))
    return (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])


def hold_out(labels: NDArray[np.int64], fraction: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(training, validation) indices, each ascending: every class gives round(fraction · its images) to validation.

    A class always keeps an image for training, and gives at least one when it has two. Equal arguments, equal result.

    Raises InputError when fraction is not inside 0…1 or nothing could be held out.
    """
    if not 0 < fraction < 1:
        raise InputError(f"val_fraction={fraction:g} holds out nothing or everything: it must be between 0 and 1")
    rng = np.random.Generator(np.random.PCG64(seed))
    is_held = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = min(max(round(fraction * len(members)), 1), len(members) - 1)
        is_held[rng.permutation(members)[:count]] = True
    if not is_held.any():
        raise InputError(f"val_fraction={fraction:g} holds out no image: every class has a single one, so set it to 0")
    return np.flatnonzero(~is_held), np.flatnonzero(is_held)


def balanced_subset(labels: NDArray[np.int64], count: int, seed: int) -> NDArray[np.int64]:
    """`count` indices, ascending, with the classes in equal shares as far as they reach; equal arguments, equal result.

    A class that is too small gives all it has and the others make up for it; shares then differ by one image at most.

    Raises InputError when count is not in 1…N.
    """
    if not 1 <= count <= len(labels):
        raise InputError(f"train_images={count} cannot be taken from {len(labels)} images: it must be from 1 to {len(labels)}")
    rng = np.random.Generator(np.random.PCG64(seed))
    order = rng.permutation(len(labels))
    shuffled = labels[order]
    turn = np.empty(len(labels), np.int64)  # the how-manieth of its class each image is, in the shuffled order
    for label in np.unique(labels):
        members = np.flatnonzero(shuffled == label)
        turn[members] = np.arange(len(members))
    # Deal in rounds, one image of each class a round, as long as the class has any; the last round's classes are chance.
    dealt = np.argsort(turn, kind="stable")[:count]
    return np.sort(order[dealt])
