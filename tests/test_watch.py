"""`cl.watch` around loops of all kinds: it changes nothing, leaves nothing, and measures the step that was really made."""

import copy
import gc
import io
import os
import pickle
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import clip_grad, clip_grad_norm_, clip_grad_value_  # before any watch is open
from torch.optim import LBFGS, SGD, Adam, AdamW, Optimizer, SparseAdam

import cifarlab as cl
from cifarlab.config import InputError
from cifarlab.gallery import draw_recorded_figures
from cifarlab.probes import PROBES
from cifarlab.probes import watch as module
from cifarlab.probes.incident import LOOK_AGAIN, WeightsBeforeBad, load_incident, locate
from cifarlab.probes.panel import LOOK_AT, LOOKS_AT_ALL, Panel
from cifarlab.probes.watch import Watch
from cifarlab.runs import Run

BATCHES = [(torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(k)), torch.arange(8) % 3) for k in range(6)]


def build() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2), nn.Linear(64, 3))


@pytest.fixture
def open_watch(tmp_path: Path) -> Callable[..., Watch]:
    def open_it(model: nn.Module, optimizer: Any, run: str = "run", **settings: Any) -> Watch:
        return cl.watch(model, optimizer, run, **({"runs_dir": tmp_path, "say": None, "figures": False} | settings))

    return open_it


@pytest.fixture(autouse=True)
def nothing_is_left_open() -> Any:
    yield
    assert not module._OPEN
    assert not isinstance(clip_grad._group_tensors_by_device_and_dtype, module._SortingSeen)


def loop(model: nn.Module, optimizer: Optimizer, batches: Any = BATCHES, watched: Watch | None = None) -> None:
    """Anybody's."""
    torch.manual_seed(1)
    for images, labels in batches:
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        if watched:
            watched.log(loss=loss)
        optimizer.step()
        optimizer.zero_grad()


def twin(run: Run, make: Callable[[], Any], optimizer_of: Callable[[Any], Optimizer], *, clip: Callable[[Any], Any] | None = None,
         batches: Any = BATCHES, rows: int | None = None) -> None:  # fmt: skip
    """Holds the run's flows against the same loop measured by hand."""
    net = make()
    optimizer = optimizer_of(net)
    torch.manual_seed(1)
    flow, change = run.tables["gradient_flow"], run.tables["update_flow"]
    assert flow.items == tuple(name for name, _ in net.named_parameters())
    assert len(flow) == (len(batches) if rows is None else rows)
    for k, (images, labels) in enumerate(batches):
        F.cross_entropy(net(images), labels).backward()
        before = [p.grad.norm().item() for p in net.parameters()]
        if clip:
            clip(net)
        after = [p.grad.norm().item() for p in net.parameters()]
        old = [p.detach().clone() for p in net.parameters()]
        optimizer.step()
        moved = [(p - was).norm().item() for p, was in zip(net.parameters(), old, strict=True)]
        optimizer.zero_grad()
        np.testing.assert_allclose(flow["norm"][k], before, rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(flow["clipped_norm"][k], after, rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(change["norm"][k], moved, rtol=1e-3, atol=1e-7)


def sgd(net: Any) -> Optimizer:
    return SGD(net.parameters(), lr=0.1, momentum=0.9)


# ---- it changes nothing and leaves nothing --------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [sgd, lambda net: Adam(net.parameters(), fused=True), lambda net: AdamW(net.parameters())],
                         ids=["momentum", "fused Adam", "AdamW"])  # fmt: skip
def test_weights_are_the_same_bits_with_and_without(open_watch: Any, make: Any) -> None:
    plain, net = build(), build()
    loop(plain, make(plain))
    optimizer = make(net)
    with open_watch(net, optimizer, probes="all", every=2, batch=BATCHES[0]) as watched:
        loop(net, optimizer, watched=watched)
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), net.state_dict().values(), strict=True))
    run = cl.load_run(watched.run.path)
    assert run.tables.keys() == set(PROBES)
    for name, table in run.tables.items():
        assert table.steps.tolist() == ([1, 2, 3, 4, 5, 6] if PROBES[name].every_step else [1, 2, 4, 6])
    assert run.metrics["train/loss"].shape == run.metrics["gradient_flow/norm"].shape == run.metrics["lr"].shape == (6,)
    assert np.isfinite(run.tables["noise"]["cosine"][1:]).all()
    assert run.result["state"] == "finished"
    assert 0 < run.result["probe_share"] < 1
    twin(run, build, make)


def hooks_of(thing: Any) -> dict[str, Any]:
    return {name: dict(value) for name, value in vars(thing).items() if "hook" in name and isinstance(value, dict)}


def test_nothing_is_left(open_watch: Any, tmp_path: Path) -> None:
    net = build()
    optimizer = sgd(net)
    loop(net, optimizer)
    hooks = [hooks_of(m) for m in [*net.modules(), optimizer]]
    names = [sorted(vars(m)) for m in [*net.modules(), optimizer]]
    as_bytes = pickle.dumps(net), pickle.dumps(optimizer)
    sorting = clip_grad._group_tensors_by_device_and_dtype
    frozen = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
    with open_watch(net, optimizer, probes="all", every=1, batch=BATCHES[0]):
        pass
    assert [hooks_of(m) for m in [*net.modules(), optimizer]] == hooks
    assert [sorted(vars(m)) for m in [*net.modules(), optimizer]] == names
    assert (pickle.dumps(net), pickle.dumps(optimizer)) == as_bytes
    assert clip_grad._group_tensors_by_device_and_dtype is sorting
    for state, was in zip((net.state_dict(), optimizer.state_dict()["state"]), (frozen[0], frozen[1]["state"]), strict=True):
        assert str(state) == str(was)
    assert list(net.state_dict()) == list(frozen[0])
    assert not any(p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None) for p in net.parameters())
    with open_watch(net, optimizer, "used", probes="all", every=1, batch=BATCHES[0]):
        loop(net, optimizer)
    assert [hooks_of(m) for m in [*net.modules(), optimizer]] == hooks
    assert [sorted(vars(m)) for m in [*net.modules(), optimizer]] == names
    assert str(copy.deepcopy(net).state_dict()) == str(net.state_dict())


def test_model_and_optimizer_can_be_copied_and_saved_while_watched(open_watch: Any) -> None:
    net = build()
    optimizer = sgd(net)
    with open_watch(net, optimizer) as watched:
        loop(net, optimizer)
        copies = [copy.deepcopy(net), pickle.loads(pickle.dumps(net))]
        file = io.BytesIO()
        torch.save({"model": net, "optimizer": optimizer}, file)
        file.seek(0)
        copies.append(torch.load(file, weights_only=False)["model"])
        copy.deepcopy(optimizer)
        pickle.loads(pickle.dumps(optimizer))
        assert watched.step == 6
        for each in copies:
            loop(each, sgd(each))  # a copy trains as it will; nobody watches it
        assert watched.step == 6
        loop(net, optimizer)
    assert watched.step == 12
    for each in copies:
        assert all(torch.equal(a, b) for a, b in zip(each.state_dict().values(), copies[0].state_dict().values(), strict=True))


def test_models_are_let_go(open_watch: Any) -> None:
    import weakref

    net = build()
    optimizer = sgd(net)
    watched = open_watch(net, optimizer)
    watched.close()
    gone = weakref.ref(net)
    del net, optimizer, watched
    gc.collect()
    assert gone() is None


def test_a_notebook_cell_that_is_run_again(open_watch: Any, tmp_path: Path) -> None:
    net = build()
    optimizer = sgd(net)
    for name in ("first", "second"):
        watched = open_watch(net, optimizer, name)
        loop(net, optimizer)
        watched.close()
        watched.close()
        assert len(Run(tmp_path / name).tables["update_flow"]) == 6
    said: list[str] = []
    for number in (2, 3):  # the same name, and not closed before
        watched = open_watch(net, optimizer, "second", say=said.append)
        assert watched.run.path.name == f"second-{number}"
        assert any(f"second has been written already; this run is {watched.run.path}" in line for line in said)
        loop(net, optimizer, BATCHES[:2])
    assert any("second-2 was still open, and is closed now" in line for line in said)
    assert Run(tmp_path / "second-2").result["state"] == "stopped"
    watched.close()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "file").touch()
    with pytest.raises(InputError, match=r"run folder .*foreign exists already: choose another run name"):
        open_watch(net, optimizer, "foreign")
    names = set()
    for _ in range(3):  # within a second
        with open_watch(net, optimizer, "") as watched:
            names.add(watched.run.path.name)
    assert len(names) == 3


def test_a_new_watch_closes_the_one_before(open_watch: Any, tmp_path: Path) -> None:
    net = build()
    optimizer = sgd(net)
    said: list[str] = []
    with open_watch(net, optimizer, "a"):
        loop(net, optimizer, BATCHES[:2])
        with open_watch(net, optimizer, "b", say=said.append):
            loop(net, optimizer)
            assert len(hooks_of(optimizer)["_optimizer_step_pre_hooks"]) == 1
    assert said[0] == f"cifarlab: the watch of {tmp_path / 'a'} was still open, and is closed now"
    assert [len(Run(tmp_path / name).metrics.rows) for name in "ab"] == [2, 6]


def test_a_watch_that_nobody_closes_ends_with_its_model(open_watch: Any, tmp_path: Path) -> None:
    import weakref

    net = build()
    optimizer = sgd(net)
    open_watch(net, optimizer)
    loop(net, optimizer)
    gone = weakref.ref(net)
    del net, optimizer
    gc.collect()
    assert gone() is None
    assert Run(tmp_path / "run").result["state"] == "stopped"
    assert len(Run(tmp_path / "run").metrics.rows) == 6


def test_a_watch_that_the_program_s_end_closes_was_stopped(tmp_path: Path) -> None:
    code = f"""
import torch, cifarlab as cl
net = torch.nn.Linear(4, 3)
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
cl.watch(net, optimizer, "run", runs_dir={str(tmp_path)!r}, figures=False)
net(torch.randn(5, 4)).sum().backward()
optimizer.step()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    run = Run(tmp_path / "run")
    assert run.result["state"] == "stopped"
    assert len(run.metrics.rows) == 1


def test_a_start_that_fails_leaves_nothing(open_watch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = build()
    optimizer = sgd(net)
    with monkeypatch.context() as patch:
        patch.setattr(module, "describe_environment", lambda device: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            open_watch(net, optimizer)
    assert not list(tmp_path.iterdir())
    assert not any(hooks_of(net).values())
    open_watch(net, optimizer).close()


def test_the_run_is_read_anew_each_time(open_watch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    monkeypatch.setattr(module, "draw_recorded_figures", lambda run: drawn.append(len(run.tables["update_flow"])))
    net = build()
    optimizer = sgd(net)
    with open_watch(net, optimizer, flush_every=2, figures=True) as watched:
        loop(net, optimizer, BATCHES[:2])
        assert len(watched.run.tables["update_flow"]) == len(watched.run.metrics.rows) == 2
        loop(net, optimizer)
        assert len(watched.run.tables["update_flow"]) == len(watched.run.metrics.rows) == 8
        loop(net, optimizer, BATCHES[:1])
    assert drawn == [9]


def test_an_error_in_the_loop_goes_through_and_what_was_measured_is_there(open_watch: Any) -> None:
    net = build()
    optimizer = sgd(net)
    before = hooks_of(net), hooks_of(optimizer)
    watched = open_watch(net, optimizer, flush_every=100)

    def fails() -> None:
        with watched:
            loop(net, optimizer, BATCHES[:3])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert (hooks_of(net), hooks_of(optimizer)) == before
    assert len(watched.run.tables["update_flow"]) == 3
    assert watched.run.result["state"] == "stopped"


def test_a_step_within_a_step_is_one_row(open_watch: Any) -> None:
    """Of a class whose step calls that of the class it is derived from, both have torch's hooks."""

    class Decayed(SGD):
        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                for p in group["params"]:
                    p *= 0.99
            return super().step(closure)

    def make(net: Any) -> Optimizer:
        return Decayed(net.parameters(), lr=0.1)

    net = build()
    optimizer = make(net)
    with open_watch(net, optimizer) as watched:
        loop(net, optimizer)
    twin(watched.run, build, make)


def test_an_error_in_the_step_itself(open_watch: Any) -> None:
    class Fails(SGD):
        failing = False

        def step(self, closure: Any = None) -> Any:
            if self.failing:
                raise ArithmeticError
            return super().step(closure)

    net = build()
    optimizer = Fails(net.parameters(), lr=0.1)
    with open_watch(net, optimizer) as watched:
        loop(net, optimizer, BATCHES[:2])
        optimizer.failing = True
        with pytest.raises(ArithmeticError):
            loop(net, optimizer, BATCHES[:1])
        optimizer.failing = False
        optimizer.zero_grad()
        loop(net, optimizer, BATCHES[:2])
    assert watched.run.tables["update_flow"].steps.tolist() == [1, 2, 4, 5]


# ---- what a row is --------------------------------------------------------------------------------------------------------


def test_accumulated_micro_batches_are_one_row(open_watch: Any) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(108, 3))
    start = copy.deepcopy(net)
    optimizer = sgd(net)
    with open_watch(net, optimizer) as watched:
        for images, labels in BATCHES:
            for piece in range(0, 8, 2):
                (F.cross_entropy(net(images[piece : piece + 2]), labels[piece : piece + 2]) / 4).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
    twin(watched.run, lambda: start, sgd)


def test_several_optimizers_of_different_pace(open_watch: Any) -> None:
    """The second steps every other time; names are in the model's order, wherever they are held."""
    net = build()
    body = SGD([*net[5].parameters(), *net[0].parameters()], lr=0.1)
    norm = Adam(net[1].parameters(), lr=0.01)
    norms: list[float] = []
    with open_watch(net, [norm, body], probes="default", every=2, flush_every=4) as watched:
        for k, (images, labels) in enumerate(BATCHES):
            F.cross_entropy(net(images), labels).backward()
            body.step()
            if k % 2:
                norm.step()
            net.zero_grad()
            norms.append(torch.cat([p.detach().reshape(-1) for p in net.parameters()]).norm().item())
    run = watched.run
    names = [name for name, _ in net.named_parameters()]
    assert watched.step == 6
    for name in ("gradient_flow", "weight_flow", "update_flow"):
        table = run.tables[name]
        assert list(table.items) == names
        assert table.steps.tolist() == [1, 2, 3, 4, 5, 6]
        of_norm = np.array([item.startswith("1.") for item in names])
        assert np.isfinite(table.values[:, ~of_norm]).all()
        assert np.isfinite(table.values[1::2, of_norm]).all()
        assert np.isnan(table.values[::2, of_norm]).all()
    kinds = [item.partition("/")[0] for item in run.tables["distributions"].items]
    assert kinds == ["weight"] * 6 + ["gradient"] * 6 + ["update"] * 6
    assert [item.partition("/")[2] for item in run.tables["distributions"].items] == names * 3
    flow = run.tables["gradient_flow"]["norm"][1::2].astype(float)
    assert run.metrics.steps("gradient_flow/norm").tolist() == [2, 4, 6]  # else a part of the model would pass for the whole
    np.testing.assert_allclose(run.metrics["gradient_flow/norm"], np.sqrt((flow**2).sum(1)), rtol=1e-6)
    assert run.metrics.steps("weight_flow/norm").tolist() == run.metrics.steps("update_flow/ratio").tolist() == [2, 3, 4, 5, 6]
    np.testing.assert_allclose(run.metrics["weight_flow/norm"], norms[1:], rtol=1e-6)
    moved = np.sqrt(np.nansum(run.tables["update_flow"]["norm"].astype(float) ** 2, axis=1))[1:]
    np.testing.assert_allclose(run.metrics["update_flow/ratio"], moved / norms[1:], rtol=1e-5)
    assert (run.metrics["lr"] == 0.01).all()  # the first one's


def test_probes_of_the_network_are_measured_though_the_first_optimizer_has_nothing_chosen(open_watch: Any) -> None:
    net = build()
    one, other = SGD(net[0].parameters(), lr=0.1), SGD(net[5].parameters(), lr=0.1)
    with open_watch(net, [one, other], include="5.*") as watched:
        F.cross_entropy(net(BATCHES[0][0]), BATCHES[0][1]).backward()
        one.step()
        other.step()
    assert watched.run.tables["activations"].items == ("2.relu",)
    assert watched.run.tables["update_flow"].items == ("5.weight", "5.bias")


def test_a_closure_is_measured_at_its_first_call(open_watch: Any) -> None:
    """LBFGS evaluates the gradient itself, several times a step; SGD once."""
    images, labels = BATCHES[0]

    def closure_of(net: nn.Module, optimizer: Optimizer, seen: list[Any] | None = None) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(net(images), labels)
            loss.backward()
            if seen is not None:
                seen.append(([p.grad.norm().item() for p in net.parameters()], [p.detach().clone() for p in net.parameters()]))
            return loss

        return closure

    for make in (lambda p: LBFGS(p, lr=0.1, max_iter=4), lambda p: SGD(p, lr=0.1)):
        plain, net = (nn.Sequential(nn.Flatten(), nn.Linear(108, 3)) for _ in range(2))
        net.load_state_dict(plain.state_dict())
        reference, optimizer = make(plain.parameters()), make(net.parameters())
        firsts: list[Any] = []
        with open_watch(net, optimizer, type(optimizer).__name__) as watched:
            for k in range(3):
                seen: list[Any] = []
                reference.step(closure_of(plain, reference, seen))
                firsts.append((*seen[0], [p.detach().clone() for p in plain.parameters()]))
                closure = closure_of(net, optimizer)
                loss = optimizer.step(closure=closure) if k == 1 else optimizer.step(closure)
                assert loss is not None
        assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), net.parameters(), strict=True))
        tables = watched.run.tables
        for k, (norms, old, new) in enumerate(firsts):
            np.testing.assert_allclose(tables["gradient_flow"]["norm"][k], norms, rtol=1e-6)
            moved = [(b - a).norm().item() for a, b in zip(old, new, strict=True)]
            np.testing.assert_allclose(tables["update_flow"]["norm"][k], moved, rtol=1e-5)


# ---- scaled, clipped, compiled, on ranks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("unscale", [False, True], ids=["", "unscale_"])
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_gradients_under_a_scaler_are_the_true_ones(open_watch: Any, fused: bool, unscale: bool) -> None:
    """The scale changes on the way; distributions too are of the true gradients."""

    def make(net: Any) -> Optimizer:
        return SGD(net.parameters(), lr=0.1, momentum=0.9, fused=fused)

    found = {}
    for name in ("scaled", "true"):
        net = build()
        optimizer = make(net)
        scaler = torch.amp.GradScaler("cpu", enabled=name == "scaled", init_scale=2.0**12, growth_interval=2)
        with open_watch(net, optimizer, name, every=2) as watched:
            torch.manual_seed(1)
            for images, labels in BATCHES:
                scaler.scale(F.cross_entropy(net(images), labels)).backward()
                if unscale:
                    scaler.unscale_(optimizer)
                    clip_grad_norm_(net.parameters(), 0.3)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
        found[name] = watched.run
        assert not (watched.run.path / "incidents").exists()
    assert scaler.get_scale() == 1.0
    for name, table in found["true"].tables.items():
        assert table.steps.tolist() == found["scaled"].tables[name].steps.tolist()
        np.testing.assert_allclose(found["scaled"].tables[name].values, table.values, rtol=1e-4, atol=1e-6, err_msg=name)
    twin(found["scaled"], build, make, clip=(lambda net: clip_grad_norm_(net.parameters(), 0.3)) if unscale else None)


@pytest.mark.parametrize("unscale", [False, True], ids=["", "unscale_"])
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_a_step_that_the_scaler_skips_spoils_no_row(open_watch: Any, fused: bool, unscale: bool) -> None:
    """The third gradient overflows: the fourth step's numbers are its own. Only a fused optimizer is called at all."""
    net = build()
    optimizer = SGD(net.parameters(), lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    norms = []
    with open_watch(net, optimizer) as watched:
        torch.manual_seed(1)
        for k, (images, labels) in enumerate(BATCHES):
            loss = F.cross_entropy(net(images), labels) * (torch.inf if k == 2 else 1)
            scaler.scale(loss).backward()
            if unscale:
                scaler.unscale_(optimizer)
                clip_grad_norm_(net.parameters(), 0.2)
            scaler.step(optimizer)
            scaler.update()
            if k != 2:
                norms.append([p.grad.norm().item() for p in net.parameters()])
            optimizer.zero_grad(set_to_none=False)
    run = watched.run
    flow, moved = run.tables["gradient_flow"], run.tables["update_flow"]["norm"]
    good = [0, 1, 3, 4, 5] if fused else [0, 1, 2, 3, 4]
    assert len(flow) == (6 if fused else 5)
    np.testing.assert_allclose(flow["clipped_norm"][good], norms, rtol=1e-4)
    assert np.isfinite(flow["norm"][good]).all()
    assert moved[good].any(axis=1).all()
    if fused:
        assert (flow["non_finite"][2] > 0).all()
        assert not moved[2].any()
    assert not (run.path / "incidents").exists()
    assert run.alarms == []


def clip_all(net: Any) -> None:
    clip_grad_norm_(net.parameters(), 0.1)


def clip_both_ways(net: Any) -> None:
    clip_grad_norm_(net.parameters(), 0.5)
    clip_grad_value_(net.parameters(), 0.01)


def clip_in_parts(net: Any) -> None:
    for child in (net[0], net[1], net[5]):
        clip_grad_norm_(child.parameters(), 0.05)


CLIPS: dict[str, Callable[[Any], Any]] = {
    "by norm": clip_all,
    "by value": lambda net: clip_grad_value_(net.parameters(), 0.01),
    "by norm and value": clip_both_ways,
    "in parts": clip_in_parts,
    "not foreach": lambda net: clip_grad_norm_(net.parameters(), 0.1, foreach=False),
}


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("clip", CLIPS.values(), ids=CLIPS.keys())
def test_gradients_are_seen_before_clipping_and_after(open_watch: Any, clip: Callable[[Any], Any], set_to_none: bool) -> None:
    net = build()
    optimizer = sgd(net)
    with open_watch(net, optimizer) as watched:
        torch.manual_seed(1)
        for images, labels in BATCHES:
            F.cross_entropy(net(images), labels).backward()
            clip(net)
            optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)
    twin(watched.run, build, sgd, clip=clip)
    table = watched.run.tables["gradient_flow"]
    assert (table["norm"] > 1.01 * table["clipped_norm"]).any()


def test_one_clip_over_the_gradients_of_two_optimizers(open_watch: Any) -> None:
    net = build()
    optimizers = [SGD(net[5].parameters(), lr=0.1), SGD([*net[0].parameters(), *net[1].parameters()], lr=0.1)]
    with open_watch(net, optimizers) as watched:
        F.cross_entropy(net(BATCHES[0][0]), BATCHES[0][1]).backward()
        before = [p.grad.norm().item() for p in net.parameters()]
        clip_grad_norm_(net.parameters(), 0.1)
        for optimizer in optimizers:
            optimizer.step()
    flow = watched.run.tables["gradient_flow"]
    np.testing.assert_allclose(flow["norm"][0], before, rtol=1e-5, atol=1e-8)
    assert np.sqrt((flow["clipped_norm"][0] ** 2).sum()) == pytest.approx(0.1, rel=1e-3)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler uses parts of torch that are deprecated
@pytest.mark.parametrize("order", ["compiled, then watched", "watched, then compiled", "inside watched", "in place"])
def test_compiled_models(open_watch: Any, order: str) -> None:
    torch._dynamo.reset()
    net = build()
    optimizer = sgd(net)
    if order == "in place":
        net.compile(backend="eager", fullgraph=True)
        used = net
    elif order != "watched, then compiled":
        used = torch.compile(net, backend="eager", fullgraph=True)
    with open_watch(net if order != "compiled, then watched" else used, optimizer, every=3) as watched:
        if order == "watched, then compiled":
            used = torch.compile(net, backend="eager", fullgraph=True)
        loop(used, optimizer)
    twin(watched.run, build, sgd)
    assert watched.run.tables["update_flow"].items[0] == "0.weight"
    assert ("activations" in watched.run.tables) == (order == "compiled, then watched")
    assert not net._forward_pre_hooks
    used(BATCHES[0][0])
    torch._dynamo.reset()


def ddp_rank(folder: str) -> None:
    """What each of two processes does; started by the test below."""
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(108, 3))
    wrapped = nn.parallel.DistributedDataParallel(net)
    optimizer = sgd(net)
    part = slice(4 * dist.get_rank(), 4 * dist.get_rank() + 4)
    with cl.watch(wrapped, optimizer, "run", runs_dir=folder, say=None, every=2, figures=False) as watched:
        for images, labels in BATCHES:
            loss = F.cross_entropy(wrapped(images[part]), labels[part])
            loss.backward()
            watched.log(loss=loss)
            clip_grad_norm_(net.parameters(), 0.2)
            optimizer.step()
            optimizer.zero_grad()
    assert watched.run.path == Path(folder) / "run"
    assert watched.step == (0 if dist.get_rank() else 6)
    gc.collect()
    dist.destroy_process_group()


def test_of_two_ranks_the_first_measures_the_averaged_gradients(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    command = [sys.executable, __file__, str(tmp_path)]
    ranks = [subprocess.Popen(command, env=os.environ | group | {"RANK": str(rank)}) for rank in range(2)]
    assert [process.wait(timeout=120) for process in ranks] == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]

    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(108, 3))

    run = cl.load_run(tmp_path / "run")
    twin(run, make, sgd, clip=lambda net: clip_grad_norm_(net.parameters(), 0.2))
    assert len(run.metrics["train/loss"]) == 6


# ---- models that change, optimizers that rest ------------------------------------------------------------------------------


@pytest.mark.parametrize("probes", ["default", "all"])
def test_a_model_that_is_cast_is_followed(open_watch: Any, probes: str) -> None:
    """As `model.to(device)` keeps the parameters and changes what they hold."""
    net = build()
    optimizer = SGD(net.parameters(), lr=0.1)
    with open_watch(net, optimizer, probes=probes, every=2, batch=BATCHES[0] if probes == "all" else None) as watched:
        loop(net, optimizer, BATCHES[:3])
        net.double()
        wide = [(images.double(), labels) for images, labels in BATCHES]
        for images, labels in wide:
            F.cross_entropy(net(images), labels).backward()
            norms = [p.grad.norm().item() for p in net.parameters()]
            old = [p.detach().clone() for p in net.parameters()]
            optimizer.step()
            moved = [(p - was).norm().item() for p, was in zip(net.parameters(), old, strict=True)]
            optimizer.zero_grad()
    run = watched.run
    assert "probes_lost" not in run.result
    assert len(run.tables["update_flow"]) == 9
    assert run.tables["activations"].steps.tolist() == [1, 2, 4, 6, 8]
    np.testing.assert_allclose(run.tables["gradient_flow"]["norm"][-1], norms, rtol=1e-5)
    np.testing.assert_allclose(run.tables["update_flow"]["norm"][-1], moved, rtol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_model_that_is_moved_to_a_gpu_and_back_is_followed(open_watch: Any) -> None:
    net = build()
    optimizer = SGD(net.parameters(), lr=0.1)
    norms = []
    with open_watch(net, optimizer, probes="all", every=2, batch=BATCHES[0]) as watched:
        for device in ("cpu", "cuda", "cpu"):
            net.to(device)
            for images, labels in BATCHES[:3]:
                F.cross_entropy(net(images.to(device)), labels.to(device)).backward()
                norms.append([p.grad.norm().item() for p in net.parameters()])
                optimizer.step()
                optimizer.zero_grad()
    assert "probes_lost" not in watched.run.result
    np.testing.assert_allclose(watched.run.tables["gradient_flow"]["norm"], norms, rtol=1e-4, atol=1e-7)
    assert watched.run.tables["curvature"].steps.tolist() == [1, 2, 4, 6, 8]


def test_weights_that_are_pruned_are_followed(open_watch: Any) -> None:
    net = nn.Linear(4000, 100)
    optimizer = SGD(net.parameters(), lr=0.1)
    said: list[str] = []
    with open_watch(net, optimizer, say=said.append, every=1) as watched:
        net(torch.randn(5, 4000)).pow(2).mean().backward()
        optimizer.step()
        net.weight.data, net.bias.data = net.weight.data[:3, :5].clone(), net.bias.data[:3].clone()
        optimizer.zero_grad()
        for _ in range(2):
            net(torch.randn(5, 5)).pow(2).mean().backward()
            optimizer.step()
    flow = watched.run.tables["weight_flow"]
    assert flow["norm"][-1, 0] == pytest.approx(net.weight.norm().item(), rel=1e-5)
    assert flow["mean_abs"][-1, 0] == pytest.approx(net.weight.abs().mean().item(), rel=1e-5)
    assert len(flow) == 3
    assert [line for line in said if "size" in line] == [
        "cifarlab: the size of weight, bias has changed: it is measured as it is now"
    ]


def swap(net: nn.Module, average: list[Tensor]) -> None:
    """The weights for their average and back, as many loops do it around an evaluation."""
    for p, a in zip(net.parameters(), average, strict=True):
        p.data, a.data = a.data, p.data


def clamp_one_entry(net: nn.Module) -> None:
    net[0].weight.data.view(-1)[17] = 0.25


def write_through_numpy(net: nn.Module) -> None:
    net[5].weight.detach().numpy()[1, 3] += 1


def load(net: nn.Module) -> None:
    net.load_state_dict({name: t * 1.01 if t.is_floating_point() else t for name, t in net.state_dict().items()})


def in_place(net: nn.Module) -> None:
    with torch.no_grad():
        net[5].bias.add_(0.5)


FOREIGN: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda net: None,
    "load_state_dict": load,
    "in place": in_place,
    "one entry of .data": clamp_one_entry,
    "all of .data": lambda net: [p.data.clamp_(-0.05, 0.05) for p in net.parameters()],
    "numpy": write_through_numpy,
    ".data replaced": lambda net: [setattr(p, "data", 0.9 * p.data) for p in net.parameters()],
    "averages and back": lambda net: swap(net, [p.detach() + 1 for p in net.parameters()]),
    "another memory order": lambda net: net.to(memory_format=torch.channels_last),
    "NaN": lambda net: net[1].bias.data.fill_(torch.nan),
}


def step_and_measure(net: nn.Module, optimizer: Optimizer, images: Tensor, labels: Tensor) -> list[float]:
    """How far an optimizer step moves each parameter, by hand."""
    F.cross_entropy(net(images), labels).backward()
    old = [p.detach().clone() for p in net.parameters()]
    optimizer.step()
    optimizer.zero_grad()
    return [(p - was).norm().item() for p, was in zip(net.parameters(), old, strict=True)]


@pytest.mark.parametrize("way", ["compiled", "torch"])
@pytest.mark.parametrize("size", [4, 300], ids=["small", "of several blocks"])
@pytest.mark.parametrize("foreign", FOREIGN)
def test_what_others_do_to_weights_between_two_steps_is_no_part_of_an_update(
    open_watch: Any, foreign: str, size: int, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However they do it: torch counts none of what goes through `.data` or numpy. For the update is that of the step alone."""
    if way == "torch":
        monkeypatch.setattr("cifarlab.probes.moments._library", lambda: None)
    torch.manual_seed(0)
    net: Any = nn.Sequential(nn.Conv2d(3, size, 3), nn.BatchNorm2d(size), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2),
                             nn.Linear(16 * size, 3 if size < 9 else 20))  # fmt: skip
    optimizer = Adam(net.parameters(), lr=0.01, fused=True)
    moved = []
    with open_watch(net, optimizer, probes="weight_flow,update_flow") as watched:
        for step, (images, labels) in enumerate(BATCHES):
            if step in (2, 3, 5):
                FOREIGN[foreign](net)
            moved.append(step_and_measure(net, optimizer, images, labels))
    np.testing.assert_allclose(watched.run.tables["update_flow"]["norm"], moved, rtol=1e-3, atol=1e-7)
    norms = [p.norm().item() for p in net.parameters()]
    np.testing.assert_allclose(watched.run.tables["weight_flow"]["norm"][-1], norms, rtol=1e-5)


def write_a_layer_through_numpy(net: nn.Module) -> None:
    array = net[3].weight.detach().numpy()
    array *= 0.9


LATE: dict[str, tuple[Callable[[Any], Any], int]] = {  # what is written, and every how many steps (0: once)
    "load_state_dict": (load, 0),
    "all of .data": (lambda net: [p.data.mul_(0.9) for p in net.parameters()], 0),
    ".data replaced": (FOREIGN[".data replaced"], 0),
    "a layer through numpy": (write_a_layer_through_numpy, 0),
    "a mask of rows": (lambda net: net[3].weight.data[::3].zero_(), 1),
    "a mask of columns": (lambda net: net[3].weight.data[:, 96:160].zero_(), LOOK_AT),
    "one bias": (lambda net: net[0].bias.data[3:4].fill_(1.5), 1),
    "one bias, now and then": (lambda net: net[0].bias.data[3:4].fill_(1.5), 7),
}


@pytest.mark.parametrize("foreign", LATE)
def test_who_writes_weights_late_is_found_out_though_not_all_are_looked_at_any_more(open_watch: Any, foreign: str) -> None:
    write, every = LATE[foreign]
    net: Any = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 16, 64))
    optimizer = sgd(net)
    images, labels = BATCHES[0]
    moved, first = [], LOOKS_AT_ALL + 4
    with open_watch(net, optimizer, probes="weight_flow,update_flow") as watched:
        for step in range(first + LOOK_AT + 10):
            if step == first or (step > first and every and (step - first) % every == 0):
                write(net)
            moved.append(step_and_measure(net, optimizer, images, labels))
    np.testing.assert_allclose(watched.run.tables["update_flow"]["norm"], moved, rtol=1e-3, atol=1e-7)


def test_frozen_weights_made_in_inference_mode_are_measured_with_the_rest(open_watch: Any) -> None:
    """Of these torch counts no writes at all."""
    with torch.inference_mode():
        frozen = nn.Linear(108, 4).requires_grad_(False)
    net = nn.Sequential(nn.Flatten(), frozen, nn.Linear(4, 3))
    optimizer = SGD(net[2].parameters(), lr=0.1)
    with open_watch(net, optimizer) as watched:
        loop(net, optimizer)
    assert "probes_lost" not in watched.run.result
    assert watched.run.tables["update_flow"]["norm"].shape == (len(BATCHES), 4)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is:DeprecationWarning")
def test_a_model_is_scripted_before_it_is_watched_or_after(open_watch: Any) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(108, 4), nn.ReLU(), nn.Linear(4, 3))
    said: list[str] = []
    with open_watch(net, sgd(net)):
        with pytest.raises(AttributeError, match=r"torch.jit.script cannot compile .* script it before it is watched"):
            torch.jit.script(net)
        assert not hasattr(next(iter(net._forward_pre_hooks.values())), "__name__")
    scripted = torch.jit.script(net)
    optimizer = sgd(scripted)
    with open_watch(scripted, optimizer, "scripted", say=said.append) as watched:
        loop(scripted, optimizer)
    assert len(watched.run.tables["update_flow"]) == len(BATCHES)
    assert "probes_lost" not in watched.run.result
    assert any("a model of torch.jit.script takes no hooks" in line for line in said)


def test_parameters_that_are_added_later_are_told_of(open_watch: Any) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(108, 4))
    optimizer = SGD(net.parameters(), lr=0.1)
    said: list[str] = []
    with open_watch(net, optimizer, say=said.append) as watched:
        loop(net, optimizer)
        net.append(nn.Linear(4, 3))
        optimizer.add_param_group({"params": list(net[2].parameters())})
        loop(net, optimizer)
    assert sum("parameters that were not there when the watch began" in line for line in said) == 1
    assert watched.run.tables["update_flow"].items == ("1.weight", "1.bias")


def test_an_optimizer_that_rests_for_whole_flushes(open_watch: Any) -> None:
    """A critic's many steps to one of the generator's: the items of a table stay the same, and what was due is made up for."""
    net = nn.ModuleDict({"g": nn.Linear(4, 3), "d": nn.Linear(4, 3)})
    generator, critic = (SGD(part.parameters(), lr=0.01) for part in net.values())
    with open_watch(net, [generator, critic], flush_every=5, every=10, figures=True) as watched:
        for k in range(1, 61):
            net["d"](torch.randn(5, 4)).pow(2).mean().backward()
            critic.step()
            if k >= 23 and k % 10 == 3:
                net["g"](torch.randn(5, 4)).pow(2).mean().backward()
                generator.step()
            net.zero_grad()
    run = watched.run
    assert "probes_lost" not in run.result
    for name in ("gradient_flow", "weight_flow", "update_flow"):
        table = run.tables[name]
        assert table.items == ("g.weight", "g.bias", "d.weight", "d.bias")
        assert table.steps.tolist() == list(range(1, 61))
        assert np.isfinite(table.values[:, 2:]).all()
        assert (np.flatnonzero(np.isfinite(table.values[:, 0, 0])) + 1).tolist() == [23, 33, 43, 53]
    bins = run.tables["distributions"]
    assert len(bins.items) == 12
    of_generator = np.isfinite(bins.values[:, bins.items.index("update/g.weight"), 0])
    assert bins.steps[of_generator].tolist() == [23, 33, 43, 53]
    assert bins.steps[~of_generator].tolist() == [1, 10, 20, 30, 40, 50, 60]
    assert (run.path / "figures" / "distributions_weight.png").exists()


def test_sparse_embeddings_are_measured_by_every_probe(open_watch: Any) -> None:
    def make(sparse: bool) -> tuple[Any, Optimizer]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Embedding(10, 4, sparse=sparse), nn.Flatten(), nn.Linear(8, 3))
        return net, SGD(net.parameters(), lr=0.1)

    places, labels = torch.arange(16).reshape(8, 2) % 10, torch.arange(8) % 3
    found = []
    for sparse in (True, False):
        net, optimizer = make(sparse)
        with open_watch(net, optimizer, f"sparse {sparse}", probes="all", every=2, batch=(places, labels)) as watched:
            loop(net, optimizer, [(places, labels)] * 4)
        assert "probes_lost" not in watched.run.result
        assert net[0].sparse == sparse
        found.append(watched.run.tables)
    assert found[0].keys() == found[1].keys()
    for name, table in found[0].items():
        np.testing.assert_allclose(table.values, found[1][name].values, rtol=1e-4, atol=1e-6, err_msg=name)


def test_curvature_of_an_optimizer_without_weight_decay_has_no_edge(open_watch: Any) -> None:
    net = nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Flatten(), nn.Linear(8, 3))
    optimizers = [SparseAdam(net[0].parameters()), SGD(net[2].parameters(), lr=0.1)]
    places, labels = torch.arange(16).reshape(8, 2) % 10, torch.arange(8) % 3
    with open_watch(net, optimizers, probes="curvature", batch=(places, labels)) as watched:
        F.cross_entropy(net(places), labels).backward()
        for optimizer in optimizers:
            optimizer.step()
    found = watched.run.tables["curvature"]
    assert np.isfinite(found["sharpness"]).all()
    assert np.isnan(found["edge"]).all()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_optimizer_step_is_measured(open_watch: Any) -> None:
    torch._dynamo.reset()
    net = build()
    optimizer = sgd(net)
    step = torch.compile(lambda: optimizer.step(), backend="eager")
    with open_watch(net, optimizer) as watched:
        torch.manual_seed(1)
        for images, labels in BATCHES:
            F.cross_entropy(net(images), labels).backward()
            step()
            optimizer.zero_grad()
    twin(watched.run, build, sgd)
    torch._dynamo.reset()


# ---- what fails here ends no training --------------------------------------------------------------------------------------


def test_a_probe_that_fails_is_switched_off_alone(open_watch: Any) -> None:
    class TrainsOnly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            if not self.training:
                raise RuntimeError("there is no eval path yet")
            return F.relu(self.body(x))

    net = TrainsOnly()
    optimizer = SGD(net.parameters(), lr=0.1)
    said: list[str] = []
    with open_watch(net, optimizer, every=1, say=said.append) as watched:
        for _ in range(3):
            net(torch.ones(2, 4)).sum().backward()
            optimizer.step()
    assert watched.run.result["probes_lost"].keys() == {"activations", "batch_norm"}
    assert watched.run.result["probes_lost"]["activations"] == "RuntimeError: there is no eval path yet"
    assert sum("activations and batch_norm could not be measured" in line for line in said) == 1
    assert len(watched.run.tables["update_flow"]) == len(watched.run.tables["distributions"]) == 3


def test_a_disk_that_is_full_for_a_while_loses_nothing(open_watch: Any) -> None:
    net = build()
    optimizer = sgd(net)
    said: list[str] = []
    with open_watch(net, optimizer, flush_every=2, say=said.append) as watched:
        loop(net, optimizer, BATCHES[:2])
        writers = [watched._folder._metrics, *(table._file for table in watched._folder._tables.values())]
        files = [writer._file for writer in writers]
        with open("/dev/full", "ab", buffering=0) as full:
            for writer in writers:
                writer._file = full
            loop(net, optimizer, BATCHES[:4])
            for writer, file in zip(writers, files, strict=True):
                writer._file = file
        loop(net, optimizer, BATCHES[:2])
    run = watched.run
    assert [row["step"] for row in run.metrics.rows] == run.tables["update_flow"].steps.tolist() == list(range(1, 9))
    assert sum("cannot be written (No space left on device)" in line for line in said) == 1
    assert run.result["state"] == "finished"


def test_a_fault_of_ours_ends_neither_the_training_nor_hides_its_error(open_watch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_count_held", lambda optimizer: 1)
    net = build()
    optimizer = sgd(net)
    said: list[str] = []
    watched = open_watch(net, optimizer, say=said.append)
    monkeypatch.setattr(module, "_count_held", lambda optimizer: 1 / 0)

    def fails() -> None:
        with watched:
            loop(net, optimizer)
            raise KeyError("theirs")

    with pytest.raises(KeyError, match="theirs"):
        fails()
    assert watched.run.result["probes_lost"] == {"watch": "ZeroDivisionError: division by zero"}
    assert sum("has failed, and nothing more is measured" in line for line in said) == 1
    plain = build()
    loop(plain, sgd(plain))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), net.parameters(), strict=True))


# ---- what is refused, said and kept ---------------------------------------------------------------------------------------


def test_what_can_be_mended_is_refused_and_nothing_is_written(open_watch: Any, tmp_path: Path) -> None:
    net = build()
    optimizer = sgd(net)
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (sgd(build()), {}, "the SGD holds no parameter of this Sequential: watch the model that it trains"),
        ([optimizer, Adam(build().parameters())], {}, r"optimizer 1 \(Adam\) holds no parameter"),
        ([], {}, "there is no optimizer to watch"),
        (optimizer, {"probes": "curvature"}, "the probe 'curvature' needs images and labels .* batch="),
        (optimizer, {"probes": "gradients"}, "there is no probe 'gradients'"),
        (optimizer, {"every": 0}, "every=0 cannot be used in watch"),
        (optimizer, {"flush_every": 0}, "flush_every=0 cannot be used in watch"),
        (optimizer, {"include": "conv*"}, "no parameter is left to probe"),
        (optimizer, {"batch": (BATCHES[0][0], BATCHES[0][1][:3])}, "a fixed batch of 8 images and 3 labels"),
        *((optimizer, {"run": run}, "^run=.* cannot be used in watch: it must be a plain folder name; runs_dir says where it is")
          for run in ("../outside", "/tmp/abs", "a/b", "x" * 300, "a\0b", " ", "..")),
    ]  # fmt: skip
    for other, settings, told in cases:
        with pytest.raises(InputError, match=told):
            open_watch(net, other, **settings)
    for other in (nn.Sequential(nn.LazyLinear(3)), nn.ParameterList([nn.Parameter(torch.ones(2, dtype=torch.complex64))])):
        with pytest.raises(InputError, match="can be measured, as each is complex, empty or not made yet"):
            open_watch(other, sgd(other))
    assert not list(tmp_path.iterdir())
    assert not any(hooks_of(net).values())
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"run='file' cannot be used in watch: .* is a file"):
        open_watch(net, optimizer, "file")
    with pytest.raises(InputError, match=r"run folder .* cannot be (used|written) \(Not a directory\): choose another runs_dir"):
        open_watch(net, optimizer, runs_dir=tmp_path / "file")


def test_it_is_said_why_activations_are_not_measured(open_watch: Any) -> None:
    class OfDict(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(4, 4)

        def forward(self, x: Any) -> Tensor:
            return F.relu(self.body(x["x"]))

    for net, given, why in ((nn.Linear(4, 4).eval(), torch.ones(2, 4), "the model is in eval mode while it trains"),
                            (OfDict(), {"x": torch.ones(2, 4)}, "the model's input is not one tensor")):  # fmt: skip
        said: list[str] = []
        optimizer = SGD(net.parameters(), lr=0.1)
        with open_watch(net, optimizer, "", say=said.append):
            for _ in range(3):
                net(given).sum().backward()
                optimizer.step()
        assert sum("no batch to measure activations and batch_norm on" in line and why in line for line in said) == 1


def test_log_takes_numbers_and_tensors(open_watch: Any) -> None:
    net = build()
    optimizer = SGD(net.parameters(), lr=torch.tensor(0.25))
    with open_watch(net, optimizer, flush_every=2) as watched:
        for k, (images, labels) in enumerate(BATCHES):
            loss = F.cross_entropy(net(images), labels)
            loss.backward()
            watched.log(loss=loss if k % 2 else loss.item(), batch_share=0.5, top1=torch.tensor([k / 8]))
            optimizer.step()
            optimizer.zero_grad()
        for name in ("step", "epoch", "lr"):
            with pytest.raises(InputError, match=rf"log\({name}=…\) cannot be used"):
                watched.log(**{name: 3})
        watched.log(loss=None, nothing=None)
        for value in ("x", torch.ones(2)):
            with pytest.raises(InputError, match=r"log\(top1=…\) cannot be used with a \w+ that is not one number"):
                watched.log(top1=value)
    metrics = watched.run.metrics
    assert metrics["top1"].tolist() == [k / 8 for k in range(6)]
    assert (metrics["batch_share"] == 0.5).all()
    assert (metrics["lr"] == 0.25).all()
    assert len(metrics["train/loss"]) == 6


def test_rows_can_be_read_while_the_loop_runs(open_watch: Any, tmp_path: Path) -> None:
    net = build()
    optimizer = sgd(net)
    with open_watch(net, optimizer, flush_every=2):
        loop(net, optimizer, BATCHES[:5])
        run = cl.load_run(tmp_path / "run")
        assert len(run.metrics.rows) == len(run.tables["gradient_flow"]) == 4
        assert not run.is_finished
    assert len(Run(tmp_path / "run").metrics.rows) == 5


def test_a_watched_run_is_known_for_one(open_watch: Any, tmp_path: Path) -> None:
    net = build()
    optimizer = sgd(net)
    with open_watch(net, optimizer, probes="weight_flow"):
        loop(net, optimizer)
    run = cl.load_run(tmp_path / "run")
    assert run.is_watched
    with pytest.raises(InputError, match=r"was recorded by cl.watch around a loop of its own: it has no settings to go by$"):
        _ = run.config
    told = {"name": "0.weight", "shape": [4, 3, 3, 3], "trainable": True, "frozen_by_design": False}
    assert run.probed["parameters"][0] == told
    assert list(run.tables) == ["weight_flow"]


def test_an_optimizer_that_knows_no_lr(open_watch: Any) -> None:
    class Signs(Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {})

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for p in group["params"]:
                    p -= 0.01 * p.grad.sign()

    net = build()
    with open_watch(net, Signs(net.parameters())) as watched:
        loop(net, watched._optimizers[0])
    assert "lr" not in watched.run.metrics
    k = watched.run.tables["update_flow"].items.index("0.weight")
    np.testing.assert_allclose(watched.run.tables["update_flow"]["mean_abs"][:, k], 0.01, rtol=1e-4)


def test_a_step_that_is_not_finite_is_kept_and_said(open_watch: Any, tmp_path: Path) -> None:
    said: list[str] = []
    net = build()
    optimizer = sgd(net)
    broken = [(images.clone(), labels) for images, labels in BATCHES]
    broken[3][0][2, 0, 1, 1] = torch.nan
    with open_watch(net, optimizer, say=said.append, flush_every=1) as watched:
        loop(net, optimizer, broken, watched)
    assert [alarm.rule for alarm in watched.alarms] == ["non_finite"]
    assert watched.run.alarms[0]["step"] == 4
    assert any("non finite" in line or "NaN" in line for line in said)
    weights, batch, told = load_incident(tmp_path / "run", 4)
    assert (told["place"], told["samples"]) == ("input", [2])
    assert torch.equal(batch["images"].nan_to_num(), broken[3][0].nan_to_num())
    assert all(torch.isfinite(w).all() for w in weights.values())
    assert len(list((tmp_path / "run" / "incidents").iterdir())) == 1  # the weights are broken from then on


@pytest.mark.parametrize("make", [sgd, lambda net: [SGD(net[:3].parameters(), lr=0.1), Adam(net[3:].parameters())]],
                         ids=["one optimizer", "two"])  # fmt: skip
def test_what_is_known_late_is_kept_as_what_is_known_at_once(
    open_watch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Any
) -> None:
    """As on a GPU: the host learns of the bad gradient of step 3 at the flush after step 5, and the weights have moved on."""
    batches = [(images.clone(), labels) for images, labels in BATCHES]
    batches[2][0][5, 0, 0, 0] = torch.nan
    ended = []
    for name, is_late in (("at-once", False), ("late", True)):
        monkeypatch.setattr(Panel, "_knows_at_once", not is_late)
        net = build()
        optimizers = make(net)
        torch.manual_seed(1)
        # Of one optimizer, weights of which nothing is measured belong to the step too.
        chosen = "5.*" if is_late and isinstance(optimizers, Optimizer) else ""
        with open_watch(net, optimizers, name, flush_every=5, probes="gradient_flow", include=chosen) as watched:
            for images, labels in batches:
                F.cross_entropy(net(images), labels).backward()
                for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
                    optimizer.step()
                net.zero_grad()
        (alarm,) = watched.alarms
        assert (alarm.rule, alarm.step) == ("non_finite", 3)
        assert "first in the input, samples 5 of the batch" in alarm.evidence
        assert [path.name for path in (tmp_path / name / "incidents").iterdir()] == ["step-00000003"]
        ended.append(net.state_dict())
    one, other = (load_incident(tmp_path / name, 3) for name in ("at-once", "late"))
    parameters = {name for name, _ in build().named_parameters()}
    assert one[0].keys() == other[0].keys()
    assert all(torch.equal(one[0][name], other[0][name]) for name in parameters)
    np.testing.assert_array_equal(one[1]["images"].numpy(), other[1]["images"].numpy())
    assert other[2]["buffers_reset"] == ["1.running_mean", "1.running_var"]
    for a, b in zip(ended[0].values(), ended[1].values(), strict=True):
        np.testing.assert_array_equal(a.numpy(), b.numpy())


class _BadBackward(torch.autograd.Function):
    """Passes on what it gets; its gradient is NaN once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, is_bad: bool) -> Tensor:
        ctx.is_bad = is_bad
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0] * torch.nan if ctx.is_bad else gradients[0], None


class BadAtThirdPass(nn.Module):
    """The gradients of what is before it are NaN in one step."""

    def __init__(self) -> None:
        super().__init__()
        self.passes = 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += self.training and torch.is_grad_enabled()
        return _BadBackward.apply(x, self.passes == 3)  # type: ignore[no-untyped-call,no-any-return]


@pytest.mark.parametrize("make", [
    sgd,
    lambda net: [SGD(net[:3].parameters(), lr=0.1), Adam(net[3:].parameters())],
    lambda net: [SGD(net[3:].parameters(), lr=0.1), Adam(net[:3].parameters())],
], ids=["one optimizer", "two, the bad one first", "two, the bad one last"])  # fmt: skip
@pytest.mark.parametrize("trouble", ["in all gradients", "in what is not measured"])
def test_an_incident_is_kept_wherever_the_first_bad_gradient_is(
    open_watch: Any, tmp_path: Path, make: Any, trouble: str, is_late: bool
) -> None:
    """Also in parameters that `include` leaves out, of an optimizer of which nothing is measured: they break all weights."""
    net, batches = build(), [(images.clone(), labels) for images, labels in BATCHES]
    if trouble == "in all gradients":
        batches[2][0][5, 0, 0, 0] = torch.nan
    else:
        net[4] = BadAtThirdPass()  # in the place of dropout
    optimizers = make(net)
    start = [copy.deepcopy(p.detach()) for p in net.parameters()]
    with open_watch(net, optimizers, flush_every=5, probes="gradient_flow", include="5.*") as watched:
        for k, (images, labels) in enumerate(batches):
            F.cross_entropy(net(images), labels).backward()
            if k == 2:
                start = [copy.deepcopy(p.detach()) for p in net.parameters()]
            for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
                optimizer.step()
            net.zero_grad()
    assert [(alarm.rule, alarm.step) for alarm in watched.alarms] == [("non_finite", 3)]
    assert [path.name for path in (tmp_path / "run" / "incidents").iterdir()] == ["step-00000003"]
    weights, batch, told = load_incident(tmp_path / "run", 3)
    np.testing.assert_array_equal(batch["images"].numpy(), batches[2][0].numpy())
    assert told["place"] == ("input" if trouble == "in all gradients" else "unknown")
    bad = {name for name, _ in net.named_parameters() if trouble == "in all gradients" or name < "5"}
    assert set(told["parameters"]) == (set() if is_late else bad)
    assert ("no probe measures" in watched.alarms[0].evidence) == (trouble != "in all gradients")
    for (name, _), before in zip(net.named_parameters(), start, strict=True):
        if name < "5" or not isinstance(optimizers, list):
            assert torch.equal(weights[name], before), name


@pytest.mark.parametrize("order", [1, -1], ids=["as listed", "the other way round"])
def test_a_second_optimizer_does_not_write_over_what_was_kept_before_the_first_one_moved(
    open_watch: Any, tmp_path: Path, order: int, is_late: bool
) -> None:
    class Careful(SGD):
        def step(self, closure: Any = None) -> Any:
            for p in self.param_groups[0]["params"]:
                p.grad.nan_to_num_()
            return super().step(closure)

    net, batches = build(), [(images.clone(), labels) for images, labels in BATCHES]
    batches[2][0][5, 0, 0, 0] = torch.nan
    one, other = Careful(net[:3].parameters(), lr=0.1, weight_decay=0.1), SGD(net[3:].parameters(), lr=0.1)
    with open_watch(net, [one, other][::order]):
        for k, (images, labels) in enumerate(batches[:3]):
            F.cross_entropy(net(images), labels).backward()
            if k == 2:
                start = {name: p.detach().clone() for name, p in net.named_parameters()}
            one.step()
            other.step()
            net.zero_grad()
    assert torch.isfinite(net[0].weight).all()
    weights = load_incident(tmp_path / "run", 3)[0]
    assert all(torch.equal(weights[name], before) for name, before in start.items())


@pytest.mark.parametrize("by", ["torch", "triton"])
def test_weights_before_the_first_bad_update_are_those_of_the_model_s_parameters(request: pytest.FixtureRequest, by: str) -> None:
    """Moved, cast or laid out otherwise they are followed at once, replaced ones some steps later; until then it is known."""
    if by == "triton":
        request.getfixturevalue("by_triton")
    net, good, bad = build(), torch.tensor(False), torch.tensor(True)
    before = WeightsBeforeBad(net)

    def check_kept() -> None:
        before.see(good)
        then = [p.detach().clone() for p in net.parameters()]
        before.see(bad)  # these are kept
        for p in net.parameters():
            p.data.fill_(torch.nan)
        before.see(good)
        assert before.are_of_model()
        with before.restored():
            assert all(map(torch.equal, net.parameters(), then))
        assert all(p.isnan().all() for p in net.parameters())
        for p, was in zip(net.parameters(), then, strict=True):
            p.data.copy_(was)

    check_kept()
    assert bool(before._passes) == (by == "triton")
    net.to(memory_format=torch.channels_last)
    check_kept()
    net.double()
    check_kept()
    assert before._passes is None
    net.float()
    before.see(good)
    net[5] = nn.Linear(64, 3)
    before.see(bad)
    assert not before.are_of_model()
    for _ in range(LOOK_AGAIN):
        before.see(good)
    check_kept()


@pytest.mark.usefixtures("by_triton")
def test_weights_of_a_kind_of_tensor_that_nobody_knows_are_not_read_by_their_address() -> None:
    class Shard(Tensor):
        pass

    net = build()
    net[5].weight = nn.Parameter(net[5].weight.detach().as_subclass(Shard))
    assert WeightsBeforeBad(net)._passes is None


@pytest.mark.parametrize("by", ["torch", "triton"])
@pytest.mark.parametrize(("change_at", "change"), {
    "a layer more, before": (1, lambda net: net.add_module("more", nn.Linear(3, 3))),
    "a layer more, behind": (3, lambda net: net.add_module("more", nn.Linear(3, 3))),
    "laid out anew, behind": (3, lambda net: net.to(memory_format=torch.channels_last)),
}.values(), ids=["a layer more, before", "a layer more, behind", "laid out anew, behind"])  # fmt: skip
def test_an_incident_of_a_model_that_has_other_parameters_since_is_told_and_not_made_up(
    open_watch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, by: str, change_at: int,
    change: Callable[[Any], Any]
) -> None:  # fmt: skip
    """By the look at each module too, which finds what is new while the bad step waits to be told."""
    if by == "triton":
        request.getfixturevalue("by_triton")
    monkeypatch.setattr("cifarlab.probes.incident.LOOK_AGAIN", 4)
    monkeypatch.setattr(Panel, "_knows_at_once", False)
    net, batches, said = build(), [(images.clone(), labels) for images, labels in BATCHES], []
    batches[2][0][5, 0, 0, 0] = torch.nan
    optimizer = SGD(net.parameters(), lr=0.1)
    with open_watch(net, optimizer, flush_every=5, say=said.append) as watched:
        for k, (images, labels) in enumerate(batches[:5]):
            if k == change_at:
                change(net)
            F.cross_entropy(net(images), labels).backward()
            optimizer.step()
            net.zero_grad()
    assert [(alarm.rule, alarm.step) for alarm in watched.alarms] == [("non_finite", 3)]
    assert not (tmp_path / "run" / "incidents").exists()
    (told,) = [line for line in said if "are lost" in line]
    assert told.startswith("cifarlab: the weights before step 3, whose gradients are not finite, are lost")


@pytest.mark.usefixtures("by_triton")
@pytest.mark.parametrize("make", [sgd, lambda net: [SGD(net[:3].parameters(), lr=0.1), SGD(net[3:].parameters(), lr=0.2)]],
                         ids=["one optimizer", "two"])  # fmt: skip
def test_between_two_flushes_the_host_waits_for_nothing_that_a_gpu_computes(
    open_watch: Any, monkeypatch: pytest.MonkeyPatch, host_waits: Any, make: Any
) -> None:
    """Seen on a CPU, whose probes measure as a GPU's do."""
    monkeypatch.setattr(Panel, "_knows_at_once", False)
    net = build()
    optimizers = make(net)
    with open_watch(net, optimizers, flush_every=100, probes="gradient_flow,weight_flow,update_flow"), host_waits:
        for step, (images, labels) in enumerate([*BATCHES, *BATCHES][:8], 1):
            host_waits.is_on = step > 2
            F.cross_entropy(net(images), labels).backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
                optimizer.step()
            net.zero_grad()
        host_waits.is_on = False
    assert not host_waits.found


def test_batches_of_the_steps_since_the_flush_are_kept_within_a_limit(
    open_watch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Panel, "_knows_at_once", False)
    monkeypatch.setattr(module, "MOST_SEEN", 2 * BATCHES[0][0].nbytes)
    net = build()
    optimizer = sgd(net)
    with open_watch(net, optimizer, flush_every=4, probes="gradient_flow") as watched:
        loop(net, optimizer, BATCHES[:3])
        assert list(watched._seen_at) == [2, 3]
        loop(net, optimizer, BATCHES[:1])
        assert not watched._seen_at
    assert not (tmp_path / "run" / "incidents").exists()


def test_weights_that_share_memory_are_kept_too(open_watch: Any, tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
            self.other.weight = self.one.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.other(self.one(x))  # type: ignore[no-any-return]

    net = Tied()
    optimizer = SGD(net.parameters(), lr=0.1)
    with open_watch(net, optimizer):
        net(torch.full((2, 4), torch.inf)).sum().backward()
        optimizer.step()
    assert set(load_incident(tmp_path / "run", 1)[0]) == {"one.weight", "one.bias", "other.weight", "other.bias"}


def test_models_of_several_inputs_are_watched_without_their_activations(open_watch: Any) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(4, 4)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return F.relu(self.body(x) + y)

    net = Two()
    optimizer = SGD(net.parameters(), lr=0.1)
    with open_watch(net, optimizer) as watched:
        for value in (1.0, torch.inf):
            net(torch.ones(2, 4), y=torch.full((2, 4), value)).sum().backward()
            optimizer.step()
    assert "activations" not in watched.run.tables
    assert len(watched.run.tables["update_flow"]) == 2


def test_a_model_that_cannot_be_run_again_does_not_end_the_training(open_watch: Any) -> None:
    class Once(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.calls = nn.Linear(4, 4), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            if self.calls == 3:
                raise RuntimeError("out of memory")
            return self.body(x)  # type: ignore[no-any-return]

    said: list[str] = []
    net = Once()
    optimizer = SGD(net.parameters(), lr=0.1)
    with open_watch(net, optimizer, probes="gradient_flow", say=said.append):
        for value in (1.0, 1e38):
            (net(torch.full((2, 4), value)) * 1e30).sum().backward()
            optimizer.step()
    assert any("step 2 are not finite; the step could not be kept (out of memory)" in line for line in said)


def test_what_is_said_at_the_end(open_watch: Any) -> None:
    said: list[str] = []
    net = build()
    optimizer = sgd(net)
    with open_watch(net, optimizer, say=said.append) as watched:
        loop(net, optimizer)
    assert said[-1].startswith("cifarlab: 6 optimizer steps watched; the probes took ")
    assert said[-1].endswith(f"0 alarm(s); {watched.run.path}")


def test_figures_are_drawn_at_the_end(open_watch: Any) -> None:
    said: list[str] = []
    net = build()
    optimizer = sgd(net)
    with open_watch(net, optimizer, figures=True, say=said.append) as watched:
        loop(net, optimizer, watched=watched)
    assert f"cifarlab: drawing figures of {watched.run.path} …" in said
    assert "gradient_flow.png" in {path.name for path in (watched.run.path / "figures").iterdir()}


if __name__ == "__main__":
    ddp_rank(sys.argv[1])


# ---- incidents name the right place ---------------------------------------------------------------------------------------


def told_of(watched: Any, step: int) -> dict[str, Any]:
    return load_incident(watched.run.path, step)[2]


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_the_bad_one_of_accumulated_micro_batches_is_found(open_watch: Any, bad: int) -> None:
    net = mlp()
    optimizer = SGD(net.parameters(), lr=0.01)
    with open_watch(net, optimizer) as watched:
        for step in range(4):
            for k, size in enumerate((5, 3, 5)):
                images = torch.randn(size, 4)
                if (step, k) == (2, bad):
                    images[2] = torch.nan
                net(images).pow(2).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    _, batch, told = load_incident(watched.run.path, 3)
    assert (told["place"], told["samples"]) == ("input", [(0, 5, 8)[bad] + 2])
    assert told["micro_batches"] == [5, 3, 5]
    assert torch.isnan(batch["images"][told["samples"]]).all()
    assert len(batch["images"]) == 13


def test_micro_batches_that_do_not_fit_are_let_go_and_counted(open_watch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cifarlab.probes.watch.MOST_SEEN", 2 * 5 * 4 * 4)
    net = mlp()
    optimizer = SGD(net.parameters(), lr=0.01)
    with open_watch(net, optimizer) as watched:
        for k in range(3):
            (net(torch.randn(5, 4)).pow(2).mean() * (torch.inf if k == 0 else 1)).backward()
        optimizer.step()
    told = told_of(watched, 1)
    assert (told["place"], told["layer"], told["micro_batches"], told["micro_batches_missing"]) == ("unknown", "", [5, 5], 1)
    assert "1 of 3 micro-batches were not kept" in told["found"]


@pytest.mark.parametrize("keyword", [False, True], ids=["model(images)", "model(input=images)"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, None])
def test_activations_are_measured_under_the_autocast_of_the_training(
    open_watch: Any, dtype: torch.dtype | None, keyword: bool
) -> None:
    model, measured = build(), []
    model[0].register_forward_hook(lambda module, _, out: None if module.training else measured.append(out.dtype))
    optimizer = SGD(model.parameters(), 0.1)
    with open_watch(model, optimizer, probes="activations,batch_norm", every=2, batch=BATCHES[0]) as watched:
        for images, labels in BATCHES[:4]:
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
                loss = F.cross_entropy(model(input=images) if keyword else model(images), labels)
            loss.backward()
            optimizer.step()
    assert measured == 3 * [dtype or torch.float32]
    assert watched.run.tables["activations"].steps.tolist() == watched.run.tables["batch_norm"].steps.tolist() == [1, 2, 4]


def test_an_overflow_under_autocast_is_found_in_its_layer(open_watch: Any) -> None:
    net = mlp()
    optimizer = SGD(net.parameters(), lr=0.01)
    with open_watch(net, optimizer) as watched:
        for step in range(4):
            images = torch.randn(5, 4)
            if step == 2:
                images[3] = 1e5
            with torch.autocast("cpu", torch.float16):
                loss = net(images).pow(2).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    told = told_of(watched, 3)
    assert (told["place"], told["layer"], told["samples"], told["autocast"]) == ("forward", "0", [3], "float16")


def test_no_layer_is_named_when_the_trouble_is_not_seen_again(open_watch: Any) -> None:
    net = mlp()
    optimizer = SGD(net.parameters(), lr=0.01)
    with open_watch(net, optimizer, flush_every=1) as watched:
        (net(torch.randn(5, 4)).pow(2).mean() * torch.inf).backward()
        optimizer.step()
    told = told_of(watched, 1)
    assert (told["place"], told["layer"], told["samples"]) == ("unknown", "", [])
    assert told["found"].startswith("not reproduced: all is finite when the step is done again (but for the loss")
    (alarm,) = watched.run.alarms
    assert alarm["layers"] == []
    assert "not reproduced" in alarm["evidence"]


class Root(nn.Module):
    """√x: finite at 0, with a slope that is not."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.stem, self.head, self.scale = nn.Linear(4, 8), nn.Linear(8, 3), scale

    def forward(self, images: Tensor) -> Tensor:
        return self.head((self.scale * self.stem(images)).abs().sqrt())  # type: ignore[no-any-return]


def test_a_backward_pass_is_done_again_where_labels_are_known() -> None:
    images, labels = torch.randn(6, 4), torch.randint(3, (6,))
    net = Root(0.0)
    found = locate(net, images, labels, F.cross_entropy, sizes=[4, 2])
    assert (found.place, found.layer) == ("backward", "stem.bias")
    assert all(p.grad is None for p in net.parameters())
    assert locate(Root(1.0), images, labels, F.cross_entropy, sizes=[4, 2]).place == "unknown"
    assert locate(net, images).place == "unknown"


def test_samples_are_counted_over_micro_batches() -> None:
    net = mlp()
    net[0].weight.data[:] = 1.0
    images, labels = torch.zeros(6, 4), torch.zeros(6, dtype=torch.long)
    images[4] = 3e38
    found = locate(net, images, sizes=[3, 3])
    assert (found.place, found.layer, found.samples) == ("forward", "0", (4,))

    def criterion(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels) / (labels != 2).float().mean()

    images[4], labels[5] = 0, 2
    assert locate(net, images, labels, criterion, sizes=[3, 3]).samples == (5,)


def test_norm_statistics_that_the_bad_batch_broke_are_reset_and_named(open_watch: Any) -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    net.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    optimizer = SGD(net.parameters(), lr=0.01)
    with open_watch(net, optimizer) as watched:
        for step in range(3):
            images = torch.randn(5, 4)
            images[3] = torch.nan if step == 2 else 0
            net(images).pow(2).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    weights, _, told = load_incident(watched.run.path, 3)
    assert told["buffers_reset"] == ["1.running_mean", "1.running_var"]
    assert torch.equal(weights["1.running_mean"], torch.zeros(8))
    assert torch.equal(weights["1.running_var"], torch.ones(8))
    assert torch.equal(weights["mask"], torch.tensor([0.0, -torch.inf]))
    net.load_state_dict(weights)


def test_the_map_of_gradients_ranks_by_their_mean_and_leaves_out_steps_that_were_not_done(
    open_watch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[str, Any] = {}

    def draw(steps: Any, names: Any, values: Any, *, quantity: str, **_: Any) -> None:
        drawn[quantity] = values

    monkeypatch.setattr("cifarlab.gallery.draw_flow_map", draw)
    monkeypatch.setattr("cifarlab.gallery.save_figure", lambda figure, path: None)
    net = mlp()
    optimizers = [SGD(net[0].parameters(), lr=0.1), SGD(net[2].parameters(), lr=0.1)]
    with open_watch(net, optimizers) as watched:
        for step in range(6):
            net(torch.randn(5, 4)).pow(2).mean().backward()
            optimizers[0].step()
            if step % 2:
                optimizers[1].step()
            net.zero_grad()
    draw_recorded_figures(watched.run)
    assert set(drawn) == {"mean |g|", "mean |Δw|", "mean |w|"}
    table = watched.run.tables["gradient_flow"]
    np.testing.assert_array_equal(drawn["mean |g|"].filled(np.nan), table["mean_abs"])
    for values in drawn.values():
        assert np.isfinite(values.compressed()).all()
        np.testing.assert_array_equal(np.ma.getmaskarray(values), np.isnan(table["norm"]))


@pytest.mark.parametrize("place", ["hook", "flush", "end"])
def test_the_told_share_holds_whatever_a_hook_does(open_watch: Any, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    net = mlp()
    optimizer = SGD(net.parameters(), lr=0.1)
    watched = open_watch(net, optimizer, flush_every=2)

    def slowly(call: Any) -> Any:
        def slow(*arguments: Any) -> Any:
            time.sleep(0.05)
            return call(*arguments)

        return slow

    if place == "hook":
        monkeypatch.setattr(watched, "_end_row", slowly(watched._end_row))
    elif place == "flush":
        monkeypatch.setattr(watched._folder, "rows", slowly(watched._folder.rows))
    else:
        monkeypatch.setattr(watched._diagnosis, "finish", slowly(watched._diagnosis.finish))
    for _ in range(6):
        net(torch.randn(5, 4)).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    watched.close()
    result = watched.run.result
    spent = result["probe_share"] * result["train_seconds"]
    assert {"hook": 0.3, "flush": 0.15, "end": 0.05}[place] <= spent <= result["train_seconds"]


def test_a_step_that_becomes_a_graph_is_not_measured_and_that_is_said_once(
    open_watch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps 3 and 4 are captured: nothing of it is in the tables, and what is measured behind them is right."""
    from cifarlab.probes import panel

    net, said = build(), []
    optimizer = sgd(net)
    with open_watch(net, optimizer, say=said.append, probes="gradient_flow,weight_flow,update_flow") as watched:
        for step, (images, labels) in enumerate(BATCHES, 1):
            monkeypatch.setattr(panel, "is_capturing", lambda device, now=step: now in (3, 4))
            F.cross_entropy(net(images), labels).backward()
            clip_grad_norm_(net.parameters(), 1.0)
            before = net[5].weight.detach().clone()
            optimizer.step()
            net.zero_grad()
    table = watched.run.tables["update_flow"]
    assert table.steps.tolist() == [1, 2, 5, 6]
    change = (net[5].weight - before).norm().item()
    assert table.values[-1, table.items.index("5.weight"), 0] == pytest.approx(change, rel=1e-5)
    assert sum("captured in a CUDA graph" in line for line in said) == 1
