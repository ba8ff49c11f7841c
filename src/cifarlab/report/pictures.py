"""Test images for a page: those behind each cell of the confusion matrix and the surest mistakes, as one small picture."""

import base64
import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from cifarlab.evaluate import load_samples
from cifarlab.runs import Run
from cifarlab.thumbnails import Thumbnails, load_thumbnails

BUDGET = 1_100_000  # characters of `data_uri`
QUALITIES = (None, 90, 80, 65, 45, 25)  # of WebP, tried in this order; None: without loss


@dataclass(frozen=True)
class Picture:
    """One thumbnail. place: its number in the sprite; index: its place in the split, −1 where that is not known."""

    place: int
    index: int
    true: int
    predicted: int
    probability: float


@dataclass(frozen=True, eq=False)
class Pictures:
    """All thumbnails of a run in one WebP picture (the sprite), `columns` in a row, each height × width pixels.

    A page shows one by `background: url(data_uri)` at `position(place)`; mistakes come first, surest first.
    """

    sprite: bytes
    columns: int
    rows: int
    height: int
    width: int
    pictures: tuple[Picture, ...]

    @cached_property
    def data_uri(self) -> str:
        return f"data:image/webp;base64,{base64.b64encode(self.sprite).decode()}"

    def position(self, place: int) -> tuple[int, int]:
        """(left, top) of a thumbnail in the sprite, in pixels."""
        return place % self.columns * self.width, place // self.columns * self.height

    @cached_property
    def cells(self) -> dict[tuple[int, int], tuple[int, ...]]:
        """(true, predicted) -> places of the thumbnails, surest first. Not all images of a cell need be there."""
        found: dict[tuple[int, int], list[int]] = {}
        for picture in sorted(self.pictures, key=lambda p: -p.probability):
            found.setdefault((picture.true, picture.predicted), []).append(picture.place)
        return {cell: tuple(places) for cell, places in found.items()}

    @cached_property
    def mistakes(self) -> tuple[int, ...]:
        """Places of the mistakes, surest of the whole split first."""
        wrong = [picture for picture in self.pictures if picture.true != picture.predicted]
        return tuple(picture.place for picture in sorted(wrong, key=lambda p: -p.probability))


def load_pictures(run: Run, *, budget: int = BUDGET) -> Pictures | None:
    """The pictures that a run kept of its test images, at most `budget` characters of data_uri; None where it kept none.

    Runs of older versions have the two dozen images of samples.npz, or none. Raises InputError where a file is damaged.
    """
    if run.is_watched or not (run.path / "dataset.json").exists():
        return None
    names = list(run.dataset["class_names"])
    kept = load_thumbnails(run.path, len(names)) or _from_samples(run, names)
    if kept is None or not len(kept.images):
        return None
    n = len(kept.images)
    columns = math.ceil(math.sqrt(n))
    for shown in _fewer(n):
        for quality in QUALITIES:
            sprite = _encode(kept.images[shown], columns, quality)
            if 4 * (len(sprite) + 2) // 3 + 32 <= budget:
                listed = (kept.index[shown], kept.true[shown], kept.predicted[shown], kept.probability[shown])
                rows = zip(*(column.tolist() for column in listed), strict=True)
                pictures = tuple(Picture(place, *row) for place, row in enumerate(rows))
                height, width = kept.images.shape[2:]
                return Pictures(sprite, columns, -(-len(pictures) // columns), height, width, pictures)
    return None


def _fewer(n: int) -> Iterator[slice]:
    while n:
        yield slice(0, n)
        n //= 2


def _encode(images: NDArray[np.uint8], columns: int, quality: int | None) -> bytes:
    from PIL import Image

    n, _, height, width = images.shape
    rows = -(-n // columns)
    sheet = np.zeros((rows * columns, height, width, 3), np.uint8)
    sheet[:n] = images.transpose(0, 2, 3, 1)
    pixels = sheet.reshape(rows, columns, height, width, 3).swapaxes(1, 2).reshape(rows * height, columns * width, 3)
    content = io.BytesIO()
    options = {"lossless": True, "quality": 0, "method": 1} if quality is None else {"quality": quality, "method": 2}
    Image.fromarray(pixels).save(content, format="webp", **options)
    return content.getvalue()


def _from_samples(run: Run, names: list[str]) -> Thumbnails | None:
    """The right and wrong images that any run leaves. They tell classes by name, so of equal names the first is taken."""
    samples = [sample for sample in load_samples(run.path) if sample.true in names and sample.predicted in names]
    if not samples:
        return None
    samples.sort(key=lambda sample: (sample.true == sample.predicted, -sample.probability))
    return Thumbnails(
        images=np.stack([sample.image for sample in samples]), index=np.full(len(samples), -1),
        true=np.array([names.index(sample.true) for sample in samples]),
        predicted=np.array([names.index(sample.predicted) for sample in samples]),
        probability=np.array([sample.probability for sample in samples], np.float32),
    )  # fmt: skip
