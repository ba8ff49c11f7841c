"""What the panel measures, against plain autograd and hand arithmetic: every quantity, every optimizer."""

import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from cifarlab.config import InputError
from cifarlab.probes import PROBES, choose_probes
from cifarlab.probes import activations as activations_module
from cifarlab.probes.activations import Activations
from cifarlab.probes.batch_norm import NormStatistics
from cifarlab.probes.distributions import COLUMNS as BINS
from cifarlab.probes.distributions import EXPONENTS, fold_bins, mean_exponent
from cifarlab.probes.fixed_batch import FixedBatch, measuring
from cifarlab.probes.moments import Moments
from cifarlab.probes.panel import COLUMNS, Panel, choose_parameters
from cifarlab.records import Measured, Table

FLOWS = "gradient_flow,weight_flow,update_flow"


class Muon(Optimizer):
    """A home-made optimizer: momentum, matrices made orthogonal, decoupled decay."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.mul_(0.9).add_(p.grad)
                move = momentum
                if p.ndim > 1:
                    u, _, v = torch.linalg.svd(momentum.flatten(1), full_matrices=False)
                    move = (u @ v).view_as(p)
                p.mul_(1 - 0.1 * group["lr"]).sub_(group["lr"] * move)


OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda p: SGD(p, lr=0.1),
    "momentum": lambda p: SGD(p, lr=0.1, momentum=0.9),
    "nesterov, fused": lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True, fused=True),
    "weight decay": lambda p: SGD(p, lr=0.1, weight_decay=0.1),
    "adam": lambda p: Adam(p, lr=0.01),
    "adam, fused": lambda p: Adam(p, lr=0.01, fused=True),
    "adamw": lambda p: AdamW(p, lr=0.01, weight_decay=0.1),
    "rmsprop": lambda p: RMSprop(p, lr=0.01, momentum=0.5),
    "muon": lambda p: Muon(p, lr=0.02),
}


def build() -> Any:
    """(net, images, labels); its first bias is frozen, and its last layer's second weight gets no gradient"""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 4, 3))
    net[0].bias.requires_grad_(False)
    net.register_parameter("unused", nn.Parameter(torch.ones(2)))
    return net, torch.randn(8, 3, 4, 4), torch.arange(8) % 3


def backward(net: nn.Module, images: Tensor, labels: Tensor) -> None:
    net.zero_grad()
    F.cross_entropy(net(images), labels).backward()


def panel_of(net: nn.Module, names: str = FLOWS, **settings: Any) -> Panel:
    return Panel(net, choose_parameters(net.named_parameters()), choose_probes(names), **({"every": 100} | settings))


def tables_of(panel: Panel) -> tuple[dict[str, Table], dict[int, dict[str, float]]]:
    reading = panel.read()
    return {measured.name: measured.table for measured in reading.tables}, reading.rows


def size(x: np.ndarray) -> list[float]:
    return [np.abs(x).mean(), np.abs(x).max(), math.sqrt((x**2).sum())]


def by_hand(g: np.ndarray, clipped: np.ndarray, old: np.ndarray, new: np.ndarray) -> dict[str, list[float]]:
    """The three tables' values for one parameter, in float64."""
    change = new - old
    mean_abs, max_abs, norm = size(change)
    weight_size = size(new)
    return {
        "gradient_flow": [*size(g), *size(clipped), (g == 0).mean(), (~np.isfinite(g)).sum()],
        "weight_flow": [new.mean(), *weight_size, new.var()],
        "update_flow": [norm, norm / weight_size[2], change.mean(), mean_abs, max_abs, change.var()],
    }


def values(tensor: Tensor | None) -> np.ndarray:
    assert tensor is not None
    return tensor.detach().double().numpy().copy()


# ---- gradients, weights, updates ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ours", [True, False], ids=["in our loop", "in anybody's"])
@pytest.mark.parametrize("clip", ["none", "norm", "value"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_flows_are_hand_arithmetic(name: str, clip: str, ours: bool) -> None:
    net, images, labels = build()
    optimizer = OPTIMIZERS[name]([p for n, p in net.named_parameters() if p.requires_grad and n != "unused"])
    panel = panel_of(net, weights_are_ours=ours)
    trained = {n: p for n, p in net.named_parameters() if p.requires_grad and n != "unused"}
    expected: list[dict[str, dict[str, list[float]]]] = []
    norms = []
    for step in (1, 2, 3):
        if not ours:
            net[1].bias.data.add_(1)  # somebody else's doing, no part of the step
        backward(net, images, labels)
        gradients = {n: values(p.grad) for n, p in trained.items()}
        if clip != "none":
            panel.before_clip()
        if clip == "norm":
            nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        elif clip == "value":
            nn.utils.clip_grad_value_(net.parameters(), 0.01)
        panel.before_update(step)
        clipped, old = {n: values(p.grad) for n, p in trained.items()}, {n: values(p) for n, p in trained.items()}
        optimizer.step()
        panel.after_update(step)
        expected.append({n: by_hand(gradients[n], clipped[n], old[n], values(p)) for n, p in trained.items()})
        norms.append([math.sqrt(sum((g**2).sum() for g in each.values())) for each in (gradients, clipped)])
    tables, rows = tables_of(panel)
    assert tables.keys() == set(FLOWS.split(","))
    for table in tables.values():
        assert table.items == tuple(n for n, _ in net.named_parameters())
        assert table.columns == COLUMNS[table.name]
        assert table.steps.tolist() == [1, 2, 3]
        for k in range(3):
            for n in trained:
                got = table.values[k, table.items.index(n)]
                # A mean of changes may cancel, and a float32 weight moves by its own last bit.
                np.testing.assert_allclose(got, expected[k][n][table.name], rtol=2e-5, atol=1e-8)
    for k, (norm, clipped_norm) in enumerate(norms):
        assert rows[k + 1]["gradient_flow/norm"] == pytest.approx(norm)
        assert rows[k + 1].get("gradient_flow/clipped_norm", norm) == pytest.approx(clipped_norm)
        assert ("gradient_flow/clipped_norm" in rows[k + 1]) == (clip != "none")
    assert panel.read().tables == []


def test_the_update_ratio_under_plain_sgd_is_lr_times_gradient_over_weight() -> None:
    net, images, labels = build()
    panel = panel_of(net)
    backward(net, images, labels)
    panel.before_update(1)
    SGD(net.parameters(), lr=0.05).step()
    panel.after_update(1)
    tables, rows = tables_of(panel)
    gradient, weight = tables["gradient_flow"]["norm"][0], tables["weight_flow"]["norm"][0]
    trained = np.isfinite(gradient)
    np.testing.assert_allclose(tables["update_flow"]["ratio"][0][trained], 0.05 * (gradient / weight)[trained], rtol=1e-5)
    whole = math.sqrt((weight.astype(float) ** 2).sum())
    assert rows[1]["weight_flow/norm"] == pytest.approx(whole)
    assert rows[1]["update_flow/ratio"] == pytest.approx(0.05 * rows[1]["gradient_flow/norm"] / whole, rel=1e-5)


def test_what_gets_no_gradient_has_none_and_does_not_move() -> None:
    net, images, labels = build()
    panel = panel_of(net, "all,none", every=1)
    backward(net, images, labels)
    panel.before_update(1)
    SGD([p for p in net.parameters() if p.requires_grad], lr=0.05).step()
    panel.after_update(1)
    tables, rows = tables_of(panel)
    for name in ("0.bias", "unused"):
        k = tables["gradient_flow"].items.index(name)
        assert np.isnan(tables["gradient_flow"].values[0, k]).all()
        assert tables["update_flow"]["norm"][0, k] == 0
        assert tables["weight_flow"]["norm"][0, k] == pytest.approx(dict(net.named_parameters())[name].norm().item())
    assert math.isfinite(rows[1]["gradient_flow/norm"])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_counted_and_shows_in_the_norm(bad: float) -> None:
    net, images, labels = build()
    seen: list[int] = []
    panel = panel_of(net, on_non_finite=seen.append)
    for step in (1, 2):
        backward(net, images, labels)
        if step == 2:
            net[4].weight.grad[1, :3] = bad
        panel.before_update(step)
        panel.after_update(step)
    assert seen == [2]
    tables, rows = tables_of(panel)
    flow = tables["gradient_flow"]
    k = flow.items.index("4.weight")
    assert np.nansum(flow["non_finite"], axis=1).tolist() == [0, 3]
    assert flow["non_finite"][1, k] == 3
    assert not np.isfinite(flow["norm"][1, k])
    assert np.isfinite(np.delete(flow["norm"][1], [k, flow.items.index("0.bias"), flow.items.index("unused")])).all()
    assert math.isfinite(rows[1]["gradient_flow/norm"])
    assert not math.isfinite(rows[2]["gradient_flow/norm"])


def test_zero_gradients_are_a_share() -> None:
    net, images, labels = build()
    panel = panel_of(net)
    backward(net, images, labels)
    net[4].weight.grad[0] = 0
    panel.before_update(1)
    panel.after_update(1)
    table = tables_of(panel)[0]["gradient_flow"]
    assert table["zero_share"][0, table.items.index("4.weight")] == pytest.approx((net[4].weight.grad == 0).float().mean().item())


def test_a_scale_that_gradients_still_carry_is_taken_off() -> None:
    """As a fused optimizer under a GradScaler has it: the step itself divides the gradients."""
    net, images, labels = build()
    backward(net, images, labels)
    plain, scaled = (panel_of(net, "gradient_flow,distributions") for _ in range(2))
    for panel, scale in ((plain, None), (scaled, torch.tensor(2.0**16))):
        for p in net.parameters():
            if p.grad is not None and scale is not None:
                p.grad *= scale
        panel.before_clip()
        panel.before_update(1, scale)
        for p in net.parameters():
            if p.grad is not None and scale is not None:
                p.grad /= scale
        panel.after_update(1)
    for one, other in zip(plain.read().tables, scaled.read().tables, strict=True):
        np.testing.assert_array_equal(one.values, other.values)


def test_a_probe_alone_measures_what_it_measures_beside_the_others() -> None:
    found: dict[str, list[Measured]] = {}
    for names in ["default", *(name for name, probe in PROBES.items() if probe.by_default)]:
        net, images, labels = build()
        optimizer = SGD(net.parameters(), lr=0.1, momentum=0.9)
        panel = panel_of(net, names, every=2, images=lambda images=images: images, weights_are_ours=True)
        for step in (1, 2, 3, 4):
            backward(net, images, labels)
            panel.before_update(step)
            optimizer.step()
            panel.after_update(step)
        found[names] = panel.read().tables
    together = {table.name: table for table in found.pop("default")}
    for name, (alone,) in found.items():
        assert alone.items == together[name].items
        np.testing.assert_array_equal(alone.steps, together[name].steps)
        np.testing.assert_array_equal(alone.values, together[name].values)


def test_the_dear_ones_are_measured_at_the_first_step_each_so_often_and_at_the_last() -> None:
    net, images, labels = build()
    panel = panel_of(net, "all", every=3, last_step=7, images=lambda: images, optimizer=SGD(net.parameters(), lr=0.1),
                     batch=lambda: FixedBatch(images, labels))  # fmt: skip
    for step in range(1, 8):
        backward(net, images, labels)
        panel.before_update(step)
        panel.after_update(step)
    reading = panel.read()
    assert {table.name for table in reading.tables} == set(PROBES)
    for table in reading.tables:
        assert table.steps.tolist() == ([1, 2, 3, 4, 5, 6, 7] if PROBES[table.name].every_step else [1, 3, 6, 7])
        assert table.values.shape == (len(table.steps), len(table.items), len(table.columns))
    cosines = next(table for table in reading.tables if table.name == "noise").table["cosine"][:, 0]
    assert np.isnan(cosines[0])
    np.testing.assert_allclose(cosines[1:], 1, rtol=1e-6)  # the weights never moved
    assert reading.seconds > 0
    assert panel.read().seconds < reading.seconds


# ---- distributions --------------------------------------------------------------------------------------------------------


def test_distributions_are_numpy_s() -> None:
    net, images, labels = build()
    optimizer = SGD(net.parameters(), lr=0.1)
    panel = panel_of(net, "distributions")
    backward(net, images, labels)
    net[4].weight.grad[0, :3] = torch.tensor([2.0**-60, -(2.0**100), math.nan])
    old = {n: p.detach().clone() for n, p in net.named_parameters()}
    panel.before_update(1)
    optimizer.step()
    gradients = {n: p.grad for n, p in net.named_parameters()}
    panel.after_update(1)
    table = tables_of(panel)[0]["distributions"]
    assert table.columns == BINS
    assert len(BINS) == 2 * len(EXPONENTS) + 2
    for n, p in net.named_parameters():
        for kind, tensor in (("weight", p), ("gradient", gradients[n]), ("update", p.detach() - old[n])):
            got = table.values[0, table.items.index(f"{kind}/{n}")]
            expected = np.zeros(len(BINS)) if tensor is None else shares(tensor)
            np.testing.assert_allclose(got, expected, atol=1e-7)


def shares(tensor: Tensor) -> np.ndarray:
    counts = dict.fromkeys(BINS, 0)
    for x in tensor.detach().reshape(-1).tolist():
        if not math.isfinite(x):
            counts["non_finite"] += 1
        elif x == 0:
            counts["0"] += 1
        else:
            exponent = min(max(math.frexp(x)[1] - 1, EXPONENTS[0]), EXPONENTS[-1])
            counts[f"{'-' if x < 0 else '+'}2^{exponent}"] += 1
    return np.array(list(counts.values())) / tensor.numel()


def test_the_mean_power_of_two() -> None:
    tensors = [torch.tensor([0.5, -2.0, 0.0, 3.9]), torch.zeros(5)]
    mean = mean_exponent(fold_bins(Moments(tensors).exponents(tensors)).numpy())
    assert mean[0] == pytest.approx((-1 + 1 + 1) / 3)
    assert np.isnan(mean[1])


# ---- activations ----------------------------------------------------------------------------------------------------------


class Functional(nn.Module):
    """Activation functions of every kind of call: functional, in place, as a tensor's method, of one module called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 8)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.ReLU6(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        self.seen: list[tuple[str, Tensor]] = []

        def note(name: str, x: Tensor) -> Tensor:
            self.seen.append((name, x.detach().clone()))
            return x

        x = note("relu", self.relu(self.body(x)))
        x = note("relu.2", self.relu(self.body(x[:, :6])))
        x = note("sigmoid", torch.sigmoid(x))
        x = note("relu", F.relu(x - 0.5))
        x = note("leaky_relu", F.leaky_relu(x - 0.1))
        x = note("gelu", F.gelu(x))
        x = self.head[0](10 * x)
        x = note("head.1.tanh", self.head[1](x))
        x = note("head.2.hardtanh", self.head[2](100 * x))
        return note("elu", F.elu_(x - 3))


def hand_row(name: str, out: Tensor) -> list[float]:
    a = out.double().numpy()
    dead = (a.max(0) <= 0).mean()
    near = {
        "tanh": (a < -0.96) | (a > 0.96), "sigmoid": (a < 0.02) | (a > 0.98), "hardtanh": a > 6 - 0.12,
    }.get(name.split(".")[-1], np.zeros(1))  # fmt: skip
    has_dead = not name.endswith(("tanh", "sigmoid")) or name.endswith("hardtanh")
    return [a.mean(), a.std(), dead if has_dead else 0, near.mean()]


def test_activations_are_those_of_hooks_by_hand() -> None:
    torch.manual_seed(1)
    net = Functional()
    images = 3 * torch.randn(16, 6)
    net.body.bias.data[2] = net.head[0].bias.data[1] = -1e4  # dead units
    listener = Activations()
    with torch.no_grad(), measuring(net) as bare, listener.listening(bare):
        bare(images)
    names = [name for name, _ in net.seen]
    numbered = ["relu", "relu.2", "sigmoid", "relu.3", "leaky_relu", "gelu", "head.1.tanh", "head.2.hardtanh", "elu"]
    assert listener.items == numbered
    rows = listener.result().numpy()
    for name, (seen, out), row in zip(names, net.seen, rows, strict=True):
        assert seen == name
        np.testing.assert_allclose(row, hand_row(name, out), rtol=1e-5, atol=1e-7, err_msg=name)
    dead = dict(zip(listener.items, rows[:, 2], strict=True))
    assert dead["relu"] == dead["head.2.hardtanh"] == 1 / 8  # ReLU6 is a ReLU
    assert rows[names.index("head.1.tanh"), 3] > 0
    assert not net._forward_hooks
    assert not net.relu._forward_pre_hooks


@pytest.mark.parametrize(
    ("function", "limits"),
    [(nn.Hardtanh(), (-1, 1)), (nn.Hardtanh(-1, 1), (-1, 1)), (nn.Hardtanh(-2, 2), (-2, 2)),
     (nn.Hardtanh(-0.5, 1), (-0.5, 1)), (nn.Hardtanh(-1, 3), (-1, 3))],
    ids=str,
)  # fmt: skip
def test_limits_of_hardtanh_are_the_ones_given(function: nn.Module, limits: tuple[float, float]) -> None:
    """torch passes on only the limits that are not its defaults."""
    images = torch.linspace(-4, 4, 801)[:, None]
    listener = Activations()
    with torch.no_grad(), measuring(function) as net, listener.listening(net):
        net(images)
    low, high = limits
    margin = 0.02 * (high - low)
    expected = ((images < low + margin) | (images > high - margin)).float().mean().item()
    assert listener.result()[0, 3].item() == pytest.approx(expected, abs=2 / 801)


@pytest.mark.parametrize("function", [
    F.relu, F.relu6, F.leaky_relu, F.elu, F.celu, F.selu, F.gelu, F.silu, F.mish, F.softplus, F.hardswish, F.sigmoid, F.tanh,
    F.hardsigmoid, F.hardtanh, F.logsigmoid, nn.PReLU(), lambda x: F.threshold(x, 0.1, 0.0), lambda x: F.rrelu(x, training=False),
    lambda x: x.clone().relu_(), lambda x: x.clone().sigmoid_(), lambda x: F.relu_(x.clone()),
])  # fmt: skip
def test_every_activation_function_is_seen_once(function: Callable[[Tensor], Tensor]) -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            self.out = function(x)
            return self.out

    net, images = Net(), torch.randn(4, 5)
    listener = Activations()
    with torch.no_grad(), measuring(net) as bare, listener.listening(bare):
        bare(images)
    assert len(listener.items) == 1
    row = listener.result()[0]
    assert row[0].item() == pytest.approx(net.out.mean().item(), abs=1e-6)
    assert row[1].item() == pytest.approx(net.out.std(correction=0).item(), abs=1e-6)


def test_activations_by_channel_of_images() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 1), nn.ReLU())
    net[0].weight.data = torch.tensor([1.0, -1.0, 0.0, 0.0]).view(4, 1, 1, 1)
    net[0].bias.data = torch.tensor([0.0, 0.0, -1.0, 1.0])
    images = torch.rand(3, 1, 5, 5)
    images[1, 0, 2, 2] = -1  # one place of one image makes the second channel positive
    listener = Activations()
    with torch.no_grad(), measuring(net) as bare, listener.listening(bare):
        bare(images)
    assert listener.items == ["1.relu"]
    assert listener.result()[0, 2] == 0.25
    assert len(activations_module.COLUMNS) == listener.result().shape[1]


class NHWC(nn.Module):
    """As in ConvNeXt: a convolution, channels moved to the end, layer norm, two products."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.one = nn.Conv2d(3, 8, 3, padding=1), nn.LayerNorm(8), nn.Linear(8, 16)
        self.one.bias.data[:4] = -1e4

    def forward(self, images: Tensor) -> Tensor:
        return F.gelu(self.one(self.norm(self.conv(images).permute(0, 2, 3, 1))))


class Excited(nn.Module):
    """Squeeze and excitation: the last layer before the ReLU is a matrix product, its input N×C×H×W."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gate = nn.Conv2d(3, 8, 1), nn.Linear(8, 8)
        self.conv.weight.data[:2] = 0
        self.conv.bias.data[:2] = -1

    def forward(self, images: Tensor) -> Tensor:
        out = self.conv(images)
        return F.relu(out * torch.sigmoid(self.gate(out.mean((2, 3))))[:, :, None, None])


class Heads(nn.Module):
    """Channels split between heads: no axis is as long as there are channels."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(6, 24)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.relu(self.qkv(tokens).unflatten(-1, (4, 6)))


def four_of_eight(first: nn.Module, *others: nn.Module) -> nn.Module:
    assert isinstance(first.bias, Tensor)
    first.bias.data[:4] = -1e4
    return nn.Sequential(first, *others, nn.ReLU())


torch.manual_seed(0)  # of the nets below, as weights drawn by chance may kill one of their other units too


@pytest.mark.parametrize(
    ("net", "shape", "dead"),
    [
        (four_of_eight(nn.Linear(4, 8)), (64, 4), 0.5),
        (four_of_eight(nn.Linear(4, 8)), (64, 7, 4), 0.5),
        (four_of_eight(nn.Linear(4, 8)), (64, 8, 4), 0.5),  # as many tokens as channels
        (four_of_eight(nn.Linear(4, 8), nn.Dropout(0.5)), (16, 5, 7, 4), 0.5),
        (four_of_eight(nn.Conv1d(4, 8, 1)), (64, 4, 7), 0.5),
        (four_of_eight(nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8), nn.MaxPool2d(2)), (8, 4, 8, 8), 0.0),
        (four_of_eight(nn.Conv2d(4, 8, 1)), (8, 4, 8, 8), 0.5),  # as wide as it has channels
        (four_of_eight(nn.Conv2d(4, 8, 1), nn.Flatten()), (64, 4, 3, 3), 0.5),
        (NHWC(), (4, 3, 6, 6), 0.25),
        (Excited(), (4, 3, 5, 5), 0.25),
        (Heads(), (4, 5, 6), np.nan),
        (Excited(), (4, 3, 5, 8), np.nan),
        (nn.ReLU(), (9,), np.nan),
    ],
    ids=str,
)
def test_units_are_looked_for_on_their_own_axis(net: nn.Module, shape: tuple[int, ...], dead: float) -> None:
    torch.manual_seed(0)
    listener = Activations()
    with torch.no_grad(), measuring(net) as bare, listener.listening(bare):
        bare(torch.randn(shape))
    np.testing.assert_allclose(listener.result()[-1, 2].item(), dead, atol=1e-6)


class Counting(nn.Module):
    """Keeps things in buffers of every kind, draws from a generator of its own, and can fail."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.fails, self.generator = nn.Linear(4, 4), False, torch.Generator().manual_seed(3)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("replaced", torch.zeros(3))
        self.register_buffer("average", torch.zeros(4), persistent=False)
        self.register_buffer("cache", torch.zeros(2))
        self.register_buffer("nothing", None)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.replaced = self.replaced + 1
        self.average.lerp_(x.mean(0).detach(), 0.1)
        self.cache = torch.ones(len(x))  # grows: left as it is
        if self.fails:
            raise RuntimeError("no")
        return self.body(x + torch.rand(x.shape, generator=self.generator))  # type: ignore[no-any-return]


@pytest.mark.parametrize("fails", [False, True])
def test_measuring_leaves_buffers_and_generators_as_they_were(fails: bool) -> None:
    net = nn.Sequential(Counting(), nn.BatchNorm1d(4))
    counting = net[0]
    net(torch.randn(5, 4))
    before = {name: (buffer, buffer.clone()) for name, buffer in net.named_buffers() if not name.endswith("cache")}
    drawn = counting.generator.get_state()
    counting.fails = fails
    with suppress(RuntimeError), torch.no_grad(), measuring(net) as bare:
        bare(torch.randn(7, 4))
    after = dict(net.named_buffers())
    for name, (buffer, values) in before.items():
        assert after[name] is buffer, name
        assert torch.equal(buffer, values), name
    assert len(counting.cache) == 7
    assert torch.equal(counting.generator.get_state(), drawn)


# ---- batch norm -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["2d", "1d"])
def test_batch_norm_statistics_by_hand(kind: str) -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(5) if kind == "2d" else nn.BatchNorm1d(5)
    plain = nn.BatchNorm2d(5, track_running_stats=False) if kind == "2d" else nn.BatchNorm1d(5, track_running_stats=False)
    plain.weight.data[0] = 1e-3  # a variance below eps
    net = nn.Sequential(plain, norm, nn.ReLU(), norm)
    images = 3 + 2 * torch.randn(*((6, 5, 3, 3) if kind == "2d" else (6, 5)))
    norm.running_mean.copy_(torch.randn(5))
    norm.running_var.copy_(torch.rand(5) + 0.5)
    state = {name: b.clone() for name, b in net.named_buffers()}
    listener = NormStatistics()
    with torch.no_grad(), measuring(net) as bare, listener.listening(bare):
        bare(images)
    assert listener.items == ["1", "1#2"]
    assert all(torch.equal(b, state[name]) for name, b in net.named_buffers())
    inputs = plain(images).detach().double().numpy()
    axes = (0, 2, 3) if kind == "2d" else (0,)
    mean, variance = inputs.mean(axes), inputs.var(axes, ddof=1)
    running_mean, running_var = values(norm.running_mean), values(norm.running_var)
    shift = math.sqrt((((running_mean - mean) ** 2) / (variance + norm.eps)).mean())
    ratio = np.median((running_var + norm.eps) / (variance + norm.eps))
    np.testing.assert_allclose(listener.result()[0], [shift, ratio], rtol=1e-5)


# ---- what is probed -------------------------------------------------------------------------------------------------------


def test_globs_choose_parameters() -> None:
    named = {name: torch.ones(1) for name in ("stem.weight", "stem.bias", "layer1.0.weight", "layer10.weight", "head.weight")}

    def chosen(include: str = "", exclude: str = "") -> list[str]:
        return list(choose_parameters(named.items(), include, exclude))

    assert chosen() == list(named)
    assert chosen("*.weight") == ["stem.weight", "layer1.0.weight", "layer10.weight", "head.weight"]
    assert chosen("layer1.*, head.*") == ["layer1.0.weight", "head.weight"]
    assert chosen("", "*.bias,layer*") == ["stem.weight", "head.weight"]
    assert chosen("layer*", "layer10*") == ["layer1.0.weight"]
    with pytest.raises(InputError, match=r"left to probe: probe_include='conv\*'.*none, so choose of stem.weight"):
        chosen("conv*")
    with pytest.raises(InputError, match="no parameter is left"):
        chosen("", "*")


def test_choosing_probes() -> None:
    default = {name for name, probe in PROBES.items() if probe.by_default}
    assert choose_probes("none") == choose_probes("") == frozenset()
    assert choose_probes("default") == default
    assert choose_probes("all") == set(PROBES)
    assert choose_probes(" default , curvature") == default | {"curvature"}
    assert choose_probes("weight-flow") == {"weight_flow"}
    with pytest.raises(InputError, match="there is no probe 'gradiant_flow'; did you mean 'gradient_flow'"):
        choose_probes("gradiant-flow")


def test_every_probe_has_columns_of_its_own() -> None:
    assert COLUMNS.keys() == PROBES.keys()
    assert all(len(set(columns)) == len(columns) for columns in COLUMNS.values())
