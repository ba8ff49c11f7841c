"""What other counters say of the same net, and which rule each follows.

"0.56 GFLOPs", "1.1 GFLOPs" and "1.8 GFLOPs" are all said of ResNet-18: the first are multiply-adds called FLOPs, the second
FLOPs at two per multiply-add, both with the stem for 32×32 images; the third is multiply-adds again, of the net for 224×224.

Source: the rules were read in fvcore 0.1.5, ptflops 0.7.5, torchinfo 1.8.0 and thop 0.1.1, and agree with what these print
for every net of ours to the last digit (torch 2.13).
"""

import contextlib
import importlib
import io
import logging
import math
import textwrap
import warnings
from collections import Counter
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, field, replace
from importlib import metadata
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from cifarlab import __version__
from cifarlab.config import InputError
from cifarlab.models.resnet import ResNet
from cifarlab.profile.counting import OPS, _tensors, copy_to, count, dtype_of, home_of, random_states_kept
from cifarlab.profile.latency import _backward
from cifarlab.profile.report import load_rich

Shape = tuple[int, ...]
RULE = "convolutions, linear layers, matrix products, attention"
IMAGENET = (3, 224, 224)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One counter's number for one net, one image.

    printed_unit: the word that the tool prints or returns; unit: what the number is. rule: what is counted. version: of the
    installed tool, or "not installed". source: "run" if the tool itself gave the number, "by its rule" if we did what it does.
    """

    tool: str
    version: str
    value: int
    printed_unit: str
    unit: Literal["MAC", "FLOP"]
    rule: str
    input_shape: Shape
    source: Literal["run", "by its rule"]
    note: str = ""


def compare_counters(module: nn.Module, input_shape: Shape) -> list[Row]:
    """Our count and those of fvcore, ptflops, torchinfo, thop and torch's own counter, for one input of that shape (C, H, W).

    Installed tools are run on copies in evaluation mode, on the CPU, with what they print swallowed; a tool that is not
    installed, or fails, is stood in for by its rule. For a ResNet with the CIFAR stem two rows follow for its ImageNet twin:
    other stem, 1,000 classes, 3×224×224. The input has the type of the module's weights. A net that cannot run on the meta
    device is run for real on its own; one whose work depends on the values of its input sees the same noise in every row, and
    the rows say so. The module and the random states stay as they are.

    Raises InputError for a module that cannot be copied or does not take the shape.
    """
    with random_states_kept(home_of(module)):
        return _compare(module, input_shape)


def _compare(module: nn.Module, input_shape: Shape) -> list[Row]:
    shape, device, note = tuple(input_shape), torch.device("meta"), ""
    try:
        ours = count(module, shape)
        device = torch.device(ours.device) if ours.device == "meta" else home_of(module)
    except InputError as error:
        device = home_of(module)
        if device.type == "meta":
            raise
        try:  # values may be all that it lacks
            ours = count(module, inputs=(_image(module, shape, device),))
        except (InputError, RuntimeError, TypeError):
            raise error from None
        note = "for one image of noise: the work depends on its values"
    calls, device = _record(module, shape, device)
    rows = [
        _our_row("cifarlab", ours.forward_macs, "MAC", RULE, shape),
        _our_row("cifarlab", ours.forward_flops, "FLOP", f"2 per multiply-add: {RULE}", shape),
    ]
    for training, flops in ((False, ours.forward_flops), (True, ours.training_flops)):
        try:
            rows.append(_torch_row(module, shape, device, flops, training=training))
        except Exception as error:  # as with the other tools: that it fails is a finding
            rows[-1] = replace(rows[-1], note=f"torch's own counter fails here: {type(error).__name__}")
    rows += [_peer_row(peer, module, shape, calls) for peer in PEERS]
    if isinstance(module, ResNet) and module.conv1.kernel_size == (3, 3):
        twin = count(_imagenet_twin(module), IMAGENET, backward=False)
        rule = 'the net made for ImageNet, 1,000 classes: papers and model pages call its MACs "FLOPs"'
        rows.append(_our_row("cifarlab, ImageNet stem", twin.forward_macs, "MAC", rule, IMAGENET))
    return [replace(row, note="; ".join(filter(None, (row.note, note)))) for row in rows]


def _our_row(tool: str, value: int, unit: Literal["MAC", "FLOP"], rule: str, shape: Shape) -> Row:
    return Row(tool=tool, version=__version__, value=value, printed_unit=unit, unit=unit, rule=rule, input_shape=shape,
               source="run")  # fmt: skip


def _image(module: nn.Module, shape: Shape, device: torch.device, num_images: int = 1) -> Tensor:
    """Images of noise, the same each time, of the type of the module's weights."""
    dtype = dtype_of((*module.parameters(), *module.buffers()))
    if device.type == "meta":
        return torch.empty(num_images, *shape, device=device, dtype=dtype)
    noise = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    return noise.expand(num_images, *shape).to(device, dtype).contiguous()


# ---- torch's own counter -------------------------------------------------------------------------------------------------


class _Causes(TorchDispatchMode):
    """FLOP by which torch's counter is known to differ, seen below it: counted too often, and not counted, by operation."""

    def __init__(self, counted: Container[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counted = counted
        self.surplus, self.missed = 0, Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        named = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | (kwargs or {})
        if name == "convolution_backward" and named["output_mask"][1]:
            macs, _ = OPS["convolution"](named, named["grad_output"])
            self.surplus += 2 * macs * (named["groups"] - 1)
        if name in OPS and func._overloadpacket not in self.counted:
            self.missed[name] += 2 * OPS[name](named, out)[0]
        return out


def _torch_row(module: nn.Module, shape: Shape, device: torch.device, ours: int, *, training: bool) -> Row:
    """Of a forward pass or of forward + backward; ours: the FLOP that we count."""
    shadow = copy_to(module, device).train(training)
    num_images = 2 if training else 1  # batch norm does not train on one value
    counter = FlopCounterMode(display=False)
    causes = _Causes(counter.flop_registry)
    with causes, counter, torch.set_grad_enabled(training):
        outputs = _tensors(shadow(_image(module, shape, device, num_images)))
        if training:
            _backward(outputs)
    value, note = counter.get_total_flops() // num_images, ""
    if value != ours:
        surplus, missed = causes.surplus // num_images, +causes.missed
        is_explained = value - surplus + missed.total() // num_images == ours
        told = [f"does not count {', '.join(missed)}"] if missed else []
        if surplus and is_explained:
            told.append("counts a grouped convolution's weight gradient `groups` times")
        elif not is_explained:
            told.insert(0, "counts differently")
        note = f"cifarlab counts {ours:,}: torch {torch.__version__} {' and '.join(told)}"
    rule = f"2 per multiply-add: {RULE}{'; forward + backward' if training else ''}"
    return Row(tool="torch FlopCounterMode", version=torch.__version__, value=value, printed_unit="FLOPS", unit="FLOP", rule=rule,
               input_shape=shape, source="run", note=note)  # fmt: skip


# ---- the others' rules, over the calls of one forward pass ---------------------------------------------------------------


@dataclass
class Calls:
    """Functional calls, those that modules make included, and calls of leaf modules, in one evaluation pass of one image.

    functions: (name, first argument's shape, second argument's shape or (), has bias, output shape).
    modules: (module, input shape, output shape).
    """

    functions: list[tuple[str, Shape, Shape, bool, Shape]] = field(default_factory=list)
    modules: list[tuple[nn.Module, Shape, Shape]] = field(default_factory=list)

    def macs(self, bias: bool = False) -> int:
        """Multiply-adds of convolutions, linear layers and matrix products; with one addition per output for biases if asked."""
        return sum(_macs(name, x, w, y) + (math.prod(y) if bias and has_bias and _macs(name, x, w, y) else 0)
                   for name, x, w, has_bias, y in self.functions)  # fmt: skip

    def numel(self, *names: str) -> int:
        """Input elements of the functional calls of these names."""
        return sum(math.prod(x) for name, x, *_ in self.functions if name in names)


CONVOLUTIONS = ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
POOLS = ("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d")
POOL_MODULES = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
NORM_MODULES = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm, nn.GroupNorm)
ACTIVATIONS = ("relu", "elu", "relu6", "gelu", "silu", "prelu", "softmax")
ACTIVATION_MODULES = (nn.ReLU, nn.PReLU, nn.ELU, nn.LeakyReLU, nn.ReLU6, nn.GELU)


def _macs(name: str, x: Shape, w: Shape, y: Shape) -> int:
    if name in CONVOLUTIONS:
        return y[0] * math.prod(w) * math.prod((x if "transpose" in name else y)[2:])
    if name == "linear":
        return math.prod(x) * w[0]
    return math.prod(x) * w[-1] if name in ("matmul", "mm", "bmm") else 0


def _fvcore(calls: Calls) -> int:
    norms = 2 * calls.numel("batch_norm") + 5 * calls.numel("layer_norm", "group_norm")
    return calls.macs() + norms + calls.numel("adaptive_avg_pool2d")


def _ptflops(calls: Calls) -> int:
    modules = sum(
        (2 if getattr(module, "affine", False) else 1) * math.prod(x) if isinstance(module, NORM_MODULES)
        else math.prod(x) if isinstance(module, (*POOL_MODULES, *ACTIVATION_MODULES)) else 0
        for module, x, _ in calls.modules
    )  # fmt: skip
    return calls.macs(bias=True) + modules + calls.numel(*POOLS, *ACTIVATIONS)


def _torchinfo(calls: Calls) -> int:
    total = 0
    for module, _, y in calls.modules:
        for name, parameter in module.named_parameters():
            if name in ("weight", "bias"):
                total += parameter.numel() * y[0] * (math.prod(y[2:]) if "Conv" in type(module).__name__ else 1)
    return total


def _thop(calls: Calls) -> int:
    total = 0
    for module, x, y in calls.modules:
        if isinstance(module, nn.modules.conv._ConvNd):
            total += math.prod(y) * (x[1] // module.groups) * math.prod(module.kernel_size)
        elif isinstance(module, nn.Linear):
            total += module.in_features * math.prod(y)
        elif isinstance(module, NORM_MODULES) and not isinstance(module, nn.GroupNorm):
            total += math.prod(x) * (4 if getattr(module, "affine", False) or getattr(module, "elementwise_affine", False) else 2)
        elif isinstance(module, nn.AvgPool2d):
            total += math.prod(y)
        elif isinstance(module, nn.AdaptiveAvgPool2d):
            total += math.prod(y) * (math.prod(x[2:]) // math.prod(y[2:]) + 1)
    return total


class _Recorder(TorchFunctionMode):
    def __init__(self, calls: Calls) -> None:
        super().__init__()
        self.calls = calls

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        name = (resolve_name(func) or getattr(func, "__name__", "")).rpartition(".")[2]
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if tensors and isinstance(output, Tensor):
            shapes = [tuple(tensor.shape) for tensor in tensors[:2]]
            has_bias = name in ("linear", *CONVOLUTIONS) and len(tensors) == 3
            self.calls.functions.append((name, shapes[0], shapes[1] if len(shapes) == 2 else (), has_bias, tuple(output.shape)))
        return output


def _record(module: nn.Module, shape: Shape, device: torch.device) -> tuple[Calls, torch.device]:
    """The calls, and the device on which they could be made: that one, or the module's own."""
    failure: Exception | None = None
    for place in dict.fromkeys([device, home_of(module)]):
        try:
            return _record_on(place, module, shape), place
        except Exception as error:
            failure = error
    told = " ".join(str(failure).split())[:200] or type(failure).__name__
    kind = type(module).__name__
    raise InputError(f"{kind} does not run in evaluation mode ({told}), in which counters are compared") from failure


def _record_on(device: torch.device, module: nn.Module, shape: Shape) -> Calls:
    calls = Calls()
    shadow = copy_to(module, device).eval()

    def note(part: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if inputs and isinstance(inputs[0], Tensor) and isinstance(output, Tensor):
            calls.modules.append((part, tuple(inputs[0].shape), tuple(output.shape)))

    for part in shadow.modules():
        if next(part.children(), None) is None:
            part.register_forward_hook(note)
    with torch.no_grad(), _Recorder(calls):
        shadow(_image(module, shape, device))
    return calls


# ---- the others themselves, where installed ------------------------------------------------------------------------------


def _run_fvcore(module: nn.Module, shape: Shape) -> int:
    analysis = importlib.import_module("fvcore.nn").FlopCountAnalysis(module, _image(module, shape, torch.device("cpu")))
    return int(analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).total())


def _run_ptflops(module: nn.Module, shape: Shape, backend: str = "pytorch") -> int:
    count = importlib.import_module("ptflops").get_model_complexity_info
    return int(count(module, shape, as_strings=False, print_per_layer_stat=False, verbose=False, backend=backend)[0])


def _run_torchinfo(module: nn.Module, shape: Shape) -> int:
    image = _image(module, shape, torch.device("cpu"))
    return int(importlib.import_module("torchinfo").summary(module, input_data=image, verbose=0, device="cpu").total_mult_adds)


def _run_thop(module: nn.Module, shape: Shape) -> int:
    image = _image(module, shape, torch.device("cpu"))
    return int(importlib.import_module("thop").profile(module, inputs=(image,), verbose=False)[0])


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A tool: what it does by its rule, and how it is run."""

    tool: str
    package: str
    printed_unit: str
    rule: str
    count: Callable[[Calls], int]
    run: Callable[[nn.Module, Shape], int]


PEERS = (
    Peer(tool="fvcore", package="fvcore", printed_unit="flops", count=_fvcore, run=_run_fvcore,
         rule="MAC (without biases) + 2 per element of batch norm, 5 of layer norm, 1 of adaptive average pools"),
    Peer(tool="ptflops (pytorch)", package="ptflops", printed_unit="MACs", count=_ptflops, run=_run_ptflops,
         rule="MAC + biases + 2 per element of norms, 1 of pools and activations; those two count double where they are modules"),
    Peer(tool="ptflops (aten)", package="ptflops", printed_unit="MACs", count=lambda calls: calls.macs(bias=True),
         run=lambda module, shape: _run_ptflops(module, shape, "aten"), rule="MAC + biases"),
    Peer(tool="torchinfo", package="torchinfo", printed_unit="mult-adds", count=_torchinfo, run=_run_torchinfo,
         rule="parameters of layers × output positions (norms: once an image); functional operations are missed"),
    Peer(tool="thop", package="thop", printed_unit="MACs", count=_thop, run=_run_thop,
         rule="MAC of modules + 4 per element of norms + average pools; functional operations are missed; leaves buffers behind"),
)  # fmt: skip


def _peer_row(peer: Peer, module: nn.Module, shape: Shape, calls: Calls) -> Row:
    value, note = None, ""
    try:
        version = metadata.version(peer.package)
    except metadata.PackageNotFoundError:
        version = "not installed"
    else:
        try:
            with _quietly():
                value = peer.run(copy_to(module, torch.device("cpu")).cpu().eval(), shape)
        except Exception as error:  # a foreign tool on a net it may not know: its failure is a finding, not ours
            note = f"installed, but it fails here: {type(error).__name__}"
    return Row(tool=peer.tool, version=version, value=peer.count(calls) if value is None else value, unit="MAC",
               printed_unit=peer.printed_unit, rule=peer.rule, input_shape=shape, note=note,
               source="by its rule" if value is None else "run")  # fmt: skip


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    disabled = logging.root.manager.disable
    with (contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings(),
          torch.random.fork_rng([]), torch.no_grad()):  # fmt: skip
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(disabled)


def _imagenet_twin(module: ResNet) -> nn.Module:
    twin: Any = copy_to(module, torch.device("meta"))
    with torch.device("meta"):
        twin.conv1 = nn.Conv2d(3, module.conv1.out_channels, 7, stride=2, padding=3, bias=False)
        twin.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        twin.fc = nn.Linear(module.fc.in_features, 1000)
    return twin  # type: ignore[no-any-return]


def format_comparison(rows: list[Row], *, width: int = 100) -> str:
    """The rows as plain text of that width: what each tool prints in its own words, what that is in MAC and FLOP, its rule."""
    load_rich()
    from rich import box
    from rich.console import Console
    from rich.table import Table

    written = io.StringIO()
    console = Console(file=written, width=width, highlight=False, markup=False, emoji=False, color_system=None)
    headings = ("", "counter", "prints", "= MAC", "= FLOP", "input", "version")
    table = Table(*headings, box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in table.columns:
        column.no_wrap = True
        column.justify = "right" if column.header in ("prints", "= MAC", "= FLOP") else "left"
    for number, row in enumerate(rows, 1):
        macs = row.value if row.unit == "MAC" else row.value / 2
        table.add_row(
            str(number), row.tool, f"{row.value / 1e9:.4f} G {row.printed_unit}",
            f"{macs / 1e9:.4f} G", f"{2 * macs / 1e9:.4f} G", "×".join(map(str, row.input_shape)), row.version,
        )  # fmt: skip
    console.print(table)
    head = "What counters say of this net, for one image. 1 MAC (multiply-add) = 2 FLOP; many print MACs and call them FLOPs."
    lines = [*textwrap.wrap(head, width), ""]
    lines += [*written.getvalue().splitlines(), "", "What each counts:"]
    for number, row in enumerate(rows, 1):
        by_rule = " (computed by that rule, for the tool is not installed)" if row.source != "run" else ""
        rule = f"{number:3} {row.rule}{f'; {row.note}' if row.note else ''}{by_rule}"
        lines += textwrap.wrap(rule, width, subsequent_indent="    ")
    return "\n".join(line.rstrip() for line in lines)
