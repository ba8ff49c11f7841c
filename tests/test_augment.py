"""Every batched function against a slow one that takes one image, or one pixel, at a time."""

import colorsys
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from cifarlab.data import augment

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
FORMATS = pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])


def random_bytes(n: int, height: int = 8, width: int = 6, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (n, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def to_pil(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


def from_pil(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    height=st.integers(2, 9), width=st.integers(2, 9), padding=st.integers(0, 5), mode=st.sampled_from(["zeros", "reflect"]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_crop_is_pad_then_cut_of_each_image(height: int, width: int, padding: int, mode: str, seed: int) -> None:
    if mode == "reflect":
        padding = min(padding, height - 1, width - 1)
    images = random_bytes(5, height, width, seed)
    offsets = torch.randint(0, 2 * padding + 1, (5, 2), generator=torch.Generator().manual_seed(seed))
    cropped = augment.crop(images, offsets, padding, mode)
    for image, (y, x), got in zip(images, offsets.tolist(), cropped, strict=True):
        if mode == "zeros":
            expected = from_pil(ImageOps.expand(to_pil(image), padding).crop((x, y, x + width, y + height)))
        else:
            padded = np.pad(image.numpy(), ((0, 0), (padding, padding), (padding, padding)), mode="reflect")
            expected = torch.from_numpy(padded[:, y : y + height, x : x + width])
        assert torch.equal(got, expected)


@FORMATS
def test_windows_of_repeated_and_last_images(memory_format: torch.memory_format) -> None:
    images = random_bytes(4, 7, 9).contiguous(memory_format=memory_format)
    indices, offsets = torch.tensor([3, 0, 3, 3]), torch.tensor([[3, 3], [0, 0], [3, 3], [1, 2]])
    cut = augment.cut_windows(images, indices, offsets, 4, 6)
    for n, (i, (y, x)) in enumerate(zip(indices.tolist(), offsets.tolist(), strict=True)):
        assert torch.equal(cut[n], images[i, :, y : y + 4, x : x + 6])
    assert cut.is_contiguous(memory_format=torch.channels_last)


@FORMATS
def test_flip_mirrors_the_chosen_images(memory_format: torch.memory_format) -> None:
    images = random_bytes(6).contiguous(memory_format=memory_format)
    mask = torch.tensor([True, False, False, True, True, False])
    for image, chosen, got in zip(images, mask.tolist(), augment.flip(images, mask), strict=True):
        expected = to_pil(image).transpose(Image.Transpose.FLIP_LEFT_RIGHT) if chosen else to_pil(image)
        assert torch.equal(got, from_pil(expected))


Pixels = NDArray[np.float64]


def grey(image: Pixels) -> Pixels:
    return 0.299 * image[0] + 0.587 * image[1] + 0.114 * image[2]


def slow_hue(image: Pixels, turn: float) -> Pixels:
    out = np.empty_like(image)
    for y, x in np.ndindex(image.shape[1:]):
        hue, saturation, value = colorsys.rgb_to_hsv(*image[:, y, x])
        out[:, y, x] = colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value)
    return out


SLOW: dict[str, Callable[[Pixels, float], Pixels]] = {
    "brightness": lambda image, f: np.clip(f * image, 0, 1),
    "contrast": lambda image, f: np.clip(f * image + (1 - f) * grey(image).mean(), 0, 1),
    "saturation": lambda image, f: np.clip(f * image + (1 - f) * grey(image), 0, 1),
    "hue": slow_hue,
}
ENHANCE = {"brightness": ImageEnhance.Brightness, "contrast": ImageEnhance.Contrast, "saturation": ImageEnhance.Color}


def color_images(n: int) -> Tensor:
    """Random colours, and what trips up HSV: grey, black, white, and colours with two equal channels."""
    images = random_bytes(n)
    special = torch.tensor([[0, 0, 0], [255, 255, 255], [90, 90, 90], [255, 0, 0], [9, 200, 200], [200, 9, 200], [200, 200, 9]])
    images[:, :, 0, :] = 0
    images[0].permute(1, 2, 0).view(-1, 3)[: len(special)] = special.to(torch.uint8)
    return images


@FORMATS
@pytest.mark.parametrize("name", SLOW)
def test_color_adjustment_of_each_image(name: str, memory_format: torch.memory_format) -> None:
    images = color_images(9).float().div(255).contiguous(memory_format=memory_format)
    factors = torch.linspace(-0.5, 0.5, 9) if name == "hue" else torch.linspace(0, 2, 9)
    adjusted = getattr(augment, f"adjust_{name}")(images, factors)
    for image, factor, got in zip(images, factors.tolist(), adjusted, strict=True):
        expected = SLOW[name](image.double().numpy(), factor)
        np.testing.assert_allclose(got.numpy(), expected, atol=2e-6)
    assert adjusted.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("name", ENHANCE)
def test_color_adjustment_is_that_of_pil_up_to_its_rounding(name: str) -> None:
    images, factors = random_bytes(9), torch.linspace(0.2, 1.8, 9)
    adjusted = getattr(augment, f"adjust_{name}")(images.float() / 255, factors)
    for image, factor, got in zip(images, factors.tolist(), adjusted, strict=True):
        expected = from_pil(ENHANCE[name](to_pil(image)).enhance(factor))
        assert (got * 255 - expected).abs().max() <= 2  # PIL rounds grey to a whole level, then cuts off the result


@FORMATS
@pytest.mark.parametrize("side", [5, 6, 9])
def test_resize_is_that_of_pil_up_to_its_rounding(side: int, memory_format: torch.memory_format) -> None:
    images = color_images(4).contiguous(memory_format=memory_format)
    resized = augment.resize(images.float(), side, side + 1)
    assert resized.shape == (4, 3, side, side + 1)
    assert resized.is_contiguous(memory_format=memory_format)
    for image, got in zip(images, resized, strict=True):
        expected = from_pil(to_pil(image).resize((side + 1, side), Image.Resampling.BILINEAR))
        assert (got - expected).abs().max() <= 1.01  # PIL rounds between rows and columns, too


@FORMATS
@pytest.mark.parametrize("name", [*SLOW, "normalize", "resize"])
def test_an_image_does_not_depend_on_its_batch(name: str, memory_format: torch.memory_format) -> None:
    images = color_images(37).float().div(255).contiguous(memory_format=memory_format)
    factors = torch.linspace(-0.4, 0.4, 37) + (name != "hue")

    def apply(images: Tensor, factors: Tensor) -> Tensor:
        if name == "normalize":
            return augment.normalize(images, MEAN, STD)
        if name == "resize":
            return augment.resize(images, 6, 5)
        result: Tensor = getattr(augment, f"adjust_{name}")(images, factors)
        return result

    whole = apply(images, factors)
    for part in (slice(0, 1), slice(1, 4), slice(4, 37)):
        assert torch.equal(apply(images[part], factors[part]), whole[part])


@FORMATS
@pytest.mark.parametrize("as_bytes", [True, False])
def test_normalize_is_the_formula(as_bytes: bool, memory_format: torch.memory_format) -> None:
    images = random_bytes(5).contiguous(memory_format=memory_format)
    normalized = augment.normalize(images if as_bytes else images.float() / 255, MEAN, STD)
    for channel, (mean, std) in enumerate(zip(MEAN, STD, strict=True)):
        expected = (images[:, channel].double() / 255 - mean) / std
        torch.testing.assert_close(normalized[:, channel].double(), expected, rtol=0, atol=1e-6)
    assert normalized.dtype == torch.float32
    assert normalized.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("channels_last", [True, False])
def test_normalize_batch_takes_read_only_arrays_and_tensors(channels_last: bool) -> None:
    images = random_bytes(5)
    array = images.numpy().copy()
    array.flags.writeable = False  # as a memory map is; torch warns where it shares such memory, and warnings are errors here
    expected = augment.normalize(images, MEAN, STD)
    for given_images in (array, images):
        got = augment.normalize_batch(given_images, MEAN, STD, torch.device("cpu"), channels_last)
        assert torch.equal(got, expected)
        assert got.is_contiguous(memory_format=augment.memory_format(channels_last))


def test_cutout_clears_one_square_in_each_image() -> None:
    images = torch.rand(4, 3, 7, 9) + 1
    corners = torch.tensor([[0, 0], [4, 6], [2, 3], [4, 0]])
    expected = images.clone()
    for image, (y, x) in zip(expected, corners.tolist(), strict=True):
        for row in range(y, y + 3):
            for column in range(x, x + 3):
                image[:, row, column] = 0
    assert torch.equal(augment.cutout(images, corners, 3), expected)
    assert (images > 0).all()  # the input is left alone


def test_mixup_blends_images_and_labels_alike() -> None:
    a, b = torch.rand(3, 3, 4, 4), torch.rand(3, 3, 4, 4)
    torch.testing.assert_close(augment.mixup(a, b, 0.3).double(), 0.3 * a.double() + 0.7 * b.double())
    targets = augment.mix_labels(torch.tensor([0, 1, 2]), torch.tensor([2, 1, 0]), 0.3, 4)
    torch.testing.assert_close(targets, torch.tensor([[0.3, 0, 0.7, 0], [0, 1.0, 0, 0], [0.7, 0, 0.3, 0]]))


@settings(deadline=None, max_examples=200, derandomize=True)
@given(st.floats(0, 1), st.integers(1, 40), st.integers(1, 40), st.floats(0, 1), st.floats(0, 1))
def test_cutmix_share_is_the_area_that_remains(share: float, height: int, width: int, down: float, across: float) -> None:
    y, x = min(int(down * height), height - 1), min(int(across * width), width - 1)
    box, corrected = augment.cutmix_box(share, (y, x), height, width)
    mixed = augment.cutmix(torch.zeros(2, 3, height, width), torch.ones(2, 3, height, width), box)
    assert corrected == pytest.approx(1 - mixed.mean().item(), abs=1e-6)
    assert corrected >= share - 1e-9  # clipping and rounding only ever shrink the box
    # As in the paper's code.
    cut = np.sqrt(1.0 - share)
    cut_h, cut_w = int(height * cut), int(width * cut)
    top, bottom = np.clip(y - cut_h // 2, 0, height), np.clip(y + cut_h // 2, 0, height)
    left, right = np.clip(x - cut_w // 2, 0, width), np.clip(x + cut_w // 2, 0, width)
    assert box == (top, bottom, left, right)


def test_cutmix_takes_the_box_from_the_partner() -> None:
    a, b = torch.rand(2, 3, 6, 8), torch.rand(2, 3, 6, 8)
    mixed = augment.cutmix(a, b, (1, 4, 2, 7))
    for y in range(6):
        for x in range(8):
            source = b if 1 <= y < 4 and 2 <= x < 7 else a
            assert torch.equal(mixed[:, :, y, x], source[:, :, y, x])


def test_contrast_of_a_large_white_image_does_not_overflow() -> None:
    images = torch.ones(1, 3, 300, 300)
    assert math.isclose(augment.adjust_contrast(images, torch.tensor([0.0])).min().item(), 1, abs_tol=1e-6)
