"""The noise scale against the covariance of per-image gradients by brute force, and the memory of one gradient."""

import io
import math
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from cifarlab.config import InputError
from cifarlab.probes.fixed_batch import FixedBatch
from cifarlab.probes.noise import COLUMNS, GradientMemory, measure_noise


def build(num_images: int = 12, *, with_norm: bool = False, dtype: torch.dtype = torch.float64) -> Any:
    """(net, batch)"""
    torch.manual_seed(2)
    norm: nn.Module = nn.BatchNorm2d(3) if with_norm else nn.Identity()
    net = nn.Sequential(nn.Conv2d(3, 3, 2), norm, nn.ReLU(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(27, 3)).to(dtype)
    return net, FixedBatch(torch.randn(num_images, 3, 4, 4, dtype=dtype), torch.arange(num_images) % 3)


def measure(net: nn.Module, batch: FixedBatch, num_pieces: int = 4) -> dict[str, float]:
    row = measure_noise(net, batch, num_pieces)
    assert row.shape == (1, len(COLUMNS))
    assert row.dtype == torch.float32
    assert not row.requires_grad
    return dict(zip(COLUMNS, row[0].tolist(), strict=True))


def gradients_of(net: nn.Sequential, batch: FixedBatch, pieces: list[Any]) -> np.ndarray:
    """One flat gradient a piece (indices of its images), by backward() on the net as measured."""
    net.eval()
    for module in net:
        if isinstance(module, nn.BatchNorm2d):
            module.train()
    rows = []
    for piece in pieces:
        net.zero_grad()
        F.cross_entropy(net(batch.images[piece]), batch.labels[piece]).backward()
        rows.append(np.concatenate([p.grad.numpy().reshape(-1) for p in net.parameters() if p.grad is not None]))
    net.zero_grad()
    net.train()
    return np.stack(rows)


def test_one_image_a_piece_is_the_covariance_by_brute_force() -> None:
    net, batch = build()
    each = gradients_of(net, batch, [[i] for i in range(12)])
    trace = np.trace(np.cov(each.T))  # divides by n − 1
    row = measure(net, batch, num_pieces=12)
    assert row["noise_trace"] == pytest.approx(trace, rel=1e-6)
    dots = each @ each.T
    assert row["gradient_square"] == pytest.approx((dots.sum() - np.trace(dots)) / (12 * 11), rel=1e-6)
    assert math.isnan(row["cosine"])


@pytest.mark.parametrize("with_norm", [False, True], ids=["plain", "batch norm"])
def test_equal_pieces_are_the_paper_s_formulas(with_norm: bool) -> None:
    """Appendix A.1 with B_small = 3, B_big = 12; with batch norm the big gradient is still the mean of the pieces'."""
    net, batch = build(with_norm=with_norm)
    pieces = gradients_of(net, batch, [slice(i, i + 3) for i in range(0, 12, 3)])
    small, big = (pieces**2).sum(1).mean(), (pieces.mean(0) ** 2).sum()
    row = measure(net, batch)
    assert row["gradient_square"] == pytest.approx((12 * big - 3 * small) / (12 - 3), rel=1e-6)
    assert row["noise_trace"] == pytest.approx((small - big) / (1 / 3 - 1 / 12), rel=1e-6)
    if row["gradient_square"] > 0:
        assert row["noise_scale"] == pytest.approx(row["noise_trace"] / row["gradient_square"], rel=1e-6)


@pytest.mark.parametrize("num_pieces", [2, 3], ids=["equal pieces", "pieces of 2, 1 and 1"])
def test_the_mean_over_all_splits_is_exact(num_pieces: int) -> None:
    """Over all orders of 4 images: unbiased for their covariance, and for the products of different images' gradients."""
    net, batch = build(num_images=4)
    each = gradients_of(net, batch, [[i] for i in range(4)])
    dots = each @ each.T
    orders = [list(order) for order in permutations(range(4))]
    rows = [measure(net, FixedBatch(batch.images[order], batch.labels[order]), num_pieces) for order in orders]
    assert len({row["noise_trace"] for row in rows}) > 1
    assert np.mean([row["noise_trace"] for row in rows]) == pytest.approx(np.trace(np.cov(each.T)), rel=1e-6)
    assert np.mean([row["gradient_square"] for row in rows]) == pytest.approx((dots.sum() - np.trace(dots)) / 12, rel=1e-6)


def test_many_random_batches_find_the_gradient_and_covariance_of_the_population() -> None:
    """Batches drawn from 30 images, with uneven pieces: within five standard errors of the truth."""
    net, population = build(num_images=30)
    each = gradients_of(net, population, [[i] for i in range(30)])
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(400):
        drawn = torch.randint(30, (10,), generator=generator)
        rows.append(measure(net, FixedBatch(population.images[drawn], population.labels[drawn]), 3))
    square, trace = (each.mean(0) ** 2).sum(), np.trace(np.cov(each.T, bias=True))
    # An error that the test must be able to see: |ḡ|² is too large by tr Σ/10, and k for k − 1 makes tr Σ too small by a third.
    for name, truth, seen in (("gradient_square", square, trace / 10), ("noise_trace", trace, trace / 3)):
        found = np.array([row[name] for row in rows])
        error = found.std() / math.sqrt(len(found))
        assert abs(found.mean() - truth) < 5 * error < seen


def test_nan_where_the_gradient_is_drowned() -> None:
    """Two images that pull to opposite sides: no gradient, only noise; the two estimates themselves are told."""
    net = nn.Linear(1, 1, bias=False)
    images = torch.tensor([[1.0], [-1.0]])
    row = measure(net, FixedBatch(images, torch.zeros(2), lambda logits, labels: logits.mean()), 2)
    assert math.isnan(row["noise_scale"])
    assert row["gradient_square"] == pytest.approx(-1)
    assert row["noise_trace"] == pytest.approx(2)


def test_equal_gradients_have_no_noise() -> None:
    net, batch = build(num_images=2)
    twice = FixedBatch(batch.images[:1].expand(8, -1, -1, -1), batch.labels[:1].expand(8))
    row = measure(net, twice)
    assert row["noise_scale"] == pytest.approx(0, abs=1e-12)
    assert row["gradient_square"] == pytest.approx((gradients_of(net, batch, [[0]]) ** 2).sum(), rel=1e-6)


def test_a_noise_a_million_times_smaller_than_the_gradient_is_seen() -> None:
    """In float32, where the difference of two squares would be rounding alone."""
    net = nn.Linear(1, 1, bias=False)
    images = 1000 + torch.tensor([[1.0], [-1.0], [1.0], [-1.0]]) / 64
    row = measure(net, FixedBatch(images, torch.zeros(4), lambda logits, labels: logits.mean()), 4)
    assert row["noise_trace"] == pytest.approx(4 / 3 / 64**2, rel=1e-3)
    assert row["noise_scale"] == pytest.approx(4 / 3 / 64**2 / 1e6, rel=1e-3)


def test_frozen_weights_are_left_out() -> None:
    net, batch = build()
    every = measure(net, batch)
    net[0].requires_grad_(False)
    last = gradients_of(net, batch, [slice(i, i + 3) for i in range(0, 12, 3)])
    assert last.shape == (4, 27 * 3 + 3)
    row = measure(net, batch)
    assert row["noise_trace"] == pytest.approx(3 * ((last - last.mean(0)) ** 2).sum() / 3, rel=1e-6)
    assert row["noise_trace"] < 0.99 * every["noise_trace"]
    net.requires_grad_(False)
    with pytest.raises(InputError, match="no trainable weights"):
        measure(net, batch)


@pytest.mark.parametrize("num_pieces", [0, 1, 13])
def test_pieces_that_cannot_be(num_pieces: int) -> None:
    net, batch = build()
    with pytest.raises(InputError, match=f"num_pieces={num_pieces} "):
        measure_noise(net, batch, num_pieces)


def test_measuring_noise_leaves_no_trace() -> None:
    net, batch = build(with_norm=True, dtype=torch.float32)
    batch.loss(net).backward()
    net[0].register_forward_hook(lambda *_: None)

    def trace() -> list[Any]:
        tensors: list[Tensor] = [*net.state_dict().values(), *(p.grad for p in net.parameters() if p.grad is not None)]
        return [[t.clone() for t in tensors] + [torch.get_rng_state()], [(t._version, t.data_ptr()) for t in tensors],
                [m.training for m in net.modules()], [len(m._forward_hooks) for m in net.modules()]]  # fmt: skip

    before = trace()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        row = measure_noise(net, batch)
    after = trace()
    assert all(map(torch.equal, before[0], after[0]))
    assert before[1:] == after[1:]
    assert torch.equal(row.nan_to_num(), measure_noise(net, batch).nan_to_num())  # nor is autocast felt, or chance


def test_channels_last_compiled_and_wrapped() -> None:
    net, batch = build(with_norm=True)
    expected = measure(net, batch)
    compiled = torch.compile(nn.DataParallel(net), backend="eager")
    assert measure(compiled, batch) == pytest.approx(expected, nan_ok=True)  # type: ignore[arg-type]
    net.to(memory_format=torch.channels_last)
    images = batch.images.contiguous(memory_format=torch.channels_last)
    assert measure(net, FixedBatch(images, batch.labels)) == pytest.approx(expected, nan_ok=True)


def test_a_given_cosine_is_in_the_row() -> None:
    net, batch = build()
    row = measure_noise(net, batch, cosine=torch.tensor(0.25))
    assert row[0, COLUMNS.index("cosine")] == 0.25


# ---- successive gradients -------------------------------------------------------------------------------------------------


def test_cosine_of_successive_gradients() -> None:
    memory = GradientMemory()
    first, second = [torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])], [torch.tensor([0.0, 7.0]), torch.tensor([[24.0]])]
    assert memory.cosine_with(first).isnan()
    memory.remember(first)
    assert memory.cosine_with(second).item() == pytest.approx(4 * 24 / (5 * 25), rel=1e-12)
    assert memory.cosine_with([-g for g in first]).item() == pytest.approx(-1, rel=1e-12)
    first[0].fill_(99)  # what is remembered is a copy
    assert memory.cosine_with([torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])]).item() == pytest.approx(1, rel=1e-12)
    assert memory.cosine_with([torch.zeros(2), torch.zeros(1, 1)]).isnan()
    memory.remember([torch.tensor([3.0, 0.0]), None])  # None is zero
    assert memory.cosine_with([torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])]).item() == pytest.approx(3 / 5, rel=1e-12)
    assert memory.cosine_with([torch.tensor([4.0, 3.0]), None]).item() == pytest.approx(4 / 5, rel=1e-12)
    assert memory.cosine_with([None, None]).isnan()
    with pytest.raises(ValueError, match=r"shorter|longer"):
        memory.cosine_with([torch.zeros(2)])


def test_cosine_of_half_precision_gradients_neither_underflows_nor_overflows() -> None:
    memory = GradientMemory()
    memory.remember([torch.full((4,), 1e-4, dtype=torch.float16), torch.full((4,), 3e4, dtype=torch.float16)])
    new = [torch.full((4,), 1e-4, dtype=torch.float16), torch.full((4,), -3e4, dtype=torch.float16)]
    assert memory.cosine_with(new).item() == pytest.approx(-1, rel=1e-9)
    memory.remember(new[:1])
    assert memory.cosine_with(new[:1]).item() == pytest.approx(1, rel=1e-9)


@pytest.mark.parametrize("strides", ["kept", "lost"])
def test_a_run_stopped_between_the_two_steps_goes_on_with_the_same_bits(strides: str) -> None:
    net, batch = build(with_norm=True)
    net.append(nn.Unflatten(1, (3, 1, 1))).append(nn.Conv2d(3, 64, 3, padding=1)).append(nn.Conv2d(64, 32, 3, padding=1))
    net.append(nn.Flatten()).double().to(memory_format=torch.channels_last)
    optimizer = SGD(net.parameters(), lr=0.1)

    def step() -> list[Tensor | None]:
        optimizer.zero_grad()
        batch.loss(net).backward()
        gradients = [None if p.grad is None else p.grad.clone() for p in net.parameters()]
        optimizer.step()
        return gradients

    memory, resumed = GradientMemory(), GradientMemory()
    memory.remember(step())
    file = io.BytesIO()
    torch.save(memory.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    if strides == "lost":
        state["gradients"] = [gradient.contiguous() for gradient in state["gradients"]]
    resumed.load_state_dict(state)
    new = step()
    assert new[-2] is not None
    assert new[-2].stride()[1] == 1  # channels_last
    assert torch.equal(memory.cosine_with(new), resumed.cosine_with(new))
    empty = GradientMemory()
    empty.load_state_dict(GradientMemory().state_dict())
    assert empty.cosine_with(new).isnan()
