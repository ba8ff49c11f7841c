"""The range test: the one loop with a rising rate, and anybody's own objects, of which not a bit may change."""

import copy
import itertools
import json
import random
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler, Sampler, TensorDataset

import cifarlab as cl
from cifarlab.config import InputError
from cifarlab.lr_curve import FILE, load_range
from cifarlab.runs import Run, RunFolder


def small(**changes: Any) -> cl.TrainConfig:
    settings: dict[str, Any] = dict(data="digits", model="tiny", train_images=96, batch_size=16, epochs=2, lr=0.05)
    return cl.TrainConfig(**(settings | changes))


def quiet(folder: Path, **changes: Any) -> cl.WatchConfig:
    return cl.WatchConfig(**(dict(runs_dir=folder, name="test", figures=False) | changes))


# ---- the one loop ----------------------------------------------------------------------------------------------------


def test_a_range_test_is_the_loop_with_a_rising_rate(tiny: str, tmp_path: Path) -> None:
    said: list[str] = []
    found = cl.lr_range(small(), quiet(tmp_path, figures=True), start=1e-5, end=1.0, steps=25, seeds=2, say=said.append)
    assert [curve.seed for curve in found.curves] == [0, 1]
    for curve in found.curves:
        assert curve.end == "swept"
        np.testing.assert_allclose(curve.lrs, 1e-5 * 1e5 ** (np.arange(25) / 24), rtol=1e-12)
    assert found.curves[0].losses != found.curves[1].losses  # other weights, order, augmentation
    assert found.path == tmp_path / "test"
    assert sorted(path.name for path in found.path.iterdir()) == [FILE, "lr_range.png", "seed-0", "seed-1"]
    assert load_range(found.path) == found
    run = Run(found.path / "seed-1")
    np.testing.assert_array_equal(run.metrics["train/loss"], found.curves[1].losses)
    assert run.result["state"] == "swept"
    assert run.config.schedule == "range-exponential"
    assert not (run.path / "checkpoints").exists()
    assert len(said) == 2
    assert "25 points" in said[0]


def test_the_test_set_is_never_looked_at(tiny: str, tmp_path: Path) -> None:
    for number, options in enumerate((dict(steps=12), dict(steps=12, val=True), dict(epochs=3), dict(epochs=3, val=True))):
        found = cl.lr_range(small(), quiet(tmp_path, name=str(number)), start=1e-4, end=1e-1, seeds=1, **options)  # type: ignore[arg-type]
        run = Run(tmp_path / str(number) / "seed-0")
        assert not [key for key in run.metrics if key.startswith("test/")]
        assert "test/accuracy" not in run.result
        assert not (run.path / "predictions.npz").exists()
        assert found.split == ("val" if "val" in options else "train")
        assert ("val/loss" in run.metrics) == ("val" in options)


def test_with_val_the_points_are_those_of_held_out_images(tiny: str, tmp_path: Path) -> None:
    found = cl.lr_range(small(train_images=0), quiet(tmp_path), start=1e-4, end=1.0, steps=80, seeds=1, val=True)
    run = Run(tmp_path / "test" / "seed-0")
    assert found.points == 40
    np.testing.assert_array_equal(found.curves[0].losses, run.metrics["val/loss"])
    np.testing.assert_allclose(found.curves[0].lrs, run.metrics["lr"][1::2])
    assert run.config.val_fraction == pytest.approx(0.1)
    assert run.environment["num_steps"] == 80


def test_the_ladder_holds_each_rate_for_an_epoch(tiny: str, tmp_path: Path) -> None:
    found = cl.lr_range(small(), quiet(tmp_path, figures=True), epochs=4, seeds=2)
    assert (found.start, found.end) == (1e-4, 1e-2)  # lab D's
    run = Run(tmp_path / "test" / "seed-0")
    np.testing.assert_allclose(run.metrics["lr"], np.repeat(1e-4 * 100 ** (np.arange(4) / 3), 6))
    np.testing.assert_allclose(found.curves[0].lrs, run.metrics["lr"][::6])
    np.testing.assert_allclose(found.curves[0].accuracies, run.metrics["train/accuracy"].reshape(4, 6).mean(1))
    np.testing.assert_allclose(found.curves[0].losses, run.metrics["train/loss"].reshape(4, 6).mean(1))
    assert (tmp_path / "test" / "lr_accuracy.png").exists()
    linear = cl.lr_range(small(), quiet(tmp_path, name="linear"), epochs=3, seeds=1, mode="linear", val=True)
    np.testing.assert_allclose(linear.curves[0].lrs, [1e-4, 5.05e-3, 1e-2])
    values = Run(tmp_path / "linear" / "seed-0").metrics
    np.testing.assert_array_equal(linear.curves[0].accuracies, values["val/accuracy"])


def test_a_ladder_of_blended_images_goes_by_clean_ones(tiny: str, tmp_path: Path) -> None:
    found = cl.lr_range(small(mixup_alpha=0.4), quiet(tmp_path), epochs=3, seeds=1)
    np.testing.assert_array_equal(found.curves[0].accuracies, Run(tmp_path / "test" / "seed-0").metrics["clean/accuracy"])


def test_it_stops_at_once_when_the_loss_climbs(tiny: str, tmp_path: Path) -> None:
    found = cl.lr_range(small(model="tiny-without-norm"), quiet(tmp_path), start=1e-3, end=1e6, steps=60, seeds=1)
    (curve,) = found.curves
    assert curve.end == "climbed"
    assert len(curve.lrs) < 45
    run = Run(tmp_path / "test" / "seed-0")
    assert run.result["state"] == "climbed"
    assert run.result["step"] == len(run.metrics["train/loss"]) == len(curve.losses)
    assert np.isfinite(found.diverged_at)


def test_it_stops_at_once_when_the_loss_is_not_finite(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pytorch-lr-finder goes on: a comparison with NaN is never true."""
    monkeypatch.setattr(import_module("cifarlab.lr_range"), "STOP_LOSS", 1e30)
    found = cl.lr_range(small(model="tiny-without-norm"), quiet(tmp_path), start=1e30, end=1e38, steps=40, seeds=1)
    (curve,) = found.curves
    run = Run(tmp_path / "test" / "seed-0")
    assert curve.end == run.result["state"] == "diverged"
    losses = run.metrics["train/loss"]
    assert not np.isfinite(losses[-1])
    assert len(curve.losses) == len(losses) - 1 < 39
    assert "stopped after" in found.warnings[0]


def test_updates_that_the_scaler_skips_are_no_points(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scale begins at 2**40, so that gradients overflow until it has been halved often enough."""
    whole = torch.amp.GradScaler.__init__

    def high(self: Any, *args: Any, **settings: Any) -> None:
        whole(self, *args, **settings | {"init_scale": 2.0**40})

    monkeypatch.setattr(torch.amp.GradScaler, "__init__", high)
    found = cl.lr_range(small(precision="fp16"), quiet(tmp_path), start=1e-5, end=1e-2, steps=40, seeds=1)
    (curve,) = found.curves
    metrics = Run(tmp_path / "test" / "seed-0").metrics
    skipped = metrics.steps("train/skipped")
    assert 5 < len(skipped) < 35
    assert curve.skipped == len(skipped)
    made = np.setdiff1d(metrics.steps("train/loss"), skipped)
    np.testing.assert_array_equal(curve.lrs, metrics["lr"][made - 1])
    np.testing.assert_array_equal(curve.losses, metrics["train/loss"][made - 1])
    assert "were skipped by the fp16 scaler" in str(found)


def test_a_range_test_leaves_training_as_it_was(tiny: str, tmp_path: Path) -> None:
    before = cl.train(small(), quiet(tmp_path, name="before", progress="none", forecast=False))
    states = torch.random.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # type: ignore[union-attr,index]
    cl.lr_range(small(), quiet(tmp_path), start=1e-4, end=10.0, steps=12, seeds=1)
    assert torch.equal(states[0], torch.random.get_rng_state())
    assert states[1] == random.getstate()
    np.testing.assert_array_equal(states[2], np.random.get_state()[1])  # type: ignore[index]
    after = cl.train(small(), quiet(tmp_path, name="after", progress="none", forecast=False))
    np.testing.assert_array_equal(before.metrics["train/loss"], after.metrics["train/loss"])


def test_a_test_that_was_stopped_is_begun_anew_under_its_name(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first seed's folder was in the way, and the remedy named was to resume that."""
    module, calls = import_module("cifarlab.lr_range"), []
    train = module.train

    def stop_second(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return train(*arguments)

    monkeypatch.setattr(module, "train", stop_second)
    with pytest.raises(KeyboardInterrupt):
        cl.lr_range(small(), quiet(tmp_path), start=1e-3, end=1e-1, steps=12, seeds=2)
    (tmp_path / "test" / "seed-notes").mkdir()
    with RunFolder(tmp_path / "test" / "seed-0"), pytest.raises(InputError, match="test is in use by another process"):
        cl.lr_range(small(), quiet(tmp_path), start=1e-3, end=1e-2, steps=12, seeds=2)
    assert (tmp_path / "test" / "seed-0" / "result.json").exists()
    found = cl.lr_range(small(), quiet(tmp_path), start=1e-3, end=1e-2, steps=12, seeds=2)
    assert [curve.lrs[-1] for curve in found.curves] == pytest.approx([1e-2, 1e-2])
    assert (tmp_path / "test" / "seed-notes").exists()


def test_a_stop_by_the_loss_is_a_result_of_plain_training_too(tiny: str, tmp_path: Path) -> None:
    config = small(model="tiny-without-norm", lr=3.0, epochs=5, stop_loss=3.0, schedule="constant")
    run = cl.train(config, quiet(tmp_path, progress="none", log_every=1))
    assert run.result["state"] == "climbed"
    assert run.result["step"] < 30


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (dict(steps=20, epochs=2), "two kinds of range test"),
        (dict(start=1.0, end=0.1), "it must rise"),
        (dict(start=0.0), "begin above 0"),
        (dict(steps=1), "at least 2"),
        (dict(seeds=0), "seeds=0 cannot be used"),
        (dict(seeds=(1, 1)), "different seeds"),
        (dict(mode="log"), "mode='log' cannot be used"),
    ],
)
def test_what_cannot_be_tested_is_refused(tiny: str, tmp_path: Path, options: Any, told: str) -> None:
    with pytest.raises(InputError, match=told):
        cl.lr_range(small(), quiet(tmp_path), **options)
    assert list(tmp_path.iterdir()) == []


# ---- anybody's own objects -------------------------------------------------------------------------------------------


class Jittered(Dataset[tuple[Tensor, Tensor]]):
    """Images with three kinds of chance in them, one of them its own."""

    def __init__(self) -> None:
        self.images = torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(1))
        self.transforms = [self._jitter]
        self.rng = np.random.default_rng(5)

    def _jitter(self, image: Tensor) -> Tensor:
        return image * (1 + 0.1 * random.random() + 0.1 * float(np.random.rand())) + 0.1 * float(self.rng.random())

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = self.images[index]
        for transform in self.transforms:
            image = transform(image)
        return image + 0.05 * torch.randn(3, 8, 8), torch.tensor(index % 4)


def build_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(6 * 36, 4))


class Session:
    """A user's training in full: everything that a finder could leave changed."""

    def __init__(self, kind: str) -> None:
        random.seed(1)
        np.random.seed(1)
        self.model = build_net()
        self.scaler = torch.amp.GradScaler("cpu", enabled=kind == "scaler", init_scale=2.0**24, growth_interval=3)
        optimizer = {"adam": torch.optim.AdamW, "scaler": torch.optim.SGD}.get(kind, torch.optim.SGD)
        settings = dict(momentum=0.9) if optimizer is torch.optim.SGD else dict(amsgrad=True, fused=True)
        head, body = list(self.model[5].parameters()), list(self.model[:5].parameters())  # type: ignore[index]
        self.optimizer = optimizer([{"params": body}, {"params": head, "lr": 0.2}], lr=0.02, **settings)  # type: ignore[arg-type]
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, 0.1, total_steps=60) if kind == "scheduler" else None
        data = Jittered()
        own = torch.Generator().manual_seed(3) if kind == "generator" else None
        sampler = RandomSampler(data, generator=torch.Generator().manual_seed(4)) if kind == "sampler" else None
        workers = 2 if kind in ("workers", "persistent") else 0
        self.loader = DataLoader(data, batch_size=8, shuffle=sampler is None, generator=own, sampler=sampler, num_workers=workers,
                                 persistent_workers=kind == "persistent")  # fmt: skip
        torch.manual_seed(2)

    def train(self, epochs: int) -> list[float]:
        losses = []
        for _ in range(epochs):
            for images, labels in self.loader:
                with torch.autocast("cpu", torch.float16, enabled=self.scaler.is_enabled()):
                    loss = F.cross_entropy(self.model(images).float(), labels)
                self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
                self.scaler.step(self.optimizer)
                self.scaler.update()
                self.optimizer.zero_grad()
                if self.scheduler:
                    self.scheduler.step()
                losses.append(float(loss.detach()))
        return losses

    def state(self) -> dict[str, Any]:
        return copy.deepcopy({
            "model": dict(self.model.state_dict()), "grads": [p.grad for p in self.model.parameters()],
            "flags": [m.training for m in self.model.modules()], "requires": [p.requires_grad for p in self.model.parameters()],
            "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(),
            "scheduler": self.scheduler and {k: v for k, v in self.scheduler.state_dict().items() if not callable(v)},
            "random": random.getstate(), "numpy": np.random.get_state(), "torch": torch.random.get_rng_state(),
            "loader": self.loader.generator and self.loader.generator.get_state(),
            "sampler": getattr(self.loader.sampler, "generator", None) and self.loader.sampler.generator.get_state(),  # type: ignore[attr-defined]
            "dataset": self.loader.dataset.rng.bit_generator.state,  # type: ignore[attr-defined]
        })  # fmt: skip


def assert_equal(a: Any, b: Any, where: str = "") -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for k, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}[{k}]")
    elif isinstance(a, Tensor | np.ndarray):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=where)
    else:
        assert a == b, where


KINDS = ["plain", "adam", "scheduler", "scaler", "generator", "sampler", "workers", "persistent"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("epochs_before", [0, 1])
def test_everything_comes_back_and_training_goes_on_as_without(kind: str, epochs_before: int) -> None:
    if kind in ("workers", "persistent") and not epochs_before:
        pytest.skip("starting processes is slow; once is enough")

    def begin() -> Session:
        session = Session(kind)  # seeds everything
        session.train(epochs_before)
        images, labels = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(9)), torch.arange(8) % 4
        F.cross_entropy(session.model(images), labels).backward()  # gradients are under way
        session.model[1].eval()  # type: ignore[index]  # a frozen batch norm
        return session

    alone = begin()
    losses, after = alone.train(2), alone.state()
    session = begin()
    before = session.state()
    found = cl.lr_range_on(session.model, session.optimizer, session.loader, F.cross_entropy, start=1e-4, end=1e3, steps=14,
                           seeds=2, scaler=session.scaler)  # fmt: skip
    assert_equal(before, session.state())
    assert len(found.curves) == 2
    assert found.curves[0].losses != found.curves[1].losses
    if kind == "scaler" and not epochs_before:
        assert found.curves[0].skipped > 0
    assert losses == session.train(2)
    assert_equal(after, session.state())


def test_the_curve_does_not_depend_on_the_random_state_around_it() -> None:
    curves = []
    for seed in (0, 1):
        session = Session("generator")
        torch.manual_seed(seed)
        session.loader.generator.manual_seed(seed)
        session.loader.dataset.rng = np.random.default_rng(seed)  # type: ignore[attr-defined]
        curves.append(cl.lr_range_on(session.model, session.optimizer, session.loader, steps=6).curves)
    assert curves[0] == curves[1]


def test_the_curve_is_that_of_a_plain_loop() -> None:
    """A twin: the same updates done by hand on a net of one's own."""
    session = Session("plain")
    batches = [(torch.randn(8, 3, 8, 8), torch.arange(8) % 4) for _ in range(3)]
    (curve,) = cl.lr_range_on(session.model, session.optimizer, batches, start=1e-3, end=1e-1, steps=7).curves
    net, optimizer = Session("plain").model, torch.optim.SGD([{"params": []}], lr=0.1)
    optimizer = torch.optim.SGD([{"params": net[:5].parameters()}, {"params": net[5].parameters()}], lr=0.1, momentum=0.9)  # type: ignore[index]
    torch.manual_seed(0)
    for step, (images, labels) in enumerate(itertools.islice(itertools.cycle(batches), 7)):
        lr = 1e-3 * 100 ** (step / 6)
        assert curve.lrs[step] == pytest.approx(lr)
        optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"] = 0.1 * lr, lr  # groups keep their ratio, 0.02 : 0.2
        optimizer.zero_grad()
        loss = F.cross_entropy(net(images), labels)
        loss.backward()
        optimizer.step()
        assert curve.losses[step] == pytest.approx(float(loss.detach()), rel=1e-6)


def test_a_model_in_eval_mode_is_trained_on_the_copy_only() -> None:
    session = Session("plain")
    session.model.eval()
    before = session.state()
    cl.lr_range_on(session.model, session.optimizer, session.loader, start=1e-2, end=1e-1, steps=4)
    assert_equal(before, session.state())


def test_an_error_in_between_leaves_no_trace() -> None:
    session = Session("generator")
    before = session.state()

    def fail(logits: Tensor, labels: Tensor) -> Tensor:
        random.random()
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        cl.lr_range_on(session.model, session.optimizer, session.loader, fail, steps=4)
    assert_equal(before, session.state())


def test_nan_stops_it_at_once() -> None:
    session, calls = Session("plain"), []

    def breaks(logits: Tensor, labels: Tensor) -> Tensor:
        calls.append(1)
        return F.cross_entropy(logits, labels) * (float("nan") if len(calls) == 5 else 1.0)

    (curve,) = cl.lr_range_on(session.model, session.optimizer, session.loader, breaks, start=1e-5, end=1e-4, steps=50).curves
    assert (curve.end, len(curve.losses), len(calls)) == ("diverged", 4, 5)


def test_wrapped_models_are_measured_inside() -> None:
    session = Session("plain")
    (plain,) = cl.lr_range_on(session.model, session.optimizer, session.loader, steps=5).curves

    class Compiled(nn.Module):  # as torch.compile's wrapper, whose import takes 20 s
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self._orig_mod = model

    assert cl.lr_range_on(Compiled(session.model), session.optimizer, session.loader, steps=5).curves == (plain,)
    assert cl.lr_range_on(nn.DataParallel(session.model), session.optimizer, session.loader, steps=5).curves == (plain,)


def test_an_optimizer_with_a_life_of_its_own_is_copied_whole() -> None:
    class Wrapping(torch.optim.SGD):
        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters, lr=0.1)
            self.calls, self.inner = 0, torch.optim.Adam(self.param_groups[0]["params"], lr=1e-3)

        def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
            self.calls += 1
            self.inner.step()

    model, batches = build_net(), [(torch.randn(8, 3, 8, 8), torch.arange(8) % 4)]
    optimizer = Wrapping(model.parameters())
    before = copy.deepcopy(model.state_dict())
    (curve,) = cl.lr_range_on(model, optimizer, batches, steps=5).curves
    assert len(set(curve.losses)) == 5
    assert optimizer.calls == 0
    assert not optimizer.inner.state
    assert_equal(dict(before), dict(model.state_dict()))


def test_what_cannot_be_tested_without_a_trace_is_refused() -> None:
    session = Session("plain")
    for used_up in (iter(session.loader), (pair for pair in ()), iter([])):
        with pytest.raises(InputError, match=r"is an iterator .* that the test would use up: give a DataLoader or a list"):
            cl.lr_range_on(session.model, session.optimizer, used_up)
    with pytest.raises(InputError, match="holds no parameter of this model"):
        cl.lr_range_on(build_net(), session.optimizer, session.loader)
    with pytest.raises(InputError, match="gave no batch"):
        cl.lr_range_on(session.model, session.optimizer, [])
    with pytest.raises(InputError, match=r"a dict of images: it must give pairs \(inputs, labels\), or unpack=lambda"):
        cl.lr_range_on(session.model, session.optimizer, [{"images": 1}])
    with pytest.raises(InputError, match="a list without param_groups: give one optimizer at a time"):
        cl.lr_range_on(session.model, [session.optimizer], session.loader)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="gave 8 losses for a batch: it must give their mean"):
        cl.lr_range_on(session.model, session.optimizer, session.loader, nn.CrossEntropyLoss(reduction="none"))
    lbfgs = torch.optim.LBFGS(session.model.parameters())
    with pytest.raises(InputError, match="LBFGS evaluates the loss several times an update, which an fp16 scaler cannot follow"):
        cl.lr_range_on(session.model, lbfgs, session.loader, scaler=torch.amp.GradScaler("cpu"))
    session.model.lock = __import__("threading").Lock()  # type: ignore[assignment]
    with pytest.raises(InputError, match="cannot be copied"):
        cl.lr_range_on(session.model, session.optimizer, session.loader)


def test_a_frozen_loader_of_arrays_works_too() -> None:
    data = TensorDataset(torch.randn(16, 3, 8, 8), torch.arange(16) % 4)
    model = build_net()
    found = cl.lr_range_on(model, torch.optim.Adam(model.parameters()), DataLoader(data, 8), steps=3)
    assert json.loads(json.dumps(found.to_dict()))["config"] == {}


BATCHES = [(torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(k)), torch.arange(8) % 4) for k in range(3)]


def test_a_closure_is_given_to_an_optimizer_that_demands_one() -> None:
    model = build_net()
    (curve,) = cl.lr_range_on(model, torch.optim.LBFGS(model.parameters()), BATCHES, start=1e-4, end=1e-2, steps=5).curves
    twin, losses = build_net(), []
    optimizer = torch.optim.LBFGS(twin.parameters())
    torch.manual_seed(0)
    for step, (images, labels) in enumerate(itertools.islice(itertools.cycle(BATCHES), 5)):
        optimizer.param_groups[0]["lr"] = 1e-4 * 100 ** (step / 4)

        def evaluate(images: Tensor = images, labels: Tensor = labels) -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(twin(images), labels)
            loss.backward()
            return loss

        losses.append(float(evaluate().detach()))
        optimizer.step(evaluate)  # type: ignore[arg-type]
    assert curve.losses == pytest.approx(losses, rel=1e-5)


class Centers(nn.Module):
    """A criterion with weights, a buffer and chance of its own, as a center loss."""

    def __init__(self) -> None:
        super().__init__()
        self.centers = nn.Parameter(torch.zeros(4, 4))
        self.register_buffer("calls", torch.zeros(()))
        self.generator = torch.Generator().manual_seed(1)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        self.calls += 1
        noise = 0.01 * torch.rand((), generator=self.generator)
        return F.cross_entropy(logits, labels) + (logits - self.centers[labels]).square().mean() + noise


def test_a_criterion_comes_back_as_it_was_too() -> None:
    model, criterion = build_net(), Centers()
    optimizer = torch.optim.SGD([*model.parameters(), *criterion.parameters()], lr=0.1)
    criterion(model(BATCHES[0][0]), BATCHES[0][1]).backward()
    gradient, before = criterion.centers.grad, copy.deepcopy(dict(criterion.state_dict()))
    assert gradient is not None
    values = gradient.clone()
    chance = criterion.generator.get_state()
    (curve,) = cl.lr_range_on(model, optimizer, BATCHES, criterion, start=1e-2, end=1.0, steps=6).curves
    assert criterion.centers.grad is gradient
    assert torch.equal(gradient, values)
    assert_equal(before, dict(criterion.state_dict()))
    assert torch.equal(chance, criterion.generator.get_state())
    assert len(curve.losses) == 6


def test_a_criterion_that_is_the_models_own_method_trains_the_copy() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.scale = build_net(), nn.Parameter(torch.ones(()))

        def forward(self, images: Tensor) -> Tensor:
            return self.net(images)  # type: ignore[no-any-return]

        def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
            seen.append(self)
            return F.cross_entropy(self.scale * logits, labels)

    seen: list[nn.Module] = []
    model = Scaled()
    cl.lr_range_on(model, torch.optim.SGD(model.parameters(), lr=0.1), BATCHES, model.loss, start=0.1, end=1.0, steps=4)
    assert len(set(seen)) == 1
    assert seen[0] is not model
    assert seen[0].scale != 1  # the copy's has learnt


def test_a_criterion_over_the_model_leaves_no_gradient_on_it() -> None:
    model = build_net()
    F.cross_entropy(model(BATCHES[0][0]), BATCHES[0][1]).backward()
    before = [(p.grad, p.grad.clone()) for p in model.parameters() if p.grad is not None]
    cl.lr_range_on(model, torch.optim.SGD(model.parameters(), lr=0.1), BATCHES, steps=4,
                   criterion=lambda a, b: F.cross_entropy(a, b) + 1e-3 * sum(p.norm() for p in model.parameters()))  # fmt: skip
    assert len(before) == 6
    for parameter, (gradient, values) in zip(model.parameters(), before, strict=True):
        assert parameter.grad is gradient
        assert torch.equal(gradient, values)


def test_what_loader_and_sampler_count_is_put_back() -> None:
    class Counting(Sampler[int]):
        epoch = 0

        def __iter__(self) -> Iterator[int]:
            self.epoch += 1
            return iter(torch.randperm(16, generator=torch.Generator().manual_seed(self.epoch)).tolist())

        def __len__(self) -> int:
            return 16

    class Counted(TensorDataset):
        def __getitem__(self, index: int) -> tuple[Tensor, ...]:
            self.served = getattr(self, "served", 0) + 1
            return super().__getitem__(index)

    class Prefetching:
        """A loader around a loader, as those that copy batches ahead."""

        def __init__(self, loader: Iterable[Any]) -> None:
            self.loader, self.epochs = loader, 0

        def __iter__(self) -> Iterator[Any]:
            self.epochs += 1
            yield from self.loader

    model, sampler = build_net(), Counting()
    data = Counted(torch.randn(16, 3, 8, 8), torch.arange(16) % 4)
    loader = Prefetching(DataLoader(data, 8, sampler=sampler))
    next(iter(loader))
    before = (sampler.epoch, data.served, loader.epochs)
    cl.lr_range_on(model, torch.optim.SGD(model.parameters(), lr=0.1), loader, start=1e-3, end=1e-2, steps=7)
    assert (sampler.epoch, data.served, loader.epochs) == before == (1, 8, 1)


def test_batches_of_another_shape_are_unpacked() -> None:
    model = build_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    named = [{"image": images, "label": labels} for images, labels in BATCHES]
    found = cl.lr_range_on(model, optimizer, named, steps=5, unpack=lambda batch: (batch["image"], batch["label"]))
    assert found.curves == cl.lr_range_on(model, optimizer, BATCHES, steps=5).curves


class Lookahead(torch.optim.Optimizer):
    """As many are written: around another optimizer, without the parent's __init__, with functions among its attributes."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner, self.param_groups, self.state = inner, inner.param_groups, inner.state
        self.when: Callable[[int], bool] = lambda step: step % 3 == 0
        self.slow = [p.detach().clone() for p in self.param_groups[0]["params"]]
        self.steps = 0

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        self.inner.step()
        self.steps += 1
        if self.when(self.steps):
            for slow, p in zip(self.slow, self.param_groups[0]["params"], strict=True):
                p.data.copy_(slow.lerp_(p.data, 0.5))


def test_an_optimizer_around_another_one_moves_the_copy_only() -> None:
    model = build_net()
    optimizer = Lookahead(torch.optim.SGD(model.parameters(), lr=0.1))
    weights, slow = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.slow)
    (curve,) = cl.lr_range_on(model, optimizer, BATCHES, start=0.01, end=0.1, steps=9).curves
    assert len(set(curve.losses)) == 9
    assert optimizer.steps == 0
    assert_equal(dict(weights), dict(model.state_dict()))
    assert_equal(slow, optimizer.slow)


def test_tied_weights_stay_tied_on_the_copy_and_groups_tell_their_shares() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 192), nn.ReLU(), nn.Linear(192, 192))
    model[3].weight = model[1].weight
    optimizer = torch.optim.SGD([{"params": [model[1].weight], "lr": 0.01}, {"params": [model[3].bias], "lr": 0.1}])
    found = cl.lr_range_on(model, optimizer, BATCHES, steps=12)
    assert found.shares == pytest.approx((0.1, 1.0))
    assert model[3].weight is model[1].weight
    twin = copy.deepcopy(model)
    again = torch.optim.SGD([{"params": [twin[1].weight]}, {"params": [twin[3].bias]}], lr=0.1)
    for (images, labels), lr, loss in zip(itertools.cycle(BATCHES), found.lrs, found.curves[0].losses, strict=False):
        again.param_groups[0]["lr"], again.param_groups[1]["lr"] = 0.1 * lr, lr
        again.zero_grad()
        measured = F.cross_entropy(twin(images), labels)
        measured.backward()
        again.step()
        assert loss == pytest.approx(float(measured.detach()), rel=1e-5)


def test_an_interrupt_leaves_no_trace() -> None:
    session = Session("workers")
    before, calls = session.state(), []

    def stop(logits: Tensor, labels: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return F.cross_entropy(logits, labels)

    with pytest.raises(KeyboardInterrupt):
        cl.lr_range_on(session.model, session.optimizer, session.loader, stop, steps=4)
    assert_equal(before, session.state())


def test_curves_and_figure_of_ones_own_objects_are_kept_where_asked(tmp_path: Path) -> None:
    model = build_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = cl.lr_range_on(model, optimizer, BATCHES, steps=12, folder=tmp_path / "a" / "test")
    assert load_range(tmp_path / "a" / "test") == found
    assert sorted(path.name for path in (tmp_path / "a" / "test").iterdir()) == [FILE, "lr_range.png"]
    with pytest.raises(InputError, match="holds a range test already: choose another folder"):
        cl.lr_range_on(model, optimizer, BATCHES, folder=tmp_path / "a" / "test")
