"""Moments and exponents of many tensors, compiled and in torch, against numpy in float64."""

import importlib.util
import math
import os
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cifarlab.probes import moments as module
from cifarlab.probes.gpu_passes import agrees, gpu_passes
from cifarlab.probes.moments import SMALL, Moments
from cifarlab.probes.moments_torch import NON_FINITE, SUM, ZEROS, dense
from cifarlab.probes.panel import choose_parameters
from cifarlab.probes.weight_flow import COLUMNS, weight_flow

FORMATS: dict[str, Callable[[Tensor], Tensor]] = {  # the same entries, in another order or elsewhere in memory
    "contiguous": lambda t: t,
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t,
    "transposed": lambda t: t.mT.contiguous().mT if t.ndim > 1 else t,
    "strided": lambda t: torch.stack([t, t + 1], -1)[..., 0],
    "sparse": lambda t: t.to_sparse() if t.ndim else t,
}
ODD = (0.0, -0.0, math.nan, math.inf, -math.inf, 1e-40, -1e-45, 3e38, -3e38, 1.0, -(2.0**-126))


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["compiled", "triton", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "triton":
        request.getfixturevalue("by_triton")
    elif request.param == "torch":
        monkeypatch.setattr(module, "_library", lambda: None)
    elif module._library() is None:
        pytest.skip("cifarlab was installed without a C compiler")
    return str(request.param)


def reference(tensor: Tensor) -> list[float]:
    x = tensor.detach().to_dense().double().numpy()
    size = np.abs(x)
    with np.errstate(invalid="ignore", over="ignore"):
        return [x.sum(), size.sum(), (x**2).sum(), size.max(), (x == 0).sum(), (~np.isfinite(x)).sum()]


def assert_close(measured: Tensor, tensors: list[Tensor]) -> None:
    """Sums to 1e-6 of those of the sizes (a strip of 256 entries is summed in float32), and to 2⁻¹⁴⁰, a few denormals, an entry;
    all else to the last bits."""
    expected = np.array([reference(t) for t in tensors])
    for (got, got_size, *_), (sum_, size, *_), tensor in zip(measured.tolist(), expected.tolist(), tensors, strict=True):
        least = tensor.numel() * 2.0**-140
        assert got_size == pytest.approx(size, rel=1e-6, abs=least, nan_ok=True)
        assert got == pytest.approx(sum_, rel=0, abs=max(1e-6 * size, least) if math.isfinite(size) else 0, nan_ok=True)
    np.testing.assert_allclose(measured[:, 2].numpy(), expected[:, 2], rtol=1e-6)
    np.testing.assert_allclose(measured[:, 3:].numpy(), expected[:, 3:], rtol=1e-12)


def drawn(draw: Any, seed: int) -> Tensor:
    """A tensor of random shape, memory order and values, some of them odd."""
    sizes = st.one_of(st.integers(1, 5), st.sampled_from([255, 256, 257, 1025]))
    several = st.lists(st.integers(1, 6), min_size=2, max_size=4)
    shape = draw(st.one_of(st.just([]), sizes.map(lambda size: [size]), several))
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator) * draw(st.sampled_from([1e-30, 1e-3, 1.0, 1e15]))
    for place in draw(st.lists(st.integers(0, max(values.numel() - 1, 0)), max_size=3)):
        values.view(-1)[place] = draw(st.sampled_from(ODD))
    return FORMATS[draw(st.sampled_from(list(FORMATS)))](values)


@st.composite
def many(draw: Any) -> list[Tensor]:
    return [drawn(draw, draw(st.integers(0, 99))) for _ in range(draw(st.integers(1, 4)))]


@given(tensors=many())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_moments_and_exponents_are_numpy_s_any_way(tensors: list[Tensor]) -> None:
    passes = None
    if importlib.util.find_spec("triton"):
        from cifarlab.probes.moments_triton import Passes as passes
    counted = []
    for is_compiled, for_gpus in ((True, None), (False, None), (False, passes)):
        with pytest.MonkeyPatch.context() as patch, np.errstate(over="ignore", invalid="ignore"):
            if not is_compiled:
                patch.setattr(module, "_library", lambda: None)
            patch.setattr(module, "gpu_passes", lambda device, found=for_gpus: found)
            meter = Moments(tensors)
            measured = meter.of(tensors)
            assert_close(measured, tensors)
            counted.append(meter.exponents(tensors))
    assert torch.equal(counted[0], counted[1])
    assert torch.equal(counted[0], counted[2])
    for tensor, counts in zip(tensors, counted[0], strict=True):
        assert_counts(tensor, counts)


def assert_counts(tensor: Tensor, counts: Tensor) -> None:
    """By frexp: x = m·2ᵉ with ½ ≤ |m| < 1, so its power of two is e − 1; below 2⁻¹²⁶ are zeros and denormals."""
    x = tensor.detach().to_dense().float().numpy().reshape(-1)
    _, exponent = np.frexp(x)
    biased = np.where(np.isfinite(x), np.clip(exponent - 1 + 127, 0, None), 255)
    biased[x == 0] = 0
    index = biased + np.where(np.signbit(x), 256, 0)
    np.testing.assert_array_equal(counts, np.bincount(index, minlength=512))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_are_measured_as_they_are(dtype: torch.dtype) -> None:
    tensors = [torch.randn(3, 300).double().div(3).to(dtype), FORMATS["channels_last"](torch.randn(2, 3, 4, 5).to(dtype))]
    meter = Moments(tensors)
    assert not meter.is_compiled
    assert_close(meter.of(tensors), tensors)
    old = meter.copies(tensors)
    before = [t.clone() for t in tensors]
    for tensor in tensors:
        tensor.add_(torch.randn_like(tensor) * (1e-11 if dtype == torch.float64 else 0.1))  # below float32's resolution
    weights, updates = meter.of_weights(tensors, old, keeps=True)
    changes = [now.double() - was.double() for now, was in zip(tensors, before, strict=True)]
    torch.testing.assert_close(weights[:, :ZEROS], meter.of(tensors)[:, :ZEROS])
    expected = np.array([reference(change)[:ZEROS] for change in changes])
    np.testing.assert_allclose(updates[:, 1:ZEROS].numpy(), expected[:, 1:], rtol=1e-6)


def test_gradients_of_another_type_and_order_than_the_weights(way: str) -> None:
    """As autocast and sparse embeddings make them."""
    weights = [torch.zeros(4, 3, 2, 2), torch.zeros(8, 3)]
    gradients = [
        FORMATS["channels_last"](torch.randn(4, 3, 2, 2).bfloat16()),
        # Not coalesced: row 1 is there twice.
        torch.sparse_coo_tensor([[1, 1, 5]], torch.ones(3, 3), (8, 3), check_invariants=True),
    ]
    meter = Moments(weights)
    assert meter.is_compiled == (way == "compiled")
    assert_close(meter.of(gradients), gradients)
    assert meter.of(gradients)[1, SUM] == 9


def test_expanded_tensors(way: str) -> None:
    tensors = [torch.randn(1, 5).expand(300, 5), torch.tensor(2.0).expand(7)]
    assert_close(Moments(tensors).of(tensors), tensors)


def test_none_has_no_moments_and_no_exponents(way: str) -> None:
    tensors = [torch.ones(3), torch.ones(2000), torch.ones(2)]
    meter = Moments(tensors)
    meter.of(tensors)
    measured = meter.of([tensors[0], None, tensors[2]])
    assert torch.isnan(measured[1]).all()
    assert_close(measured[[0, 2]], [tensors[0], tensors[2]])
    counts = meter.exponents([None, tensors[1], None])
    assert counts.sum(1).tolist() == [0, 2000, 0]


@pytest.mark.parametrize("value", [1.0, 0.1, -3.7e-5])
@pytest.mark.parametrize("size", [1, 2, 257, 1000, 1025, 5000])
def test_equal_values_have_no_variance(way: str, value: float, size: int) -> None:
    meter = Moments([torch.full((size,), value)])
    row = weight_flow(meter.of([torch.full((size,), value)]).numpy(), meter.numels)[0]
    assert row[COLUMNS.index("variance")] == 0
    assert row[COLUMNS.index("mean")] == pytest.approx(np.float32(value))


def test_a_small_variance_beside_a_large_mean_is_seen(way: str) -> None:
    weights = 1 + 1e-4 * torch.randn(5000, generator=torch.Generator().manual_seed(0))
    meter = Moments([weights])
    row = weight_flow(meter.of([weights]).numpy(), meter.numels)[0]
    assert row[COLUMNS.index("variance")] == pytest.approx(weights.double().var(correction=0).item(), rel=1e-6)


@pytest.mark.parametrize("mean", [0.0, 1.0, 1.7, 2.0, 3.0, 5.0, 30.0, 1000.0])
def test_a_variance_is_right_however_the_entries_lie(way: str, mean: float) -> None:
    """Of weights and of updates, about where a strip's entries are so alike that it is summed in doubles."""
    change = 1e-3 * (mean + torch.randn(50_000))
    weights = [mean + torch.randn(50_000)]
    meter = Moments(weights)
    old = meter.copies(weights)
    weights[0] += change
    for measured, x in zip(meter.of_weights(weights, old, keeps=False), (weights[0], weights[0] - old[0]), strict=True):
        row = weight_flow(measured.numpy(), meter.numels)[0]
        assert row[COLUMNS.index("variance")] == pytest.approx(x.double().var(correction=0).item(), rel=1e-5)
        assert row[COLUMNS.index("mean")] == pytest.approx(x.double().mean().item(), abs=1e-6 * x.abs().mean().item())


@pytest.mark.parametrize("size", [255, 256, 512, 50_000])
@pytest.mark.parametrize("share", [0.01, 0.05, 0.065, 0.1, 0.2, 0.25, 0.3, 0.5])
def test_a_variance_is_right_of_two_values(way: str, share: float, size: int) -> None:
    """A share of zeros among equal entries: rounding errors of one direction."""
    weights = torch.where(torch.rand(size) < share, 0.0, 0.1)
    meter = Moments([weights])
    row = weight_flow(meter.of([weights]).numpy(), meter.numels)[0]
    assert row[COLUMNS.index("variance")] == pytest.approx(weights.double().var(correction=0).item(), rel=1e-5)


@pytest.mark.parametrize("exponent", [-140, -75, -70, -63, -60, -55, -51, -50, 49, 50, 51, 55, 60, 63, 70, 126])
def test_sums_of_any_size_are_right(way: str, exponent: int) -> None:
    """Squares of floats leave the range of floats, both ways."""
    tensors = [torch.randn(3000).clamp(-1.9, 1.9).ldexp(torch.tensor(exponent))]
    assert_close(Moments(tensors).of(tensors), tensors)


def test_the_largest_floats_do_not_overflow(way: str) -> None:
    huge = torch.full((1000,), torch.finfo(torch.float32).max)
    assert_close(Moments([huge]).of([huge]), [huge])


def test_weights_and_their_change(way: str) -> None:
    """In their own memory order; afterwards `old` holds the weights."""
    torch.manual_seed(0)
    weights = [torch.randn(()), torch.randn(257), torch.randn(4, 3, 5, 5).contiguous(memory_format=torch.channels_last),
               torch.randn(6, 7).T]  # fmt: skip
    meter = Moments(weights)
    old = meter.copies(weights)
    for _ in range(2):
        before = [w.clone() for w in weights]
        for weight in weights:
            weight.sub_(0.01 * torch.randn_like(weight))
        of_weights, of_updates = meter.of_weights(weights, old, keeps=True)
        changes = [w - b for w, b in zip(weights, before, strict=True)]
        for measured, tensors in ((of_weights, weights), (of_updates, changes)):
            assert not measured[:, [ZEROS, NON_FINITE]].any()
            expected = np.array([reference(t)[:ZEROS] for t in tensors])
            np.testing.assert_allclose(measured[:, :ZEROS], expected, rtol=1e-6, atol=1e-6)
        assert all(torch.equal(o, w) for o, w in zip(old, weights, strict=True))
    for weight in weights:
        weight.add_(1)
    meter.copy(weights, old)
    assert all(torch.equal(o, w) for o, w in zip(old, weights, strict=True))
    assert not meter.of_weights(weights, old, keeps=True)[1].any()


@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "not aligned"])
def test_copies_can_be_left_alone_or_made_anew(way: str, offset: int) -> None:
    weights = [torch.randn(n) for n in (1, 3, 257, 100_003)]
    meter = Moments(weights)
    old = [torch.zeros(w.numel() + offset)[offset:] for w in weights]
    meter.copy(weights, old)
    assert all(map(torch.equal, old, weights))
    now = [w + 1 for w in weights]
    one, other = meter.of_weights(now, old, keeps=False), meter.of_weights(now, old, keeps=False)
    assert all(map(torch.equal, one, other))
    assert one[1][:, SUM].tolist() == pytest.approx([1, 3, 257, 100_003], rel=1e-5)
    assert all(map(torch.equal, old, weights))


def test_weights_replaced_by_another_view_of_the_same_memory(way: str) -> None:
    """It begins at the same address and is of the same shape."""
    bank = torch.randn(8, 3)
    meter = Moments([bank[:4]])
    old = [bank[:4].clone()]
    for view in (bank[:4], bank[::2], bank[:1].expand(4, 3), bank[:4]):
        of_weights, of_changes = meter.of_weights([view], old, keeps=False)
        np.testing.assert_allclose(of_weights[0, :ZEROS], reference(view)[:ZEROS], rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(of_changes[0, :ZEROS], reference(view - old[0])[:ZEROS], rtol=1e-6, atol=1e-6)
        if meter.is_compiled:
            assert meter.differ([view], old) == (not torch.equal(view, old[0]))


def test_a_change_that_is_not_finite_is_one(way: str) -> None:
    weights = [torch.ones(300), torch.ones(300)]
    meter = Moments(weights)
    old = meter.copies(weights)
    weights[0][7], weights[1][299] = math.nan, math.inf
    for measured in meter.of_weights(weights, old, keeps=True):
        assert torch.isnan(measured[0, :ZEROS]).all()
        assert (measured[1, :ZEROS] == math.inf).all()


def test_the_same_input_gives_the_same_bits(way: str) -> None:
    tensors = [torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in (3, 1000, 70_001)]
    meter = Moments(tensors)
    first = meter.of(tensors)
    meter.of([t + 1 for t in tensors])
    assert torch.equal(meter.of([torch.cat([torch.zeros(1), t])[1:].clone() for t in tensors]), first)


@pytest.mark.parametrize("flushes", [False, True], ids=["denormals", "denormals as 0"])
def test_the_number_of_threads_does_not_matter(flushes: bool) -> None:
    """Not a bit: of tensors that are cut into many blocks, of a part of one, of denormals, whatever thread takes them."""
    if module._library() is None:
        pytest.skip("cifarlab was installed without a C compiler")
    weights = [torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in (5, 700_001, 65_536, 65_537, 1)]
    weights.append(torch.full((200_000,), 1e-41))
    changes = [1e-3 * w.flip(0) for w in weights]
    threads, results = torch.get_num_threads(), []
    try:
        torch.set_flush_denormal(flushes)
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            meter = Moments(weights)
            assert meter._plan[1] == (count if module._launcher() else 1)
            old = meter.copies(weights)
            now = [w + change for w, change in zip(weights, changes, strict=True)]
            of_now, of_changes = meter.of_weights(now, old, keeps=True)
            assert all(map(torch.equal, old, now))
            old[1][650_000] = 7  # one entry of one block
            meter.copy(now, old)
            assert all(map(torch.equal, old, now))
            results.append((meter.of(weights), of_now, of_changes))
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(threads)
    for one, *others in zip(*results, strict=True):
        assert all(torch.equal(one, other) for other in others)
    assert_close(results[0][0][:5], weights[:5])
    assert (results[0][0][5, SUM] == 0) == flushes


def test_nan_in_any_block_is_the_largest_and_a_missing_tensor_has_none(way: str) -> None:
    tensors = [torch.ones(200_000), torch.ones(200_000), torch.ones(3)]
    tensors[0][70_000], tensors[1][199_999] = math.nan, -math.inf
    measured = Moments(tensors).of([tensors[0], tensors[1], None])
    assert torch.isnan(measured[0, :ZEROS]).all()
    assert measured[0, NON_FINITE] == measured[1, NON_FINITE] == 1
    assert measured[1, 3] == math.inf
    assert torch.isnan(measured[2]).all()


def test_the_threads_are_torch_s_own() -> None:
    if "OpenMP" not in torch.__config__.parallel_info() or sys.platform != "linux":
        pytest.skip("this torch has no OpenMP, or one that cannot be asked")
    assert module._launcher() is not None


def test_the_compiled_way_is_there_where_a_compiler_is() -> None:
    if not (shutil.which("gcc") or shutil.which("cc")):
        pytest.skip("no C compiler on the path")
    assert module._library() is not None
    assert Moments([torch.ones(3), nn.Parameter(torch.ones(2))]).is_compiled


def test_an_address_is_only_used_where_it_is_known_what_lies_there() -> None:
    assert not Moments([torch.ones(3).as_subclass(Shard)]).is_compiled
    assert not Moments([torch.ones(3), torch.ones(3, device="meta")]).is_compiled


def test_dense_keeps_what_fills_its_memory() -> None:
    image = torch.randn(2, 3, 4, 5)
    assert dense(image) is image
    last = image.contiguous(memory_format=torch.channels_last)
    assert dense(last) is last
    assert dense(image.mT).is_contiguous()


def test_parameters_without_a_number_to_an_entry_are_left_out() -> None:
    named = {"w": torch.ones(2), "empty": torch.ones(0, 3), "complex": torch.ones(2, dtype=torch.complex64)}
    assert list(choose_parameters(named.items())) == ["w"]


def test_weights_of_another_form_are_told() -> None:
    weights = [torch.ones(3, 4), torch.ones(5)]
    meter = Moments(weights)
    assert meter.fits([torch.zeros(3, 4), torch.zeros(5)])
    for other in (torch.ones(3, 3), torch.ones(4, 3), torch.ones(3, 4).double(), torch.ones(3, 4, device="meta")):
        assert not meter.fits([other, weights[1]])


def test_a_gradient_that_is_not_its_weight_s_is_none(way: str) -> None:
    """Left over from before the weight was replaced: another size, or elsewhere."""
    meter = Moments([torch.ones(300), torch.ones(300), torch.ones(2)])
    gradients = [torch.ones(3), torch.ones(100_000), torch.ones(2)]
    assert torch.isnan(meter.of(gradients)[:2]).all()
    assert meter.of(gradients)[2, SUM] == 2
    assert meter.exponents(gradients).sum(1).tolist() == [0, 0, 2]
    if way != "torch":
        assert torch.isnan(meter.of([None, torch.ones(300, device="meta"), None])).all()


def test_lazy_parameters_are_left_out() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.LazyLinear(2))
    assert list(choose_parameters(net.named_parameters())) == ["0.weight", "0.bias"]


def test_copies_differ_where_a_bit_does_and_where_it_is_looked() -> None:
    if module._library() is None:
        pytest.skip("cifarlab was installed without a C compiler")
    weights = [torch.randn(40), torch.randn(1100), torch.zeros(0), torch.full((33,), torch.nan),
               torch.randn(64, 8, 3, 3).to(memory_format=torch.channels_last)]  # fmt: skip
    moments = Moments(weights)
    old = moments.copies(weights)
    assert not moments.differ(weights, old)  # a NaN is itself
    before = 0  # strips of the large ones
    for k, w in enumerate(weights):
        flat = (old[k].permute(0, 2, 3, 1) if w.ndim == 4 else old[k]).view(-1)
        for entry in range(0, w.numel(), 7):
            was = flat[entry].item()
            flat[entry] = -1e9
            assert moments.differ(weights, old)
            seen = [first for first in range(7) if moments.differ(weights, old, first, 7)]
            assert seen == ([(before + entry // 256) % 7] if w.numel() > SMALL else list(range(7))), (k, entry)
            flat[entry] = was
        before += -(-w.numel() // 256) if w.numel() > SMALL else 0


# ---- the passes for GPUs -------------------------------------------------------------------------------------------------


class Shard(Tensor):
    """Nobody knows what lies at its address."""


def spoiled(monkeypatch: pytest.MonkeyPatch, name: str, harm: Callable[..., object]) -> bool:
    """Whether passes would be used of which one does this harm: to what it found, or to what it was given."""
    from cifarlab.probes.moments_triton import Passes

    right = getattr(Passes, name)

    def wrong(self: Any, *arguments: Any, **settings: Any) -> Any:
        found = right(self, *arguments, **settings)
        harm(found, *arguments, **settings)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Passes, name, wrong)
        return agrees(Passes, torch.device("cpu"))


@pytest.mark.usefixtures("by_triton")
def test_passes_for_gpus_are_used_where_they_give_the_numbers_of_torch() -> None:
    from cifarlab.probes.moments_triton import Passes

    before = torch.get_rng_state()
    assert agrees(Passes, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), before)
    torch.set_default_dtype(torch.float64)
    try:
        assert agrees(Passes, torch.device("cpu"))
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("by_triton")
@pytest.mark.parametrize(("name", "harm"), {
    "a sum": ("gradient_moments", lambda found, *_: found[2, 0].add_(found[2, 1] * 1e-4)),
    "a sum of sizes": ("gradient_moments", lambda found, *_: found[0, 1].mul_(1.0001)),
    "squares": ("gradient_moments", lambda found, *_: found[2, 2].mul_(1.0001)),
    "squares too small for floats": ("gradient_moments", lambda found, *_: found[1, 2].zero_()),
    "a variance that is a difference": ("gradient_moments", lambda found, *_: found[3, 2].mul_(1 + 1e-9)),
    "the largest": ("gradient_moments", lambda found, *_: found[2, 3].mul_(1.0001)),
    "zeros": ("gradient_moments", lambda found, *_: found[4, 4].add_(1)),
    "what is not finite": ("gradient_moments", lambda found, *_: found[5, 5].add_(1)),
    "a gradient that is not there": ("gradient_moments", lambda found, given, *_: given[0] is None and found[0].nan_to_num_()),
    "a copy beside gradients": ("gradient_moments", lambda _, tensors, copying=None: copying and copying[1][2][-1].add_(1)),
    "weights": ("weight_moments", lambda found, *_, keeps: found[0][2, 2].mul_(1.0001)),
    "weights nearly alike": ("weight_moments", lambda found, *_, keeps: found[0][3, 2].mul_(1 + 1e-9)),
    "changes": ("weight_moments", lambda found, *_, keeps: found[1][2, 1].mul_(1.0001)),
    "changes too small": ("weight_moments", lambda found, *_, keeps: found[1][1, 2].zero_()),
    "a copy that is kept": ("weight_moments", lambda found, weights, old, keeps: keeps and old[2][-1].add_(1)),
    "a copy that is left alone": ("weight_moments", lambda found, weights, old, keeps: keeps or old[2][-1].add_(1)),
    "a copy though it is over": ("copy_unless", lambda _, is_over, weights, old: is_over and old[0].add_(1)),
    "no copy though it is not over": ("copy_unless", lambda _, is_over, weights, old: is_over or old[0].add_(1)),
    "exponents": ("exponents", lambda found, *_: found[4, 0].add_(1)),
}.values())  # fmt: skip
def test_passes_for_gpus_are_not_used_where_a_number_is_wrong(
    monkeypatch: pytest.MonkeyPatch, name: str, harm: Callable[..., object]
) -> None:
    assert not spoiled(monkeypatch, name, harm)


def test_no_passes_for_gpus_where_there_is_none(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever is raised there, and by whom; and not on a CPU's memory, which is what an interpreted kernel reads."""
    assert gpu_passes(torch.device("cpu")) is None
    card = torch.device("cuda", 7)
    gpu_passes.cache_clear()

    def broken(*_: object) -> None:
        raise RuntimeError("no driver")

    monkeypatch.setattr(torch.cuda, "get_device_capability", broken)
    assert gpu_passes(card) is None
    found = bool(importlib.util.find_spec("triton"))
    assert ("cuda:7 measure by torch's operations" in (told := capsys.readouterr().err)) == ("no driver" in told) == found
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    gpu_passes.cache_clear()
    assert gpu_passes(card) is None  # interpreted, in this suite
    assert capsys.readouterr().err == ""
    monkeypatch.setitem(sys.modules, "triton", types.ModuleType("triton"))  # of which find_spec raises
    gpu_passes.cache_clear()
    assert gpu_passes(card) is None
    gpu_passes.cache_clear()


@pytest.mark.usefixtures("by_triton")
@pytest.mark.parametrize("name", ["__init__", "gradient_moments", "weight_moments", "exponents"])
def test_passes_that_fail_leave_the_measuring_to_torch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    from cifarlab.probes.moments_triton import Passes

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no registers")

    monkeypatch.setattr(Passes, name, broken)
    weights = [torch.randn(300), torch.randn(4, 5)]
    meter = Moments(weights)
    old = [torch.zeros_like(w) for w in weights]
    assert torch.isnan(meter.of([None, None])).all()
    for measured in meter.of_weights(weights, old, keeps=False):
        np.testing.assert_allclose(measured[:, 1], [w.double().abs().sum() for w in weights], rtol=1e-5)
    meter.copy(weights, old)
    assert all(map(torch.equal, old, weights))
    assert_close(meter.of(weights), weights)
    assert meter.exponents(weights).sum(1).tolist() == [300, 20]
    assert capsys.readouterr().err.count("by torch's operations from here on (RuntimeError: no registers)") == 1


@pytest.mark.usefixtures("by_triton")
def test_what_lies_at_an_address_is_known_of_all_that_the_passes_read() -> None:
    for weights in ([torch.ones(3).as_subclass(Shard)], [torch.ones(3), torch.ones(3, device="meta")],
                    [torch.ones(3).double()], [torch.ones(3).bfloat16()]):  # fmt: skip
        assert Moments(weights)._kernels is None
    meter = Moments([torch.ones(300), torch.ones(300)])
    assert meter._kernels is not None
    gradients = [torch.ones(300).as_subclass(Shard), torch.ones(300, device="meta")]
    assert torch.isnan(meter.of(gradients)).all()
    assert not meter.exponents(gradients).any()


@pytest.mark.usefixtures("by_triton")
def test_addresses_are_sent_to_a_gpu_only_when_they_are_new(monkeypatch: pytest.MonkeyPatch) -> None:
    from cifarlab.probes.moments_triton import TABLES, Passes

    sent = []
    send = Passes._send
    monkeypatch.setattr(Passes, "_send", lambda self, array: sent.append(array) or send(self, array))
    weights = [torch.randn(300), torch.randn(4, 5)]
    meter = Moments(weights)
    old = meter.copies(weights)
    meter.of(weights)
    sent.clear()
    for _ in range(3):
        meter.of(weights)
        meter.of_weights(weights, old, keeps=True)
    assert len(sent) == 1  # of the copies
    others = [[w.clone() for w in weights] for _ in range(TABLES + 2)]
    for other in others:
        assert meter.of_weights(other, old, keeps=True)[0][0, SUM] == meter.of([other[0], None])[0, SUM]
    assert meter._passes is not None
    assert len(meter._passes._tables) == TABLES


def test_more_blocks_than_are_added_at_a_time(way: str) -> None:
    tensors = [torch.randn(9 * 4096 + 1), torch.randn(3), torch.randn(6 * 4096)]
    assert_close(Moments(tensors).of(tensors), tensors)


def test_passes_for_gpus_compile_for_them() -> None:
    """To machine code for cards from Volta to Hopper, by the assembler that comes with triton: it takes no GPU."""
    pytest.importorskip("triton")
    if sys.platform != "linux":
        pytest.skip("triton's assembler is there on Linux")
    script = Path(__file__).parent / "compile_passes.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, str(script), "70", "80", "90"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 3 * 7


def test_passes_agree_on_a_gpu() -> None:
    if not torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        pytest.skip("no GPU, or no triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    told = "import torch; from cifarlab.probes.gpu_passes import gpu_passes; assert gpu_passes(torch.device('cuda', 0))"
    subprocess.run([sys.executable, "-c", told], env=environment, check=True)
