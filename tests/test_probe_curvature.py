"""The sharpness and its edge against full Hessians, known spectra and what torch's own optimizers do on a quadratic."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop

from cifarlab.config import InputError
from cifarlab.probes.curvature import COLUMNS, largest_eigenvalue, measure_curvature
from cifarlab.probes.fixed_batch import FixedBatch, measuring, unwrap


class Quadratic(nn.Module):
    """½ wᵀHw as a net: H is its input, and the mean of its output is the loss. w is held in several parameters."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.parts = nn.ParameterList([torch.full((size,), 1e-6, dtype=torch.float64) for size in sizes])

    def forward(self, hessian: Tensor) -> Tensor:
        w = torch.cat(list(self.parts))
        return 0.5 * w @ hessian[0] @ w


def mean_output(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.mean()


def quadratic(hessian: Any) -> FixedBatch:
    hessian = torch.as_tensor(hessian, dtype=torch.float64)
    return FixedBatch(hessian[None], torch.zeros(1), mean_output)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 3))


def conv_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 2), nn.GroupNorm(2, 4),
        nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(4, 3),
    )  # fmt: skip


def build(make: Callable[[], nn.Module], size: int = 8, num_images: int = 10, dtype: torch.dtype = torch.float64) -> Any:
    """(net in training mode after a forward pass, so that its statistics are its own; batch)"""
    torch.manual_seed(1)
    net = make().to(dtype)
    images = torch.randn(num_images, 3, size, size, dtype=dtype)
    net(images)
    return net, FixedBatch(images, torch.arange(num_images) % 3)


def measure(net: nn.Module, batch: FixedBatch, optimizer: Optimizer, **settings: Any) -> dict[str, float]:
    row = measure_curvature(net, batch, optimizer, **({"tolerance": 1e-6, "max_iterations": 300} | settings))
    assert row.shape == (1, len(COLUMNS))
    assert row.dtype == torch.float32
    assert not row.requires_grad
    return dict(zip(COLUMNS, row[0].tolist(), strict=True))


def full_hessian(net: nn.Module, batch: FixedBatch, names: list[str] | None = None) -> np.ndarray:
    """By torch.autograd.functional, of the net as `measuring` has it, written out by hand: batch norm in training mode."""
    params = {name: p for name, p in net.named_parameters() if names is None or name in names}
    kept = {name: b.clone() for name, b in net.named_buffers()}
    net.eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train()

    def loss(flat: Tensor) -> Tensor:
        parts = flat.split([p.numel() for p in params.values()])
        values = {name: part.view(p.shape) for (name, p), part in zip(params.items(), parts, strict=True)}
        return batch.criterion(torch.func.functional_call(net, values, (batch.images,)), batch.labels)

    flat = torch.cat([p.detach().reshape(-1) for p in params.values()])
    hessian = torch.autograd.functional.hessian(loss, flat)
    net.train()
    for name, buffer in net.named_buffers():
        buffer.copy_(kept[name])
    return np.asarray(hessian)


def top(matrix: Any) -> float:
    return float(np.linalg.eigvalsh(np.asarray(matrix))[-1])


# ---- the eigenvalue -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "size"), [(mlp, 2), (conv_net, 8)], ids=["MLP", "convolutions, norms, max-pool"])
def test_sharpness_is_the_top_of_the_full_hessian(make: Callable[[], nn.Module], size: int) -> None:
    net, batch = build(make, size)
    hessian = full_hessian(net, batch)
    row = measure(net, batch, SGD(net.parameters(), lr=0.1))
    assert row["sharpness"] == pytest.approx(top(hessian), rel=1e-5)
    assert math.isnan(row["preconditioned"])
    # Batch statistics and no dropout: the Hessian of the net in eval mode is another one.
    if make is conv_net:
        net.eval()
        values = {name: p.detach() for name, p in net.named_parameters()}

        def by_weight(weight: Tensor) -> Tensor:
            logits = torch.func.functional_call(net, values | {"10.weight": weight}, (batch.images,))
            return F.cross_entropy(logits, batch.labels)

        other = torch.autograd.functional.hessian(by_weight, values["10.weight"]).reshape(12, 12)
        assert top(other) > 0
        net.train()
        assert abs(top(full_hessian(net, batch, ["10.weight"])) / top(other) - 1) > 1e-3


def test_the_largest_algebraic_eigenvalue_even_when_a_negative_one_is_larger_in_magnitude() -> None:
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(40, 40)))[0]
    spectrum = np.concatenate([[-90.0, -40.0, 2.0], np.linspace(-1, 1, 37)])
    row = measure(net := Quadratic(40), quadratic(rotation * spectrum @ rotation.T), SGD(net.parameters(), lr=0.5))
    assert row["sharpness"] == pytest.approx(2.0, rel=1e-6)
    assert row["edge"] == 4.0
    assert row["edge_share"] == pytest.approx(0.5, rel=1e-6)
    row = measure(net, quadratic(np.diag([-5.0, -3.0] + [-7.0] * 38)), SGD(net.parameters(), lr=0.5))
    assert row["sharpness"] == pytest.approx(-3.0, rel=1e-6)
    row = measure(net, quadratic(np.zeros((40, 40))), SGD(net.parameters(), lr=0.5))
    assert (row["sharpness"], row["residual"], row["iterations"], row["edge_share"]) == (0, 0, 1, 0)


@pytest.mark.parametrize("tolerance", [0.3, 0.1, 0.01, 0.001])
def test_the_residual_bounds_the_error_and_is_the_true_residual(tolerance: float) -> None:
    rng = np.random.default_rng(3)
    spectrum = np.sort(np.concatenate([rng.uniform(-1, 1, 190), [3, 5, 6, 9, 9.5, 10, -20, -3, 2, 2.5]]))
    rotation = np.linalg.qr(rng.normal(size=(200, 200)))[0]
    matrix = torch.as_tensor(rotation * spectrum @ rotation.T)
    start = torch.as_tensor(rng.normal(size=200))
    found = largest_eigenvalue(lambda v: matrix @ v, start, max_iterations=200, tolerance=tolerance)
    assert found.residual <= tolerance
    assert np.abs(spectrum - found.value).min() <= found.residual * found.value * (1 + 1e-9)
    assert found.iterations < 60
    short = largest_eigenvalue(lambda v: matrix @ v, start, max_iterations=3, tolerance=1e-9)
    assert short.iterations == 3
    assert short.residual > 1e-9
    assert short.value <= 10 + 1e-9  # a Ritz value never exceeds it


def test_the_residual_against_the_ritz_vector_itself() -> None:
    matrix = torch.diag(torch.tensor([1.0, 2.0, 4.0, -8.0, 3.0], dtype=torch.float64))
    start = torch.tensor([1.0, 1.0, 2.0, 1.0, -1.0], dtype=torch.float64)
    found = largest_eigenvalue(lambda v: matrix @ v, start, max_iterations=3, tolerance=0.0)
    basis = torch.linalg.qr(torch.stack([start, matrix @ start, matrix @ matrix @ start], 1))[0]
    values, vectors = torch.linalg.eigh(basis.T @ matrix @ basis)
    ritz = basis @ vectors[:, -1]
    assert found.value == pytest.approx(values[-1].item(), rel=1e-12)
    assert found.residual == pytest.approx((matrix @ ritz - values[-1] * ritz).norm().item() / values[-1].item(), rel=1e-9)


def test_lost_orthogonality_does_not_move_the_eigenvalue() -> None:
    """In float32, long after convergence: without reorthogonalisation copies appear, none of them beyond the spectrum."""
    spectrum = torch.cat([torch.linspace(-1, 1, 2000), torch.tensor([50.0, -80.0, 49.0])])
    found = largest_eigenvalue(lambda v: spectrum * v, torch.randn(2003), max_iterations=150, tolerance=0.0)
    assert found.iterations >= 40
    assert found.value == pytest.approx(50.0, rel=3e-6)


def test_not_finite_is_nan_and_ends_at_once() -> None:
    net, batch = build(mlp, 2)
    with torch.no_grad():
        net[1].weight[0, 0] = math.nan
    row = measure(net, batch, SGD(net.parameters(), lr=0.1))
    assert math.isnan(row["sharpness"])
    assert math.isnan(row["edge_share"])
    assert row["iterations"] == 1


def test_float32_agrees_and_the_same_call_gives_the_same_bits() -> None:
    net, batch = build(conv_net, dtype=torch.float32)
    double, batch64 = build(conv_net)
    double.load_state_dict(net.state_dict())
    batch64 = FixedBatch(batch.images.double(), batch.labels)
    optimizer = SGD(net.parameters(), lr=0.1)
    first, second = (measure_curvature(net, batch, optimizer) for _ in range(2))
    assert torch.equal(first.nan_to_num(), second.nan_to_num())
    exact = measure(double, batch64, SGD(double.parameters(), lr=0.1))
    assert first[0, 0].item() == pytest.approx(exact["sharpness"], rel=1e-3)  # at the default tolerance of 0.01
    assert measure(net, batch, optimizer, tolerance=1e-4)["sharpness"] == pytest.approx(exact["sharpness"], rel=1e-5)


def test_weights_that_do_not_count() -> None:
    """Frozen weights, weights of another optimizer and weights without a use are left out."""
    net, batch = build(mlp, 2)
    net.unused = nn.Linear(2, 2).double()
    net.forward = lambda images: nn.Sequential.forward(net[:5], images)
    every = ["1.weight", "1.bias", "4.weight", "4.bias"]
    full = top(full_hessian(net, batch, every))
    assert measure(net, batch, SGD(net.parameters(), lr=0.1))["sharpness"] == pytest.approx(full, rel=1e-5)
    last = top(full_hessian(net, batch, every[2:]))
    assert measure(net, batch, SGD(net[4].parameters(), lr=0.1))["sharpness"] == pytest.approx(last, rel=1e-5)
    optimizer = SGD(net.parameters(), lr=0.1)
    net[1].requires_grad_(False)
    assert measure(net, batch, optimizer)["sharpness"] == pytest.approx(last, rel=1e-5)
    assert last < full * 0.999
    net.requires_grad_(False)
    with pytest.raises(InputError, match="no trainable weight"):
        measure(net, batch, optimizer)
    with pytest.raises(InputError, match="max_iterations=0"):
        measure(net, batch, optimizer, max_iterations=0)


def test_attention_which_has_no_fused_second_derivative() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.queries, self.head = nn.Linear(4, 12), nn.Linear(4, 3)

        def forward(self, images: Tensor) -> Tensor:
            q, k, v = self.queries(images.flatten(2)[:, None, :, :4]).chunk(3, -1)
            return self.head(F.scaled_dot_product_attention(q, k, v).mean((1, 2)))

    net, batch = build(Attention, 2)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = top(full_hessian(net, batch))
    assert measure(net, batch, SGD(net.parameters(), lr=0.1))["sharpness"] == pytest.approx(expected, rel=1e-5)


# ---- the edge: torch's own optimizers on a quadratic just below and above it -------------------------------------------------


def frozen(optimizer: Optimizer, squares: list[Tensor]) -> Optimizer:
    """Adam's or RMSprop's state as after endless training with these second moments, which then no longer change."""
    for group in optimizer.param_groups:
        for weight in group["params"]:
            square = squares.pop(0)
            state: dict[str, Any] = {"step": torch.tensor(1e18)}  # bias corrections of 1
            if isinstance(optimizer, RMSprop):
                state |= {"square_avg": square.clone(), "momentum_buffer": torch.zeros_like(square)}
                state["grad_avg"] = 0.1 * square.sqrt()
            else:
                state |= {"exp_avg_sq": square.clone(), "max_exp_avg_sq": square.clone(), "exp_avg": torch.zeros_like(square)}
            optimizer.state[weight] = state
    return optimizer


STILL = 1 - 1e-15  # β₂: second moments stand still

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "SGD": lambda p: SGD(p, lr=0.1),
    "SGD, decay": lambda p: SGD(p, lr=0.1, weight_decay=5.0),
    "momentum": lambda p: SGD(p, lr=0.1, momentum=0.9),
    "momentum, decay": lambda p: SGD(p, lr=0.1, momentum=0.7, weight_decay=9.0),
    "momentum, dampening": lambda p: SGD(p, lr=0.1, momentum=0.9, dampening=0.4),
    "dampening alone": lambda p: SGD(p, lr=0.1, dampening=0.4),
    "nesterov": lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "nesterov, decay": lambda p: SGD(p, lr=0.1, momentum=0.8, nesterov=True, weight_decay=3.0),
    "rmsprop": lambda p: RMSprop(p, lr=0.1, alpha=STILL, eps=0.3),
    "rmsprop, centered, momentum, decay": lambda p: RMSprop(p, 0.1, STILL, momentum=0.6, centered=True, weight_decay=4.0),
    "adam": lambda p: Adam(p, lr=0.1, betas=(0.9, STILL)),
    "adam, decay": lambda p: Adam(p, lr=0.1, betas=(0.9, STILL), eps=0.3, weight_decay=50.0),
    "amsgrad": lambda p: Adam(p, lr=0.1, betas=(0.8, STILL), amsgrad=True),
    "adamw": lambda p: AdamW(p, lr=0.1, betas=(0.9, STILL), weight_decay=4.0),
}
GROUPS: dict[str, Callable[..., Optimizer]] = {
    "SGD, two lr": lambda a, b: SGD([{"params": a, "lr": 0.3}, {"params": b, "lr": 0.02}], momentum=0.9, lr=1),
    "SGD, all apart": lambda a, b: SGD([{"params": a, "lr": 0.3, "momentum": 0.5, "weight_decay": 1.0},
                                        {"params": b, "lr": 0.1, "momentum": 0.95}], lr=1),
    "nesterov, two lr": lambda a, b: SGD([{"params": a, "lr": 0.3}, {"params": b}], momentum=0.9, lr=0.1, nesterov=True),
    "a frozen group": lambda a, b: SGD([{"params": a, "lr": 0.0}, {"params": b, "lr": 0.1}]),
    "adam": lambda a, b: Adam([{"params": a, "lr": 0.3, "weight_decay": 2.0}, {"params": b}], lr=0.1, betas=(0.9, STILL)),
    "adamw": lambda a, b: AdamW([{"params": a, "lr": 0.3, "betas": (0.5, STILL)}, {"params": b}], lr=0.1, betas=(0.9, STILL)),
    "rmsprop": lambda a, b: RMSprop([{"params": a, "lr": 0.02}, {"params": b}], lr=0.1, alpha=STILL),
}  # fmt: skip


def growth(net: nn.Module, batch: FixedBatch, optimizer: Optimizer, steps: int = 3000) -> float:
    """log(size at the end / size in the middle) when torch trains on that quadratic."""
    norms = []
    for _ in range(steps):
        optimizer.zero_grad()
        batch.loss(net).backward()
        optimizer.step()
        norm = torch.cat([p.detach() for p in net.parameters()]).norm()
        norms.append(norm.item())
        if not 1e-30 < norm < 1.0:  # before second moments of 1 notice
            break
    return math.log(norms[-1] / norms[len(norms) // 2])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_torch_converges_below_the_edge_and_diverges_above_it(name: str) -> None:
    squares = torch.tensor([4.0, 0.25, 1.0], dtype=torch.float64)
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0]
    shape = rotation * [1.0, 0.3, 0.2] @ rotation.T

    def fresh() -> tuple[nn.Module, Optimizer]:
        net = Quadratic(3)
        optimizer = OPTIMIZERS[name](net.parameters())
        return net, optimizer if isinstance(optimizer, SGD) else frozen(optimizer, [squares])

    net, optimizer = fresh()
    low, high = 0.0, 1e5  # the scale of H at which edge_share is 1
    for _ in range(60):
        middle = (low + high) / 2
        share = measure(net, quadratic(middle * shape), optimizer, tolerance=1e-12)["edge_share"]
        low, high = (middle, high) if share < 1 else (low, middle)
    for factor, is_stable in ((0.98, True), (1.02, False)):
        net, optimizer = fresh()
        batch = quadratic(factor * low * shape)
        row = measure(net, batch, optimizer)
        assert (row["edge_share"] < 1) == is_stable
        assert math.isnan(row["preconditioned"]) == isinstance(optimizer, SGD)
        sharp = row["sharpness"] if isinstance(optimizer, SGD) else row["preconditioned"]
        assert row["edge_share"] == pytest.approx(sharp / row["edge"], rel=1e-6)
        assert row["sharpness"] == pytest.approx(factor * low, rel=1e-5)
        assert (growth(net, batch, optimizer) < 0) == is_stable


@pytest.mark.parametrize("name", GROUPS)
def test_groups_of_different_settings_have_one_exact_edge(name: str) -> None:
    rng = np.random.default_rng(2)
    root = rng.normal(size=(5, 5))
    shape = root @ root.T
    squares = [torch.tensor([4.0, 0.25]).double(), torch.tensor([1.0, 0.1, 9.0]).double()]

    def fresh() -> tuple[nn.Module, Optimizer]:
        net = Quadratic(2, 3)
        optimizer = GROUPS[name]([net.parts[0]], [net.parts[1]])
        return net, optimizer if isinstance(optimizer, SGD) else frozen(optimizer, list(squares))

    net, optimizer = fresh()
    low, high = 0.0, 1e5
    for _ in range(60):
        middle = (low + high) / 2
        share = measure(net, quadratic(middle * shape), optimizer, tolerance=1e-12)["edge_share"]
        low, high = (middle, high) if share < 1 else (low, middle)
    for factor in (0.97, 1.03):
        net, optimizer = fresh()
        batch = quadratic(factor * low * shape)
        row = measure(net, batch, optimizer)
        assert row["edge_share"] == pytest.approx(row["preconditioned"] / row["edge"], rel=1e-6)
        if name == "a frozen group":  # it stays where it is and pulls the others to a minimum of their own
            with torch.no_grad():
                net.parts[0].zero_()
        assert (growth(net, batch, optimizer) < 0) == (factor < 1)


def test_edges_by_number() -> None:
    net, batch = Quadratic(2), quadratic(np.diag([3.0, 1.0]))
    (weight,) = net.parameters()

    def edge(optimizer: Optimizer) -> float:
        return measure(net, batch, optimizer)["edge"]

    assert edge(SGD([weight], lr=0.1)) == pytest.approx(20)
    assert edge(SGD([weight], lr=0.1, weight_decay=0.5)) == pytest.approx(19.5)
    assert edge(SGD([weight], lr=0.1, momentum=0.9)) == pytest.approx(38)
    assert edge(SGD([weight], lr=0.1, momentum=0.9, nesterov=True)) == pytest.approx(3.8 / 0.28)
    assert edge(RMSprop([weight], lr=0.1)) == pytest.approx(20)
    assert edge(Adam([weight], lr=0.001)) == pytest.approx(38 / 0.001)
    row = measure(net, batch, SGD([weight], lr=0.0))
    assert (row["edge"], row["edge_share"]) == (math.inf, 0)


@pytest.mark.parametrize("make", [
    lambda p: Adagrad(p, lr=0.1), lambda p: SGD(p, lr=0.1, maximize=True), lambda p: type("Mine", (SGD,), {})(p, lr=0.1),
], ids=["not listed", "maximize", "subclass"])  # fmt: skip
def test_no_edge_is_claimed_where_the_step_is_unknown(make: Callable[..., Optimizer]) -> None:
    net, batch = Quadratic(2), quadratic(np.diag([3.0, 1.0]))
    row = measure(net, batch, make(net.parameters()))
    assert row["sharpness"] == pytest.approx(3)
    assert all(math.isnan(row[name]) for name in ("edge", "edge_share", "preconditioned"))


@pytest.mark.parametrize("make", [
    lambda p: Adam(p, lr=0.01, betas=(0.9, 0.98), weight_decay=0.1), lambda p: AdamW(p, lr=0.01, amsgrad=True),
    lambda p: RMSprop(p, lr=0.01, centered=True, alpha=0.9), lambda p: Adam(p, lr=0.01, fused=True),
], ids=["Adam with decay", "AdamW, AMSGrad", "RMSprop, centered", "fused Adam"])  # fmt: skip
def test_preconditioned_sharpness_by_explicit_matrices(make: Callable[..., Optimizer]) -> None:
    """P^-½ (H + D) P^-½ written out, P by the formulas of torch's documentation after seven steps."""
    net, batch = build(conv_net)
    optimizer = make(net.parameters())
    before = measure(net, batch, optimizer)
    assert math.isnan(before["preconditioned"])
    assert math.isnan(before["edge_share"])
    assert before["edge"] > 0
    torch.manual_seed(3)
    for step in range(7):
        optimizer.zero_grad()
        (0.5**step * batch.loss(net)).backward()  # shrinking: AMSGrad's largest second moment is not the present one
        optimizer.step()
    roots, group = [], optimizer.param_groups[0]
    for weight in net.parameters():
        state = optimizer.state[weight]
        if isinstance(optimizer, RMSprop):
            square = state["square_avg"] - state["grad_avg"] ** 2
        else:
            name = "max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"
            square = state[name] / (1 - group["betas"][1] ** 7)
        roots.append((square.sqrt() + group["eps"]).reshape(-1))
    scale = torch.cat(roots).rsqrt().numpy()
    decay = 0.1 if make(net.parameters()).param_groups[0]["weight_decay"] == 0.1 else 0.0
    hessian = full_hessian(net, batch)
    row = measure(net, batch, optimizer)
    assert row["sharpness"] == pytest.approx(top(hessian), rel=1e-5)
    expected = top(scale[:, None] * (hessian + decay * np.eye(len(hessian))) * scale)
    assert row["preconditioned"] == pytest.approx(expected, rel=1e-5)
    assert row["edge_share"] == pytest.approx(expected / row["edge"], rel=1e-5)


# ---- without a trace ----------------------------------------------------------------------------------------------------------


def trace(net: nn.Module, optimizer: Optimizer) -> list[Any]:
    """All that a measurement could have changed."""
    bare = unwrap(net)
    return [
        {name: (v.clone(), v._version, v.data_ptr()) for name, v in bare.state_dict(keep_vars=True).items()},
        [(m.training, getattr(m, "track_running_stats", None), len(m._forward_hooks), len(m._forward_pre_hooks),
          len(m._backward_hooks), sorted(vars(m))) for m in bare.modules()],
        [(p.requires_grad, None if p.grad is None else (p.grad.clone(), p.grad._version, p.grad.data_ptr()))
         for p in bare.parameters()],
        {i: {k: v.clone() if isinstance(v, Tensor) else v for k, v in s.items()} for i, s in enumerate(optimizer.state.values())},
        torch.get_rng_state(), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.backends.cuda.math_sdp_enabled(),
        torch.backends.cuda.flash_sdp_enabled(),
    ]  # fmt: skip


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def drawing_net() -> nn.Module:
    """With all that could leave traces: chance even in eval mode, running statistics of two kinds, a frozen norm."""
    net = conv_net()
    net.insert(3, nn.InstanceNorm2d(4, track_running_stats=True, affine=True))
    net.insert(4, nn.InstanceNorm2d(4, track_running_stats=True))
    net.insert(5, nn.BatchNorm2d(4, momentum=None))
    net.append(type("Drops", (nn.Module,), {"forward": lambda self, x: F.dropout(x, 0.1)})())
    return net


@pytest.mark.parametrize("mode", ["training", "eval", "mixed"])
def test_measuring_leaves_no_trace(mode: str) -> None:
    net, batch = build(drawing_net, dtype=torch.float32)
    optimizer = Adam(net.parameters(), lr=0.01)
    batch.loss(net).backward()
    optimizer.step()
    net.train(mode != "eval")
    if mode == "mixed":
        net[1].eval()
    net[0].register_forward_hook(lambda *_: None)
    next(net.parameters()).register_post_accumulate_grad_hook(lambda p: pytest.fail("a gradient was accumulated"))
    before = trace(net, optimizer)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        within = torch.is_autocast_enabled("cpu")
        row = measure_curvature(net, batch, optimizer)
        assert torch.is_autocast_enabled("cpu") == within
        assert not torch.is_grad_enabled()
    assert row.isfinite().all()
    assert same(before, trace(net, optimizer))
    with torch.inference_mode():
        assert same(row, measure_curvature(net, batch, optimizer))  # neither grad mode nor autocast is felt
    assert same(before, trace(net, optimizer))

    def fails(logits: Tensor, labels: Tensor) -> Tensor:
        raise RuntimeError("no loss")

    with pytest.raises(RuntimeError, match="no loss"):
        measure_curvature(net, FixedBatch(batch.images, batch.labels, fails), optimizer)
    assert same(before, trace(net, optimizer))


def test_what_the_net_is_while_it_is_measured() -> None:
    net, batch = build(drawing_net, dtype=torch.float32)
    net[4].eval()  # an instance norm, frozen by its owner
    net.sync = nn.SyncBatchNorm(4)
    with measuring(net) as inside, torch.no_grad():
        assert inside is net
        assert [name for name, module in net.named_modules() if module.training] == ["1", "3", "5"]
        out = net[1](batch.images.new_ones(2, 4, 3, 3) * torch.arange(2.0).view(2, 1, 1, 1))
        assert out.std() > 0.9  # batch statistics
    net.eval()
    with measuring(net):  # in a model in eval mode nothing says that a norm is frozen
        assert net[1].training
        assert net[4].training
        assert not net.sync.training


def test_channels_last_and_any_wrapper_give_the_same(tmp_path: Path) -> None:
    net, batch = build(conv_net)
    optimizer = SGD(net.parameters(), lr=0.1)
    expected = measure(net, batch, optimizer)["sharpness"]
    wrappers: list[nn.Module] = [nn.DataParallel(net), torch.compile(net, backend="eager")]  # type: ignore[list-item]
    wrappers.append(nn.DataParallel(wrappers[-1]))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrappers.append(nn.parallel.DistributedDataParallel(net))
        wrappers.append(torch.compile(wrappers[-1], backend="eager"))  # type: ignore[arg-type]
        for wrapped in wrappers:
            assert unwrap(wrapped) is net
            assert measure(wrapped, batch, optimizer)["sharpness"] == pytest.approx(expected, rel=1e-9)
        ddp = wrappers[-2]
        F.cross_entropy(ddp(batch.images), batch.labels).backward()  # its reducer is as it was
    finally:
        dist.destroy_process_group()
    net.to(memory_format=torch.channels_last)
    images = batch.images.contiguous(memory_format=torch.channels_last)
    assert measure(net, FixedBatch(images, batch.labels), optimizer)["sharpness"] == pytest.approx(expected, rel=1e-6)


def test_compiled_in_place_and_in_part_runs_eagerly() -> None:
    """Graphs of aot_autograd, which cannot be differentiated twice, are bypassed, and used again afterwards as they were."""
    from torch._dynamo.backends.debugging import aot_eager

    compiled = []

    def counting(graph: Any, inputs: Any, **settings: Any) -> Any:
        compiled.append(graph)
        return aot_eager(graph, inputs, **settings)

    net, batch = build(conv_net)
    optimizer = SGD(net.parameters(), lr=0.1)
    expected = measure(net, batch, optimizer)
    net[0] = torch.compile(net[0], backend=counting)
    net.compile(backend=counting)
    try:
        batch.loss(net).backward()
        num_graphs = len(compiled)
        assert num_graphs > 0
        assert measure(net, batch, optimizer) == pytest.approx(expected, nan_ok=True)
        batch.loss(net).backward()
        assert len(compiled) == num_graphs
    finally:
        torch._dynamo.reset()


def test_a_child_called_module_is_not_a_wrapper() -> None:
    net = nn.Sequential()
    net.module = nn.Linear(2, 2)
    assert unwrap(net) is net


def test_fixed_batches_that_cannot_be() -> None:
    for num_images, num_labels in ((0, 0), (3, 2)):
        with pytest.raises(InputError, match=f"{num_images} images and {num_labels} labels"):
            FixedBatch(torch.zeros(num_images, 3), torch.zeros(num_labels))
    batch = FixedBatch(torch.arange(10.0), torch.arange(10))
    assert [piece.labels.tolist() for piece in batch.split(3)] == [[0, 1, 2, 3], [4, 5, 6], [7, 8, 9]]
    with pytest.raises(InputError, match="num_pieces=11"):
        batch.split(11)
