"""Muon: its iteration against the SVD's polar factor, its updates by hand in float64, and what probes see of it."""

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import cifarlab as cl
from cifarlab.checkpoint import load_weights
from cifarlab.config import TrainConfig
from cifarlab.optim.muon import COEFFICIENTS, Muon, orthogonalize
from cifarlab.optim.optimizers import build_optimizer


def with_spectrum(values: list[float], rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """(U·diag(values)·Vᵀ, U, V) with random orthonormal U (rows × k) and V (columns × k)."""
    generator = torch.Generator().manual_seed(rows)
    u, v = (torch.linalg.qr(torch.randn(n, len(values), generator=generator, dtype=torch.float64))[0] for n in (rows, columns))
    return u @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ v.T, u, v


@pytest.mark.parametrize(("rows", "columns"), [(6, 6), (6, 40), (40, 6)])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_orthogonal_within_the_iterations_tolerance(rows: int, columns: int, scale: float) -> None:
    """The singular vectors are the matrix's own, so it is the polar factor U·Vᵀ but for values in 0.68 … 1.14 instead of 1."""
    values = [1.0, 0.8, 0.5, 0.1, 0.05, 0.02]  # of a Frobenius norm of 1.38
    matrix, u, v = with_spectrum([scale * value for value in values], rows, columns)
    result = orthogonalize(matrix.float()).double()
    inner = u.T @ result @ v
    found = inner.diagonal()
    torch.testing.assert_close(u @ torch.diag(found) @ v.T, result, rtol=0, atol=1e-4)
    torch.testing.assert_close(inner, torch.diag(found), rtol=0, atol=1e-4)
    assert found.min() > 0.68
    assert found.max() < 1.14
    u_svd, _, vh_svd = torch.linalg.svd(matrix, full_matrices=False)
    assert torch.linalg.matrix_norm(result - u_svd @ vh_svd, 2) < 0.33


def test_more_steps_reach_smaller_singular_values() -> None:
    matrix, u, v = with_spectrum([1.0, 1e-2, 1e-3], 8, 8)
    smallest = [float((u.T @ orthogonalize(matrix.float(), steps).double() @ v)[2, 2]) for steps in (1, 3, 5, 7)]
    assert smallest == sorted(smallest)
    assert smallest[0] == pytest.approx(COEFFICIENTS[0] * 1e-3, rel=1e-3)
    assert smallest[-1] > 0.68


def test_a_matrix_of_zeros_stays() -> None:
    assert not orthogonalize(torch.zeros(3, 5)).any()


@pytest.mark.parametrize("shape", [(64, 64), (16, 300), (300, 16)])
def test_in_bf16_the_same_but_for_its_rounding(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    exact, rounded = orthogonalize(matrix, 3), orthogonalize(matrix, 3, torch.bfloat16)
    assert rounded.dtype == matrix.dtype
    assert 0 < float((rounded - exact).norm() / exact.norm()) < 0.02


@pytest.mark.parametrize(("precision", "is_rounded"), [("fp32", False), ("bf16", True)])
def test_a_training_in_bf16_makes_orthogonal_in_bf16(precision: str, is_rounded: bool) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(40, 30, bias=False), nn.Linear(30, 2))
    before = net[0].weight.detach().clone()
    optimizer = build_optimizer(net, TrainConfig(optimizer="muon", lr=1.0, momentum=0.0, nesterov=False, precision=precision))
    net[0].weight.grad = torch.randn(30, 40)
    optimizer.step()
    exact = before - orthogonalize(net[0].weight.grad)
    assert torch.equal(net[0].weight, exact) != is_rounded
    torch.testing.assert_close(net[0].weight, exact, rtol=0, atol=0.02)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
def test_a_copy_steps_as_its_original_does(copied: Any) -> None:
    torch.manual_seed(0)
    optimizer = Muon([{"params": [nn.Parameter(torch.randn(20, 30))], "is_matrix": True}], lr=0.1, dtype=torch.bfloat16)
    gradient = torch.randn(20, 30)
    moved = []
    for each in (optimizer, copied(optimizer)):
        param = each.param_groups[0]["params"][0]
        param.grad = gradient.clone()
        each.step()
        moved.append(param.detach())
    assert torch.equal(*moved)


def by_hand(weight: Tensor, gradients: list[Tensor], *, lr: float, momentum: float, nesterov: bool, decay: float, matrix: bool,
            renormalize: bool) -> Tensor:  # fmt: skip
    """The formula of the class, slowly, in float64, with the iteration written out."""
    weight, buffer = weight.double().clone(), torch.zeros_like(weight, dtype=torch.float64)
    for gradient in gradients:
        buffer = momentum * buffer + gradient.double()
        update = gradient.double() + momentum * buffer if nesterov else buffer
        weight = weight * (1 - lr * decay)
        if matrix:
            rows, columns = len(weight), weight[0].numel()
            if renormalize:
                weight = weight / weight.norm() * rows**0.5
            x = update.reshape(rows, columns) / update.norm()
            for _ in range(4):
                gram = x @ x.T
                x = COEFFICIENTS[0] * x + COEFFICIENTS[1] * gram @ x + COEFFICIENTS[2] * gram @ gram @ x
            update = max(1.0, rows / columns) ** 0.5 * x.reshape(weight.shape)
        weight = weight - lr * update
    return weight


@pytest.mark.parametrize("shape", [(6, 4, 3, 3), (12, 5), (7,)], ids=["kernel", "tall matrix", "bias"])
@pytest.mark.parametrize(("nesterov", "renormalize"), [(True, False), (False, True)])
def test_updates_by_hand(shape: tuple[int, ...], nesterov: bool, renormalize: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    param = nn.Parameter(torch.randn(shape, generator=generator))
    if len(shape) == 4:
        param.data = param.data.contiguous(memory_format=torch.channels_last)
    before, is_matrix = param.detach().clone(), len(shape) > 1
    gradients = [torch.randn(shape, generator=generator) for _ in range(4)]
    optimizer = Muon([{"params": [param], "is_matrix": is_matrix}], lr=0.1, momentum=0.7, nesterov=nesterov, weight_decay=0.2,
                     steps=4, renormalize=renormalize)  # fmt: skip
    for gradient in gradients:
        param.grad = gradient.clone()
        optimizer.step()
        assert torch.equal(param.grad, gradient)  # probes and clipping read it afterwards
    expected = by_hand(before, gradients, lr=0.1, momentum=0.7, nesterov=nesterov, decay=0.2, matrix=is_matrix,
                       renormalize=renormalize)  # fmt: skip
    torch.testing.assert_close(param.detach().double(), expected, rtol=1e-4, atol=1e-4)


def test_hidden_matrices_are_made_orthogonal_and_the_rest_is_not() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = build_optimizer(net, TrainConfig(optimizer="muon"))
    orthogonal = {id(param) for group in optimizer.param_groups if group["is_matrix"] for param in group["params"]}
    named = {name for name, param in net.named_parameters() if id(param) in orthogonal}
    assert named == {"0.weight", "3.weight"}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(net.parameters()))


def test_a_parameter_without_gradient_stays() -> None:
    still, moving = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    moving.grad = torch.eye(2)
    Muon([{"params": [still, moving], "is_matrix": True}], lr=0.1, weight_decay=0.1).step()
    assert torch.equal(still, torch.ones(2, 2))
    assert not torch.equal(moving, torch.ones(2, 2))


def test_the_update_flow_probe_sees_what_muon_did(tiny: str, tmp_path: Path) -> None:
    """‖Δw‖/‖w‖ of weights kept before and after; with renormalised weights that of a matrix is near the learning rate."""
    config = cl.TrainConfig(data="digits", model="tiny", train_images=32, batch_size=16, epochs=1, optimizer="muon", lr=0.03,
                            schedule="constant", nesterov=True, renormalize=True, eval_every=0)  # fmt: skip
    watch = cl.WatchConfig(runs_dir=tmp_path, name="run", progress="none", forecast=False, figures=False, trajectory_every=0.5)
    run = cl.train(config, watch)
    table = run.tables["update_flow"]
    first, last = (load_weights(run.path / "trajectory" / f"step-{step:08d}.safetensors") for step in (1, 2))
    ratios = dict(zip(table.items, table["ratio"][-1], strict=True))
    for name in table.items:
        moved = (last[name].double() - first[name].double()).norm() / last[name].double().norm()
        assert ratios[name] == pytest.approx(float(moved), rel=1e-3), name
    assert 0.5 * 0.03 < ratios["0.weight"] < 1.5 * 0.03
    assert np.isfinite(table["ratio"]).all()
