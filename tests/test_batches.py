"""Batches are a function of (seed, step): whatever came before, and however many ranks share them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cifarlab.config import InputError, TrainConfig
from cifarlab.data.batches import Batches
from cifarlab.data.dataset import Split

PLAIN = {"crop_padding": 0, "flip": "none"}
JITTER = {"brightness": 0.2, "contrast": 0.2, "saturation": 0.2, "hue": 0.1}
AUGMENTATIONS = {
    "plain": PLAIN,
    "crop-flip": {},
    "reflect-alternating": {"crop_mode": "reflect", "flip": "alternating"},
    "jitter": JITTER,
    "cutout": {"cutout": 3},
    "mixup": {"mixup_alpha": 0.5, **JITTER},
    "cutmix": {"cutmix_alpha": 1.0, "cutout": 2},
    "small-first": {"small_sides": "5:0.001,6:0.002", "epochs": 1000},
    "mixup-cutmix": {"mixup_alpha": 0.5, "cutmix_alpha": 1.0, "channels_last": False},
}
EACH_AUGMENTATION = pytest.mark.parametrize("name", AUGMENTATIONS)


def make_images(n: int, height: int = 8, width: int = 8) -> NDArray[np.uint8]:
    images = np.random.default_rng(0).integers(1, 256, (n, 3, height, width), dtype=np.uint8)
    images.flags.writeable = False  # as the memory-mapped cache gives them
    return images


def make_batches(
    images: NDArray[np.uint8], *, rank: int = 0, world_size: int = 1, device: str = "cpu", **fields: object
) -> Batches:
    """Batches in which label i belongs to image i, and normalisation only divides by 255."""
    config = TrainConfig(**{"batch_size": 7, "image_size": 8, **fields})
    n = len(images)
    return Batches(
        Split(images, np.arange(n)), config, num_classes=n, mean=(0.0,) * 3, std=(1.0,) * 3, device=torch.device(device),
        rank=rank, world_size=world_size,
    )  # fmt: skip


@EACH_AUGMENTATION
def test_a_step_is_the_same_whatever_came_before(name: str) -> None:
    images = make_images(30)
    fresh, walked = (make_batches(images, **AUGMENTATIONS[name]) for _ in range(2))
    sequence = list(walked.range(0, 12))  # more than two epochs
    for step in (12, 7, 7, 1):
        for got, expected in zip(fresh.at(step), sequence[step - 1], strict=True):
            assert torch.equal(got, expected)
    resumed = list(fresh.range(7, 12))
    assert len(resumed) == 5
    assert all(torch.equal(a[0], b[0]) for a, b in zip(resumed, sequence[7:], strict=True))
    other_seed = make_batches(images, seed=1, **AUGMENTATIONS[name]).at(1)
    assert not torch.equal(other_seed[0], sequence[0][0])


@EACH_AUGMENTATION
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_together_see_the_batch_of_one_process(name: str, world_size: int) -> None:
    images = make_images(31)  # batches of 11, the last of 9
    alone = make_batches(images, batch_size=11, **AUGMENTATIONS[name])
    ranks = [make_batches(images, batch_size=11, rank=r, world_size=world_size, **AUGMENTATIONS[name]) for r in range(world_size)]
    for step in range(1, 8):
        parts = [batches.at(step) for batches in ranks]
        assert max(len(p[0]) for p in parts) - min(len(p[0]) for p in parts) <= 1
        for whole, pieces in zip(alone.at(step), zip(*parts, strict=True), strict=True):
            assert torch.equal(torch.cat(pieces), whole)
        assert all(torch.equal(r.indices_at(step), alone.indices_at(step)) for r in ranks)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(n=st.integers(2, 40), batch_size=st.integers(1, 50), drop_last=st.booleans())
def test_every_image_once_an_epoch(n: int, batch_size: int, drop_last: bool) -> None:
    if drop_last and batch_size > n:
        return
    batches = make_batches(make_images(n), batch_size=batch_size, drop_last=drop_last, **PLAIN)
    for epoch in range(2):
        steps = range(epoch * batches.steps_per_epoch + 1, (epoch + 1) * batches.steps_per_epoch + 1)
        sizes = [len(batches.indices_at(step)) for step in steps]
        seen = torch.cat([batches.indices_at(step) for step in steps]).tolist()
        rest = n % batch_size
        left_out = rest if (drop_last or rest == 1) and n > batch_size else 0
        assert len(seen) == len(set(seen)) == n - left_out
        assert all(size == batch_size for size in sizes[:-1])
        assert sizes[-1] >= min(2, batch_size)


def test_labels_belong_to_their_images_and_epochs_differ() -> None:
    images = make_images(30)
    batches = make_batches(images, **PLAIN)
    for step in range(1, 6):
        pixels, labels = batches.at(step)
        assert torch.equal(labels, batches.indices_at(step))
        torch.testing.assert_close(pixels, torch.from_numpy(images[labels.numpy()] / 255).float())
        assert pixels.is_contiguous(memory_format=torch.channels_last)
        assert labels.dtype == torch.int64
    assert not torch.equal(batches.indices_at(1), batches.indices_at(1 + batches.steps_per_epoch))
    assert make_batches(images, channels_last=False).at(1)[0].is_contiguous()


def test_crop_offsets_cover_the_whole_range_evenly() -> None:
    # In a set of one picture of 25 different pixels, the pixel in the middle tells the offset: source[offset] with padding 2.
    picture = np.arange(25, dtype=np.uint8).reshape(1, 1, 5, 5) * 10
    batches = make_batches(np.tile(picture, (500, 3, 1, 1)), batch_size=500, crop_padding=2, flip="none")
    middles = torch.cat([images[:, 0, 2, 2] * 25.5 for images, _ in batches.range(0, 20)]).round().int()
    counts = torch.bincount(middles, minlength=25)
    assert len(counts) == 25
    assert (counts - 400).abs().max() < 100  # five standard deviations


def count_flips(batches: Batches, images: NDArray[np.uint8], epoch: int) -> torch.Tensor:
    """Per image of the set, whether it is mirrored in this epoch."""
    flipped = torch.zeros(len(images), dtype=torch.bool)
    start = epoch * batches.steps_per_epoch
    for pixels, labels in batches.range(start, start + batches.steps_per_epoch):
        upright = torch.from_numpy(images[labels.numpy()] / 255).float()
        same = torch.isclose(pixels, upright).flatten(1).all(1)
        assert torch.isclose(pixels[~same], upright[~same].flip(-1)).all()
        flipped[labels] = ~same
    return flipped


def test_small_images_come_first_and_are_the_whole_ones_resized() -> None:
    images = make_images(30)
    whole, small = make_batches(images, epochs=4), make_batches(images, epochs=4, small_sides="4:0.3,6:0.5")  # 20 updates
    sides = [small.at(step)[0].shape[2:] for step in range(1, 21)]
    assert sides == [(4, 4)] * 6 + [(6, 6)] * 4 + [(8, 8)] * 10
    assert small.stages(after=5) == [((4, 4), range(6, 7)), ((6, 6), range(7, 11)), ((8, 8), range(11, 21))]
    assert small.stages(after=6) == small.stages(after=5)[1:]
    for epochs, text in ((0.2, "3:0.1,4:0.12,5:0.9"), (7, "4:0.3,6:0.7"), (40, "")):  # also where a stage has no step
        batches = make_batches(images, epochs=epochs, small_sides=text)
        told = {step: shape for shape, steps in batches.stages() for step in steps}
        assert told == {step: batches.shape_at(step) for step in range(1, batches.num_steps + 1)}
    for step in (1, 8):
        expected = torch.nn.functional.interpolate(whole.at(step)[0], sides[step - 1], mode="bilinear", antialias=True)
        assert torch.equal(small.at(step)[0], expected)
        assert torch.equal(small.at(step)[1], whole.at(step)[1])
    assert torch.equal(small.at(11)[0], whole.at(11)[0])
    assert make_batches(make_images(30, 8, 12), small_sides="4:0.9").shape_at(1) == (4, 6)


def test_alternating_flip_mirrors_each_image_every_other_epoch() -> None:
    images = make_images(700)
    batches = make_batches(images, batch_size=64, flip="alternating", crop_padding=0)
    first, second, third = (count_flips(batches, images, epoch) for epoch in range(3))
    assert torch.equal(second, ~first)
    assert torch.equal(third, first)
    assert 250 < first.sum() < 450


def test_random_flip_mirrors_half_of_the_images_anew_each_epoch() -> None:
    images = make_images(700)
    batches = make_batches(images, batch_size=64, crop_padding=0)
    first, second = (count_flips(batches, images, epoch) for epoch in range(2))
    assert 250 < first.sum() < 450
    assert 250 < (first ^ second).sum() < 450


def test_augmentations_come_in_the_stated_order() -> None:
    """The whole chain, one image at a time in NumPy, fed with the same draws."""
    images = make_images(14)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    jitter = {"brightness": 0.4, "contrast": 0.3, "saturation": 0.5}
    config = TrainConfig(batch_size=7, crop_padding=2, crop_mode="reflect", cutout=3, **jitter)
    batches = Batches(Split(images, np.arange(14)), config, num_classes=14, mean=mean, std=std, device=torch.device("cpu"))
    indices = batches.indices_at(2).numpy()
    draws = batches._draw(2, indices)
    for n, got in enumerate(batches.at(2)[0]):
        y, x = draws["crop"][n]
        image = np.pad(images[indices[n]], ((0, 0), (2, 2), (2, 2)), mode="reflect")[:, y : y + 8, x : x + 8] / 255
        if draws["flip"][n]:
            image = image[:, :, ::-1]
        image = np.clip(image * draws["brightness"][n], 0, 1)
        grey_mean = np.tensordot([0.299, 0.587, 0.114], image, 1).mean()
        image = np.clip(image * draws["contrast"][n] + grey_mean * (1 - draws["contrast"][n]), 0, 1)
        grey = np.tensordot([0.299, 0.587, 0.114], image, 1)
        image = np.clip(image * draws["saturation"][n] + grey * (1 - draws["saturation"][n]), 0, 1)
        image = (image - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
        top, left = draws["cutout"][n]
        image[:, top : top + 3, left : left + 3] = 0
        np.testing.assert_allclose(got.numpy(), image, atol=1e-5)


def test_jitter_factors_and_cutout_corners_fill_their_ranges() -> None:
    batches = make_batches(make_images(500), batch_size=500, brightness=0.2, contrast=1.5, hue=0.1, cutout=5)
    draws = batches._draw(1, batches.indices_at(1).numpy())
    for name, low, high in (("brightness", 0.8, 1.2), ("contrast", 0, 2.5), ("hue", -0.1, 0.1)):
        margin = 0.05 * (high - low)
        assert low <= draws[name].min() < low + margin
        assert high - margin < draws[name].max() <= high + 1e-6
    assert "saturation" not in draws
    assert {tuple(corner) for corner in draws["cutout"]} == {(y, x) for y in range(4) for x in range(4)}


def test_one_augmentation_leaves_the_draws_of_the_others_alone() -> None:
    images = make_images(21)
    without, _ = make_batches(images).at(3)
    with_cutout, _ = make_batches(images, cutout=4).at(3)
    kept = with_cutout != 0
    assert torch.equal(with_cutout[kept], without[kept])
    assert 0 < kept.sum() < kept.numel()


@pytest.mark.parametrize("world_size", [1, 2])
def test_soft_targets_tell_how_the_pixels_were_mixed(world_size: int) -> None:
    images = make_images(21)
    clean = torch.from_numpy(images / 255).float()
    kinds = {"mixup": 0, "cutmix": 0}
    for rank in range(world_size):
        batches = make_batches(images, rank=rank, world_size=world_size, mixup_alpha=1.0, cutmix_alpha=1.0, **PLAIN)
        for step in range(1, 31):
            pixels, targets = batches.at(step)
            assert targets.dtype == torch.float32
            torch.testing.assert_close(targets.sum(1), torch.ones(len(targets)))
            blend = torch.einsum("nk,kchw->nchw", targets, clean)
            if torch.allclose(pixels, blend, atol=1e-5):
                kinds["mixup"] += 1
                continue
            kinds["cutmix"] += 1
            for image, target in zip(pixels, targets, strict=True):
                shares = [torch.isclose(image, clean[k]).all(0).float().mean() for k in target.nonzero().flatten()]
                # Pixels of two images may agree by chance, hence the tolerance.
                torch.testing.assert_close(torch.stack(shares), target[target > 0], rtol=0, atol=0.05)
    assert min(kinds.values()) >= 5


def test_mixing_alone_never_draws_the_other_kind() -> None:
    images = make_images(21)
    clean = torch.from_numpy(images / 255).float()
    for pixels, targets in make_batches(images, mixup_alpha=0.4, **PLAIN).range(0, 20):
        torch.testing.assert_close(pixels, torch.einsum("nk,kchw->nchw", targets, clean), rtol=0, atol=1e-5)
    for pixels, _ in make_batches(images, cutmix_alpha=0.4, **PLAIN).range(0, 20):  # every pixel is an original one
        assert torch.isclose(pixels[:, None], clean[None]).all(2).any(1).all()


@pytest.mark.parametrize(
    ("n", "world_size", "fields", "message"),
    [
        (1, 1, {}, "training set of 1 image"),
        (0, 1, {}, "training set of 0 image"),
        (5, 1, {"drop_last": True}, "batch_size=7 with drop_last"),
        (30, 8, {}, "batch_size=7 is too small for 8 ranks"),
        (30, 3, {}, "last batch of an epoch has 2 images"),
        (3, 4, {}, "last batch of an epoch has 3 images"),
        (30, 1, {"cutout": 9}, "cutout=9 does not fit"),
        (30, 1, {"crop_padding": 8, "crop_mode": "reflect", "image_size": 32}, "crop_padding=8 is too much"),
    ],
)
def test_what_does_not_fit_together_is_refused(n: int, world_size: int, fields: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_batches(make_images(n), world_size=world_size, **fields)


def test_small_sides_do_not_enlarge() -> None:
    with pytest.raises(InputError, match=r"small_sides='20:0.5' enlarges images of 8×8 pixels: choose sides of at most 8"):
        make_batches(make_images(30), small_sides="20:0.5")


def test_ranks_fit_when_the_small_last_batch_is_dropped() -> None:
    assert make_batches(make_images(30), world_size=3, drop_last=True).steps_per_epoch == 4


def test_steps_count_from_one() -> None:
    with pytest.raises(ValueError, match="counted from 1"):
        make_batches(make_images(10)).at(0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@EACH_AUGMENTATION
def test_gpu_and_cpu_see_the_same_pixels(name: str) -> None:
    images = make_images(30)
    cpu, gpu = (make_batches(images, device=device, **AUGMENTATIONS[name]) for device in ("cpu", "cuda"))
    for step in (1, 5, 8):
        for a, b in zip(cpu.at(step), gpu.at(step), strict=True):
            torch.testing.assert_close(b.cpu(), a, rtol=0, atol=1e-6)
