"""The test images behind a run's confusion matrix, kept small beside its predictions: a report shows them without the data.

No torch here.
"""

import io
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cifarlab.config import InputError
from cifarlab.runs import write_atomically

if TYPE_CHECKING:
    from cifarlab.evaluate import Evaluation

FILE = "thumbnails.npz"
PER_CELL = 6  # images of one confusion (true class, predicted class)
MISTAKES = 600  # in all: CIFAR-10 at 92 % has some 500 in cells of six; the file is then 1.5 MB
SUREST = 36  # mistakes that are there in any case
SIDE = 48  # pixels: larger images are shrunk
BYTES = 2 << 20  # of the mistakes' pixels: larger images are fewer


@dataclass(frozen=True, eq=False)
class Thumbnails:
    """images: uint8 (N, 3, H, W); index: place in the split; true, predicted: class numbers; probability: of the predicted class.

    Mistakes first, surest first, then some right ones.
    """

    images: NDArray[np.uint8]
    index: NDArray[np.int64]
    true: NDArray[np.int64]
    predicted: NDArray[np.int64]
    probability: NDArray[np.float32]


def choose_rows(true: NDArray[np.int64], predicted: NDArray[np.int64], probability: NDArray[np.float32], *,
                at_most: int = MISTAKES, per_cell: int = PER_CELL, right_per_class: int = 3) -> NDArray[np.intp]:  # fmt: skip
    """Which images stand for a confusion matrix: rows of mistakes, surest first, then of right answers.

    Of a cell the surest mistakes. Where not all fit, cells get their images in turn by count/(number got + 1), as parties get
    seats (d'Hondt): a habit shows more than a single mistake. The SUREST mistakes of all are among them. Of right answers, evenly
    spaced ones of each class: neither picked nor random. predicted −1 (no finite logits) is in no cell.
    """
    wrong = np.flatnonzero((true != predicted) & (predicted >= 0))
    wrong = wrong[np.argsort(-probability[wrong], kind="stable")]
    cell_of = np.unique(np.stack([true[wrong], predicted[wrong]]), axis=1, return_inverse=True)[1].ravel()
    counts = np.bincount(cell_of) if len(wrong) else np.zeros(0, np.intp)
    by_cell = np.argsort(cell_of, kind="stable")
    rank = np.empty(len(wrong), np.intp)  # 0 for the surest of its cell
    rank[by_cell] = np.arange(len(wrong)) - np.repeat(np.cumsum(counts) - counts, counts)
    claim = counts[cell_of] / (rank + 1)
    claim[rank >= per_cell] = 0
    claim[:SUREST] = np.inf
    chosen = np.sort(np.argsort(-claim, kind="stable")[: min(at_most, int((claim > 0).sum()))])
    right = [np.flatnonzero((true == k) & (predicted == k)) for k in np.unique(true)]
    spread = [rows[np.linspace(0, len(rows) - 1, min(right_per_class, len(rows))).astype(np.intp)] for rows in right]
    return np.concatenate([wrong[chosen], *spread])


def save_thumbnails(folder: Path, evaluation: "Evaluation", images: NDArray[np.uint8]) -> None:
    """Writes thumbnails.npz: images (of the evaluated split's uint8 N×3×H×W) behind the confusion matrix, bounded in number."""
    probability = evaluation.probabilities.max(axis=1, initial=0)
    height, width = images.shape[2:]
    scale = min(1.0, SIDE / max(height, width))
    size = max(1, round(scale * height)), max(1, round(scale * width))
    at_most = min(MISTAKES, BYTES // (3 * size[0] * size[1]))
    rows = choose_rows(evaluation.labels, evaluation.predicted, probability, at_most=at_most,
                       right_per_class=3 if evaluation.num_classes <= 20 else 1)  # fmt: skip
    small = images[evaluation.indices[rows]]
    archive = io.BytesIO()
    np.savez_compressed(archive, images=small if scale == 1 else _shrink(small, size), index=evaluation.indices[rows],
                        true=evaluation.labels[rows], predicted=evaluation.predicted[rows], probability=probability[rows],
    )  # fmt: skip
    write_atomically(folder / FILE, archive.getvalue())


def _shrink(images: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    from PIL import Image

    pictures = (Image.fromarray(image.transpose(1, 2, 0)).resize(size[::-1], Image.Resampling.LANCZOS) for image in images)
    return np.stack([np.asarray(picture).transpose(2, 0, 1) for picture in pictures]) if len(images) else images[:, :, :1, :1]


def load_thumbnails(folder: Path, num_classes: int) -> Thumbnails | None:
    """What `save_thumbnails` wrote; None where there is none, as in runs of older versions.

    Raises InputError for a damaged file.
    """
    path = folder / FILE
    if not path.exists():
        return None
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            found = Thumbnails(*(archive[name] for name in ("images", "index", "true", "predicted", "probability")))
        n, classes = len(found.images), np.concatenate([found.true, found.predicted])
        if found.images.dtype != np.uint8 or found.images.shape[:2] != (n, 3) or found.images.ndim != 4:
            raise ValueError(f"its images are {found.images.dtype} {found.images.shape}")
        if any(column.shape != (n,) for column in (found.index, found.true, found.predicted, found.probability)):
            raise ValueError("its columns are of different lengths")
        if n and not 0 <= classes.min() <= classes.max() < num_classes:
            raise ValueError(f"it has classes {classes.min()}…{classes.max()} of {num_classes}")
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} cannot be read ({error}): remove it and run `cifarlab evaluate {folder}`") from None
    return found
