"""How good a model is: its logits on a whole split, and every score, table and list that follows from them.

The scores are scikit-learn's. It and torch are imported where they are used, so that reading a saved evaluation needs no
torch, and training waits for scikit-learn (1.7 s) only when there is something to score.
"""

import io
import json
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cifarlab.arrays import read_arrays
from cifarlab.config import InputError
from cifarlab.runs import write_atomically

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


def predict_logits(
    model: "nn.Module",
    images: "NDArray[np.uint8] | Tensor",
    *,
    mean: Sequence[float],
    std: Sequence[float],
    device: "torch.device | str",
    batch_size: int = 500,
    precision: str = "fp32",
    channels_last: bool = True,
    rank: int = 0,
    world_size: int = 1,
) -> "Tensor":
    """Logits of every image, float32 (N, K) on the CPU, in the images' order.

    images: uint8 N×3×H×W; mean, std: per channel, of pixels in 0…1; precision: fp32, bf16 or fp16 (autocast).
    The model is in evaluation mode meanwhile; each of its modules gets its own training flag back.
    With several ranks each does a contiguous slice and all return the whole; pass the bare model then, not its
    DistributedDataParallel wrapper, whose forward may wait for ranks that have one batch less.

    Raises InputError for images that are not uint8 N×3×H×W with N ≥ 1.
    """
    import torch
    import torch.distributed as dist

    from cifarlab.data.augment import normalize_batch
    from cifarlab.distributed import autocast

    num_images, device = len(images), torch.device(device)
    if images.ndim != 4 or images.shape[1] != 3 or str(images.dtype).removeprefix("torch.") != "uint8" or not num_images:
        raise InputError(f"images of shape {tuple(images.shape)} and type {images.dtype} cannot be evaluated: "
                         "give uint8, N×3×H×W, at least one image")  # fmt: skip
    start, stop = num_images * rank // world_size, num_images * (rank + 1) // world_size
    pieces: list[Tensor] = []
    flags = [(module, module.training) for module in model.modules()]  # not one flag for all: a user may have frozen a layer
    model.eval()
    try:
        with torch.inference_mode(), autocast(device, precision):
            # A rank without images (fewer images than ranks) still runs one, which is cut off below: it must know K.
            for first in range(start, max(stop, start + 1), batch_size):
                piece = images[first : max(min(first + batch_size, stop), first + 1)]
                pieces.append(model(normalize_batch(piece, mean, std, device, channels_last)).float())
    finally:
        for module, flag in flags:
            module.training = flag
    logits = torch.cat(pieces)[: stop - start]  # outside inference mode, so that the result is an ordinary tensor
    if world_size > 1:
        longest = -(-num_images // world_size)
        padded = logits.new_zeros(longest, logits.shape[1])
        padded[: len(logits)] = logits
        everybody = [torch.empty_like(padded) for _ in range(world_size)]
        dist.all_gather(everybody, padded)
        bounds = [num_images * r // world_size for r in range(world_size + 1)]
        logits = torch.cat([part[: bounds[r + 1] - bounds[r]] for r, part in enumerate(everybody)])
    return logits.cpu()


VIEWS = ((0, 0, 0.25), (0, 1, 0.25), (-1, 0, 0.125), (-1, 1, 0.125), (1, 0, 0.125), (1, 1, 0.125))
"""Of test-time augmentation: shift down and right in pixels, whether mirrored, weight."""


def predict_views(
    evaluation: "Evaluation", images: NDArray[np.uint8], share: float, predict: Callable[[NDArray[np.uint8]], NDArray[np.float32]]
) -> NDArray[np.float32]:
    """Logits (N, K), those of the least sure images as means over six views: mirrored or not, shifted by −1, 0, 1 pixels.

    The least sure `share` of the images (uint8, N×3×H×W) are those with the smallest gap between the two most probable classes.
    predict: logits of uint8 images. Borders are mirrored where a shift uncovers them. Cost: five forward passes of that share.

    Source: Keller Jordan 2024, arXiv:2404.00498, for the views and weights; taking them of the least sure images only is from
    the Hiverge speedrun of 2025 (github.com/hiverge/cifar10-speedrun).
    """
    logits = evaluation.logits.copy()
    rows = evaluation.doubtful(round(share * len(logits)))["row"]
    if not len(rows):
        return logits
    padded = np.pad(images[rows], ((0, 0), (0, 0), (1, 1), (1, 1)), mode="reflect")
    height, width = images.shape[2:]
    mean = np.zeros_like(logits[rows])
    for shift, is_mirrored, weight in VIEWS:
        view = padded[:, :, 1 - shift : 1 - shift + height, 1 - shift : 1 - shift + width]
        is_plain = not shift and not is_mirrored
        mean += weight * (logits[rows] if is_plain else predict(view[..., ::-1].copy() if is_mirrored else view.copy()))
    logits[rows] = mean
    return logits


def quick_scores(logits: "Tensor", labels: "Tensor") -> dict[str, float]:
    """{"loss": mean cross-entropy, "accuracy": share of right top-1} of logits (N, K), labels (N,): for every epoch.

    An image with a non-finite logit counts as wrong and makes the loss nan, as in `Evaluation`.
    """
    import torch
    from torch.nn.functional import cross_entropy

    logits, labels = logits.float(), labels.to(logits.device)
    finite = logits.isfinite().all(dim=1)
    correct = (logits.argmax(dim=1) == labels) & finite
    loss = torch.where(finite.all(), cross_entropy(logits, labels), math.nan)
    return {"loss": float(loss), "accuracy": float(correct.float().mean())}


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Everything known about a model on one split; made by `build_evaluation`, or read back by `load_evaluation`.

    logits: float32 (N, K); labels: int64 (N,); indices: int64 (N,), each image's place in its split.
    An image with a NaN or infinite logit has no prediction (`predicted` is −1): it counts as wrong everywhere, is in no
    column of the confusion matrix, and makes the loss nan. `num_nonfinite` says how many there are.
    """

    split: str
    logits: NDArray[np.float32]
    labels: NDArray[np.int64]
    indices: NDArray[np.int64]

    @property
    def num_classes(self) -> int:
        return int(self.logits.shape[1])

    @cached_property
    def _is_finite(self) -> NDArray[np.bool_]:
        return np.asarray(np.isfinite(self.logits).all(axis=1))

    @property
    def num_nonfinite(self) -> int:
        """Images with a NaN or infinite logit."""
        return int((~self._is_finite).sum())

    @cached_property
    def _log_probabilities(self) -> NDArray[np.float64]:
        logits = np.where(self._is_finite[:, None], self.logits, np.nan).astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        return np.asarray(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))

    @cached_property
    def probabilities(self) -> NDArray[np.float32]:
        """softmax(logits), float32 (N, K); a row of nan where a logit is not finite."""
        return np.exp(self._log_probabilities).astype(np.float32)

    @cached_property
    def predicted(self) -> NDArray[np.int64]:
        """The class with the largest logit, int64 (N,); −1 where a logit is not finite."""
        return np.where(self._is_finite, self.logits.argmax(axis=1), -1)

    @cached_property
    def loss(self) -> float:
        """−Σ log p(label) / N over the whole split: every image weighs the same, however the batches fell.

        From log-softmax, not scikit-learn's log_loss: that one clips probabilities, so a sure mistake would cost too little.
        """
        return float(-self._log_probabilities[np.arange(len(self.labels)), self.labels].mean())

    @cached_property
    def top1(self) -> float:
        """Share of images whose most probable class is the right one, 0…1: the accuracy."""
        from sklearn.metrics import accuracy_score

        return float(accuracy_score(self.labels, self.predicted))

    @cached_property
    def top5(self) -> float | None:
        """Share of images whose class is among the five most probable, 0…1; None with five classes or fewer."""
        from sklearn.metrics import top_k_accuracy_score

        if self.num_classes <= 5:
            return None
        if not self._is_finite.any():
            return 0.0
        finite = self._is_finite
        classes = range(self.num_classes)
        hits = top_k_accuracy_score(self.labels[finite], self.logits[finite], k=5, labels=classes, normalize=False)
        return float(hits / len(self.labels))

    @cached_property
    def confusion(self) -> NDArray[np.int64]:
        """Counts, int64 (K, K): row = true class, column = predicted class."""
        from sklearn.metrics import confusion_matrix

        with _quiet():
            matrix = confusion_matrix(self.labels, self.predicted, labels=range(self.num_classes))
        return np.asarray(matrix, dtype=np.int64)

    @cached_property
    def per_class(self) -> dict[str, NDArray[np.float64]]:
        """accuracy (= recall: share of the class's images that were found), precision, f1, support; each (K,), 0…1.

        A class that does not occur in the split has nan: nothing was measured. Precision of a class never predicted is 0.
        """
        precision, recall, f1, support = self._scores(range(self.num_classes), None)
        absent = support == 0
        scores = {"accuracy": recall, "precision": precision, "f1": f1}
        return {name: np.where(absent, np.nan, values) for name, values in scores.items()} | {"support": support.astype(float)}

    def average(self, kind: str) -> dict[str, float]:
        """Mean precision, recall, f1 over the classes that occur in the split: "macro" (all alike) or "weighted" (by support)."""
        precision, recall, f1, _ = self._scores(np.unique(self.labels), kind)
        return {"precision": float(precision), "recall": float(recall), "f1": float(f1)}

    def _scores(self, classes: Any, average: str | None) -> Any:
        from sklearn.metrics import precision_recall_fscore_support

        with _quiet():
            return precision_recall_fscore_support(
                self.labels, self.predicted, labels=list(classes), average=average, zero_division=0
            )

    def classification_report(self, class_names: Sequence[str]) -> str:
        """scikit-learn's table of precision, recall, F1 and support, one line per class that occurs in the split."""
        from sklearn.metrics import classification_report

        self._check_names(class_names)
        classes = np.unique(self.labels)
        names = [" ".join(class_names[k].split()) or f"class {k}" for k in classes]
        with _quiet():
            return str(classification_report(self.labels, self.predicted, labels=classes, target_names=names,
                                             digits=4, zero_division=0))  # fmt: skip

    def mistakes(self, n: int = 36) -> NDArray[np.void]:
        """The n misclassified images that the model was surest of, surest first; see `doubtful` for the fields.

        How to read: wrong labels and near-twins come first; many from one class pair show what the model cannot tell apart.
        """
        wrong = np.flatnonzero(self._is_finite & (self.predicted != self.labels))
        confidence = self.probabilities.max(axis=1)[wrong]
        return self._list(wrong[np.argsort(-confidence, kind="stable")[:n]])

    def doubtful(self, n: int = 36) -> NDArray[np.void]:
        """The n images, right or wrong, with the smallest gap between the two most probable classes, smallest first.

        Fields of the structured array: row (place in `labels`), index (place in the split), true, predicted,
        probability (of the predicted class), margin (its gap to the second, 0…1).
        """
        finite = np.flatnonzero(self._is_finite)
        return self._list(finite[np.argsort(self._margins[finite], kind="stable")[:n]])

    def sample(self, count: int = 12) -> NDArray[np.intp]:
        """Rows of `count` right and `count` wrong images, evenly spaced over the split: neither picked nor random."""
        finite = np.flatnonzero(self._is_finite)
        is_right = self.predicted[finite] == self.labels[finite]
        spread = [part[np.linspace(0, len(part) - 1, min(count, len(part))).astype(int)]
                  for part in (finite[is_right], finite[~is_right])]  # fmt: skip
        return np.concatenate(spread)

    @cached_property
    def _margins(self) -> NDArray[np.float32]:
        if self.num_classes == 1:
            return np.ones(len(self.labels), dtype=np.float32)
        best = np.partition(self.probabilities, -2, axis=1)
        return best[:, -1] - best[:, -2]

    def _list(self, rows: NDArray[np.intp]) -> NDArray[np.void]:
        kinds = [("row", "i8"), ("index", "i8"), ("true", "i8"), ("predicted", "i8"), ("probability", "f4"), ("margin", "f4")]
        table = np.zeros(len(rows), dtype=kinds)
        table["row"], table["index"], table["true"] = rows, self.indices[rows], self.labels[rows]
        table["predicted"], table["margin"] = self.predicted[rows], self._margins[rows]
        table["probability"] = self.probabilities[rows].max(axis=1, initial=0)
        return table

    def summary(self) -> dict[str, Any]:
        """The scores as plain numbers for JSON, which has no nan: that is the string "nan" here, which float() reads back."""
        return {
            "split": self.split,
            "num_images": len(self.labels),
            "num_classes": self.num_classes,
            "num_nonfinite": self.num_nonfinite,
            "loss": _number(self.loss),
            "accuracy": self.top1,
            "top1": self.top1,
            "top5": self.top5,
            "macro": self.average("macro"),
            "weighted": self.average("weighted"),
        }

    def _check_names(self, class_names: Sequence[str]) -> None:
        if len(class_names) != self.num_classes:
            raise InputError(f"{len(class_names)} class names were given for {self.num_classes} classes: give one name per logit")


def build_evaluation(split: str, logits: ArrayLike, labels: ArrayLike, indices: ArrayLike | None = None) -> Evaluation:
    """The Evaluation of logits (N, K) against labels (N,), arrays or CPU tensors; indices default to 0…N−1.

    Raises InputError when there is no image, the lengths differ, or a label is not in 0…K−1.
    """
    values, truth = np.asarray(logits, dtype=np.float32), np.asarray(labels, dtype=np.int64)
    places = np.arange(len(truth)) if indices is None else np.asarray(indices, dtype=np.int64)
    if values.ndim != 2 or not values.size:
        raise InputError(f"logits of shape {values.shape} on {split!r} cannot be evaluated: give (images, classes), at least 1×1")
    if truth.shape != values.shape[:1] or places.shape != truth.shape:
        raise InputError(f"logits {values.shape}, labels {truth.shape} and indices {places.shape} on {split!r} do not "
                         "fit together: give one label and one index per row of logits")  # fmt: skip
    if truth.min() < 0 or truth.max() >= values.shape[1]:
        raise InputError(f"labels {truth.min()}…{truth.max()} on {split!r} do not fit {values.shape[1]} classes: "
                         f"they must be 0…{values.shape[1] - 1}, so check that model and data set belong together")  # fmt: skip
    return Evaluation(split, values, truth, places)


def save_evaluation(folder: Path, evaluation: Evaluation, class_names: Sequence[str]) -> None:
    """Writes predictions.npz (logits, labels, indices) and evaluation.json (all scores) into the folder.

    Each appears whole or not at all. Raises InputError when there is not one name per class.
    """
    evaluation._check_names(class_names)
    archive = io.BytesIO()
    np.savez(archive, split=evaluation.split, logits=evaluation.logits, labels=evaluation.labels, indices=evaluation.indices,
             class_names=np.array(class_names, dtype=str))  # fmt: skip
    columns = {name: [_number(value) for value in values.tolist()] for name, values in evaluation.per_class.items()}
    rows: list[dict[str, Any]] = [{"name": name} | {key: columns[key][k] for key in columns}
                                  for k, name in enumerate(class_names)]  # fmt: skip
    scores = evaluation.summary() | {"per_class": rows, "confusion": evaluation.confusion.tolist()}
    write_atomically(folder / "predictions.npz", archive.getvalue())
    write_atomically(folder / "evaluation.json", (json.dumps(scores, indent=1, ensure_ascii=False) + "\n").encode())


@dataclass(frozen=True, eq=False)
class Sample:
    """An image (uint8 3×H×W) with the names of its class and of the predicted one, and that one's probability."""

    image: NDArray[np.uint8]
    true: str
    predicted: str
    probability: float


SAMPLE_BYTES = 1 << 19  # of samples.npz, about: large images make fewer samples


def save_samples(folder: Path, evaluation: Evaluation, images: NDArray[np.uint8], class_names: Sequence[str]) -> None:
    """Writes samples.npz: some right and some wrong images (of uint8 N×3×H×W) with names, to be shown without the data."""
    rows = evaluation.sample(max(1, min(12, SAMPLE_BYTES // (2 * images[0].nbytes))))
    names = np.array(class_names, dtype=str)
    archive = io.BytesIO()
    np.savez_compressed(archive, images=images[evaluation.indices[rows]], true=names[evaluation.labels[rows]],
                        predicted=names[evaluation.predicted[rows]],
                        probability=evaluation.probabilities[rows].max(axis=1, initial=0))  # fmt: skip
    write_atomically(folder / "samples.npz", archive.getvalue())


def load_samples(folder: Path) -> list[Sample]:
    """What `save_samples` wrote; empty where there is none. Raises InputError for a damaged file."""
    path = folder / "samples.npz"
    if not path.exists():
        return []
    remedy = f"remove it and run `cifarlab evaluate {folder}`"
    found = read_arrays(path, ("images", "true", "predicted", "probability"), remedy=remedy)
    images, *columns = found.values()
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] != 3 or not images.size:
        raise InputError(f"{path} holds no images that can be shown: {remedy}")
    if any(column.shape != (len(images),) for column in columns) or found["probability"].dtype.kind != "f":
        raise InputError(f"{path} has not one name and probability for each image: {remedy}")
    return [Sample(image, str(t), str(p), float(q)) for image, t, p, q in zip(images, *columns, strict=True)]


def load_evaluation(folder: Path) -> tuple[Evaluation, tuple[str, ...]]:
    """(the evaluation, class names) that `save_evaluation` wrote; raises InputError when missing or damaged."""
    path = folder / "predictions.npz"
    try:
        names = ("split", "logits", "labels", "indices", "class_names")
        values = read_arrays(path, names, remedy=f"remove it and run `cifarlab evaluate {folder}`")
    except FileNotFoundError:
        raise InputError(f"there is no predictions.npz in {folder}: run `cifarlab evaluate {folder}`") from None
    kinds = {"split": "U", "logits": "f", "labels": "iu", "indices": "iu", "class_names": "U"}
    if bad := [name for name, kind in kinds.items() if values[name].dtype.kind not in kind]:
        raise InputError(f"{path} holds no {bad[0]} of the right kind: remove it and run `cifarlab evaluate {folder}`")
    evaluation = build_evaluation(str(values["split"]), values["logits"], values["labels"], values["indices"])
    class_names = tuple(values["class_names"].ravel().tolist())
    evaluation._check_names(class_names)
    return evaluation, class_names


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def _quiet() -> "warnings.catch_warnings[None]":
    """scikit-learn warns of few images per class and of one class in all: both are fine here."""
    return warnings.catch_warnings(action="ignore", category=UserWarning)
