"""The loss along lines and over planes of weights: random directions, the plane of the training trajectory, between two runs.

A `Plane` says which weights: centre + x·d₁ + y·d₂. A `Sample` says on which images. `measure_landscape` gives the loss at every
point of a grid, with its error. The model given is only read: weights are moved in a copy.

What most tools get wrong is batch norm: its running statistics are not weights, and those of the centre do not fit weights
somewhere else. So the policy is always named, and meant to be looked at both ways:
- "frozen": the statistics stay those of the centre; between two runs they are interpolated with the weights, and beyond the ends
  they stay those of the nearer run. This is what a network in use would do with such weights.
- "recomputed": measured anew at each point, on training images. This is the loss that training itself would see there.
"""

import copy
import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cifarlab.analysis.grid import GridFile, Landscape
from cifarlab.config import InputError
from cifarlab.data.augment import normalize_batch
from cifarlab.data.dataset import Split, balanced_subset
from cifarlab.optim.ema import recompute_batch_norm

Weights = dict[str, Tensor]  # by the names of a state_dict
Criterion = Callable[[Tensor, Tensor], Tensor]  # (outputs, labels) -> one loss an image


# ---- which weights -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Plane:
    """The weights centre + x·directions[0] + y·directions[1]; a line has one direction. A name that is not there does not move.

    coordinates: (T, 2 or 1), where the weights that a plane was laid through lie on it (the trajectory, or the two ends of a
    line); steps: their updates. explained: share of the trajectory's squared distance from the centre along each direction.
    cosine: of the angle between the two directions.
    """

    kind: str
    centre: Weights
    directions: tuple[Weights, ...]
    coordinates: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 2)))
    steps: tuple[int, ...] = ()
    explained: tuple[float, ...] = ()
    cosine: float = 0.0


def random_plane(model: nn.Module, num_directions: int = 2, *, seed: int = 0,
                 biases_and_norms: Literal["zero", "scaled"] = "zero") -> Plane:  # fmt: skip
    """Filter-normalised random directions: each filter d of a direction is scaled to ‖d‖ = ‖w‖ of the filter it moves.

    A filter is w[k] of a weight with two axes or more: all that makes output k. biases_and_norms, tensors with one axis:
    "zero" leaves them where they are (usual, since they are few and scale everything behind them); "scaled" moves them by a
    random vector of the norm of the whole tensor. What is not trainable stays. So x = 1 is a step as long as the weights
    themselves, whatever their scale, and nets with ReLU or batch norm, whose scale means nothing, can be compared.

    Directions are drawn for weights in plain memory order on the CPU: the same on every device.
    Source: Li et al. 2018, arXiv:1712.09913. Ours differs in that a vector is normalised once, as a whole.
    """
    if num_directions not in (1, 2):
        raise InputError(f"num_directions={num_directions} cannot be used: a landscape has 1 or 2")
    if biases_and_norms not in ("zero", "scaled"):
        raise InputError(f"biases_and_norms={biases_and_norms!r} cannot be used: it must be zero or scaled")
    generator = torch.Generator().manual_seed(seed)
    directions = []
    for _ in range(num_directions):
        direction: Weights = {}
        for name, weight in model.named_parameters():
            drawn = torch.randn(weight.shape, generator=generator).to(weight)  # drawn for all, so that one more changes no other
            if not weight.requires_grad or (weight.ndim < 2 and biases_and_norms == "zero"):
                continue
            rows = 1 if weight.ndim < 2 else len(weight)
            norms, sizes = (t.detach().reshape(rows, -1).norm(dim=1, keepdim=True) for t in (weight, drawn))
            direction[name] = (drawn.reshape(rows, -1) * (norms / sizes.clamp(min=1e-30))).reshape(weight.shape)
        directions.append(direction)
    cosine = _dot(directions[0], directions[-1]) / max(_dot(directions[0], directions[0]), 1e-300) if num_directions == 2 else 0.0
    if num_directions == 2:
        cosine *= math.sqrt(_dot(directions[0], directions[0]) / max(_dot(directions[1], directions[1]), 1e-300))
    return Plane(f"random {num_directions}-D", _weights_of(model), tuple(directions), cosine=cosine)


def line_between(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> Plane:
    """The straight line from one state_dict (x = 0) to another (x = 1), running statistics included.

    Raises InputError when they are not of the same network.
    """
    _check_alike(first, second)
    direction = {name: second[name].detach() - tensor.detach() for name, tensor in first.items() if tensor.is_floating_point()}
    centre = {name: tensor.detach().clone() for name, tensor in first.items()}
    return Plane("between two runs", centre, (direction,), coordinates=np.array([[0.0], [1.0]]))


def trajectory_plane(model: nn.Module, points: Sequence[Mapping[str, Tensor]], steps: Sequence[int] = ()) -> Plane:
    """The plane through the model's weights in which the trajectory moves most: the first two principal directions of
    points − model, orthonormal, so that x and y are distances between weights.

    points: state_dicts along the training (those of `trajectory/` in a run's folder), two or more that differ from the model's.
    Only trainable parameters count and move. The first point that differs has x, y ≥ 0. Exact: from the T×T matrix of inner
    products, in float64; tensor by tensor, so that it needs memory for T times the largest one.

    How to read `explained`: a random walk of many small steps already gives 8/π² = 81 % and 9 %, since its distance from the
    end grows along a half cosine; only what is above that speaks of the loss.

    Source: Li et al. 2018, arXiv:1712.09913, section 7; the random walk: Antognini & Sohl-Dickstein 2018, arXiv:1806.08805,
    there for distances from the mean (61 % and 15 %); ours are from the end.
    """
    names = [name for name, weight in model.named_parameters() if weight.requires_grad]
    centre = _weights_of(model)
    for point in points:
        _check_alike(centre, point)
    def moved(name: str) -> Tensor:
        """How far each point is from the centre in one tensor: float64, points × weights."""
        return torch.stack([(point[name].detach().to(centre[name]) - centre[name]).flatten().double() for point in points])

    gram = np.zeros((len(points), len(points)))
    for name in names if points else ():
        along = moved(name)
        gram += (along @ along.T).cpu().numpy()
    if not np.isfinite(gram).all():
        raise InputError("a point of the trajectory is not finite: leave it out")
    values, vectors = np.linalg.eigh(gram) if len(gram) else (gram.diagonal(), gram)
    values, vectors = np.clip(values[::-1], 0, None), vectors[:, ::-1]
    if int((values > 1e-9 * max(gram.trace(), 1e-300)).sum()) < 2:
        raise InputError(f"{len(points)} points of the trajectory span no plane: give two or more that differ from the model's "
                         "weights, such as --trajectory-every 0.5 keeps")  # fmt: skip
    apart = int(np.flatnonzero(np.diag(gram) > 0)[0])
    lengths, signs = np.sqrt(values[:2]), np.where(vectors[apart, :2] < 0, -1.0, 1.0)
    columns = vectors[:, :2] * lengths * signs  # the points' coordinates along the two directions
    mixing = torch.tensor(vectors[:, :2] / lengths * signs)
    directions: tuple[Weights, Weights] = ({}, {})
    for name in names:
        for direction, mixed in zip(directions, mixing.T.to(centre[name].device) @ moved(name), strict=True):
            direction[name] = mixed.view(centre[name].shape).to(centre[name])
    explained = tuple(float(v / gram.trace()) for v in values[:2])
    return Plane("training trajectory", centre, directions, columns, tuple(steps), explained)


def _weights_of(model: nn.Module) -> Weights:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def _check_alike(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
    if first.keys() != second.keys() or any(second[name].shape != tensor.shape for name, tensor in first.items()):
        raise InputError("the two sets of weights are not of the same network: names or shapes differ")


def _dot(first: Weights, second: Weights) -> float:
    return math.fsum(float(torch.dot(a.flatten().double(), second[name].flatten().double())) for name, a in first.items())


# ---- on which images ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Sample:
    """The fixed images of a landscape, ready on the device: batches of normalised images and their labels.

    norm_batches: training images that recomputed batch-norm statistics are measured on.
    """

    batches: tuple[tuple[Tensor, Tensor], ...]
    norm_batches: tuple[Tensor, ...] = ()

    @property
    def num_images(self) -> int:
        return sum(len(labels) for _, labels in self.batches)


def build_sample(split: Split, *, mean: Sequence[float], std: Sequence[float], num_images: int = 1000, seed: int = 0,
                 num_norm_images: int = 500, batch_size: int = 250, device: torch.device | str = "cpu",
                 channels_last: bool = True) -> Sample:  # fmt: skip
    """A sample of a split (usually train), without augmentation, its classes in equal shares; equal arguments, equal images.

    The images for batch norm are drawn from the same split by another seed.
    """
    def draw(count: int, seed: int) -> tuple[Tensor, Tensor]:
        chosen = balanced_subset(split.labels, min(count, len(split)), seed)
        images = normalize_batch(torch.tensor(split.images[chosen]), mean, std, torch.device(device), channels_last)
        return images, torch.tensor(split.labels[chosen], device=device)

    images, labels = draw(num_images, seed)
    norm_images, _ = draw(num_norm_images, seed + 1)
    batches = tuple(zip(torch.split(images, batch_size), torch.split(labels, batch_size), strict=True))
    return Sample(batches, tuple(torch.split(norm_images, batch_size)))


# ---- the loss there ----------------------------------------------------------------------------------------------------------


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), labels, reduction="none")


def measure_landscape(
    model: nn.Module,
    plane: Plane,
    sample: Sample,
    xs: ArrayLike,
    ys: ArrayLike | None = None,
    *,
    batch_norm: Literal["frozen", "recomputed"] = "frozen",
    criterion: Criterion = cross_entropy,
    path: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Landscape:
    """The loss at each point (x, y) of a grid, in evaluation mode; of a line, leave ys out.

    batch_norm: see this module's head. criterion: one loss an image; no label smoothing, no weight decay unless it adds them.
    path: a file that takes each point as it is measured; a later call with the same arguments goes on with it, and its result is
    the same as if it had never stopped. progress: called with (points done, points in all).

    Costs a forward pass of the sample a point (of its norm images too when recomputed), and two passes over the weights;
    the device is waited for once a second. The model and its flags are not touched: a copy moves.

    A point where the loss of any image is not finite has nan, and in `layers` the first layer whose output was not finite.
    Raises InputError for a plane of another network, and for a file that holds another landscape.
    """
    across, down = (np.atleast_1d(np.asarray(values, dtype=float)) for values in (xs, [0.0] if ys is None else ys))
    if batch_norm not in ("frozen", "recomputed"):
        raise InputError(f"batch_norm={batch_norm!r} cannot be used: it must be frozen or recomputed")
    if ys is not None and len(plane.directions) < 2:
        raise InputError("a plane needs two directions, and this is a line: leave ys out")
    if not (across.size and down.size and np.isfinite(across).all() and np.isfinite(down).all()):
        raise InputError("the points of a landscape must be finite numbers, at least one along each axis")
    if not sample.num_images:
        raise InputError("the sample has no images: give at least one")
    if batch_norm == "recomputed" and not sample.norm_batches:
        raise InputError("recomputed batch norm needs training images: give the sample norm_batches")
    mover = _Mover(model, plane)
    facts = {
        "cifarlab": "landscape", "kind": plane.kind, "batch_norm": batch_norm, "num_images": sample.num_images,
        "has_batch_norm": mover.has_batch_norm, "explained": list(plane.explained), "cosine": plane.cosine,
        "coordinates": plane.coordinates.tolist(), "steps": list(plane.steps),
        "xs": across.tolist(), "ys": down.tolist(), "hash": _fingerprint(model, plane, sample),
    }  # fmt: skip
    file = GridFile(path, facts)
    recompute = sample.norm_batches if batch_norm == "recomputed" and mover.has_batch_norm else ()
    try:
        points = [(i, j) for i in range(len(down)) for j in range(len(across)) if (i, j) not in file.done]
        pending: list[tuple[tuple[int, int], Tensor]] = []
        last_read = time.perf_counter()
        centre = _losses(mover.move(0.0, 0.0, recompute), sample, criterion)[0] if points else torch.empty(0)
        for i, j in points:
            moved = mover.move(float(across[j]), float(down[i]), recompute)
            losses, accuracy = _losses(moved, sample, criterion)
            pending.append(((i, j), _describe(losses, centre, accuracy)))
            if time.perf_counter() - last_read > 1 or (i, j) == points[-1]:
                rows = [_row(i, j, values) for (i, j), values in zip([at for at, _ in pending],
                        torch.stack([values for _, values in pending]).tolist(), strict=True)]  # fmt: skip
                for row in rows:
                    if row["nonfinite"]:
                        moved = mover.move(float(across[row["j"]]), float(down[row["i"]]), recompute)
                        row["layer"] = _first_nonfinite(moved, sample)
                file.append(rows)
                pending.clear()
                last_read = time.perf_counter()
                if progress:
                    progress(len(file.done), len(across) * len(down))
    finally:
        file.close()
    return file.landscape


class _Moving:
    """Tensors of a model, where they are at the centre, and how they move along each direction."""

    def __init__(self, live: list[Tensor], directions: list[list[Tensor]]) -> None:
        self._live, self._directions = live, directions
        self._centre = [tensor.clone() for tensor in live]

    def move(self, *amounts: float) -> None:
        if self._live:
            torch._foreach_copy_(self._live, self._centre)
            for amount, direction in zip(amounts, self._directions, strict=False):
                if amount:
                    torch._foreach_add_(self._live, direction, alpha=amount)


class _Mover:
    """A copy of the model whose weights can be put anywhere on the plane."""

    def __init__(self, model: nn.Module, plane: Plane) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        own = self.model.state_dict()  # shares its memory with the copy
        _check_alike(own, plane.centre)
        for direction in plane.directions:
            if not direction.keys() <= own.keys():
                raise InputError("the plane is of another network: it moves weights that this one has not")
        for name, tensor in own.items():
            tensor.copy_(plane.centre[name])
        trained = {name for name, _ in self.model.named_parameters()}
        moving = [name for name in own if any(name in direction for direction in plane.directions)]
        self._weights, self._statistics = (
            _Moving([own[name] for name in moving if (name in trained) == is_weight],
                    [[direction[name].to(own[name]) if name in direction else torch.zeros_like(own[name])
                      for name in moving if (name in trained) == is_weight] for direction in plane.directions])
            for is_weight in (True, False)
        )  # fmt: skip
        self._norms = [m for m in self.model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]

    @property
    def has_batch_norm(self) -> bool:
        return bool(self._norms)

    @torch.no_grad()
    def move(self, x: float, y: float, norm_batches: Sequence[Tensor] = ()) -> nn.Module:
        """The model at (x, y): always from the centre, so that a point is the same whichever came before it."""
        self._weights.move(x, y)
        self._statistics.move(min(max(x, 0.0), 1.0), min(max(y, 0.0), 1.0))  # beyond the ends a variance would become negative
        if norm_batches:
            recompute_batch_norm(self.model, norm_batches)
        return self.model


@torch.inference_mode()
def _losses(model: nn.Module, sample: Sample, criterion: Criterion) -> tuple[Tensor, Tensor]:
    """(loss of each image, accuracy)."""
    losses, right = [], []
    for images, labels in sample.batches:
        outputs = model(images)
        losses.append(criterion(outputs, labels).double())
        if outputs.ndim == 2 and not labels.is_floating_point():
            right.append(outputs.argmax(1) == labels)
    nothing = torch.tensor(math.nan, dtype=torch.float64, device=losses[0].device)
    return torch.cat(losses), torch.cat(right).double().mean() if right else nothing


def _describe(losses: Tensor, centre: Tensor, accuracy: Tensor) -> Tensor:
    """loss, loss_error, difference_error, accuracy, number of images whose loss is not finite; still on the device."""
    root = math.sqrt(len(losses))
    few = len(losses) < 2  # one image has no spread
    errors = [torch.full_like(accuracy, math.nan) if few else t.std() / root for t in (losses, losses - centre)]
    return torch.stack([losses.mean(), *errors, accuracy, (~losses.isfinite()).sum().double()])


def _row(i: int, j: int, values: list[float]) -> dict[str, Any]:
    *numbers, nonfinite = values
    names = ("loss", "loss_error", "difference_error", "accuracy")
    row = {name: value if math.isfinite(value) else None for name, value in zip(names, numbers, strict=True)}
    if nonfinite:
        row["loss"] = None  # also where it is infinite: a mean of the rest would look better than it is
    return {"i": i, "j": j, **row, "nonfinite": int(nonfinite), "layer": ""}


def _first_nonfinite(model: nn.Module, sample: Sample) -> str:
    """The first layer, in order of execution, with an output that is not finite; "the loss" where all outputs are."""
    for name, tensor in model.state_dict().items():
        if not bool(torch.isfinite(tensor).all()):
            return f"{name} itself"
    found: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            if not found and isinstance(output, Tensor) and not bool(torch.isfinite(output).all()):
                found.append(name or "the output")

        return hook

    leaves = [(name, module) for name, module in model.named_modules() if next(module.children(), None) is None]
    handles = [module.register_forward_hook(watch(name)) for name, module in [*leaves, ("", model)]]
    try:
        with torch.inference_mode():
            for images, _ in sample.batches:
                model(images)
                if found:
                    return found[0]
    finally:
        for handle in handles:
            handle.remove()
    return "the loss"


def _fingerprint(model: nn.Module, plane: Plane, sample: Sample) -> str:
    """16 hex digits over all that the numbers depend on: the network's code as it prints, weights, directions, images."""
    digest = hashlib.sha256(repr(model).encode())
    tensors: Iterator[tuple[str, Tensor]] = (pair for weights in (plane.centre, *plane.directions) for pair in weights.items())
    for name, tensor in tensors:
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    for images, labels in sample.batches:
        digest.update(images.detach().cpu().contiguous().numpy().tobytes() + labels.detach().cpu().numpy().tobytes())
    for images in sample.norm_batches:
        digest.update(images.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


# ---- what it says ------------------------------------------------------------------------------------------------------------


def barrier(landscape: Landscape) -> tuple[float, float]:
    """(height, its standard error) of the loss above the straight line between the losses at x = 0 and x = 1, at its largest.

    0 or less says that the two runs are linearly connected on these images. The error is that of the difference to x = 0, the
    part of it that the other end adds left out: a floor.

    Source: Frankle et al. 2020, arXiv:1912.05671. Raises InputError when the line has no points at 0 and 1, or one between them
    is not finite.
    """
    xs, loss = landscape.xs, landscape.loss[0]
    ends = [np.flatnonzero(np.isclose(xs, end)) for end in (0.0, 1.0)]
    if not all(len(end) for end in ends):
        raise InputError("a barrier needs the losses at x = 0 and x = 1: put both among the points")
    inside = (xs >= -1e-9) & (xs <= 1 + 1e-9)
    if not np.isfinite(loss[inside]).all():
        raise InputError(f"no barrier can be told: {landscape.tell_nonfinite() or 'not all points are measured'}")
    first, second = (float(loss[end[0]]) for end in ends)
    above = np.where(inside, loss - ((1 - xs) * first + xs * second), -np.inf)
    at = int(above.argmax())
    return float(above[at]), float(landscape.difference_error[0, at])
