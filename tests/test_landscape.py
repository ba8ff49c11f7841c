"""The loss landscape against landscapes known exactly, batch norm against doing it by hand, and a grid that is killed."""

import copy
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import cifarlab as cl
from cifarlab.analysis.grid import GridFile, read_landscape
from cifarlab.analysis.landscape import (
    Plane,
    Sample,
    barrier,
    build_sample,
    line_between,
    measure_landscape,
    random_plane,
    trajectory_plane,
)
from cifarlab.checkpoint import load_weights
from cifarlab.config import InputError
from cifarlab.data.dataset import Split

XS = np.linspace(-1, 1, 5)


def squared(outputs: Tensor, targets: Tensor) -> Tensor:
    """½‖output − target‖² of each image: with a linear model a quadratic function of its weights."""
    return 0.5 * (outputs - targets).square().sum(1)


def quadratic() -> tuple[nn.Linear, Sample, Tensor, Tensor]:
    """A linear model in float64, its data in two batches, and the same data whole."""
    torch.manual_seed(0)
    model = nn.Linear(6, 3).double()
    inputs, targets = torch.randn(40, 6).double(), torch.randn(40, 3).double()
    batches = tuple(zip(inputs.split(25), targets.split(25), strict=True))
    return model, Sample(batches), inputs, targets


def quadratic_loss(inputs: Tensor, targets: Tensor, weight: Tensor, bias: Tensor) -> np.ndarray:
    """Written out in numpy, one loss an image."""
    return 0.5 * ((inputs.numpy() @ weight.numpy().T + bias.numpy() - targets.numpy()) ** 2).sum(1)  # type: ignore[no-any-return]


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
                         nn.Dropout(0.5), nn.Linear(16, 5))  # fmt: skip


def digits_like(count: int = 60, side: int = 8) -> Split:
    rng = np.random.default_rng(0)
    return Split(rng.integers(0, 256, (count, 3, side, side), dtype=np.uint8), np.arange(count) % 5)


def sample_of(split: Split, **changes: Any) -> Sample:
    settings: dict[str, Any] = dict(mean=(0.5,) * 3, std=(0.25,) * 3, num_images=40, num_norm_images=30, batch_size=16)
    return build_sample(split, **(settings | changes))


# ---- landscapes known exactly -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_directions", [1, 2])
def test_a_quadratic_landscape_is_the_known_one(num_directions: int) -> None:
    model, sample, inputs, targets = quadratic()
    plane = random_plane(model, num_directions, seed=3, biases_and_norms="scaled")
    ys = np.array([-0.5, 0.0, 2.0]) if num_directions == 2 else None
    found = measure_landscape(model, plane, sample, XS, ys, criterion=squared)
    at_centre = quadratic_loss(inputs, targets, model.weight.detach(), model.bias.detach())
    for i, y in enumerate([0.0] if ys is None else ys):
        for j, x in enumerate(XS):
            moved = {name: plane.centre[name] + x * plane.directions[0][name] for name in ("weight", "bias")}
            if ys is not None:
                moved = {name: moved[name] + y * plane.directions[1][name] for name in moved}
            losses = quadratic_loss(inputs, targets, moved["weight"], moved["bias"])
            assert found.loss[i, j] == pytest.approx(losses.mean(), rel=1e-12)
            assert found.loss_error[i, j] == pytest.approx(losses.std(ddof=1) / 40**0.5, rel=1e-12)
            paired = (losses - at_centre).std(ddof=1) / 40**0.5
            assert found.difference_error[i, j] == pytest.approx(paired, rel=1e-9, abs=1e-15)
    # along any line it is a parabola: the third difference vanishes
    assert np.abs(np.diff(found.loss, 3, axis=1)).max() < 1e-12
    assert np.isnan(found.accuracy).all()  # of a regression there is none


def test_the_plane_of_a_known_trajectory_is_found() -> None:
    """Gradient descent on a quadratic with two steep directions and flat others moves in the plane of those two."""
    model = nn.Linear(8, 1, bias=False).double()
    curvature = torch.diag(torch.tensor([5.0, 2.0, 0, 0, 0, 0, 0, 0])).double()
    weight, points = torch.full((1, 8), 1.0).double(), []
    for _ in range(30):
        points.append({"weight": weight.clone()})
        weight = weight - 0.1 * weight @ curvature
    with torch.no_grad():
        model.weight.copy_(weight)
    plane = trajectory_plane(model, points, steps=range(30))
    basis = torch.stack([d["weight"].flatten() for d in plane.directions])
    torch.testing.assert_close(basis @ basis.T, torch.eye(2).double(), rtol=0, atol=1e-9)
    assert basis[:, 2:].abs().max() < 1e-12
    assert sum(plane.explained) == pytest.approx(1, abs=1e-12)
    assert (plane.coordinates[0] >= 0).all()
    for point, (x, y) in zip(points, plane.coordinates, strict=True):  # it lies wholly in the plane
        there = plane.centre["weight"] + x * plane.directions[0]["weight"] + y * plane.directions[1]["weight"]
        torch.testing.assert_close(there, point["weight"], rtol=0, atol=1e-9)
    # and the loss measured there is ½ wᵀAw, written out: inputs √A rows give it with the squared criterion
    sample = Sample(((curvature.sqrt(), torch.zeros(8, 1).double()),))
    start = plane.coordinates[0]
    found = measure_landscape(model, plane, sample, [start[0], 0.0], [start[1]], criterion=squared)
    first = points[0]["weight"]
    assert 8 * found.loss[0, 0] == pytest.approx(float(0.5 * (first @ curvature @ first.T)), rel=1e-9)


def test_the_principal_plane_is_that_of_a_singular_value_decomposition() -> None:
    model, rng = nn.Linear(30, 4), np.random.default_rng(0)
    points = [{name: torch.tensor(rng.normal(size=size)).float() for name, size in (("weight", (4, 30)), ("bias", 4))}
              for _ in range(7)]  # fmt: skip
    plane = trajectory_plane(model, points)
    flat = np.stack([np.concatenate([(p[n] - plane.centre[n]).flatten().numpy() for n in ("weight", "bias")]) for p in points])
    _, lengths, rows = np.linalg.svd(flat.astype(float), full_matrices=False)
    for k in range(2):
        ours = np.concatenate([plane.directions[k][n].flatten().numpy() for n in ("weight", "bias")])
        assert abs(ours @ rows[k]) == pytest.approx(1, abs=1e-4)
        assert plane.explained[k] == pytest.approx(lengths[k] ** 2 / (lengths**2).sum(), rel=1e-5)
        np.testing.assert_allclose(plane.coordinates[:, k], flat @ ours, atol=1e-4)


def test_a_random_walk_already_has_the_shares_that_the_docstring_tells() -> None:
    steps = np.random.default_rng(0).normal(size=(200, 4000))
    walk = steps.cumsum(0)
    model = nn.Linear(4000, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor(walk[-1:]))
    plane = trajectory_plane(model, [{"weight": torch.tensor(point[None]).float()} for point in walk])
    assert plane.explained == pytest.approx((8 / np.pi**2, 8 / (9 * np.pi**2)), abs=0.02)


# ---- directions -------------------------------------------------------------------------------------------------------------


def test_every_filter_of_a_direction_has_the_norm_of_the_filter_it_moves() -> None:
    model = network()
    model[6].weight.requires_grad_(False)
    plane = random_plane(model, seed=1)
    for direction in plane.directions:
        assert set(direction) == {"0.weight"}  # biases and norms stay, and so does what is not trainable
        norms = [t.flatten(1).norm(dim=1) for t in (direction["0.weight"], model[0].weight.detach())]
        torch.testing.assert_close(*norms)
    scaled = random_plane(model, seed=1, biases_and_norms="scaled")
    assert torch.equal(scaled.directions[0]["0.weight"], plane.directions[0]["0.weight"])
    assert set(scaled.directions[0]) == {"0.weight", "1.weight", "1.bias", "6.bias"}
    torch.testing.assert_close(scaled.directions[1]["6.bias"].norm(), model[6].bias.detach().norm())
    assert not scaled.directions[0]["1.bias"].any()  # its norm is 0 before training
    assert torch.equal(random_plane(model, seed=1).directions[1]["0.weight"], plane.directions[1]["0.weight"])
    a, b = (d["0.weight"].flatten().double() for d in plane.directions)
    assert plane.cosine == pytest.approx(float(a @ b / a.norm() / b.norm()), rel=1e-9)
    assert abs(plane.cosine) < 0.3


def test_the_landscape_of_a_net_with_rescaled_filters_is_the_same() -> None:
    """What filter normalisation is for: behind batch norm the scale of a filter means nothing."""
    model, sample = network(), sample_of(digits_like())
    recompute = dict(batch_norm="recomputed")
    rescaled = copy.deepcopy(model)
    with torch.no_grad():
        rescaled[0].weight.mul_(torch.tensor([4.0, 0.5, 8.0, 2.0])[:, None, None, None])
    plain, other = (measure_landscape(m, random_plane(m), sample, XS, XS[:2], **recompute) for m in (model, rescaled))  # type: ignore[arg-type]
    np.testing.assert_allclose(plain.loss, other.loss, rtol=2e-3)
    assert np.ptp(plain.loss) > 0.05


# ---- batch norm -------------------------------------------------------------------------------------------------------------


def by_hand(model: nn.Sequential, sample: Sample, moved: dict[str, Tensor], mean: Tensor, variance: Tensor) -> float:
    """The mean loss of `network` with those weights and statistics, in plain operations."""
    total = 0.0
    for images, labels in sample.batches:
        maps = nn.functional.conv2d(images, moved["0.weight"])
        maps = (maps - mean[:, None, None]) / (variance[:, None, None] + 1e-5).sqrt()
        maps = maps * model[1].weight[:, None, None] + model[1].bias[:, None, None]  # type: ignore[index]
        features = nn.functional.adaptive_avg_pool2d(maps.relu(), 2).flatten(1)
        logits = features @ moved["6.weight"].T + model[6].bias
        total += float(nn.functional.cross_entropy(logits, labels, reduction="sum"))
    return total / sample.num_images


@pytest.mark.parametrize("batch_norm", ["frozen", "recomputed"])
def test_batch_norm_is_treated_as_it_is_said(batch_norm: Any) -> None:
    model, sample = network(), sample_of(digits_like())
    with torch.no_grad():
        model.train()(sample.batches[0][0])  # statistics that are not those of the start
        model.eval()
    plane = random_plane(model, 1)
    found = measure_landscape(model, plane, sample, XS, batch_norm=batch_norm)
    norms = torch.cat(sample.norm_batches)
    with torch.no_grad():
        for j, x in enumerate(XS):
            moved = {name: plane.centre[name] + x * direction for name, direction in plane.directions[0].items()}
            mean, variance = model[1].running_mean, model[1].running_var
            if batch_norm == "recomputed":
                parts = [nn.functional.conv2d(part, moved["0.weight"]) for part in sample.norm_batches]
                shares = torch.tensor([len(part) / len(norms) for part in parts])
                mean = (torch.stack([p.mean((0, 2, 3)) for p in parts]) * shares[:, None]).sum(0)
                variance = (torch.stack([p.transpose(0, 1).flatten(1).var(1) for p in parts]) * shares[:, None]).sum(0)
            assert found.loss[0, j] == pytest.approx(by_hand(model, sample, moved, mean, variance), rel=1e-5)
    assert found.facts["batch_norm"] == batch_norm
    assert found.facts["has_batch_norm"]


def test_the_two_policies_differ_where_they_must_and_agree_without_batch_norm() -> None:
    model, sample = network(), sample_of(digits_like())
    plane = random_plane(model, 1)
    frozen, anew = (measure_landscape(model, plane, sample, XS, batch_norm=p) for p in ("frozen", "recomputed"))  # type: ignore[arg-type]
    assert np.abs(frozen.loss - anew.loss).max() > 0.01
    bare = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
    plane = random_plane(bare, 1)
    frozen, anew = (measure_landscape(bare, plane, sample, XS, batch_norm=p) for p in ("frozen", "recomputed"))  # type: ignore[arg-type]
    assert np.array_equal(frozen.loss, anew.loss)
    assert not anew.facts["has_batch_norm"]


# ---- between two runs -------------------------------------------------------------------------------------------------------


def test_between_two_runs_the_ends_are_the_runs_with_their_own_statistics() -> None:
    first, second, sample = network(0), network(1), sample_of(digits_like())
    for model in (first, second):
        with torch.no_grad():
            model.train()(sample.batches[0][0])
            model.eval()
    plane = line_between(first.state_dict(), second.state_dict())
    found = measure_landscape(first, plane, sample, np.linspace(0, 1, 5))
    for model, at in ((first, 0), (second, 4)):
        with torch.no_grad():
            losses = torch.cat([nn.functional.cross_entropy(model(batch), labels, reduction="none")
                                for batch, labels in sample.batches])  # fmt: skip
        assert found.loss[0, at] == pytest.approx(float(losses.mean()), rel=1e-5)
    height, error = barrier(found)
    line = np.linspace(found.loss[0, 0], found.loss[0, 4], 5)
    assert height == pytest.approx((found.loss[0] - line).max())
    assert error >= 0
    # beyond the ends the statistics are those of the nearer run, not such of a negative variance
    beyond = measure_landscape(first, plane, sample, [-30.0, 3.0])
    assert not beyond.layers
    for at, x, model in ((0, -30.0, first), (1, 3.0, second)):
        moved = {name: plane.centre[name] + x * direction for name, direction in plane.directions[0].items()}
        with torch.no_grad():
            statistics = {name: model.state_dict()[name] for name in ("1.running_mean", "1.running_var")}
            model.load_state_dict(moved | statistics, strict=False)
            losses = torch.cat([nn.functional.cross_entropy(model(batch), labels, reduction="none")
                                for batch, labels in sample.batches])  # fmt: skip
        assert beyond.loss[0, at] == pytest.approx(float(losses.mean()), rel=1e-4)
    with pytest.raises(InputError, match="names or shapes differ"):
        line_between(first.state_dict(), nn.Linear(2, 2).state_dict())
    with pytest.raises(InputError, match="x = 0 and x = 1"):
        barrier(beyond)


# ---- what is not finite -----------------------------------------------------------------------------------------------------


def test_nan_never_comes_without_saying_where(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 5))
    sample = sample_of(digits_like(), std=(0.01,) * 3)
    found = measure_landscape(model, random_plane(model), sample, [0.0, 1e30], [0.0, 1e38], path=tmp_path / "a.jsonl")
    assert np.isfinite(found.loss[0, 0])
    assert found.num_nonfinite[0, 0] == 0
    for at in [(0, 1), (1, 0), (1, 1)]:
        assert np.isnan(found.loss[at]) == (found.num_nonfinite[at] > 0) == (at in found.layers)
    assert found.layers[1, 1] == "1"
    assert found.layers[0, 1] == "3"
    assert "(1e+30, 0) in 3" in found.tell_nonfinite()
    again = read_landscape(tmp_path / "a.jsonl")
    assert again.layers == found.layers
    assert "NaN" not in (tmp_path / "a.jsonl").read_text()


def test_a_loss_that_overflows_behind_finite_outputs_is_named() -> None:
    model, sample, _, _ = quadratic()
    model, sample = model.float(), Sample(tuple((a.float(), b.float()) for a, b in sample.batches))
    found = measure_landscape(model, random_plane(model, 1), sample, [0.0, 1e25], criterion=squared)
    assert found.layers == {(0, 1): "the loss"}


# ---- nothing is touched, everything goes on ---------------------------------------------------------------------------------


def test_the_model_comes_back_bit_equal_with_its_flags() -> None:
    model, sample = network(), sample_of(digits_like())
    model.train()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = [(m.training) for m in model.modules()], [p.requires_grad for p in model.parameters()]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    for policy in ("frozen", "recomputed"):
        measure_landscape(model, random_plane(model, biases_and_norms="scaled"), sample, XS, XS, batch_norm=policy)  # type: ignore[arg-type]
    assert torch.equal(torch.rand(3), expected)  # nor is anybody's random state
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert flags == ([m.training for m in model.modules()], [p.requires_grad for p in model.parameters()])
    assert all(p.grad is None for p in model.parameters())


def test_each_point_is_the_same_whatever_came_before() -> None:
    model, sample = network(), sample_of(digits_like())
    plane = random_plane(model)
    whole = measure_landscape(model, plane, sample, XS, XS, batch_norm="recomputed")
    alone = measure_landscape(model, plane, sample, XS[3:4], XS[1:2], batch_norm="recomputed")
    assert whole.loss[1, 3] == alone.loss[0, 0]
    assert whole.difference_error[1, 3] == alone.difference_error[0, 0]


PROGRAM = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import test_landscape as t
calls = 0
def count(done, total):
    if done >= 7: os.kill(os.getpid(), signal.SIGKILL)
import cifarlab.analysis.landscape as landscape, itertools
clock = itertools.count(0, 2)                       # two seconds a point: each is written at once
landscape.time.perf_counter = lambda: next(clock)
model = t.network()
landscape.measure_landscape(model, landscape.random_plane(model), t.sample_of(t.digits_like()), t.XS, t.XS,
                            path=Path(sys.argv[1]), progress=count)
"""


def test_a_killed_grid_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    path = tmp_path / "landscape" / "random.jsonl"
    ended = subprocess.run([sys.executable, "-c", PROGRAM, str(path), str(Path(__file__).parent)], timeout=100, check=False)
    assert ended.returncode == -signal.SIGKILL
    part = read_landscape(path)
    assert (part.num_nonfinite >= 0).sum() == 7
    assert not part.is_complete
    with path.open("ab") as file:
        file.write(b'{"i": 1, "j": 2, "lo')  # and a line that the crash tore
    model, sample = network(), sample_of(digits_like())
    told: list[tuple[int, int]] = []
    plane = random_plane(model)
    resumed = measure_landscape(model, plane, sample, XS, XS, path=path, progress=lambda *at: told.append(at))
    whole = measure_landscape(model, plane, sample, XS, XS)
    assert np.array_equal(resumed.loss, whole.loss)
    assert np.array_equal(resumed.difference_error, whole.difference_error)
    assert resumed.is_complete
    assert told[-1] == (25, 25)
    assert len(path.read_bytes().splitlines()) == 26  # no point was measured twice
    measure_landscape(model, plane, sample, XS, XS, path=path, progress=lambda *_: pytest.fail("nothing was left to do"))


def test_points_of_two_landscapes_never_mix(tmp_path: Path) -> None:
    model, sample, path = network(), sample_of(digits_like()), tmp_path / "a.jsonl"
    measure_landscape(model, random_plane(model, 1), sample, XS, path=path)
    for other, images, policy, xs in (
        (network(1), sample, "frozen", XS), (model, sample_of(digits_like(), seed=1), "frozen", XS),
        (model, sample, "recomputed", XS), (model, sample, "frozen", XS[:3]),
    ):  # fmt: skip
        with pytest.raises(InputError, match="another landscape"):
            measure_landscape(other, random_plane(other, 1), images, xs, batch_norm=policy, path=path)  # type: ignore[arg-type]
    path.write_bytes(b"no json\n")
    with pytest.raises(InputError, match="no landscape, or damaged"):
        read_landscape(path)
    with pytest.raises(InputError, match="there is no landscape"):
        read_landscape(tmp_path / "b.jsonl")
    GridFile(None, {"a": 1}).close()


def test_what_cannot_be_measured_is_refused() -> None:
    model, sample = network(), sample_of(digits_like())
    plane = random_plane(model, 1)
    for changes, words in [
        (dict(batch_norm="batch"), "frozen or recomputed"), (dict(ys=XS), "two directions"), (dict(xs=[np.nan]), "finite"),
        (dict(xs=[]), "finite"), (dict(sample=Sample(())), "no images"),
        (dict(sample=replace(sample, norm_batches=()), batch_norm="recomputed"), "norm_batches"),
        (dict(plane=Plane("x", nn.Linear(1, 1).state_dict(), ({},))), "names or shapes"),
        (dict(plane=replace(plane, directions=({"zzz": torch.ones(1)},))), "another network"),
    ]:  # fmt: skip
        with pytest.raises(InputError, match=words):
            measure_landscape(**(dict(model=model, plane=plane, sample=sample, xs=XS) | changes))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="span no plane"):
        trajectory_plane(model, [model.state_dict(), model.state_dict()])
    with pytest.raises(InputError, match="0 points of the trajectory span no plane"):
        trajectory_plane(model, [])
    with pytest.raises(InputError, match="num_directions=3"):
        random_plane(model, 3)
    with pytest.raises(InputError, match="zero or scaled"):
        random_plane(model, biases_and_norms="drop")  # type: ignore[arg-type]


# ---- the trajectory of a run ------------------------------------------------------------------------------------------------


def test_a_run_keeps_its_trajectory_when_asked_and_is_not_changed_by_it(tiny: str, tmp_path: Path) -> None:
    config = cl.recipes.quick(model=tiny, epochs=2, train_images=256, batch_size=64)
    quiet: dict[str, Any] = dict(runs_dir=tmp_path, progress="none", forecast=False, figures=False, probes="none")
    plain = cl.train(config, cl.WatchConfig(name="plain", **quiet))
    kept = cl.train(config, cl.WatchConfig(name="kept", trajectory_every=0.5, **quiet))
    files = sorted((kept.path / "trajectory").iterdir())
    assert [path.name for path in files] == [f"step-{step:08d}.safetensors" for step in (0, 2, 4, 6, 8)]
    assert not (plain.path / "trajectory").exists()
    ends = [load_weights(path) for path in (plain.path / "model.safetensors", kept.path / "model.safetensors", files[-1])]
    assert all(torch.equal(tensor, other[name]) for other in ends[1:] for name, tensor in ends[0].items())


def test_a_landscape_is_read_without_torch(tmp_path: Path) -> None:
    model, sample = network(), sample_of(digits_like())
    found = measure_landscape(model, random_plane(model), sample, XS, XS, path=tmp_path / "a.jsonl")
    script = ("import sys; sys.modules['torch'] = None\nfrom pathlib import Path\n"
              "from cifarlab.analysis.grid import read_landscape\n"
              "print(repr(read_landscape(Path(sys.argv[1])).loss.tolist()))")  # fmt: skip
    told = subprocess.run([sys.executable, "-c", script, str(tmp_path / "a.jsonl")], check=True, capture_output=True, text=True,
                          timeout=60, env=os.environ)  # fmt: skip
    assert json.loads(told.stdout) == found.loss.tolist()
