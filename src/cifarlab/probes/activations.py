"""What the activation functions let through, on a fixed batch: mean, spread, dead units, saturated outputs."""

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from cifarlab.probes.listener import Listener
from cifarlab.probes.moments import mean_and_std

COLUMNS = ("mean", "std", "dead_share", "saturated_share")
LIMITS: dict[str, tuple[float, float]] = {  # aten operation -> (lower, upper) limit of its result; None: it has none
    "relu": (0.0, torch.inf), "threshold": (0.0, torch.inf), "leaky_relu": (-torch.inf, torch.inf), "elu": (-1.0, torch.inf),
    "celu": (-1.0, torch.inf), "gelu": (-torch.inf, torch.inf), "silu": (-torch.inf, torch.inf),
    "mish": (-torch.inf, torch.inf), "softplus": (0.0, torch.inf), "_prelu_kernel": (-torch.inf, torch.inf),
    "hardswish": (-torch.inf, torch.inf), "rrelu_with_noise": (-torch.inf, torch.inf),
    "sigmoid": (0.0, 1.0), "tanh": (-1.0, 1.0), "hardsigmoid": (0.0, 1.0),
    "hardtanh": (-1.0, 1.0), "log_sigmoid_forward": (-torch.inf, 0.0),
}  # fmt: skip
RECTIFIERS = {"relu", "threshold", "leaky_relu", "rrelu_with_noise", "elu", "celu", "gelu", "silu", "mish", "softplus",
              "_prelu_kernel", "hardswish"}  # fmt: skip
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "embedding"}
NEAR = 0.02  # of the range between both limits: closer than this to one of them is saturated


class Activations(Listener):
    """mean a, standard deviation of a, share of dead units, share of saturated outputs, after each activation function

    A unit is a channel: axis 1 of N×C and N×C×H×W, the last one of N×L×D and N×H×W×C, told apart by the layer (convolution,
    norm, matrix product) that was last computed and how many channels it gave; where none fits, the share of dead ones is NaN.
    It is dead when no image and no place of the batch makes it positive: of a ReLU, its
    output is 0 throughout, and no gradient passes. An output is saturated when it is within 2 % of the range from a limit of a
    function that has two (sigmoid, tanh, hardtanh), where hardly any gradient passes; elsewhere the share is 0. ReLU6 is a ReLU
    with an upper limit: only there it saturates, as its zeros are a ReLU's.

    Activation functions are found as PyTorch dispatches them, so functional calls count. Their names are those of the modules
    in which they are called, numbered where there are several: `layer1.0.relu.2`. Cost: a forward pass of the batch.

    How to read: standard deviations of the same size from layer to layer are healthy; falling ones starve the last
    layers, rising ones explode. A few per cent of dead units are usual; half a layer is lost capacity, a whole layer ends
    learning below it: lower the learning rate, look at biases and at the shift before the function, use a leaky one. More
    than half of the outputs saturated: smaller initial weights, normalisation, or another function.
    """

    columns = COLUMNS

    def _attach(self, model: nn.Module, stack: ExitStack) -> None:
        inside: list[str] = []  # names of the modules that are at work
        for name, module in model.named_modules():
            stack.callback(module.register_forward_pre_hook(lambda _, __, name=name: inside.append(name)).remove)
            stack.callback(module.register_forward_hook(lambda *_: _leave(inside), always_call=True).remove)
        seen: Counter[str] = Counter()

        def note(operation: str, limits: tuple[float, float], out: Tensor, layer: "_Layer | None") -> None:
            place = inside[-1] if inside else ""
            # A module that is an activation function gives its name; a function's own name is added to that of its caller.
            label = place if place and place.split(".")[-1] == operation else f"{place}.{operation}".strip(".")
            seen[label] += 1
            row = _measure(out, operation, limits, find_unit_axis(out.shape, layer))
            self._add(label if seen[label] == 1 else f"{label}.{seen[label]}", row)

        stack.enter_context(_Dispatched(note))


def _leave(stack: list[str]) -> None:
    stack.pop()


class _Layer(NamedTuple):
    """What the last layer with channels gave: the axis on which it has them, and how many."""

    axis: int
    size: int


def find_unit_axis(shape: Sequence[int], layer: _Layer | None) -> int | None:
    """The axis of a layer's units; None where it cannot be known.

    A tensor may have been reshaped since that layer (squeeze and excitation ends in a matrix product, and what follows is
    N×C×H×W again): so the axis is that of the right length.
    """
    if len(shape) <= 2:
        return 1 if len(shape) == 2 else None
    if layer is None:
        return 2 if len(shape) == 3 else 1
    fitting = [axis for axis in range(1, len(shape)) if shape[axis] == layer.size]
    expected = layer.axis % len(shape)
    if expected in fitting and (len(fitting) == 1 or expected == 1 or len(shape) == 3):
        return expected
    return fitting[0] if len(fitting) == 1 else None


def _find_layer(name: str, args: Any, out: Any) -> _Layer | None:
    """Of an operation that gives channels, where and how many; None of all others."""
    out = out[0] if isinstance(out, tuple) else out
    if "convolution" in name or "batch_norm" in name or "group_norm" in name:
        return _Layer(1, out.shape[1])
    is_over_last = ("layer_norm" in name or "rms_norm" in name) and len(args[1]) == 1
    return _Layer(-1, out.shape[-1]) if is_over_last or name in PRODUCTS else None


def _measure(out: Tensor, operation: str, limits: tuple[float, float], axis: int | None) -> Tensor:
    values = out.detach().float()
    mean, std = mean_and_std(values)
    zero = torch.zeros((), device=values.device)
    dead = zero
    low, high = limits
    is_rectifier = operation in RECTIFIERS or (operation == "hardtanh" and low == 0)
    if is_rectifier and axis is None:
        dead = zero + torch.nan
    elif is_rectifier and axis is not None:
        dead = (values.amax([other for other in range(values.ndim) if other != axis]) <= 0).float().mean()
    saturated = zero
    if high - low < torch.inf:
        margin = NEAR * (high - low)
        is_near = values > high - margin
        saturated = (is_near if is_rectifier else is_near | (values < low + margin)).float().mean()
    return torch.stack([mean, std, dead, saturated])


class _Dispatched(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Calls `note` for every activation function that is dispatched."""

    def __init__(self, note: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._note = note
        self._layer: _Layer | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::").removesuffix("_")
        if name in LIMITS:
            limits = LIMITS[name]
            if name == "hardtanh":  # ReLU6 is one of 0 … 6; what equals the default is not passed on
                given = dict(zip(("min_val", "max_val"), args[1:], strict=False)) | (kwargs or {})
                limits = float(given.get("min_val", limits[0])), float(given.get("max_val", limits[1]))
            self._note(name, limits, out[0] if isinstance(out, tuple) else out, self._layer)
        else:
            self._layer = _find_layer(name, args, out) or self._layer
        return out
