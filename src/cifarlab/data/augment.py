"""Augmentation and normalisation of whole batches, on any device; what is random is drawn elsewhere and passed in.

Every function takes images of shape N×3×H×W, in either memory format, and returns new ones (of the same shape, but for pad and
resize).
crop and flip move uint8 pixels, the colour functions and mixing work on floats in 0…1, cutout on normalised floats. The order in
which `Batches` applies them: crop, flip, brightness, contrast, saturation, hue, normalise, cutout, mix, resize.

No result depends on the batch that an image happens to be in, bit for bit, so that N ranks see what one process sees; and
CPU and GPU agree, which is why products and sums are separate operations here: a GPU's addcmul, lerp and `add(alpha=)` round
once where a CPU rounds twice.

Speeds in comments: batch 512 at 3×32×32, two threads of a 2-core AVX-512 CPU, torch 2.13.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional


def pad(images: Tensor, padding: int, mode: Literal["zeros", "reflect"] = "zeros") -> Tensor:
    """Images with a border of `padding` pixels on each side: black, or mirrored without repeating the edge.

    Shape N×C×(H+2·padding)×(W+2·padding). Reflection needs padding < min(H, W).
    """
    if mode == "zeros":
        return functional.pad(images, (padding,) * 4)
    rows, columns = (_mirrored(side, padding).to(images.device) for side in images.shape[-2:])
    return images[:, :, rows][..., columns]  # functional.pad does not reflect uint8


def _mirrored(side: int, padding: int) -> Tensor:
    index = torch.arange(-padding, side + padding).abs()
    return torch.minimum(index, 2 * (side - 1) - index)


def crop(images: Tensor, offsets: Tensor, padding: int, mode: Literal["zeros", "reflect"] = "zeros") -> Tensor:
    """Images shifted within their padded selves; size unchanged.

    offsets: int64, N×2 (y, x), each in 0…2·padding; (padding, padding) is the image itself.
    """
    rows = torch.arange(len(images), device=images.device)
    return cut_windows(pad(images, padding, mode), rows, offsets, images.shape[2], images.shape[3])


def cut_windows(images: Tensor, indices: Tensor, offsets: Tensor, height: int, width: int) -> Tensor:
    """Windows of height × width out of the images of these indices, upper left corners at `offsets`.

    images: uint8, N×3×H×W, fast only in channels_last memory (else it is copied whole); indices: int64, n; offsets: int64, n×2
    (y, x). Returns n×3×height×width in channels_last memory.
    """
    # A row of a window is width·3 adjacent bytes, so cropping copies rows: 0.5 ms. One gather by pixel, which could mirror
    # as well, takes 3 ms by byte number and 6.7 ms by (image, y, x).
    nhwc = images.permute(0, 2, 3, 1).contiguous()
    _, full_height, full_width, channels = nhwc.shape
    y = offsets[:, :1] + torch.arange(height, device=images.device)
    start = ((indices[:, None] * full_height + y) * full_width + offsets[:, 1:]).view(-1) * channels
    flat, length = nhwc.view(-1), width * channels
    if flat.device.type == "cpu":
        rows = flat.unfold(0, length, 1).index_select(0, start)
    else:  # not every device indexes an overlapping view without first writing it out, 100 times the size of the set
        rows = flat[start[:, None] + torch.arange(length, device=flat.device)]
    return rows.view(-1, height, width, channels).permute(0, 3, 1, 2)


def flip(images: Tensor, mask: Tensor) -> Tensor:
    """Images mirrored left to right where `mask` (bool, N) is true."""
    return torch.where(mask[:, None, None, None], images.flip(-1), images)


def adjust_brightness(images: Tensor, factors: Tensor) -> Tensor:
    """clamp(factor · image): 0 is black, 1 the image itself.

    images: float in 0…1; factors: float, N. Source: PIL's ImageEnhance.Brightness; ours is not rounded to 256 levels.
    """
    return (images * factors[:, None, None, None]).clamp_(0, 1)


def adjust_contrast(images: Tensor, factors: Tensor) -> Tensor:
    """clamp(factor · image + (1 − factor) · mean of its grey image): 0 is plain grey, 1 the image itself.

    images: float in 0…1; factors: float, N.
    Source: PIL's ImageEnhance.Contrast, which rounds the mean to a whole level; ours does not.
    """
    # Whole numbers of 2⁻²⁰ add up to the same mean in any order. A mean of floats differs in its last bit between a batch
    # of one and of four (seen at 300×300 with two threads).
    levels = (_grey(images) * 2**20).round_().to(torch.int32).sum((1, 2, 3), keepdim=True)
    return _blend(images, levels.float() / (2**20 * images.shape[2] * images.shape[3]), factors)


def adjust_saturation(images: Tensor, factors: Tensor) -> Tensor:
    """clamp(factor · image + (1 − factor) · its grey image): 0 is without colour, 1 the image itself.

    images: float in 0…1; factors: float, N. Source: PIL's ImageEnhance.Color; ours is not rounded to 256 levels.
    """
    return _blend(images, _grey(images), factors)


def adjust_hue(images: Tensor, turns: Tensor) -> Tensor:
    """Images with the hue of HSV turned; value and saturation stay.

    images: float in 0…1; turns: float, N, in turns of the colour circle: 1/3 makes red green.
    Source: torchvision's adjust_hue; ours is not rounded to PIL's 256 hues.
    """
    red, green, blue = images.unbind(1)
    value, _ = images.max(1)
    chroma = value - images.amin(1)
    safe = torch.where(chroma > 0, chroma, 1)
    sector = torch.where(
        value == red, (green - blue) / safe, torch.where(value == green, (blue - red) / safe + 2, (red - green) / safe + 4)
    )
    sector = sector + (turns * 6)[:, None, None]
    # Each channel is a trapezoid over the six sectors of the circle, shifted by two sectors from channel to channel.
    out = torch.empty_like(images)
    for channel, shift in enumerate((5, 3, 1)):
        k = (sector + shift) % 6
        out[:, channel] = value - chroma * torch.minimum(k, 4 - k).clamp_(0, 1)
    return out


def _grey(images: Tensor) -> Tensor:
    """Luma of ITU-R 601, as PIL's mode L, N×1×H×W."""
    return images[:, 0:1] * 0.299 + images[:, 1:2] * 0.587 + images[:, 2:3] * 0.114


def _blend(images: Tensor, other: Tensor, factors: Tensor) -> Tensor:
    factors = factors[:, None, None, None]
    return (images * factors + other * (1 - factors)).clamp_(0, 1)


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(image − mean) / std per channel, float32, in the memory format of the images.

    images: uint8, or float in 0…1; mean, std: of pixels in 0…1. Computed as image · scale + shift: within 10⁻⁶ of the formula.
    """
    scale, shift = _scale_and_shift(tuple(mean), tuple(std), 255 if images.dtype == torch.uint8 else 1, images.device)
    if images.is_contiguous():
        return images.float().mul_(scale[:, None, None]).add_(shift[:, None, None])
    # With the channels innermost, broadcasting runs in loops of three; constants repeated over a row of pixels make
    # them loops of 3·W: 0.6 instead of 2.8 ms.
    nhwc = images.permute(0, 2, 3, 1).contiguous()
    width = images.shape[3]
    rows = nhwc.float().view(-1, width * len(scale)).mul_(scale.repeat(width)).add_(shift.repeat(width))
    return rows.view(nhwc.shape).permute(0, 3, 1, 2)


@lru_cache(maxsize=32)
def _scale_and_shift(mean: tuple[float, ...], std: tuple[float, ...], levels: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Kept: numbers that Python hands to a GPU are waited for there, behind all that it was given to do before."""
    with torch.inference_mode(False):  # of a tensor made in that mode not everything can be made later
        scale = torch.tensor([1 / (s * levels) for s in std], device=device)
        return scale, torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=device)


def normalize_batch(
    images: Tensor | NDArray[np.uint8],
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device,
    channels_last: bool = True,
) -> Tensor:
    """Images as a network wants them, without augmentation: normalised float32 on the device, N×3×H×W.

    images: uint8, N×3×H×W. They travel as uint8, a quarter of the bytes.
    """
    pixels = images if isinstance(images, Tensor) else torch.tensor(images)  # copies: from_numpy warns of read-only memory
    pixels = pixels.to(device)
    return normalize(pixels.contiguous(memory_format=memory_format(channels_last)), mean, std)


def resize(images: Tensor, height: int, width: int) -> Tensor:
    """Images of another size, n×C×height×width, by a triangle filter as wide as one new pixel; the memory format stays.

    images: float. Source: PIL's BILINEAR, which rounds to 256 levels; ours does not.
    """
    return functional.interpolate(images, (height, width), mode="bilinear", antialias=True)


def memory_format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def cutout(images: Tensor, corners: Tensor, side: int) -> Tensor:
    """Normalised images with a square of side × side pixels set to 0, which is the mean colour.

    corners: int64, N×2 (y, x) of the upper left pixel.
    Source: DeVries & Taylor 2017, arXiv:1708.04552; there the square may hang over the border, here `Batches` draws it
    wholly inside, so that every image loses the same area.
    """
    y = torch.arange(images.shape[2], device=images.device) - corners[:, :1]
    x = torch.arange(images.shape[3], device=images.device) - corners[:, 1:]
    in_rows, in_columns = (y >= 0) & (y < side), (x >= 0) & (x < side)
    return images.masked_fill((in_rows[:, :, None] & in_columns[:, None, :])[:, None], 0.0)


def mixup(images: Tensor, partners: Tensor, share: float) -> Tensor:
    """share · image + (1 − share) · partner.

    Source: Zhang et al. 2017, arXiv:1710.09412; as there, one share for the whole batch.
    """
    return images * share + partners * (1 - share)


def cutmix(images: Tensor, partners: Tensor, box: tuple[int, int, int, int]) -> Tensor:
    """Images with a box (top, bottom, left, right; bottom and right excluded) taken from their partners.

    Source: Yun et al. 2019, arXiv:1905.04899; as there, one box for the whole batch.
    """
    top, bottom, left, right = box
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = partners[:, :, top:bottom, left:right]
    return mixed


def cutmix_box(share: float, center: tuple[int, int], height: int, width: int) -> tuple[tuple[int, int, int, int], float]:
    """The box of area 1 − share around a pixel (y, x), clipped at the border, and the share of the image that remains.

    Source: arXiv:1905.04899; as in its code, the share returned is that of the clipped box, so that the labels fit the pixels.
    """
    half_height, half_width = (int(side * math.sqrt(1 - share)) // 2 for side in (height, width))
    y, x = center
    top, bottom = max(y - half_height, 0), min(y + half_height, height)
    left, right = max(x - half_width, 0), min(x + half_width, width)
    return (top, bottom, left, right), 1 - (bottom - top) * (right - left) / (height * width)


def mix_labels(labels: Tensor, partners: Tensor, share: float, num_classes: int) -> Tensor:
    """Soft targets, float N×K: `share` on the image's own class, the rest on its partner's."""
    own, other = (functional.one_hot(classes, num_classes).float() for classes in (labels, partners))
    return own * share + other * (1 - share)
