"""What a network costs, counted operation by operation as PyTorch dispatches them, forward and backward.

`count(module, input_shape)` runs one training step of a copy on the meta device, which neither allocates nor computes, and
looks at every operation below autograd. So functional calls, einsum, attention and code in the middle of a forward are seen
like layers are. Each operation has its rule in the table OPS; what has none is listed in `Profile.uncounted`.
"""

import copy
import random
from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from cifarlab.config import InputError

Rule = Callable[[dict[str, Any], Any], tuple[int, int]]
"""(arguments by name, result) -> (multiply-adds, other FLOP) of one call."""


# ---- the rules: what each operation costs --------------------------------------------------------------------------------


def _each(flop: int) -> Rule:
    """So many FLOP for each element of the largest tensor involved; integer and boolean results are no FLOP."""

    def rule(a: dict[str, Any], out: Any) -> tuple[int, int]:
        results = _tensors(out)
        if not any(t.is_floating_point() or t.is_complex() for t in results):
            return 0, 0
        return 0, flop * max(t.numel() for t in (*_tensors(a), *results))

    return rule


def _product(left: str, other: int = 0) -> Rule:
    """A matrix product whose left factor is the argument of that name: one multiply-add per result and inner index.

    other: FLOP for each result, 1 where something (a bias) is added to it.
    """
    return lambda a, out: (out.numel() * a[left].shape[-1], other * out.numel())


def _convolution(a: dict[str, Any], result: Tensor) -> tuple[int, int]:
    # Each position of the result (transposed: of the input) meets the kernel once per channel; weights are (out, in/groups, …).
    positions = a["input"] if a["transposed"] else result
    return positions.numel() * prod(a["weight"].shape[1:]), result.numel() * (a.get("bias") is not None)


def _convolution_backward(a: dict[str, Any], out: Any) -> tuple[int, int]:
    # Either gradient pairs the same (input, weight, output) triples as the forward pass, groups or not; the bias' is a sum.
    to_input, to_weight, to_bias = a["output_mask"]
    macs, _ = _convolution(a, a["grad_output"])
    return macs * (to_input + to_weight), a["grad_output"].numel() * to_bias


def _trilinear(a: dict[str, Any], out: Any) -> tuple[int, int]:
    # Σ i1·i2·i3: the first two are multiplied and summed over what the third lacks, then the third likewise.
    def unfold(k: int) -> list[int]:
        sides = list(a[f"i{k}"].shape)
        for d in sorted(a[f"expand{k}"]):
            sides.insert(d, 1)
        return sides

    both = list(map(max, unfold(1), unfold(2)))
    left = [1 if d in a["sumdim"] and d in a["expand3"] else n for d, n in enumerate(both)]
    return prod(both) + prod(map(max, left, unfold(3))), 0


def _bag(a: dict[str, Any], out: Any) -> tuple[int, int]:
    # One addition for each element that an index fetches; backward the same.
    return 0, a["indices"].numel() * (a["weight"] if "weight" in a else a["grad"]).shape[-1]


def _attention(products: Callable[[int, int], int], other: int) -> Rule:
    """Fused attention: multiply-adds per (query, key) pair from their width and the values', other FLOP per pair."""

    def rule(a: dict[str, Any], out: Any) -> tuple[int, int]:
        width, keys, values = a["query"].shape[-1], a["key"].shape[-2], a["value"].shape[-1]
        pairs = a["query"].numel() // width * keys
        return pairs * products(width, values), pairs * other

    return rule


def _pool(a: dict[str, Any], out: Any) -> tuple[int, int]:
    # One FLOP for each element of each window; there is a window for each element of the result, backward of its gradient.
    windows = a["grad_output"] if "grad_output" in a else _tensors(out)[0]
    return 0, windows.numel() * prod(a["kernel_size"])


def _norm(a: dict[str, Any], out: Any) -> tuple[int, int]:
    # Mean 1, variance 3, normalise 2, scale and shift 2; with stored statistics, scale and shift by two folded constants.
    uses_stored = not a.get("training", "momentum" not in a)
    return 0, a["input"].numel() * (2 if uses_stored else 6 if a.get("weight") is None else 8)


def _norm_backward(a: dict[str, Any], out: Any) -> tuple[int, int]:
    # Σdy 1, x̂ 2, Σdy·x̂ 2; from them dx 4. With stored statistics dx is one product.
    if a.get("train", a.get("training", True)):
        return 0, a["input"].numel() * 9
    to_input, to_weight, *_ = a.get("output_mask", (True, True))
    return 0, a["input"].numel() * (to_input + 5 * to_weight)


def _rules(rule: Rule, names: str) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


# Keys are names of aten operations, without the overload and without the in-place underscore; others' are "namespace.name".
# FLOP per element: +, −, ×, ÷, max and every elementary function (exp, log, erf, √ …) are one each.
OPS: dict[str, Rule] = {
    # multiply-adds
    "convolution": _convolution,
    "_convolution": _convolution,
    "convolution_overrideable": _convolution,
    "convolution_backward": _convolution_backward,
    "convolution_backward_overrideable": _convolution_backward,
    **_rules(_product("self"), "mm bmm mv dot vdot _int_mm _scaled_mm"),
    "addmm": _product("mat1", 1),
    "_addmm_activation": _product("mat1", 2),
    "baddbmm": _product("batch1", 1),
    "addmv": _product("mat", 1),
    "_trilinear": _trilinear,
    **_rules(_attention(lambda width, values: width + values, 5), """
        _scaled_dot_product_flash_attention _scaled_dot_product_flash_attention_for_cpu
        _scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention
        _scaled_dot_product_fused_attention_overrideable"""),
    # The scores are computed anew (Q·K), then four products: dV, dP, dQ, dK.
    **_rules(_attention(lambda width, values: 3 * width + 2 * values, 9), """
        _scaled_dot_product_flash_attention_backward _scaled_dot_product_flash_attention_for_cpu_backward
        _scaled_dot_product_efficient_attention_backward _scaled_dot_product_cudnn_attention_backward
        _scaled_dot_product_fused_attention_overrideable_backward"""),
    # norms
    **_rules(_norm, """
        native_batch_norm cudnn_batch_norm miopen_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training
        native_layer_norm native_group_norm"""),
    **_rules(_norm_backward, """
        native_batch_norm_backward cudnn_batch_norm_backward miopen_batch_norm_backward batch_norm_backward
        native_layer_norm_backward native_group_norm_backward"""),
    "_fused_rms_norm": _each(5),
    "_fused_rms_norm_backward": _each(8),
    "linalg_vector_norm": _each(2),
    "_weight_norm_interface": _each(3),  # Σv² 2, v·(g/‖v‖) 1
    "_weight_norm_interface_backward": _each(5),  # Σdw·v 2; from it dv 3
    # pools and resizing
    **_rules(_pool, """
        max_pool2d_with_indices max_pool3d_with_indices avg_pool2d avg_pool3d avg_pool2d_backward avg_pool3d_backward"""),
    **_rules(_each(1), """
        max_pool2d_with_indices_backward max_pool3d_with_indices_backward adaptive_max_pool2d adaptive_max_pool3d
        adaptive_max_pool2d_backward adaptive_max_pool3d_backward _adaptive_avg_pool2d _adaptive_avg_pool3d
        _adaptive_avg_pool2d_backward _adaptive_avg_pool3d_backward"""),
    **_rules(_each(0), "upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact2d"),
    **_rules(_each(1), """
        upsample_nearest1d_backward upsample_nearest2d_backward upsample_nearest3d_backward
        _upsample_nearest_exact2d_backward"""),
    **_rules(_each(11), """
        upsample_bilinear2d upsample_bilinear2d_backward _upsample_bilinear2d_aa _upsample_bilinear2d_aa_backward"""),
    **_rules(_each(3), "upsample_linear1d upsample_linear1d_backward"),
    **_rules(_each(35), """
        upsample_bicubic2d upsample_bicubic2d_backward _upsample_bicubic2d_aa _upsample_bicubic2d_aa_backward"""),
    # losses
    **_rules(lambda a, out: (0, a["target"].numel()), """
        nll_loss_forward nll_loss_backward nll_loss2d_forward nll_loss2d_backward"""),
    # activations
    **_rules(_each(1), """
        relu threshold threshold_backward hardtanh hardtanh_backward clamp clamp_min clamp_max leaky_relu leaky_relu_backward
        abs neg sgn sign exp expm1 log log1p log2 sqrt rsqrt sin cos tanh erf reciprocal floor round trunc"""),
    **_rules(_each(2), "_prelu_kernel elu"),
    **_rules(_each(3), """
        sigmoid hardsigmoid tanh_backward sigmoid_backward _prelu_kernel_backward hardsigmoid_backward elu_backward softplus"""),
    **_rules(_each(4), "silu hardswish softplus_backward hardswish_backward _softmax_backward_data log_sigmoid_forward"),
    **_rules(_each(5), "gelu _softmax _safe_softmax _log_softmax mish log_sigmoid_backward"),
    "_log_softmax_backward_data": _each(4),
    "silu_backward": _each(8),
    "gelu_backward": _each(10),
    "mish_backward": _each(10),
    "glu": _each(2),  # of the input: half of it goes through a sigmoid and a product
    "glu_backward": _each(4),
    # sums and other arithmetic
    **_rules(_each(1), """
        add sub rsub mul div pow maximum minimum fmod remainder sum nansum mean amax amin max min prod cumsum cumprod
        logical_not native_dropout native_dropout_backward _fused_dropout"""),
    **_rules(_each(2), "addcmul addcdiv square"),
    **_rules(_each(3), "lerp logsumexp"),
    **_rules(_each(4), "var std var_mean std_mean"),
    **_rules(_bag, "_embedding_bag _embedding_bag_forward_only _embedding_bag_backward _embedding_bag_dense_backward"),
    **_rules(_each(1), "embedding_dense_backward index_add scatter_add scatter_reduce index_put _index_put_impl"),
    # moves bytes, computes nothing
    **_rules(_each(0), """
        clone copy _to_copy cat stack repeat fill zero zeros ones full zeros_like ones_like full_like new_zeros new_ones
        new_full scalar_tensor arange linspace eye constant_pad_nd reflection_pad1d reflection_pad2d replication_pad1d
        replication_pad2d roll flip embedding index index_select gather scatter masked_fill where tril triu pixel_shuffle
        pixel_unshuffle channel_shuffle im2col slice_scatter select_scatter slice_backward select_backward bernoulli uniform
        normal random rand rand_like randn randn_like randint randperm eq ne gt ge lt le isnan isinf logical_and logical_or
        bitwise_not bitwise_and bitwise_or any all argmax argmin topk sort"""),
    **_rules(_each(1), """
        reflection_pad1d_backward reflection_pad2d_backward replication_pad1d_backward replication_pad2d_backward col2im"""),
}  # fmt: skip

ALLOCATIONS = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "empty_permuted"}  # no bytes move
OVERWRITES = {"copy", "fill", "zero", "uniform", "normal", "bernoulli", "random"}  # in place: the old values are not read
GATHERS = {"embedding", "index", "index_select", "gather"}  # read what they give, not the whole table

RULE = (
    "1 MAC (multiply-add) = 2 FLOP; MAC counts convolutions, linear layers, matrix products and attention, padding included; "
    "biases, norms, activations, pools and sums are a count of their own (other), in FLOP; backward counts only the gradients "
    "that are asked for"
)


# ---- the result ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """What one module did itself: a leaf, or a container whose forward calls functions. All counts are for the whole batch.

    A module called twice has one entry with the sum of both calls and the shape of the last output; a shared module has the
    first of its names. A parameter is counted once, where it was first used.
    """

    name: str
    """Dotted path; "" for the root's own functional operations."""
    kind: str
    """Class name."""
    what: str = ""
    """In words, e.g. "3×3 convolution 64→64 at 32×32"."""
    output_shape: tuple[int, ...] | None
    """Of its first output tensor, batch included."""
    calls: int
    parameters: int
    trainable_parameters: int
    parameter_bytes: int = 0
    forward_macs: int
    backward_macs: int
    forward_other: int
    """FLOP of biases, norms, activations, pools, additions, softmax: not in forward_macs."""
    backward_other: int
    bytes_read: int
    """Forward. Views are free; each operation reads its inputs and writes its results once: no cache, no fusion."""
    bytes_written: int
    backward_bytes: int
    """Read and written in backward."""
    activation_bytes: int
    """What autograd keeps for backward: each storage once, where it was first kept; parameters and buffers left out."""

    @property
    def forward_flops(self) -> int:
        """2 · forward_macs; forward_other is not in it."""
        return 2 * self.forward_macs

    @property
    def training_flops(self) -> int:
        """2 · (forward_macs + backward_macs)."""
        return 2 * (self.forward_macs + self.backward_macs)

    @property
    def forward_bytes(self) -> int:
        return self.bytes_read + self.bytes_written

    @property
    def arithmetic_intensity(self) -> float:
        """FLOP per byte moved in forward, other FLOP included; 0 where nothing moves."""
        return (self.forward_flops + self.forward_other) / self.forward_bytes if self.forward_bytes else 0.0


@dataclass(frozen=True, kw_only=True)
class Profile:
    """The cost of one training step (or one forward pass, where backward was not asked for) of a whole batch."""

    layers: tuple[LayerCost, ...]
    """In order of first call; a container comes before what is in it."""
    input_shapes: tuple[tuple[int, ...], ...]
    uncounted: dict[str, int] = field(default_factory=dict)
    """Operations without a rule -> times met; their bytes are counted, their arithmetic is not."""
    backward: bool = True
    kind: str = ""
    """Class name of the module."""
    device: str = "meta"
    """Where it was counted: "meta" (nothing computed), or the real device where the module cannot run on meta."""
    notes: tuple[str, ...] = ()
    """What differs from a plain training step."""

    def __str__(self) -> str:
        from cifarlab.profile.report import format_table

        return format_table(self)

    @property
    def rule(self) -> str:
        return RULE

    def total(self, quantity: str) -> int:
        """Sum over all layers of an integer field or property of LayerCost."""
        return sum(getattr(layer, quantity) for layer in self.layers)

    @property
    def parameters(self) -> int:
        return self.total("parameters")

    @property
    def trainable_parameters(self) -> int:
        return self.total("trainable_parameters")

    @property
    def parameter_bytes(self) -> int:
        return self.total("parameter_bytes")

    @property
    def forward_macs(self) -> int:
        return self.total("forward_macs")

    @property
    def backward_macs(self) -> int:
        return self.total("backward_macs")

    @property
    def forward_other(self) -> int:
        return self.total("forward_other")

    @property
    def backward_other(self) -> int:
        return self.total("backward_other")

    @property
    def forward_flops(self) -> int:
        """2 · forward_macs."""
        return 2 * self.forward_macs

    @property
    def training_flops(self) -> int:
        """2 · (forward_macs + backward_macs)."""
        return 2 * (self.forward_macs + self.backward_macs)

    @property
    def bytes_read(self) -> int:
        return self.total("bytes_read")

    @property
    def bytes_written(self) -> int:
        return self.total("bytes_written")

    @property
    def forward_bytes(self) -> int:
        return self.total("forward_bytes")

    @property
    def backward_bytes(self) -> int:
        return self.total("backward_bytes")

    @property
    def activation_bytes(self) -> int:
        return self.total("activation_bytes")

    @property
    def arithmetic_intensity(self) -> float:
        """FLOP per byte moved in forward, other FLOP included."""
        return (self.forward_flops + self.forward_other) / self.forward_bytes if self.forward_bytes else 0.0


# ---- the count -----------------------------------------------------------------------------------------------------------


def count_parameters(model: nn.Module) -> int:
    """Numbers in all parameters, a shared one counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, input_shape: tuple[int, ...]) -> int:
    """Multiply-adds of one forward pass on one input of that shape (C, H, W): convolutions, linear, matrix products, attention.

    One multiply-add is two FLOP. Batch norm, activations, pooling and additions are not in it. The model is not touched.
    """
    return count(model, input_shape, backward=False).forward_macs


def count(module: nn.Module, input_shape: tuple[int, ...] | None = None, *, batch_size: int = 1, inputs: Any = None,
          backward: bool = True, strict: bool = False) -> Profile:  # fmt: skip
    """What a module costs, layer by layer: multiply-adds, other FLOP, bytes moved, memory kept; forward and backward.

    input_shape: of one input without the batch axis, e.g. (3, 32, 32); its numbers have the type of the module's parameters.
    inputs replaces it: a tensor is the one argument of forward, a tuple all positional ones, a dict those by keyword, a list is
    passed as it is (a dict as one argument: `inputs=({"image": x},)`). Only their shapes and types matter.

    With backward the copy is in train mode and every output gets a gradient (the loss itself is not counted); an input gets one
    only if it requires it. Without backward it is in eval mode. The sum of gradients where two paths meet is charged to the
    module that delivered the second. Hooks that users put on the module do not run.

    Counted on a deep copy on the meta device (milliseconds, no memory), or, where the module cannot run there, on a copy on its
    own device (`Profile.device` tells). The module, its hooks and all random states are left as they were. On meta, fused
    attention appears as its matrix products and softmax, so its bytes are those of the unfused form.

    Raises InputError for a module that fails on the input, cannot be copied, or whose work depends on its input's values while
    only a shape was given; with strict also for operations without a rule.

    Source: the dispatch-level count is the idea of torch.utils.flop_counter. Ours differs: MAC and other work apart, bytes and
    activation memory, no silent omissions, work attributed to modules by autograd's node numbers (so residual branches and
    functional calls are right in backward too), and the weight gradient of grouped convolutions, which torch 2.13 over-counts
    by the number of groups.
    """
    if not isinstance(module, nn.Module):
        raise InputError(f"a {type(module).__name__} cannot be profiled: give an nn.Module")
    while isinstance(inner := getattr(module, "_orig_mod", None), nn.Module):  # torch.compile's wrapper
        module = inner
    kind = type(module).__name__
    weights = [*module.parameters(), *module.buffers()]
    if any(is_lazy(weight) for weight in weights):
        raise InputError(f"{kind} has lazy parameters without a shape yet: run one batch through it before profiling")
    home = home_of(module)
    given = inputs if inputs is not None else _make_input(input_shape, batch_size, weights)
    shapes = tuple(tuple(t.shape) for t in _tensors(given))

    failure: Exception | None = None
    for place in dict.fromkeys([torch.device("meta"), home]):
        try:
            with random_states_kept(home), torch.inference_mode(False):  # copies made in inference mode could not go backward
                meter = _measure(module, given, place, backward)
            break
        except InputError:
            raise
        except _DataDependentError as error:
            if inputs is None:
                told = f"the work of {kind} depends on the values of its input ({error}): give real ones with inputs="
                raise InputError(told) from error
            failure = error
        except Exception as error:
            failure = error
    else:
        told = " ".join(str(failure).split())[:300] or type(failure).__name__
        sides = " and ".join("×".join(map(str, shape)) for shape in shapes)
        given_as = f"input of shape {sides}" if sides else "an input without tensors"
        is_shape = inputs is None and not isinstance(failure, TypeError)  # a TypeError: it wants other arguments
        remedy = "the shape it was made for" if is_shape else "the arguments it was made for with inputs="
        raise InputError(f"{kind} fails on {given_as} ({told}): give {remedy}") from failure

    if strict and meter.uncounted:
        told = ", ".join(f"{name} ({times}×)" for name, times in meter.uncounted.items())
        raise InputError(f"strict: {kind} uses operations without a counting rule: {told}; add rules to "
                         "cifarlab.profile.counting.OPS, or leave strict out to have them listed")  # fmt: skip
    return Profile(layers=meter.layers(), input_shapes=shapes, uncounted=dict(meter.uncounted), backward=backward, kind=kind,
                   device=place.type, notes=tuple(meter.notes))  # fmt: skip


def _make_input(input_shape: Any, batch_size: int, weights: list[Tensor]) -> Tensor:
    if isinstance(input_shape, Tensor):
        sides = "×".join(map(str, input_shape.shape))
        raise InputError(f"input_shape is a tensor of shape {sides}: give it as inputs=, or a shape such as (3, 32, 32)")
    is_shape = isinstance(input_shape, tuple | list) and all(type(side) is int and side > 0 for side in input_shape)
    if not is_shape or not input_shape:
        raise InputError(f"input_shape={input_shape!r} is no shape: give positive whole numbers such as (3, 32, 32), or inputs=")
    if type(batch_size) is not int or batch_size < 1:
        raise InputError(f"batch_size={batch_size!r} cannot be used: it must be a whole number of at least 1")
    try:
        return torch.empty(batch_size, *input_shape, dtype=dtype_of(weights), device="meta")
    except (RuntimeError, TypeError, OverflowError) as error:
        raise InputError(f"input_shape={tuple(input_shape)} is too large for any memory: give a smaller one") from error


def dtype_of(weights: Iterable[Tensor]) -> torch.dtype:
    """Of the first weight with a floating point."""
    return next((weight.dtype for weight in weights if weight.is_floating_point()), torch.float32)


def home_of(module: nn.Module) -> torch.device:
    """The device of the module's first parameter or buffer."""
    return next((weight.device for weight in (*module.parameters(), *module.buffers())), torch.device("cpu"))


@contextmanager
def random_states_kept(device: torch.device) -> Iterator[None]:
    """Puts back the generators of Python, numpy and torch, on the CPU and that device."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _measure(module: nn.Module, inputs: Any, place: torch.device, backward: bool) -> "_Meter":
    """One pass of a fresh copy on that device, counted."""
    try:
        meter = _Meter(copy_to(module, place), module)
        _run(meter, inputs, place, backward)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        # Batch norm refuses to train on a batch of one with one pixel left; that must not forbid the count.
        meter = _Meter(copy_to(module, place), module)
        meter.notes.append(
            "batch norm is counted with stored statistics: it cannot train on one value per channel (a larger batch can)"
        )
        _run(meter, inputs, place, backward, stored_statistics=True)
    return meter


def copy_to(module: nn.Module, place: torch.device) -> nn.Module:
    """A deep copy of the module on that device, without users' hooks and without torch.compile's wrappers.

    All by deepcopy's memo, which says what stands for what: so shared tensors stay shared, and on meta no data is copied.
    """
    memo: dict[int, Any] = {}
    modules = list(module.modules())
    if scripted := [m for m in modules if isinstance(m, torch.jit.ScriptModule)]:
        raise InputError(f"{scripted[0].original_name} is TorchScript, which hides its layers: give the module it was made from")
    try:
        for m in modules:
            for t in (*m._parameters.values(), *m._buffers.values(), *vars(m).values()):
                if isinstance(t, Tensor) and id(t) not in memo:
                    twin = torch.empty_like(t, device=place).detach() if place.type == "meta" else t.detach().clone()
                    memo[id(t)] = nn.Parameter(twin, t.requires_grad) if isinstance(t, nn.Parameter) else twin
            for hooks in (m._forward_hooks, m._backward_hooks, m._backward_pre_hooks):
                memo[id(hooks)] = OrderedDict()
            # A user's hook may write into the user's objects. torch's own (spectral norm, pruning) make weights: that is work.
            own = {key: hook for key, hook in m._forward_pre_hooks.items() if type(hook).__module__.startswith("torch.nn.utils.")}
            memo[id(m._forward_pre_hooks)] = OrderedDict((key, copy.copy(hook)) for key, hook in own.items())
        for m in reversed(modules):  # inner ones first
            if isinstance(inner := getattr(m, "_orig_mod", None), nn.Module):
                memo[id(m)] = copy.deepcopy(inner, memo)
        copied = copy.deepcopy(module, memo)
        for m in copied.modules():  # module.forward = torch.compile(module.forward), which is bound to the original
            forward: Any = getattr(vars(m).get("forward"), "_torchdynamo_orig_callable", None)
            method: Any = type(m).forward
            if forward and (forward.__module__, forward.__qualname__) == (method.__module__, method.__qualname__):
                del m.forward
        return copied
    except Exception as error:
        raise InputError(f"{type(module).__name__} cannot be deep-copied, and only a copy is profiled "
                         f"({' '.join(str(error).split())[:200]}): keep such objects out of the module") from error  # fmt: skip


def bring_to(place: torch.device, inputs: Any) -> Any:
    """A copy of all tensors in these inputs on that device; random ones for those that are on meta."""

    def bring(tensor: Tensor) -> Tensor:
        if tensor.device.type == "meta" and place.type != "meta":
            # Noise, but zeros where they are whole numbers: likely indices, for which 0 is always allowed.
            make = torch.randn if tensor.is_floating_point() else torch.zeros
            brought = make(tensor.shape, dtype=tensor.dtype, device=place)
        else:
            brought = tensor.detach().to(place, copy=True)
        return brought.requires_grad_(tensor.requires_grad)

    return tree_map_only(Tensor, bring, inputs)


def _run(meter: "_Meter", inputs: Any, place: torch.device, backward: bool, stored_statistics: bool = False) -> None:
    module = meter.module.train(backward)
    if stored_statistics:
        for m in module.modules():
            if isinstance(m, _BatchNorm):
                m.eval()
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one opaque operation for a whole transformer layer
    try:
        with torch.set_grad_enabled(backward):
            arguments = bring_to(place, inputs)
            with torch.autograd.graph.saved_tensors_hooks(meter.keep, lambda tensor: tensor), meter:
                if isinstance(arguments, dict):
                    outputs = module(**arguments)
                else:
                    outputs = module(*(arguments if isinstance(arguments, tuple) else (arguments,)))
            results = [t for t in _tensors(outputs) if t.requires_grad]
            if backward and not results and any(p.requires_grad for p in module.parameters()):
                meter.notes.append("nothing is counted backward, for no output requires a gradient (outputs are looked for in "
                                   "tuples, lists, dicts and dataclasses)")  # fmt: skip
            if results and backward:
                gradients = [torch.ones_like(t) for t in results]
                meter.in_backward = True
                with meter:
                    torch.autograd.backward(results, gradients)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


class _DataDependentError(Exception):
    """An operation needs its input's values, which meta tensors do not have."""


@dataclass(eq=False)
class _Row:
    """A LayerCost while it is being added up."""

    name: str
    module: nn.Module
    output_shape: tuple[int, ...] | None = None
    calls: int = 0
    has_worked: bool = False
    counts: Counter[str] = field(default_factory=Counter)


class _Meter(TorchDispatchMode):
    """Sees every operation of a module on its own device and charges it to the innermost running module.

    In backward no module runs. But autograd numbers its nodes in the order of their making, so the numbers at which modules were
    entered and left say which of them made the node that runs now.
    """

    def __init__(self, module: nn.Module, original: nn.Module) -> None:
        """module: a copy of the original, whose own tensors must stay out of this."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.module = module
        self.originals = {_address(t) for t in (*original.parameters(), *original.buffers())}
        self.uncounted: Counter[str] = Counter()
        self.notes: list[str] = []
        self.in_backward = False
        self.rows: dict[nn.Module, _Row] = {}
        self.running: list[_Row] = []
        self.entered_at: list[int] = []  # number of the next node when `entered[i]` became the innermost module
        self.entered: list[_Row] = []
        self.kept: dict[int, Any] = {}  # storages by address, held so that no address is used twice
        self.state = {_address(t) for t in (*module.parameters(), *module.buffers())}
        self.unused = {_address(p): p for p in module.parameters()}
        self.owner: dict[int, _Row] = {}
        for name, m in module.named_modules():
            self.rows[m] = _Row(name, m)
            m.register_forward_pre_hook(self._enter, prepend=True)
            m.register_forward_hook(self._leave, always_call=True)
        self.order: list[_Row] = []

    def _enter(self, module: nn.Module, _: Any) -> None:
        row = self.rows[module]
        if not row.calls:
            self.order.append(row)
        row.calls += not self.in_backward  # checkpointing calls modules again in backward
        self.running.append(row)
        self._mark()

    def _leave(self, module: nn.Module, _: Any, output: Any) -> None:
        row = self.running.pop()
        if shapes := [tuple(t.shape) for t in _tensors(output)]:
            row.output_shape = shapes[0]
        self._mark()

    def _mark(self) -> None:
        if self.running:
            self.entered_at.append(torch._C._autograd._get_sequence_nr())
            self.entered.append(self.running[-1])

    def _responsible(self) -> _Row:
        if self.running:
            return self.running[-1]
        node = torch._C._current_autograd_node()
        if hasattr(node, "variable"):  # a gradient arrives at its parameter
            return self.owner.get(_address(node.variable), self.rows[self.module])
        made_at = bisect_right(self.entered_at, node._sequence_nr()) if node is not None else 0
        return self.entered[made_at - 1] if made_at else self.rows[self.module]

    def keep(self, tensor: Tensor) -> Tensor:
        """For saved_tensors_hooks: notes what autograd keeps."""
        if tensor.layout is torch.strided and (address := _address(tensor)) not in self.kept and address not in self.state:
            self.kept[address] = tensor.untyped_storage()
            self._responsible().counts["activation_bytes"] += tensor.untyped_storage().nbytes()
        return tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = _name(func)
        if any(_address(t) in self.originals for t in _tensors((args, kwargs))):
            raise InputError(f"{type(self.module).__name__} cannot be profiled: a function in it, such as a replaced forward, is "
                             "bound to the module itself, so a copy would run it: make it a method of the class")  # fmt: skip
        if name not in OPS:
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        try:
            out = func(*args, **kwargs)
        except (RuntimeError, NotImplementedError) as error:
            if {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags):
                raise _DataDependentError(func.overloadpacket) from error
            raise
        self._count(func, name, args, kwargs, out)
        return out

    def _count(self, func: Any, name: str, args: Any, kwargs: Any, out: Any) -> None:
        row, phase = self._responsible(), "backward" if self.in_backward else "forward"
        schema = func._schema.arguments
        named = dict(zip((argument.name for argument in schema), args, strict=False)) | kwargs
        given = {id(t): t for t in _tensors(named)}
        addresses = {_address(t) for t in given.values()}
        for address in addresses & self.unused.keys():
            self._charge_parameter(row, self.unused.pop(address))
        changed = {id(t) for argument in schema if argument.alias_info and argument.alias_info.is_write
                   for t in _tensors(named.get(argument.name))}  # fmt: skip
        made = [t for t in _tensors(out) if _address(t) not in addresses]
        if (not made and not changed) or torch.Tag.inplace_view in func.tags:
            return  # a view, or a tensor that turns into one: nothing moves
        if name in ALLOCATIONS:
            return

        if name in OPS:
            macs, other = OPS[name](named, out)
            row.counts[f"{phase}_macs"] += macs
            row.counts[f"{phase}_other"] += other
        else:
            self.uncounted[name] += 1
        if name in GATHERS:
            read = [*made, *(t for t in given.values() if not t.is_floating_point())]
        elif name.startswith("_embedding_bag") and "weight" in named:  # a row for each index, not the whole table
            rows = torch.empty(named["indices"].numel(), named["weight"].shape[1], dtype=named["weight"].dtype, device="meta")
            read = [rows, *(t for t in given.values() if not t.is_floating_point())]
        elif "convolution_backward" in name:  # each gradient needs the other factor
            to_input, to_weight, _ = named["output_mask"]
            read = [named["grad_output"], *[named["input"]] * to_weight, *[named["weight"]] * to_input]
        else:
            only_written = changed if name in OVERWRITES or func._overloadname.endswith("out") else set()
            read = [t for key, t in given.items() if key not in only_written]
        written = [*made, *(t for key, t in given.items() if key in changed)]
        bytes_read, bytes_written = sum(map(_nbytes, read)), sum(map(_nbytes, written))
        if self.in_backward:
            row.counts["backward_bytes"] += bytes_read + bytes_written
        else:
            row.counts["bytes_read"] += bytes_read
            row.counts["bytes_written"] += bytes_written
        row.has_worked = True

    def _charge_parameter(self, row: _Row, parameter: Tensor) -> None:
        self.owner[_address(parameter)] = row
        row.counts["parameters"] += parameter.numel()
        row.counts["trainable_parameters"] += parameter.numel() * parameter.requires_grad
        row.counts["parameter_bytes"] += _nbytes(parameter)

    def layers(self) -> tuple[LayerCost, ...]:
        """The rows of modules that worked, then those of modules with parameters that nothing used."""
        for row in self.rows.values():
            for parameter in row.module._parameters.values():
                if parameter is not None and self.unused.pop(_address(parameter), None) is not None:
                    self._charge_parameter(row, parameter)
        keys = ("parameters", "trainable_parameters", "parameter_bytes", "forward_macs", "backward_macs", "forward_other",
                "backward_other", "bytes_read", "bytes_written", "backward_bytes", "activation_bytes")  # fmt: skip
        return tuple(
            LayerCost(
                name=row.name,
                kind=type(row.module).__name__,
                what=_describe(row.module, row.output_shape),
                output_shape=row.output_shape,
                calls=row.calls,
                **{key: row.counts[key] for key in keys},
            )
            for row in (*self.order, *(row for row in self.rows.values() if not row.calls))
            if row.has_worked or row.counts["parameters"]
        )


def _describe(module: nn.Module, output_shape: tuple[int, ...] | None) -> str:
    at = f" at {'×'.join(map(str, output_shape[2:]))}" if output_shape and len(output_shape) > 2 else ""
    match module:
        case nn.modules.conv._ConvNd():
            depthwise = module.groups == module.in_channels > 1
            words = [
                "×".join(map(str, module.kernel_size)),
                *([f"dilation {'×'.join(map(str, module.dilation))}"] if set(module.dilation) != {1} else []),
                *(["depthwise"] if depthwise else [f"{module.groups}-group"] if module.groups > 1 else []),
                "transposed convolution" if module.transposed else "convolution",
                f"{module.in_channels}→{module.out_channels}",
            ]
            return " ".join(words) + at
        case nn.Linear():
            return f"linear {module.in_features}→{module.out_features}"
        case _:
            return type(module).__name__ + at


def _tensors(tree: Any) -> list[Tensor]:
    """All tensors in nested tuples, lists, dicts and dataclasses."""
    found: list[Tensor] = []
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif is_dataclass(leaf) and not isinstance(leaf, type):  # such as a model's output with named parts
            found += _tensors([getattr(leaf, part.name) for part in fields(leaf)])
    return found


def _address(tensor: Tensor) -> int:
    # Sparse tensors have no storage; on meta all data pointers are 0, so it is the storage object that is told apart.
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else id(tensor)


def _nbytes(tensor: Tensor) -> int:
    size = tensor.numel() * tensor.element_size()
    return min(size, tensor.untyped_storage().nbytes()) if tensor.layout is torch.strided else size  # an expanded one is small


def _name(func: Any) -> str:
    namespace, _, name = str(func._schema.name).partition("::")
    if namespace != "aten":
        return f"{namespace}.{name}"
    return name[:-1] if name.endswith("_") and name[:-1] in OPS else name
