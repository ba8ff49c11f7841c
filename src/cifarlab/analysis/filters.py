"""What a network's filters look for: the filters, their responses, what excites them most, and which pixels a decision hangs on.

Everything takes uint8 images and the statistics to normalise them with, and gives numpy arrays. The model is used in evaluation
mode and left as it was: flags, weights, gradients, hooks.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from cifarlab.config import InputError, did_you_mean
from cifarlab.data.augment import normalize_batch
from cifarlab.profile.receptive import receptive_fields

Images = NDArray[np.uint8]  # N×3×H×W


# ---- filters and their responses -----------------------------------------------------------------------------------------------


def list_convolutions(model: nn.Module) -> list[str]:
    """Dotted names of the model's 2-D convolutions, in the order of definition."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]


def read_filters(model: nn.Module, layer: str | None = None) -> NDArray[np.float32]:
    """The weights of a convolution, out×in×h×w, of the first one by default; raises InputError when there is none so named."""
    names = list_convolutions(model)
    if not names:
        raise InputError("this model has no 2-D convolution, so it has no filters to look at")
    name = names[0] if layer is None else layer
    if name not in names:
        raise InputError(f"{name!r} is no convolution of this model{did_you_mean(name, names)}; it has {', '.join(names)}")
    return model.get_submodule(name).weight.detach().cpu().float().numpy().copy()  # type: ignore[operator]


def feature_maps(model: nn.Module, images: Images, layers: Sequence[str], *, mean: Sequence[float],
                 std: Sequence[float]) -> dict[str, NDArray[np.float32]]:  # fmt: skip
    """The output of each of these layers for each image: N×C×h×w (or what shape it has), by name.

    A layer is any module by its dotted name; of a convolution, this is what its filters respond to the image as it arrives there,
    before batch norm and ReLU. Costs one forward pass. Raises InputError for a layer that is not there or was not called.
    """
    found: dict[str, NDArray[np.float32]] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            found[name] = output.detach().to("cpu", torch.float32, copy=True).numpy()  # at once: a ReLU may act in place

        return hook

    with _hooked(model, {name: keep(name) for name in layers}), torch.no_grad():
        model(_normal(model, images, mean, std))
    _check_called(found, layers)
    return found


def apply_filters(model: nn.Module, images: Images, layer: str | None = None, channels: Sequence[int] | None = None, *,
                  mean: Sequence[float], std: Sequence[float]) -> NDArray[np.float32]:  # fmt: skip
    """The responses of single filters of a convolution to each image, N×filters×h×w: what an image is before and after a filter.

    layer: the first convolution by default; channels: which filters, all by default. Raises InputError for one that is not there.
    """
    filters = read_filters(model, layer)
    name = list_convolutions(model)[0] if layer is None else layer
    chosen = list(range(len(filters))) if channels is None else list(channels)
    if wrong := [channel for channel in chosen if not 0 <= channel < len(filters)]:
        raise InputError(f"layer {name!r} has no filter {wrong[0]}: it has 0 to {len(filters) - 1}")
    return feature_maps(model, images, [name], mean=mean, std=std)[name][:, chosen]


# ---- what excites a channel ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Exciting:
    """The images that excite each channel of a layer most, strongest first.

    channels: (K,); indices: (K, top), places in the images given; values: (K, top), the channel's largest output on that image;
    positions: (K, top, 2), row and column of it in the map; boxes: (K, top, 4), the pixels that this output sees, cut off at the
    image's borders: top, left, bottom, right, the last two excluded; (0, 0, H, W) where the field is not known.
    """

    layer: str
    channels: tuple[int, ...]
    indices: NDArray[np.int64]
    values: NDArray[np.float32]
    positions: NDArray[np.int64]
    boxes: NDArray[np.int64]


def find_exciting(model: nn.Module, images: Images, layer: str, channels: Sequence[int], *, mean: Sequence[float],
                  std: Sequence[float], top: int = 9, batch_size: int = 250) -> Exciting:  # fmt: skip
    """The `top` images on which each channel's largest output is largest, and where on them.

    Costs a forward pass of all images; memory for one batch. Equal values: the earlier image first. An output that is not finite
    excites nothing. Raises InputError for a layer without maps, and channels that are not there.
    """
    count = min(top, len(images))
    best: list[tuple[Tensor, Tensor]] = []
    shape: tuple[int, ...] = ()
    kept: list[Tensor] = []
    with _hooked(model, {layer: lambda _, __, output: kept.append(output.detach())}), torch.no_grad():
        for first in range(0, len(images), batch_size):
            kept.clear()
            model(_normal(model, images[first : first + batch_size], mean, std))
            _check_called(kept, [layer])
            maps = kept[-1].float()
            if maps.ndim != 4:
                raise InputError(f"layer {layer!r} gives {tuple(maps.shape)}, no maps N×C×h×w: name a convolution, or after one")
            if wrong := [channel for channel in channels if not 0 <= channel < maps.shape[1]]:
                raise InputError(f"layer {layer!r} has no channel {wrong[0]}: it has 0 to {maps.shape[1] - 1}")
            shape = tuple(maps.shape[2:])
            flat = maps[:, list(channels)].flatten(2).nan_to_num(nan=-torch.inf, posinf=-torch.inf)
            values, places = flat.max(dim=2)
            best.append((values.cpu(), places.cpu()))
    values, places = (torch.cat([pair[k] for pair in best]).T for k in range(2))
    order = values.argsort(dim=1, descending=True, stable=True)[:, :count]
    chosen = places.gather(1, order).numpy()
    positions = np.stack([chosen // shape[1], chosen % shape[1]], axis=-1)
    boxes = _boxes(model, layer, images.shape[1:], positions)
    return Exciting(layer, tuple(channels), order.numpy(), values.gather(1, order).numpy(), positions, boxes)


def _boxes(model: nn.Module, layer: str, shape: tuple[int, ...], positions: NDArray[np.int64]) -> NDArray[np.int64]:
    boxes = np.tile(np.array([0, 0, shape[1], shape[2]]), (*positions.shape[:2], 1))
    field = receptive_fields(model, shape).get(layer)
    if field is None or field.unknown:
        return boxes
    for at in np.ndindex(positions.shape[:2]):
        seen = field.pixels(*map(int, positions[at]))
        if seen.any():
            rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
            boxes[at] = rows[0], columns[0], rows[-1] + 1, columns[-1] + 1
    return boxes


def _blur(images: Tensor, sigma: float) -> Tensor:
    """Convolved with a Gaussian along both axes; beyond the border the edge pixels go on."""
    reach = math.ceil(3 * sigma)
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, device=images.device) / sigma) ** 2).to(images)
    kernel = (kernel / kernel.sum()).expand(images.shape[1], 1, 1, -1)
    for _ in range(2):
        padded = nn.functional.pad(images, (reach, reach, 0, 0), mode="replicate")
        images = nn.functional.conv2d(padded, kernel, groups=images.shape[1]).transpose(2, 3)
    return images


def excite(model: nn.Module, layer: str, channels: Sequence[int], *, image_size: tuple[int, int], mean: Sequence[float],
           std: Sequence[float], steps: int = 128, step_size: float = 0.05, smoothness: float = 0.0,
           seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.float32]]:  # fmt: skip
    """(an image for each channel that excites it, K×3×H×W in 0…1; its activation, K): gradient ascent on the pixels.

    The activation is the channel's mean over its map, or the output itself where there is no map (a class's logit). From grey
    with a little noise; each step moves an image by step_size times its gradient over that one's largest entry, cuts off at 0
    and 1. smoothness: standard deviation in pixels of the Gaussian that each step's gradient is blurred with; 0 shows what the
    channel really wants, which is often fine-grained noise, more keeps to coarse patterns: pleasanter, and less exciting.

    Source: Erhan et al. 2009 ("Visualizing higher-layer features of a deep network"); Simonyan et al. 2013, arXiv:1312.6034,
    section 2, there with weight decay instead of bounds. Raises InputError for a layer or a channel that is not there.
    """
    device = _device(model)
    generator = torch.Generator().manual_seed(seed)
    start = 0.5 + 0.02 * torch.randn(len(channels), 3, *image_size, generator=generator)
    pixels = start.clamp(0, 1).to(device)
    shift, scale = (torch.tensor(values, device=device).view(3, 1, 1) for values in (mean, std))
    kept: list[Tensor] = []
    rows = torch.arange(len(channels), device=device)

    def activation() -> Tensor:
        kept.clear()
        model((pixels - shift) / scale)
        _check_called(kept, [layer])
        output = kept[-1].float()
        output = output.flatten(2).mean(2) if output.ndim > 2 else output
        if wrong := [channel for channel in channels if not 0 <= channel < output.shape[1]]:
            raise InputError(f"layer {layer!r} has no channel {wrong[0]}: it has 0 to {output.shape[1] - 1}")
        return output[rows, torch.tensor(list(channels), device=device)]

    def keep(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        kept.append(output)
        return output.clone()  # what follows may act in place

    with _hooked(model, {layer: keep}), torch.enable_grad():
        for _ in range(steps):
            pixels = pixels.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(activation().sum(), pixels)
            gradient = _blur(gradient, smoothness) if smoothness else gradient
            largest = gradient.abs().amax((1, 2, 3), keepdim=True)
            pixels = (pixels.detach() + step_size * gradient / largest.clamp(min=1e-30)).clamp(0, 1)
        with torch.no_grad():
            reached = activation()
    return pixels.detach().cpu().numpy(), reached.detach().cpu().numpy()


# ---- which pixels a decision hangs on ------------------------------------------------------------------------------------------


def saliency(model: nn.Module, images: Images, classes: ArrayLike | None = None, *, mean: Sequence[float],
             std: Sequence[float]) -> NDArray[np.float32]:  # fmt: skip
    """max over colours |∂ logit of the class / ∂ pixel|, N×H×W, pixels in 0…1: how much the score hangs on each pixel.

    classes: class numbers, one an image; those that the model predicts by default. The logit, not the probability: that one can
    also be raised by lowering others. Costs a forward and a backward pass.

    Source: Simonyan et al. 2013, arXiv:1312.6034, section 3. Raises InputError for classes that are not there.
    """
    pixels = torch.tensor(np.ascontiguousarray(images), device=_device(model)).float().div_(255).requires_grad_()
    shift, scale = (torch.tensor(values, device=pixels.device).view(3, 1, 1) for values in (mean, std))
    with _hooked(model, {}), torch.enable_grad():
        logits = model((pixels - shift) / scale).float()
        (gradient,) = torch.autograd.grad(_scores(logits, classes).sum(), pixels)
    return gradient.abs().amax(1).cpu().numpy()


def grad_cam(model: nn.Module, images: Images, layer: str | None = None, classes: ArrayLike | None = None, *,
             mean: Sequence[float], std: Sequence[float]) -> NDArray[np.float32]:  # fmt: skip
    """ReLU(Σ_k α_k A_k), α_k the mean over the map of ∂ logit / ∂ A_k: N×h×w, where layer A found what speaks for the class.

    layer: with maps larger than 1×1; the last such one by default. classes: as for `saliency`. An image for whose class nothing
    there speaks gets zeros. Costs a forward pass and the backward pass from the logits to the layer.

    Source: Selvaraju et al. 2016, arXiv:1610.02391. Raises InputError for a layer without maps or behind the logits.
    """
    layer = layer or last_maps(model, images.shape[1:])
    kept: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        kept.append(output if output.requires_grad else output.requires_grad_())
        return output.clone()  # what follows may act in place

    with _hooked(model, {layer: keep}), torch.enable_grad():
        logits = model(_normal(model, images, mean, std)).float()
        _check_called(kept, [layer])
        maps = kept[-1]
        if maps.ndim != 4:
            raise InputError(f"layer {layer!r} gives {tuple(maps.shape)}, no maps N×C×h×w: name a convolution or what follows it")
        (gradient,) = torch.autograd.grad(_scores(logits, classes).sum(), maps, allow_unused=True)
    if gradient is None:
        raise InputError(f"the logits do not depend on layer {layer!r}: name another")
    return (gradient.mean((2, 3), keepdim=True) * maps.detach()).sum(1).relu().cpu().float().numpy()


def last_maps(model: nn.Module, shape: tuple[int, ...]) -> str:
    """Name of the last leaf layer, in order of execution, whose output is maps larger than 1×1: Grad-CAM's usual place."""
    found: list[str] = []

    def note(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.ndim == 4 and max(output.shape[2:]) > 1:
                found.append(name)

        return hook

    leaves = [name for name, module in model.named_modules() if name and next(module.children(), None) is None]
    with _hooked(model, {name: note(name) for name in leaves}), torch.no_grad():
        model(torch.zeros(1, *shape, device=_device(model)))
    if not found:
        raise InputError("no layer of this model gives maps larger than 1×1: Grad-CAM needs one")
    return found[-1]


def rank_correlation(first: ArrayLike, second: ArrayLike) -> float:
    """Spearman's ρ of two maps of equal size: 1 where they order the pixels alike, about 0 where they have nothing in common.

    nan where one of them is the same everywhere. Ties share their mean rank.
    """
    ranks = []
    for values in (np.asarray(first, dtype=float).ravel(), np.asarray(second, dtype=float).ravel()):
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        ends = counts.cumsum()
        ranks.append((ends - (counts + 1) / 2)[inverse])
    a, b = (r - r.mean() for r in ranks)
    size = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / size if size else float("nan")


# ---- what they share -----------------------------------------------------------------------------------------------------------


def _scores(logits: Tensor, classes: ArrayLike | None) -> Tensor:
    chosen = logits.argmax(1) if classes is None else torch.as_tensor(np.asarray(classes), device=logits.device)
    if chosen.shape != logits.shape[:1] or bool((chosen < 0).any()) or bool((chosen >= logits.shape[1]).any()):
        raise InputError(f"classes {tuple(chosen.shape)} do not fit {len(logits)} images and {logits.shape[1]} classes: "
                         f"give one of 0…{logits.shape[1] - 1} for each image")  # fmt: skip
    return logits.gather(1, chosen[:, None].long())[:, 0]


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _normal(model: nn.Module, images: Images, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    if images.ndim != 4 or images.shape[1] != 3 or images.dtype != np.uint8 or not len(images):
        raise InputError(f"images of shape {images.shape} and type {images.dtype} cannot be used: "
                         "give uint8, N×3×H×W, one or more")  # fmt: skip
    return normalize_batch(torch.tensor(np.ascontiguousarray(images)), mean, std, _device(model), channels_last=True)


@contextmanager
def _hooked(model: nn.Module, hooks: dict[str, Callable[..., Any]]) -> Iterator[None]:
    """The model in evaluation mode, without gradients for its weights, with these forward hooks, and afterwards as it was."""
    names = [name for name, _ in model.named_modules()]
    for name in hooks:
        if name not in names:
            raise InputError(f"{name!r} is no layer of this model{did_you_mean(name, names) or ': give the dotted name of one'}")
    flags = [(module, module.training) for module in model.modules()]
    trainable = [p for p in model.parameters() if p.requires_grad]
    handles = [model.get_submodule(name).register_forward_hook(hook) for name, hook in hooks.items()]
    try:
        model.eval()
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter in trainable:
            parameter.requires_grad_(True)
        for module, flag in flags:
            module.training = flag


def _check_called(found: Sequence[Any] | dict[str, Any], layers: Sequence[str]) -> None:
    missing = [name for name in layers if name not in found] if isinstance(found, dict) else list(layers)[: not found]
    if missing:
        raise InputError(f"layer {missing[0]!r} was not called in the forward pass: name another")
