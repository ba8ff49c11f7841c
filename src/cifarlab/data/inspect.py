"""Looking at a data set before training on it: counts, statistics, exact duplicates, a contact sheet."""

import hashlib
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cifarlab.config import InputError
from cifarlab.data.dataset import Dataset


@dataclass(frozen=True)
class Duplicates:
    """Images that are equal pixel by pixel.

    groups: each at least two (split, index, label), in order. A group inside "train" weighs its image more; one across the
    splits shows the test's answer in training; one with several labels is a mistake in the data.
    """

    groups: tuple[tuple[tuple[str, int, int], ...], ...]

    def within(self, split: str) -> int:
        """Number of superfluous copies inside a split: what removing duplicates would take out of it."""
        return sum(max(sum(name == split for name, _, _ in group) - 1, 0) for group in self.groups)

    @property
    def across(self) -> int:
        """Number of test images that are in train too."""
        return sum(
            sum(name == "test" for name, _, _ in group) for group in self.groups if any(name == "train" for name, _, _ in group)
        )

    @property
    def conflicts(self) -> tuple[tuple[tuple[str, int, int], ...], ...]:
        """The groups whose images have different labels."""
        return tuple(group for group in self.groups if len({label for _, _, label in group}) > 1)


def count_classes(dataset: Dataset) -> dict[str, NDArray[np.int64]]:
    """Images per class, {"train": K numbers, "test": K numbers}, in the order of class_names."""
    splits = {"train": dataset.train, "test": dataset.test}
    return {name: np.bincount(split.labels, minlength=dataset.num_classes) for name, split in splits.items()}


def find_duplicates(dataset: Dataset) -> Duplicates:
    """Exact duplicates within and across the splits. Re-coded or shifted copies are not found. About 1 s for CIFAR-10."""
    groups = defaultdict(list)
    for name, split in (("train", dataset.train), ("test", dataset.test)):
        for index, (image, label) in enumerate(zip(split.images, split.labels.tolist(), strict=True)):
            digest = hashlib.blake2b(np.ascontiguousarray(image).data, digest_size=16).digest()
            groups[digest].append((name, index, label))
    return Duplicates(tuple(tuple(group) for group in groups.values() if len(group) > 1))


def draw_contact_sheet(dataset: Dataset, path: Path, *, per_class: int = 10) -> Path:
    """A PNG with the first `per_class` training images of every class, a row for each class, its name and count beside it.

    Images are enlarged by a whole number, pixels kept square. More than 25 classes are set smaller, in several columns.
    How to read it: a row that does not look like its name is a labelling mistake; wrong colours mean wrong channel order.

    Raises InputError when `path` cannot be written.
    """
    import matplotlib  # for its font, which has more alphabets than Pillow's own
    from PIL import Image, ImageDraw, ImageFont

    side = dataset.train.images.shape[2]
    gap, margin, head = 3, 16, 44
    fonts = Path(matplotlib.get_data_path(), "fonts", "ttf")
    font, small, bold = (
        ImageFont.truetype(str(fonts / file), size)
        for file, size in (("DejaVuSans.ttf", 13), ("DejaVuSans.ttf", 11), ("DejaVuSans-Bold.ttf", 15))
    )
    names = [name if len(name) <= 28 else name[:27] + "…" for name in dataset.class_names]
    label_width = int(max(font.getlength(name) for name in names)) + 12
    columns = -(-len(names) // 25)
    tile = side * max((64 if columns == 1 else 32) // side, 1)
    rows = -(-len(names) // columns)
    block = label_width + per_class * (tile + gap) + margin
    title = f"{dataset.name}: {len(dataset.train):,} training images, {len(names)} classes"
    width = max(margin + columns * block, int(bold.getlength(title)) + 2 * margin)
    pitch = max(tile + gap, 32)
    sheet = Image.new("RGB", (width, head + rows * pitch + margin), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    draw.text((margin, 13), title, (20, 20, 20), bold)
    counts = count_classes(dataset)["train"]
    for label, name in enumerate(names):
        x, y = margin + label // rows * block, head + label % rows * pitch
        right, middle = x + label_width - 10, y + tile / 2
        draw.text((right, middle - 1), name, (20, 20, 20), font, anchor="rs")
        draw.text((right, middle + 3), f"{counts[label]:,}", (120, 120, 120), small, anchor="rt")
        for place, index in enumerate(np.flatnonzero(dataset.train.labels == label)[:per_class]):
            image = Image.fromarray(np.ascontiguousarray(dataset.train.images[index].transpose(1, 2, 0)))
            if tile != side:
                image = image.resize((tile, tile), Image.Resampling.NEAREST)
            sheet.paste(image, (x + label_width + place * (tile + gap), y))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(path, "PNG")
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error}): choose another file for the contact sheet") from error
    return path
