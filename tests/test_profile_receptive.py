"""Receptive fields against the set of non-zero input gradients, exactly; published sizes; what must come back untouched."""

import copy
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from cifarlab.config import InputError
from cifarlab.models import MODELS, create_model
from cifarlab.profile import receptive
from cifarlab.profile.receptive import ReceptiveField, effective_receptive_field, receptive_fields


def mean_pool(x: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False,
              return_indices: bool = False) -> Tensor:  # fmt: skip
    """In place of max-pool, whose gradient reaches one pixel only."""
    assert dilation == 1
    return F.avg_pool2d(x, kernel_size, stride, padding, ceil_mode)


def positive(module: nn.Module) -> nn.Module:
    """A double-precision copy in eval mode with random positive weights: no ReLU is off, nothing cancels."""
    module = copy.deepcopy(module).double().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for child in module.modules():
        if isinstance(child, nn.ReLU):
            child.inplace = False  # what a hook has kept must stay as it was
    for parameter in module.parameters():
        parameter.copy_(0.5 + torch.rand(parameter.shape, generator=generator, dtype=torch.float64))
        parameter /= max(1, parameter[0].numel())  # about 1 in, about 1 out, however deep
    return module


Seen = dict[tuple[int, int], NDArray[Any]]
"""Output position -> the pixels, H×W, with a gradient that is not 0."""


def seen_pixels(module: nn.Module, layers: list[str], shape: tuple[int, int, int], positions: list[tuple[int, int]] | None = None
                ) -> dict[str, Seen]:  # fmt: skip
    """The pixels of non-zero input gradient, by layer and output position; None is every row and every column once."""
    module = positive(module)
    outputs: dict[str, Tensor] = {}
    for layer in layers:
        module.get_submodule(layer).register_forward_hook(lambda _, __, out, layer=layer: outputs.update({layer: out}))
    image = torch.rand(1, *shape, dtype=torch.float64).add_(0.5).requires_grad_()
    module(image)
    seen: dict[str, Seen] = {}
    for layer in layers:
        h, w = outputs[layer].shape[2:]
        chosen = positions or [(k % h, k % w) for k in range(max(h, w))] + [(0, w - 1), (h - 1, 0)]
        for i, j in sorted({(i % h, j % w) for i, j in chosen}):
            value = outputs[layer][0, :, i, j].sum()
            pixels = torch.zeros(shape)
            if value.requires_grad:
                pixels = torch.autograd.grad(value, image, retain_graph=True)[0][0].abs()
            seen.setdefault(layer, {})[i, j] = (pixels.amax(0) > 0).numpy()
    return seen


def check(field: ReceptiveField, seen: Seen, *, clipped: bool = True) -> None:
    """The field against the gradients; clipped: also that its formula, cut off at the image, has the same ends."""
    assert field.unknown == ()
    assert field.size is not None
    assert field.offset is not None
    for (i, j), pixels in seen.items():
        np.testing.assert_array_equal(field.pixels(i, j), pixels)  # every pixel, gaps and corners too
        for axis, k, known in ((0, i, field.rows), (1, j, field.columns)):
            lines = pixels.any(1 - axis)
            assert not (lines & ~known[min(k, len(known) - 1)]).any()
            if clipped and lines.any():
                assert field.stride is not None
                first, last = np.flatnonzero(lines)[[0, -1]]
                begin = field.offset[axis] + k * field.stride[axis]
                assert (first, last) == (max(begin, 0), min(begin + field.size[axis], len(lines)) - 1)


DEPTHS = {
    "resnet18": ["conv1", "layer2.0.downsample.1", "layer3.0.conv1", "layer4.1.bn2"],
    "resnet34": ["layer1.2.bn2", "layer3.5.conv2", "layer4.0.conv1"],
    "resnet18-imagenet-stem": ["conv1", "maxpool", "layer1.1.conv2", "layer2.0.conv1", "layer2.1.bn2", "layer4.1.bn2"],
    "simple_cnn": ["features.0", "features.5", "features.6", "features.10", "features.13"],
    "resnet9": ["prep", "layer1.0.1", "layer1.1.convs.1.2", "layer2.0", "layer3.0.3", "layer3.1.convs.1.0"],
    "airbench": ["whitening", "groups.0.conv2", "groups.1.conv1", "groups.2.conv1", "groups.2.conv2"],
    "airbench-large": ["whitening", "groups.0.conv2", "groups.1.conv3", "groups.2.conv1", "groups.2.conv3"],
    "airbench-residual": ["whitening", "groups.0.conv3", "groups.1.conv1", "groups.2.conv2", "groups.2.conv3"],
    "separable": ["prep.0", "stage1.1.0", "stage2.0.3", "stage2.2.0", "stage3.0.0", "stage3.2.4", "pool"],
}


@pytest.mark.parametrize("name", MODELS)
def test_models_see_what_their_gradients_say(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = create_model(name)
    fields = receptive_fields(model, (3, 32, 32))  # with max-pool
    monkeypatch.setattr(F, "max_pool2d", mean_pool)
    layers = [layer for layer in DEPTHS[name] if layer in fields]
    assert len(layers) >= 3
    seen = seen_pixels(model, layers, (3, 32, 32), [(0, 3), (14, 9), (-1, -1)])
    for layer in layers:
        check(fields[layer], seen[layer])


def test_known_sizes() -> None:
    def sides(name: str) -> list[int]:
        distinct: list[int] = []
        for field in receptive_fields(create_model(name), (3, 32, 32)).values():
            assert field.size is not None
            if not distinct or field.size[0] > distinct[-1]:
                distinct.append(field.size[0])
        return distinct

    fields = receptive_fields(create_model("resnet18"), (3, 32, 32))
    first = fields["conv1"]
    assert (first.size, first.stride, first.offset, first.is_global) == ((3, 3), (1, 1), (-1, -1), False)
    # 3 + Σ 2 · stride over the 3×3 convolutions behind the first: 4 · 1, then 1 with stride and 3 without per stage
    last = fields["layer4.1.conv2"]
    assert (last.size, last.stride, last.offset) == ((109, 109), (8, 8), (-54, -54))
    assert fields["avgpool"].is_global
    assert "fc" not in fields  # no axes left
    assert list(fields)[:3] == ["conv1", "bn1", "maxpool"]  # as executed, not as defined
    assert receptive_fields(create_model("resnet18-imagenet-stem"), (3, 224, 224))["layer4.1.conv2"].size == (
        435,
        435,
    )  # Araujo et al.
    assert sides("resnet9") == [3, 5, 6, 10, 14, 18, 20, 28, 32, 48, 64, 88]  # 88: what lab D quotes
    assert sides("separable")[:-1] == [3, 5, 9, 11, 15, 23, 27, 35, 51]  # as its docstring says; then the average


class Branches(nn.Module):
    """f(x) + g(x), cut to what both have, or beside each other on the channel axis; g is x itself by default."""

    def __init__(self, inner: nn.Module, join: str, other: nn.Module | None = None) -> None:
        super().__init__()
        self.inner, self.join, self.other = inner, join, other or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x, y = self.other(x), self.inner(x)
        h, w = min(x.shape[2], y.shape[2]), min(x.shape[3], y.shape[3])
        x, y = x[:, :, :h, :w], y[:, :, :h, :w]
        # Of what is cut off behind the concatenation, x has another copy: a field is the union over channels.
        return x + y if self.join == "add" else torch.cat([x, x, y], 1)[:, x.shape[1] :]


class Pad(nn.Module):
    def __init__(self, amounts: tuple[int, int, int, int], mode: str) -> None:
        super().__init__()
        self.amounts, self.mode = amounts, mode

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, self.amounts, self.mode)


small = st.integers(1, 3)


@st.composite
def convolutions(draw: Callable[..., Any], stride: st.SearchStrategy[int] = small) -> nn.Module:
    kernel = draw(small), draw(small)
    dilation = draw(small), draw(small)
    padding = tuple(draw(st.integers(0, (k - 1) * d + 1)) for k, d in zip(kernel, dilation, strict=True))  # 1: padding alone
    return nn.LazyConv2d(2, kernel, (draw(stride), draw(stride)), padding, dilation, bias=False)


@st.composite
def layers(draw: Callable[..., Any]) -> nn.Module:
    kinds = "conv", "pool", "pad", "residual", "branches", "branches", "transposed", "nearest", "bilinear", "adaptive", "relu"
    kind = draw(st.sampled_from(kinds))
    if kind == "conv":
        return draw(convolutions())  # type: ignore[no-any-return]
    if kind == "pool":
        size = draw(st.integers(1, 4))
        return nn.AvgPool2d(size, draw(small), draw(st.integers(0, size // 2)), ceil_mode=draw(st.booleans()))
    if kind == "pad":
        mode = draw(st.sampled_from(["constant", "reflect", "replicate"]))
        low = -1 if mode == "constant" else 0  # negative amounts crop
        return Pad(tuple(draw(st.integers(low, 2)) for _ in range(4)), mode)  # type: ignore[arg-type]
    if kind == "residual":
        return Branches(draw(convolutions(st.just(1))), draw(st.sampled_from(["add", "cat"])))
    if kind == "branches":  # of different strides, shapes and borders
        return Branches(draw(convolutions()), draw(st.sampled_from(["add", "cat"])), draw(convolutions()))
    if kind == "transposed":
        kernel, stride = draw(small), draw(small)
        return nn.LazyConvTranspose2d(2, kernel, stride, draw(st.integers(0, kernel - 1)), 0, bias=False, dilation=draw(small))
    if kind == "nearest":
        return nn.Upsample(
            scale_factor=draw(st.sampled_from([2.0, 1.5, 3.0])), mode=draw(st.sampled_from(["nearest", "nearest-exact"]))
        )
    if kind == "bilinear":
        return nn.Upsample(
            scale_factor=draw(st.sampled_from([2.0, 1.5, 0.5])), mode="bilinear", align_corners=draw(st.booleans())
        )
    if kind == "adaptive":
        return nn.AdaptiveAvgPool2d((draw(st.integers(1, 7)), draw(st.integers(1, 7))))
    return nn.ReLU(inplace=True)


def test_random_stacks_see_what_their_gradients_say() -> None:
    met: Counter[str] = Counter()

    @settings(max_examples=300, deadline=None, derandomize=True)
    @given(st.lists(layers(), min_size=1, max_size=4), st.integers(1, 15), st.integers(1, 15))
    def holds(stack: list[nn.Module], height: int, width: int) -> None:
        module = nn.Sequential(nn.Conv2d(2, 2, 1, bias=False), *stack, nn.Identity())
        shape, last = (2, height, width), str(len(stack) + 1)
        with torch.no_grad():
            try:
                if min(module(torch.ones(1, *shape)).shape) == 0:
                    return
            except RuntimeError:  # a kernel larger than the map
                return
        field, seen = receptive_fields(module, shape)[last], seen_pixels(module, [last], shape)[last]
        check(field, seen, clipped=False)
        met.update(["all"])
        met.update({
            "some output sees nothing": not all(pixels.any() for pixels in seen.values()),
            "a branch sees nothing": any(rows.any() != columns.any() for rows, columns in field.branches),
            "more than a rectangle": len(field.branches) > 1,
            "no one stride": field.stride is None,
            "phases": field.stride is not None and max(field.stride) % 1 > 0,
        })  # fmt: skip

    holds()
    assert len(met) == 6
    assert min(met.values()) >= 5, met  # nothing of this is left out by the strategies


def test_a_window_on_padding_alone_sees_nothing_along_either_axis() -> None:
    blind = nn.Conv2d(2, 2, (1, 2), padding=(0, 1), dilation=(1, 2), bias=False)  # on a map of width 1: taps at −1 and 1
    field = receptive_fields(nn.Sequential(blind), (2, 5, 1))["0"]
    assert not field.pixels(2, 0).any()
    assert not field.rows.any()
    assert not field.columns.any()
    assert field.size == (1, 3)  # on an image without borders
    beside = nn.Sequential(Branches(blind, "add", nn.Conv2d(2, 2, (3, 1), padding=(1, 0), bias=False)))
    field = receptive_fields(beside, (2, 5, 1))["0"]
    assert np.flatnonzero(field.rows[0]).tolist() == [0, 1]
    tall = nn.Conv2d(2, 2, (5, 2), padding=(2, 1), dilation=(1, 2), bias=False)
    field = receptive_fields(nn.Sequential(Branches(tall, "add")), (2, 5, 1))["0"]
    assert np.flatnonzero(field.rows[0]).tolist() == [0]  # of the identity; the tall branch is blind
    check(field, seen_pixels(Branches(tall, "add"), [""], (2, 5, 1))[""], clipped=False)


def test_a_cross_is_not_its_square() -> None:
    cross = Branches(nn.Conv2d(2, 2, (1, 5), padding=(0, 2)), "add", nn.Conv2d(2, 2, (5, 1), padding=(2, 0)))
    twice = nn.Sequential(nn.Conv2d(2, 2, 1), cross, Branches(nn.Conv2d(2, 2, (1, 3), padding=(0, 1)), "cat"))
    fields = receptive_fields(twice, (2, 9, 9))
    assert (fields["1"].size, fields["1"].stride, fields["1"].offset) == ((5, 5), (1, 1), (-2, -2))
    assert fields["1"].pixels(4, 4).sum() == 9
    seen = seen_pixels(twice, ["1", "2"], (2, 9, 9), [(i, j) for i in range(9) for j in range(9)])
    for name in seen:
        check(fields[name], seen[name], clipped=False)
    assert not fields["1"].is_global
    wide = Branches(nn.Conv2d(2, 2, (1, 17), padding=(0, 8)), "add", nn.Conv2d(2, 2, (17, 1), padding=(8, 0)))
    field = receptive_fields(nn.Sequential(wide), (2, 9, 9))["0"]
    assert field.rows.all()
    assert field.columns.all()
    assert not field.is_global  # every row and every column, but not every pixel


def test_more_branches_than_are_kept_are_one_rectangle(monkeypatch: pytest.MonkeyPatch) -> None:
    cross = nn.Sequential(Branches(nn.Conv2d(2, 2, (1, 3), padding=(0, 1)), "add", nn.Conv2d(2, 2, (3, 1), padding=(1, 0))))
    exact = receptive_fields(cross, (2, 9, 9))["0"]
    monkeypatch.setattr(receptive, "MOST_BRANCHES", 1)
    merged = receptive_fields(cross, (2, 9, 9))["0"]
    assert (exact.pixels(4, 4).sum(), merged.pixels(4, 4).sum()) == (5, 9)
    assert merged == exact  # size, stride and offset


def test_branches_of_different_strides_are_exact_on_this_map() -> None:
    halved, kept = nn.Conv2d(2, 2, 3, stride=2, padding=1), nn.Conv2d(2, 2, 3, padding=1)
    net = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), Branches(halved, "add", kept), nn.Conv2d(2, 2, 3, padding=1))
    fields = receptive_fields(net, (2, 12, 12))
    seen = seen_pixels(net, ["1", "2"], (2, 12, 12), [(i, j) for i in range(6) for j in (0, 2, 5)])
    for name in seen:
        check(fields[name], seen[name], clipped=False)
    # Output i sees i − 2 … i + 2 and 2i − 2 … 2i + 2: output 5, the last, 3 … 12.
    assert (fields["1"].size, fields["1"].stride, fields["1"].offset) == ((10, 10), None, (-2, -2))
    # With one output there is no distance between outputs, and nothing that could vary.
    single = receptive_fields(nn.Sequential(Branches(halved, "add", kept)), (2, 2, 2))["0"]
    assert (single.size, single.stride, single.offset) == ((3, 3), (0, 0), (-1, -1))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(convolutions(st.integers(1, 2)), min_size=1, max_size=3), st.booleans())
def test_size_stride_and_offset_of_outputs_away_from_the_border(stack: list[nn.Module], is_residual: bool) -> None:
    blocks = [Branches(m, "add") if is_residual and m.stride == (1, 1) else m for m in stack]
    module = nn.Sequential(*blocks)
    last = list(dict(module.named_modules()))[-1]
    module(torch.ones(1, 2, 60, 60))
    field = receptive_fields(module, (2, 60, 60))[last]
    assert field.size is not None
    assert field.stride is not None
    assert field.offset is not None
    i, j = (int(np.ceil((30 - field.size[k] // 2 - field.offset[k]) / field.stride[k])) for k in range(2))
    (pixels,) = seen_pixels(module, [last], (2, 60, 60), [(i, j)])[last].values()
    for axis, k, lines in ((0, i, pixels.any(1)), (1, j, pixels.any(0))):
        first = field.offset[axis] + k * field.stride[axis]
        assert np.flatnonzero(lines)[[0, -1]].tolist() == [first, first + field.size[axis] - 1]


def test_upsampling_has_phases_and_a_fractional_stride() -> None:
    module = nn.Sequential(nn.Conv2d(1, 1, 3, 2, 1), nn.Upsample(scale_factor=2), nn.Conv2d(1, 1, 3, padding=1))
    fields = receptive_fields(module, (1, 16, 16))
    assert (fields["1"].size, fields["1"].stride) == ((3, 3), (1, 1))
    assert fields["2"].size == (5, 5)  # three outputs see two positions of the coarse map, whichever the phase
    module = nn.Sequential(nn.ConvTranspose2d(1, 1, 2, 2), nn.Conv2d(1, 1, 2))
    fields = receptive_fields(module, (1, 8, 8))
    assert (fields["0"].stride, fields["0"].size, fields["1"].size) == ((0.5, 0.5), (1, 1), (2, 2))


class Gate(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.conv, self.fc, self.end = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 3), nn.Identity()
        self.attention = nn.MultiheadAttention(3, 1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.how == "squeeze-excite":
            return self.end(x * self.fc(x.mean((2, 3)))[:, :, None, None].sigmoid())  # type: ignore[no-any-return]
        if self.how == "channels last":
            return self.end(self.fc(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))  # type: ignore[no-any-return]
        tokens = x.flatten(2).transpose(1, 2)
        if self.how == "tokens":
            tokens = self.fc(tokens)
        if self.how == "attention":
            tokens = self.attention(tokens, tokens, tokens, need_weights=False)[0]
        if self.how == "flatten":
            return self.end(F.linear(x.flatten(1), torch.ones(x[0].numel(), x[0].numel())
                                     .to(x)).reshape(x.shape))  # type: ignore[no-any-return]  # fmt: skip
        return self.end(tokens.transpose(1, 2).unflatten(2, x.shape[2:]))  # type: ignore[no-any-return]


@pytest.mark.parametrize("how", ["squeeze-excite", "channels last", "tokens", "attention", "flatten"])
def test_what_makes_a_layer_global(how: str) -> None:
    module = Gate(how)
    field = receptive_fields(module, (3, 8, 6))["end"]
    assert field.is_global == (how in ("squeeze-excite", "attention", "flatten"))
    if not field.is_global:
        assert (field.size, field.stride, field.offset) == ((3, 3), (1, 1), (-1, -1))
    check(field, seen_pixels(module, ["end"], (3, 8, 6))["end"], clipped=not field.is_global)


def test_norms_that_measure_the_map_make_everything_global() -> None:
    for norm, expected in ((nn.BatchNorm2d(4), False), (nn.GroupNorm(2, 4), True), (nn.InstanceNorm2d(4), True)):
        fields = receptive_fields(nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.Conv2d(4, 4, 3)), (3, 9, 9))
        assert fields["2"].is_global is expected


class Odd(nn.Module):
    def __init__(self, what: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.what, self.end = what, nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.what(x))  # type: ignore[no-any-return]


def write_in_slice(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[:, :, 1:] = x[:, :, :-1]
    return y


@pytest.mark.parametrize(("what", "said"), [
    (lambda x: x.cumsum(2), "cumsum"),
    (lambda x: x + x.transpose(2, 3), "add (one image axis on two axes)"),
    (lambda x: torch.cat([x, x], 2), "cat (along an image axis)"),
    (write_in_slice, "copy_ into shared memory"),
])  # fmt: skip
def test_what_cannot_be_followed_is_named_and_not_guessed(what: Callable[[Tensor], Tensor], said: str) -> None:
    field = receptive_fields(Odd(what), (3, 8, 8))["end"]
    assert (field.size, field.stride, field.offset, field.is_global) == (None, None, None, False)
    assert field.unknown == (said,)
    assert field.rows.shape == (0, 0)
    with pytest.raises(InputError, match="not known behind"):
        field.pixels(0, 0)


def test_inputs_of_any_structure_and_modules_called_twice() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.pool = nn.Conv2d(3, 3, 3), nn.MaxPool2d(2)

        def forward(self, batch: dict[str, list[Tensor]]) -> Tensor:
            return self.conv(self.pool(self.conv(batch["images"][0]))) * batch["scale"][0]  # type: ignore[no-any-return]

    inputs = {"images": [torch.rand(2, 3, 12, 12)], "scale": [torch.ones(1)]}
    fields = receptive_fields(Two(), (3, 12, 12), inputs=(inputs,))
    assert fields == receptive_fields(Two(), (3, 12, 12), inputs={"batch": inputs})
    assert list(fields) == ["pool", "conv", ""]  # the last is the product
    assert fields["conv"].size == (8, 8)
    assert inputs["images"][0].device.type == "cpu"


def test_the_module_and_the_generators_come_back_untouched() -> None:
    model = nn.Sequential(
        nn.ReLU(inplace=True), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout(0.5)
    ).train()
    calls: list[str] = []
    model[1].register_forward_hook(lambda *_: calls.append("hook"))
    state = copy.deepcopy(model.state_dict())
    generator = torch.get_rng_state()
    images = torch.randn(2, 3, 8, 8)
    original = images.clone()
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager")
        assert receptive_fields(compiled, (3, 8, 8)) == receptive_fields(model, (3, 8, 8))  # type: ignore[arg-type]
        first = effective_receptive_field(model, (3, 8, 8), "2", seed=3)
        effective_receptive_field(model, images)
    torch.randn(1)
    torch.set_rng_state(generator)
    assert torch.equal(images, original)
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))
    assert all(m.training for m in model.modules())
    assert all(p.requires_grad and p.grad is None and p.device.type == "cpu" for p in model.parameters())
    assert calls == []
    assert [len(m._forward_hooks) for m in model] == [0, 1, 0, 0, 0]
    np.testing.assert_array_equal(first.array, effective_receptive_field(model, (3, 8, 8), "2", seed=3).array)


class Draws(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * (random.random() + np.random.rand() + torch.rand(1, device=x.device))  # type: ignore[no-any-return]


def test_modules_that_draw_leave_all_generators_as_they_were() -> None:
    net = Draws()
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    receptive_fields(net, (3, 8, 8))
    effective_receptive_field(net, (3, 8, 8))
    effective_receptive_field(net, (3, 8, 8), inputs=(torch.empty(1, 3, 8, 8, device="meta"),))
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[:2]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_other_types_hidden_constants_and_compiled_parts() -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1, 3, 3, 3))
            self.scaled = self.weight * 2  # has a history: deepcopy refuses it

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.weight) * hidden * self.scaled.shape[0]

    hidden = torch.ones(1, 6, 6, dtype=torch.float64)  # on the CPU, so meta tensors cannot run
    assert receptive_fields(Hidden().double(), (3, 8, 8))[""].size == (3, 3)
    for dtype in (torch.float64, torch.bfloat16):
        net = nn.Sequential(torch.compile(nn.Conv2d(3, 4, 3), backend="eager"), nn.ReLU()).to(dtype)
        assert {name: field.size for name, field in receptive_fields(net, (3, 8, 8)).items()} == {"0": (3, 3), "1": (3, 3)}
        assert effective_receptive_field(net, (3, 8, 8), "0", num_images=1).mass_side == 3


def test_circular_padding_is_followed() -> None:
    stack = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(4, 4, (3, 5), padding=(1, 2), stride=2, padding_mode="circular"),
        nn.Conv2d(4, 4, 2),
    )
    fields = receptive_fields(stack, (3, 9, 8))
    seen = seen_pixels(stack, ["0", "1", "2"], (3, 9, 8))
    for name in seen:
        check(fields[name], seen[name], clipped=False)
    assert (fields["0"].size, fields["0"].offset) == ((3, 3), (-1, -1))


def test_a_container_that_works_itself_has_its_own_field() -> None:
    model = create_model("resnet18")
    fields = receptive_fields(model, (3, 32, 32))
    names = list(fields)
    assert names.index("layer2.0") > names.index("layer2.0.downsample.1")  # behind the addition
    assert fields["layer2.0"].size == fields["layer2.0.bn2"].size
    assert fields["layer2.0.downsample.1"].size != fields["layer2.0"].size
    assert "layer2" not in fields  # gives what its last block gave
    check(fields["layer2.0"], seen_pixels(model, ["layer2.0"], (3, 32, 32), [(0, 3), (-1, -1)])["layer2.0"])
    in_place = nn.Sequential(nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU(inplace=True)))
    assert list(receptive_fields(in_place, (3, 8, 8))) == ["0.0", "0.1"]


def test_a_rule_that_breaks_is_a_field_that_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise KeyError("an argument of a later torch")

    monkeypatch.setitem(receptive._RULES, "convolution", broken)
    assert receptive_fields(nn.Conv2d(3, 3, 3), (3, 8, 8))[""].unknown == ("convolution (KeyError)",)


def test_effective_field_of_averages_is_their_binomial() -> None:
    stack = nn.Sequential(*(nn.Conv2d(1, 1, 3, padding=1, bias=False) for _ in range(4)))
    for conv in stack:
        nn.init.constant_(conv.weight, 1 / 9)
    field = effective_receptive_field(stack.double(), (1, 21, 25), num_images=2)
    line = np.array([1.0])
    for _ in range(4):
        line = np.convolve(line, np.ones(3) / 3)
    expected = np.zeros((21, 25))
    expected[10 - 4 : 10 + 5, 12 - 4 : 12 + 5] = np.outer(line, line)
    np.testing.assert_allclose(field.array, expected, atol=1e-12)
    assert field.layer == "3"
    inner = sum(line[1:-1]) ** 2  # of the 7×7 square; the 5×5 one holds less than 95 %
    assert inner > 0.95 > sum(line[2:-2]) ** 2
    assert field.mass_side == 7
    assert field.core_side == pytest.approx(np.sqrt((expected > 0.0455 * expected.max()).sum()))


def test_effective_field_lies_within_the_theoretical_one() -> None:
    model = create_model("resnet9")
    theory = receptive_fields(model, (3, 32, 32))["layer2.0"]
    field = effective_receptive_field(model, (3, 32, 32), "layer2.0", num_images=2)
    assert not field.array[~np.outer(theory.rows[8], theory.columns[8])].any()
    assert theory.size is not None
    assert 0 < field.core_side <= theory.size[0]
    assert field.array.sum() == pytest.approx(1)


def test_bad_input_is_one_sentence() -> None:
    model = create_model("resnet9")
    blind = nn.Conv2d(3, 3, 1)
    nn.init.zeros_(blind.weight)
    for ask, said in (
        (lambda: receptive_fields(model, (3, 32)), "is not the shape of an image"),
        (lambda: receptive_fields(model, (1, 32, 32)), r"does not run on images of shape \(1, 32, 32\)"),
        (lambda: receptive_fields(model, (3, 32, 32), inputs=[torch.ones(3)]), "no tensor of the inputs"),
        (lambda: effective_receptive_field(model, (3, 32, 32), "layer2.9"), "did you mean 'layer2"),
        (lambda: effective_receptive_field(model, (3, 32, 32), "linear", num_images=1), "'linear'.*gives no map"),
        (lambda: effective_receptive_field(model, torch.ones(3, 32, 32)), "give a batch"),
        (lambda: effective_receptive_field(blind, (3, 8, 8)), "no finite gradient"),
    ):
        with pytest.raises(InputError, match=said) as caught:
            ask()  # type: ignore[no-untyped-call]
        assert "\n" not in str(caught.value)
