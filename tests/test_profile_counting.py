"""Counting: golden values, closed forms, agreement with torch's counter where that is right, and the module left as it was."""

import copy
import dataclasses
import importlib
import random
import threading
import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from cifarlab.config import InputError
from cifarlab.models import create_model
from cifarlab.profile import count, count_macs, count_parameters, profile
from cifarlab.profile.counting import Profile

IMAGE = (3, 32, 32)


def build(name: str, num_classes: int = 10) -> nn.Module:
    with torch.device("meta"):  # no time is spent on drawing weights that nobody needs
        return create_model(name, num_classes)


class Calls(nn.Module):
    """A module whose forward is the given function of (itself, *arguments)."""

    def __init__(self, function: Any, **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


def layer(profiled: Profile, name: str) -> Any:
    return next(layer for layer in profiled.layers if layer.name == name)


def torch_flops(module: nn.Module, *inputs: Tensor, backward: bool = True) -> int:
    with FlopCounterMode(display=False) as counter:
        out = module(*inputs)
        if backward:
            out.sum().backward()
    return counter.get_total_flops()


# ---- golden values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "num_classes", "parameters", "macs"),
    [
        ("resnet18", 10, 11_173_962, 555_422_720),
        ("resnet34", 100, 21_328_292, 1_159_448_576),
        ("resnet9", 10, 6_573_120, 379_261_952),
        ("simple_cnn", 10, 4_441_130, 161_163_264 // 2),
        ("separable", 10, 879_114, 114_807_808),
    ],
)
def test_published_counts(name: str, num_classes: int, parameters: int, macs: int) -> None:
    model = build(name, num_classes)
    profiled = profile(model, IMAGE)
    assert (profiled.parameters, profiled.forward_macs) == (parameters, macs)
    assert (count_parameters(model), count_macs(model, IMAGE)) == (parameters, macs)
    assert profiled.forward_flops == 2 * macs
    assert not profiled.uncounted
    # Each multiply-add has one for the weight and one for the input gradient, but the image needs none.
    first = next(one for one in profiled.layers if one.forward_macs)
    assert profiled.backward_macs == 2 * macs - first.forward_macs


def test_counts_grow_with_the_batch_and_parameters_do_not() -> None:
    model = build("resnet9")
    one, four = profile(model, IMAGE), profile(model, IMAGE, batch_size=4)
    assert four.training_flops == 4 * one.training_flops
    assert four.activation_bytes > 3.9 * one.activation_bytes
    assert four.parameters == one.parameters
    assert four.input_shapes == ((4, *IMAGE),)


def test_batch_norm_on_one_pixel_is_counted_and_said() -> None:
    profiled = profile(build("resnet18-imagenet-stem"), IMAGE)
    assert profiled.forward_macs == 37_016_576
    assert "batch norm" in profiled.notes[0]
    assert not profile(build("resnet18-imagenet-stem"), IMAGE, batch_size=2).notes


# ---- closed forms ----------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    dims=st.integers(1, 3),
    groups=st.integers(1, 3),
    per_group=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    padding=st.integers(0, 2),
    dilation=st.integers(1, 2),
    transposed=st.booleans(),
    batch=st.integers(1, 3),
    frozen=st.booleans(),
    input_grad=st.booleans(),
)
def test_convolutions_follow_their_closed_form(
    dims: int, groups: int, per_group: tuple[int, int], kernel: int, stride: int, padding: int, dilation: int, transposed: bool,
    batch: int, frozen: bool, input_grad: bool,
) -> None:  # fmt: skip
    convs = ((nn.Conv1d, nn.Conv2d, nn.Conv3d), (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d))
    in_channels, out_channels, side = groups * per_group[0], groups * per_group[1], 7
    conv: Any = convs[transposed][dims - 1](in_channels, out_channels, kernel, stride, padding, dilation=dilation, groups=groups)
    conv.requires_grad_(not frozen)
    x = torch.empty(batch, in_channels, *(side,) * dims, device="meta", requires_grad=input_grad)
    extent = dilation * (kernel - 1)
    out = (side - 1) * stride - 2 * padding + extent + 1 if transposed else (side + 2 * padding - extent - 1) // stride + 1
    if out < 1:
        return
    profiled = profile(conv, inputs=x)
    taps = batch * (side if transposed else out) ** dims * kernel**dims * in_channels * out_channels // groups
    assert profiled.forward_macs == taps
    assert profiled.backward_macs == taps * (input_grad + (not frozen))
    assert profiled.backward_other == (0 if frozen else batch * out_channels * out**dims)  # the bias' gradient
    assert profiled.layers[0].output_shape == (batch, out_channels, *(out,) * dims)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.integers(1, 9), st.integers(1, 9), st.lists(st.integers(1, 4), min_size=1, max_size=3), st.booleans())
def test_linear_layers_follow_their_closed_form(inner: int, outer: int, rows: list[int], input_grad: bool) -> None:
    x = torch.empty(*rows, inner, device="meta", requires_grad=input_grad)
    profiled = profile(nn.Linear(inner, outer), inputs=x)
    macs = int(np.prod(rows)) * inner * outer
    assert profiled.forward_macs == macs
    assert profiled.backward_macs == macs * (1 + input_grad)


def test_torch_counts_a_grouped_weight_gradient_too_often_and_we_do_not() -> None:
    channels, side = 16, 8
    depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
    x = torch.empty(1, channels, side, side, device="meta", requires_grad=True)
    macs = side * side * channels * 9
    profiled = profile(depthwise, inputs=x)
    assert profiled.training_flops == 2 * 3 * macs  # forward, input gradient, weight gradient
    theirs = torch_flops(copy.deepcopy(depthwise).to("meta"), x)
    if theirs == profiled.training_flops:
        pytest.skip(f"torch {torch.__version__} counts grouped weight gradients rightly")
    assert theirs == 2 * (2 + channels) * macs


@pytest.mark.parametrize("name", ["resnet18", "resnet9", "simple_cnn"])
def test_torch_agrees_where_nothing_is_grouped(name: str) -> None:
    model = build(name)
    x = torch.empty(2, *IMAGE, device="meta")
    assert profile(model, IMAGE, batch_size=2).training_flops == torch_flops(copy.deepcopy(model).to("meta"), x)


def test_other_work_is_counted_apart() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2))
    profiled = profile(net, (3, 8, 8))
    elements = 4 * 8 * 8
    assert [one.forward_other for one in profiled.layers] == [0, 8 * elements, elements, elements]
    assert profile(net, (3, 8, 8), backward=False).layers[1].forward_other == 2 * elements
    assert profiled.forward_macs == 3 * 9 * elements
    relu = layer(profiled, "2")
    assert (relu.bytes_read, relu.bytes_written, relu.backward_bytes) == (4 * elements, 4 * elements, 3 * 4 * elements)
    assert relu.arithmetic_intensity == 1 / 8


def test_matrix_products_and_attention_in_any_spelling() -> None:
    q = torch.empty(2, 3, 5, 4, requires_grad=True)  # 2 sequences, 3 heads, 5 positions of width 4
    pairs = 2 * 3 * 5 * 5
    spellings = [
        lambda _, q: F.scaled_dot_product_attention(q, q, q),
        lambda _, q: (q @ q.transpose(-1, -2)).softmax(-1) @ q,
        lambda _, q: torch.einsum("bhij,bhjd->bhid", torch.einsum("bhid,bhjd->bhij", q, q).softmax(-1), q),
    ]
    for spelling in spellings:
        profiled = profile(Calls(spelling), inputs=q, strict=True)
        assert profiled.forward_macs == 2 * pairs * 4
        assert profiled.backward_macs == 4 * pairs * 4

    # On a real CPU attention is one fused operation; a call that meta tensors forbid brings us there.
    on_cpu = Calls(lambda _, q: F.scaled_dot_product_attention(q, q, q) * q.sum().item())
    fused = profile(on_cpu, inputs=torch.zeros(q.shape, requires_grad=True))
    assert fused.device == "cpu"
    assert fused.forward_macs == 2 * pairs * 4
    assert fused.backward_macs in (4 * pairs * 4, 5 * pairs * 4)  # fused backward computes the scores anew


@pytest.mark.parametrize("training", [True, False])
def test_a_transformer_layer_has_no_hidden_work(training: bool) -> None:
    width, positions = 8, 5
    net = nn.TransformerEncoderLayer(width, 2, dim_feedforward=16, batch_first=True, activation="gelu").requires_grad_(False)
    profiled = profile(net, (positions, width), backward=training, strict=True)
    projections, feed_forward, scores = 4 * width * width, 2 * width * 16, 2 * positions * width
    assert profiled.forward_macs == positions * (projections + feed_forward + scores)
    assert profiled.backward_macs == 0
    assert profiled.parameters == count_parameters(net)
    assert profiled.trainable_parameters == 0
    assert layer(profiled, "self_attn").parameters == 4 * width * width + 4 * width  # its output projection is never called


# ---- who did it ------------------------------------------------------------------------------------------------------------


def test_backward_is_charged_to_the_module_that_went_forward() -> None:
    """Each residual branch, each functional call, in an order that differs from the order of definition."""

    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.stem(x)
        short = self.short(x)
        return F.linear(torch.relu(self.long(x) + short).mean((2, 3)), self.weight)

    net = Calls(forward, short=nn.Conv2d(4, 6, 1, bias=False), long=nn.Conv2d(4, 6, 3, padding=1, bias=False),
                stem=nn.Conv2d(3, 4, 3, padding=1, bias=False), weight=nn.Parameter(torch.zeros(2, 6)))  # fmt: skip
    profiled = profile(net, (3, 8, 8))
    assert [one.name for one in profiled.layers] == ["", "stem", "short", "long"]
    for name in ("short", "long"):
        assert layer(profiled, name).backward_macs == 2 * layer(profiled, name).forward_macs
    assert layer(profiled, "stem").backward_macs == layer(profiled, "stem").forward_macs == 64 * 27 * 4
    assert (layer(profiled, "").forward_macs, layer(profiled, "").backward_macs, layer(profiled, "").parameters) == (12, 24, 12)


def test_frozen_layers_do_no_backward_work() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU(), nn.Conv2d(5, 6, 3))
    net[0].requires_grad_(False)
    net[2].requires_grad_(False)
    profiled = profile(net, (3, 12, 12))
    macs = [layer(profiled, name).forward_macs for name in "024"]
    assert [layer(profiled, name).backward_macs for name in "024"] == [0, 0, macs[2]]
    net[0].requires_grad_(True)
    assert [layer(profile(net, (3, 12, 12)), name).backward_macs for name in "024"] == [macs[0], macs[1], 2 * macs[2]]


def test_shared_and_repeated_modules() -> None:
    shared = nn.Conv2d(3, 3, 3, padding=1)
    net = nn.Sequential(shared, nn.ReLU(), shared)
    profiled = profile(net, (3, 8, 8))
    macs = 64 * 9 * 9
    one = layer(profiled, "0")
    assert (one.calls, one.forward_macs, one.parameters) == (2, 2 * macs, 84)
    assert one.backward_macs == 3 * macs
    assert profiled.parameters == 84

    tied = Calls(lambda self, i: self.head(self.table(i)), table=nn.Embedding(7, 4), head=nn.Linear(4, 7, bias=False))
    tied.head.weight = tied.table.weight
    profiled = profile(tied, inputs=torch.zeros(2, 5, dtype=torch.long))
    assert profiled.parameters == 28
    assert profiled.forward_macs == 10 * 28


def test_parameters_that_nothing_uses_are_still_there() -> None:
    net = Calls(lambda self, x: self.used(x), used=nn.Linear(4, 3), idle=nn.Linear(4, 5))
    profiled = profile(net, (4,))
    assert profiled.parameters == 15 + 25
    assert (layer(profiled, "idle").calls, layer(profiled, "idle").parameters) == (0, 25)


def test_checkpointed_work_is_done_twice() -> None:
    block = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 4, bias=False))
    plain = profile(Calls(lambda self, x: self.block(x), block=block), (4,))
    again = profile(Calls(lambda self, x: checkpoint(self.block, x, use_reentrant=False), block=block), (4,))
    assert again.forward_macs == plain.forward_macs == 32
    assert layer(again, "block.0").backward_macs == layer(plain, "block.0").backward_macs + 16
    assert again.activation_bytes < plain.activation_bytes


@pytest.mark.parametrize(
    ("module", "inputs", "macs", "other"),
    [
        (nn.Bilinear(4, 5, 6), (torch.zeros(2, 4), torch.zeros(2, 5)), 2 * 6 * 4 * 5 + 2 * 6 * 5, 12),
        (nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), torch.zeros(2, 4), 24, 3 * 12 + 6),
        (nn.EmbeddingBag(10, 3), torch.zeros(2, 5, dtype=torch.long), 0, 2 * 5 * 3),
        (Calls(lambda _, x: F.interpolate(x, scale_factor=2, mode="bicubic")), torch.zeros(1, 3, 4, 4), 0, 35 * 3 * 64),
        (Calls(lambda _, x: F.nll_loss(x, torch.zeros(7, dtype=torch.long, device=x.device))), torch.zeros(7, 4), 0, 7),
        (Calls(lambda _, x: (x + 1).squeeze_(1).t_().unsqueeze_(0)), torch.zeros(2, 1, 3), 0, 6),  # views of itself
    ],
)  # fmt: skip
def test_rarer_operations_have_rules(module: nn.Module, inputs: Any, macs: int, other: int) -> None:
    profiled = profile(module.requires_grad_(), inputs=inputs, strict=True)
    assert (profiled.forward_macs, profiled.forward_other) == (macs, other)


@pytest.mark.parametrize("layer", [nn.Linear, nn.Conv2d, nn.ConvTranspose2d])
def test_a_bias_is_one_addition_for_each_result_forward_and_backward(layer: Any) -> None:
    shape, kernel = ((4,), ()) if layer is nn.Linear else ((4, 5, 5), (3,))
    with_bias, without = (profile(layer(4, 6, *kernel, bias=bias), shape, batch_size=2) for bias in (True, False))
    results = int(np.prod(with_bias.layers[0].output_shape))
    assert (with_bias.forward_other, with_bias.backward_other) == (results, results)
    assert (without.forward_other, without.backward_other) == (0, 0)
    assert with_bias.forward_macs == without.forward_macs


# ---- memory ----------------------------------------------------------------------------------------------------------------


def test_activation_memory_is_what_autograd_keeps() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 5, 3, padding=1), nn.Flatten(), nn.Linear(320, 2))
    profiled = profile(net, (3, 8, 8), batch_size=2)
    kept = {one.name: one.activation_bytes for one in profiled.layers}
    # Images for the first weight gradient; ReLU's result, which the next convolution needs too; the linear layer's input.
    assert kept == {"0": 2 * 3 * 64 * 4, "1": 2 * 4 * 64 * 4, "2": 0, "4": 2 * 320 * 4}
    assert profile(net, (3, 8, 8), backward=False).activation_bytes == 0


def test_views_are_free_and_moves_are_not() -> None:
    view = profile(Calls(lambda _, x: x.flatten(1).unsqueeze(0).transpose(0, 1)), (3, 8, 8))
    assert not view.layers
    moved = profile(Calls(lambda _, x: x.transpose(1, 2).contiguous()), (3, 8, 8))
    assert (moved.bytes_read, moved.bytes_written, moved.forward_other) == (768, 768, 0)
    table = profile(nn.Embedding(1000, 4), inputs=torch.zeros(5, dtype=torch.long))
    assert table.bytes_read == 5 * 8 + 5 * 16  # five rows, not the table


# ---- any module, any input ---------------------------------------------------------------------------------------------------


def test_inputs_of_any_structure() -> None:
    a, b = torch.zeros(2, 4), torch.zeros(2, 4)
    give = {"linear": nn.Linear(4, 3, bias=False)}
    spellings: list[tuple[Any, Any]] = [
        (lambda self, a, b: {"sum": [self.linear(a + b)], "none": None}, (a, b)),
        (lambda self, a, b: self.linear(a + b), {"a": a, "b": b}),
        (lambda self, pair: (self.linear(pair[0] + pair[1]),), [a, b]),
        (lambda self, named: self.linear(named["a"] + named["b"]), ({"a": a, "b": b},)),
    ]
    for function, inputs in spellings:
        profiled = profile(Calls(function, **give), inputs=inputs)
        assert (profiled.forward_macs, profiled.backward_macs, profiled.forward_other) == (24, 24, 8)
        assert profiled.input_shapes == ((2, 4), (2, 4))


def test_compiled_modules_are_unwrapped() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), torch.compile(nn.Linear(3, 2), backend="eager"))
    for module in (net, torch.compile(net, backend="eager")):
        profiled = profile(module, (4,))
        assert [one.name for one in profiled.layers] == ["0", "1", "2"]
        assert profiled.forward_macs == 18


def test_a_forward_that_was_compiled_alone_is_unwrapped_and_does_not_train_the_original() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    expected = profile(net, (3, 8, 8))
    net.forward = torch.compile(net.forward, backend="eager")  # type: ignore[method-assign]
    before = copy.deepcopy(net.state_dict())
    assert profile(net, (3, 8, 8)).layers == expected.layers
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())


def test_a_function_bound_to_the_module_itself_is_refused_before_it_changes_it() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    forward = net.forward
    net.forward = lambda x: 2 * forward(x)  # type: ignore[method-assign]
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(InputError, match=r"Sequential cannot be profiled: .*bound to the module itself"):
        profile(net, (3, 8, 8))
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())


@dataclasses.dataclass
class Output:
    logits: Tensor
    features: list[Tensor]


def test_outputs_in_a_dataclass_go_backward() -> None:
    net = Calls(lambda self, x: Output(self.linear(x), [x]), linear=nn.Linear(4, 3))
    found = profile(net, (4,), timed=True)
    assert (found.forward_macs, found.backward_macs, found.notes) == (12, 12, ())
    assert found.times["linear"].backward_ms > 0


def test_outputs_that_cannot_be_looked_into_are_told() -> None:
    net = Calls(lambda self, x: SimpleNamespace(logits=self.linear(x)), linear=nn.Linear(4, 3))
    found = profile(net, (4,))
    assert (found.forward_macs, found.backward_macs) == (12, 0)
    assert "nothing is counted backward, for no output requires a gradient" in " ".join(str(found).split())
    assert profile(net.requires_grad_(False), (4,)).notes == ()


def test_module_lists_half_precision_and_an_own_autograd_function() -> None:
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad * 2

    def forward(self: Any, x: Tensor) -> Tensor:
        for part in self.parts:
            x = Double.apply(part(x))
        return x

    profiled = profile(Calls(forward, parts=nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])).bfloat16(), (4,))
    assert profiled.forward_macs == 48
    assert layer(profiled, "").backward_other == 12
    assert profiled.parameter_bytes == 2 * 60


def test_a_module_that_meta_tensors_stop_is_counted_on_its_own_device() -> None:
    hidden = [torch.ones(4)]  # not registered, so it stays on the CPU
    profiled = profile(Calls(lambda self, x: self.linear(x * hidden[0]), linear=nn.Linear(4, 3)), (4,), batch_size=2)
    assert profiled.device == "cpu"
    assert (profiled.forward_macs, profiled.forward_other) == (24, 8 + 6)  # the product; the bias


def test_pruned_and_spectrally_normalised_modules() -> None:
    pruned = prune.l1_unstructured(nn.Linear(4, 3), "weight", 0.5)
    profiled = profile(pruned, (4,))
    assert (profiled.forward_macs, profiled.forward_other) == (12, 12 + 3)  # the mask is a product; the bias
    assert profile(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), (4,)).forward_macs == 12
    assert profile(nn.utils.spectral_norm(nn.Linear(4, 3)), (4,)).forward_macs > 12  # a power iteration each step


# ---- nothing is touched ------------------------------------------------------------------------------------------------------


def test_the_module_and_all_random_states_come_back_as_they_were() -> None:
    torch.manual_seed(1)
    seen: list[object] = []
    body = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout()
    net = nn.Sequential(*body, nn.Flatten(), nn.Linear(144, 2))
    net[1].eval()
    net[0].register_forward_hook(lambda *_: seen.append(1))
    net[2].register_forward_pre_hook(lambda *_: seen.append(2))
    net[5].register_full_backward_hook(lambda *_: seen.append(3))
    net(torch.randn(2, 3, 8, 8)).sum().backward()
    seen.clear()

    def state() -> Any:
        hooks = [(list(m._forward_hooks), list(m._forward_pre_hooks), list(m._backward_hooks), m.training) for m in net.modules()]
        keys = [sorted(vars(m)) for m in net.modules()]
        return hooks, keys, random.getstate(), np.random.get_state()[1].tolist(), torch.is_grad_enabled()

    tensors = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    gradients = [parameter.grad.clone() for parameter in net.parameters() if parameter.grad is not None]
    before, generator = state(), torch.get_rng_state()

    def stops_meta(self: Any, x: Tensor) -> Any:
        return self.net(x + torch.rand(x.shape) + random.random() + np.random.rand() + x.sum().item())

    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    # On the CPU dropout really draws and batch norm really updates.
    assert profile(Calls(stops_meta, net=net), inputs=x).device == "cpu"
    assert profile(net, (3, 8, 8)).device == "meta"
    assert torch.equal(generator, torch.get_rng_state())
    assert state() == before
    assert list(net.state_dict()) == list(tensors)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in net.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), gradients, strict=True) if p.grad is not None)
    assert not seen
    assert all(parameter.device.type == "cpu" for parameter in net.parameters())


def test_works_under_no_grad_and_inference_mode() -> None:
    expected = profile(build("resnet9"), IMAGE)
    with torch.no_grad():
        assert profile(build("resnet9"), IMAGE) == expected
    with torch.inference_mode():
        assert profile(build("resnet9"), IMAGE) == expected


# ---- bad input -------------------------------------------------------------------------------------------------------------


def test_uncounted_operations_are_listed_and_strict_refuses() -> None:
    net = Calls(lambda self, x: torch.cdist(self.linear(x), x) + torch.erfinv(torch.erfinv(x[..., :1])), linear=nn.Linear(4, 4))
    profiled = profile(net, (3, 4))
    assert profiled.uncounted["erfinv"] == 2
    assert profiled.forward_macs == 48
    with pytest.raises(InputError, match=r"erfinv \(2×\)"):
        profile(net, (3, 4), strict=True)
    profile(build("resnet9"), IMAGE, strict=True)


@pytest.mark.parametrize("shape", [None, (), (3, 0, 3), (3, -1), (3.0, 4), "3x32", 32, (True, 2)])
def test_a_shape_that_is_no_shape(shape: Any) -> None:
    with pytest.raises(InputError, match="input_shape"):
        profile(nn.Linear(4, 3), shape)


def test_other_bad_input_gets_one_clear_sentence() -> None:
    net = create_model("resnet9")
    with pytest.raises(InputError, match=r"ResNet9 fails on input of shape 1×5×32×32 .*channels"):
        profile(net, (5, 32, 32))
    with pytest.raises(InputError, match=r"^input_shape is a tensor of shape 1×3×32×32: give it as inputs="):
        profile(net, torch.randn(1, 3, 32, 32))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="Linear fails on an input without tensors"):
        profile(nn.Linear(4, 3), inputs="four")
    with pytest.raises(InputError, match="batch_size=0"):
        profile(net, IMAGE, batch_size=0)
    with pytest.raises(InputError, match=r"nn\.Module"):
        profile(print, IMAGE)  # type: ignore[arg-type]
    locked = nn.Linear(4, 3)
    locked.lock = threading.Lock()  # type: ignore[assignment]
    with pytest.raises(InputError, match="Linear cannot be deep-copied"):
        profile(locked, (4,))
    with pytest.raises(InputError, match=r"depends on the values of its input.*inputs="):
        profile(Calls(lambda _, x: x[x > 0].sum()), (4,))
    with pytest.raises(InputError, match=r"give the shape it was made for$"):
        profile(net, (5, 32, 32))  # the command line has no inputs=
    with pytest.raises(InputError, match=r"give the arguments it was made for with inputs=$"):
        profile(nn.Bilinear(4, 5, 6), (4,))
    with pytest.raises(InputError, match="too large for any memory"):
        profile(nn.Linear(4, 3), (10**30, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, that TorchScript is deprecated
        scripted = torch.jit.script(nn.Linear(4, 3))
    with pytest.raises(InputError, match=r"Linear is TorchScript.*give the module it was made from"):
        profile(nn.Sequential(scripted), (4,))
    with pytest.raises(InputError, match="lazy"):
        profile(nn.LazyLinear(3), (4,))
    # With real values the same module can be counted.
    assert profile(Calls(lambda _, x: x[x > 0] * 2), inputs=torch.tensor([1.0, -1.0, 2.0])).forward_other == 2


def test_the_package_is_its_function() -> None:
    import cifarlab.profile

    assert cifarlab.profile(nn.Linear(4, 3), (4,)).forward_macs == 12  # type: ignore[operator]


def test_every_public_name_is_what_it_says() -> None:
    package = importlib.import_module("cifarlab.profile")
    for name in package._HOME:
        thing = getattr(package, name)
        assert callable(thing), name  # no module of the same name
    assert package.survey is package.profile


def test_one_call_gives_counts_fields_times_and_text() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    found = profile(net, (3, 8, 8), batch_size=2, timed=True, effective=True)
    assert found.forward_macs == count(net, (3, 8, 8), batch_size=2).forward_macs
    assert found.fields["0"].size == (3, 3)
    assert found.times.keys() >= {"0", "1", "3"}
    assert found.effective is not None
    assert found.effective.mass_side == 3
    for words in ("Sequential · input 2×3×8×8", "ms", "images/s in training", "effective receptive field of 1's"):
        assert words in str(found)
    assert max(map(len, str(found).splitlines())) <= 100
    assert str(count(net, (3, 8, 8))).startswith("Sequential · input 1×3×8×8")


def test_one_call_takes_inputs_of_any_structure() -> None:
    image, scale = torch.randn(2, 3, 8, 8), torch.ones(1)
    for function, inputs in (
        (lambda self, x: self.conv(x), image),
        (lambda self, x, s: self.conv(x) * s, (image, scale)),
        (lambda self, xs: self.conv(xs[0]) * xs[1], [image, scale]),
        (lambda self, x, s: self.conv(x) * s, {"x": image, "s": scale}),
    ):
        found = profile(Calls(function, conv=nn.Conv2d(3, 4, 3)), inputs=inputs, timed=True, effective=True)
        assert found.fields["conv"].size == (3, 3)
        assert found.times["conv"].forward_ms > 0
        assert found.effective is not None
        assert found.effective.mass_side == 3


def test_what_cannot_be_walked_leaves_the_counts() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        if not self.training:
            raise RuntimeError("only for training")
        return self.conv(x)  # type: ignore[no-any-return]

    found = profile(Calls(forward, conv=nn.Conv2d(3, 4, 1)), (3, 4, 4))
    assert (found.forward_macs, found.fields) == (16 * 12, {})
    assert "receptive fields are not known" in " ".join(str(found).split())
    assert "only for training" in found.remarks[0]
    assert profile(nn.Linear(4, 3), (4,)).fields == {}


def test_nothing_trained_has_no_images_per_second() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).requires_grad_(False)
    told = str(profile(net, (3, 8, 8), timed=True))
    assert "measured at batch 1: forward" in told
    assert "images/s" not in told


def test_what_does_not_fit_into_memory_is_not_begun() -> None:
    net = nn.Conv2d(3, 64, 3)
    for wish in ({"timed": True, "batch_size": 10**6}, {"effective": True}):
        with pytest.raises(InputError, match="this machine has"):
            profile(net, (3, 30_000, 30_000), **wish)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="can only be counted"):
        profile(build("resnet9"), IMAGE, timed=True)
