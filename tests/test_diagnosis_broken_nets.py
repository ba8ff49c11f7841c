"""The diagnosis on networks that are really trained: each broken on purpose raises its alarm and no other, a healthy one none.

`python tests/test_diagnosis_broken_nets.py` trains a healthy ResNet-18 for longer than a test may take.
"""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

import cifarlab as cl
from cifarlab.diagnosis import RULES, diagnose_run
from cifarlab.models import MODELS
from cifarlab.models.airbench import Airbench
from cifarlab.probes.watch import Watch
from cifarlab.runs import Run

PROTOTYPES = torch.randn(10, 3, 16, 16, generator=torch.Generator().manual_seed(5))


def draw(step: int, seed: int = 0, *, noise: float = 3.0, size: int = 32) -> tuple[Tensor, Tensor]:
    """A batch of ten classes: their prototypes and noise."""
    generator = torch.Generator().manual_seed(1000 * step + seed)
    labels = torch.randint(10, (size,), generator=generator)
    return PROTOTYPES[labels] + noise * torch.randn(size, 3, 16, 16, generator=generator), labels


def conv_net(activation: Callable[[], nn.Module] = nn.ReLU, **norm: float | bool) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16, **norm), activation(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32, **norm), activation(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(128, 10),
    )  # fmt: skip


def plain_net(activation: Callable[[], nn.Module] = nn.ReLU, depth: int = 4, dropout: float = 0.0) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Flatten()]
    for k in range(depth - 1):
        layers += [nn.Linear(64 if k else 768, 64), activation()] + [nn.Dropout(dropout)] * (dropout > 0)
    return nn.Sequential(*layers, nn.Linear(64 if depth > 1 else 768, 10))


class Residual(nn.Module):
    """A residual net whose branch begins at zero: by its last batch norm, or by its last convolution."""

    def __init__(self, zero: str) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.branch = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
                                    nn.Conv2d(16, 16, 3, padding=1, bias=False))  # fmt: skip
        if zero == "norm":
            self.branch.append(nn.BatchNorm2d(16))
        nn.init.zeros_(self.branch[-1].weight)
        self.head = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        features = F.relu(self.stem(images))
        features = F.relu(features + self.branch(features))
        return self.head(F.adaptive_avg_pool2d(features, 2).flatten(1))


class Unused(nn.Module):
    """A layer that the forward pass passes by."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.forgotten = conv_net(), nn.Linear(10, 10)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.used(images)
        return out


def changed(net: nn.Sequential, layer: int, *, weight: float | None = None, bias: float | None = None) -> nn.Sequential:
    for tensor, value in ((net[layer].weight, weight), (net[layer].bias, bias)):
        if value is not None:
            nn.init.constant_(tensor, value)
    return net


def frozen(net: nn.Sequential, layer: int) -> nn.Sequential:
    net[layer].requires_grad_(False)
    return net


def scaled(net: nn.Sequential, factor: float) -> nn.Sequential:
    with torch.no_grad():
        for layer in net[:-1]:
            if isinstance(layer, nn.Linear):
                layer.weight *= factor
    return net


def all_but_the_hidden(parameters: Iterator[nn.Parameter]) -> Optimizer:
    return SGD([p for p in parameters if p.shape != (64, 64)], 0.02, momentum=0.9)


sgd, adam = partial(SGD, lr=0.05, momentum=0.9), partial(Adam, lr=1e-3)
Change = Callable[[int, Tensor, nn.Module, Optimizer], None]


@dataclass(frozen=True, kw_only=True)
class Case:
    net: Callable[[], nn.Module]
    optimizer: Callable[..., Optimizer] = sgd
    steps: int = 210
    data: Callable[[int, int], tuple[Tensor, Tensor]] = draw
    lr: Callable[[int], float] | None = None
    change: Change | None = None
    smoothing: float = 0.0
    clip: float = 0.0
    probes: str = "default"
    held_out: bool = False
    alarm: str = ""
    layers: tuple[str, ...] = ()  # the worst ones named
    also: tuple[str, ...] = ()  # an alarm before it that is true as well
    cause: str = ""
    seeds: int = 2


def train(case: Case, folder: Path, seed: int = 0) -> Watch:
    torch.manual_seed(seed + 1)
    net = case.net()
    optimizer = case.optimizer(net.parameters())
    criterion = partial(F.cross_entropy, label_smoothing=case.smoothing)
    with cl.watch(net, optimizer, "run", runs_dir=folder, every=20, say=None, figures=False, probes=case.probes,
                  batch=case.data(1, seed) if case.probes != "default" else None, criterion=criterion) as watched:  # fmt: skip
        for step in range(1, case.steps + 1):
            images, labels = case.data(step, seed)
            if case.lr:
                optimizer.param_groups[0]["lr"] = case.lr(step)
            if case.change:
                case.change(step, images, net, optimizer)
            optimizer.zero_grad()
            loss = criterion(net(images), labels)
            loss.backward()
            told = {}
            if case.held_out and step % 20 == 0:
                with torch.no_grad():
                    told = {"val/loss": float(criterion(net.eval()(draw(9999, size=200)[0]), draw(9999, size=200)[1]))}
                net.train()
            watched.log(loss=loss, **told)
            if case.clip:
                nn.utils.clip_grad_norm_(net.parameters(), case.clip)
            optimizer.step()
    return watched


def shuffled(step: int, seed: int) -> tuple[Tensor, Tensor]:
    return draw(step, seed)[0], draw(step + 7777, seed)[1]


def black(step: int, seed: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(32, 3, 16, 16), draw(step, seed)[1]


def fixed(size: int, noise: float, step: int, seed: int) -> tuple[Tensor, Tensor]:
    return draw(1, seed, noise=noise, size=size)


def wrong(step: int, seed: int) -> tuple[Tensor, Tensor]:
    return draw(1, seed, size=64)[0], draw(7777, seed, size=64)[1]


def plant(step: int, images: Tensor, net: nn.Module, optimizer: Optimizer) -> None:
    if step == 7:
        images[5, 0, 0, 0] = torch.nan


def kick(step: int, images: Tensor, net: nn.Module, optimizer: Optimizer) -> None:
    optimizer.param_groups[0]["lr"] = 15.0 if step == 120 else 0.05


no_affine = partial(conv_net, affine=False)  # units behind such a norm cannot die

BROKEN = {
    "30 layers of sigmoids": Case(
        net=lambda: plain_net(nn.Sigmoid, 30), alarm="vanishing", layers=("1.weight", "3.weight")),
    "30 layers of sigmoids, Adam": Case(net=lambda: plain_net(nn.Sigmoid, 30), optimizer=adam, alarm="vanishing"),
    "lr × 1000": Case(net=plain_net, optimizer=partial(SGD, lr=20.0, momentum=0.9), alarm="exploding"),
    "lr × 1000, Adam": Case(net=plain_net, optimizer=partial(Adam, lr=1.0), alarm="exploding"),
    "lr × 1000, batch norm": Case(net=conv_net, optimizer=partial(SGD, lr=50.0, momentum=0.9), alarm="exploding"),
    "lr × 1000, batch norm, Adam": Case(net=conv_net, optimizer=partial(Adam, lr=1.0), alarm="exploding"),
    "a layer of zeros": Case(net=lambda: changed(plain_net(), 5, weight=0, bias=0), alarm="zero_weights", layers=("5.weight",)),
    "a convolution of zeros": Case(
        net=lambda: changed(conv_net(), 4, weight=0, bias=0), alarm="zero_weights", layers=("4.weight",)),
    "a bias of -10": Case(net=lambda: changed(plain_net(), 3, bias=-10), alarm="dead_units", layers=("4.relu",)),
    "a shift of -10 in batch norm": Case(net=lambda: changed(conv_net(), 5, bias=-10), alarm="dead_units", layers=("6.relu",)),
    "NaN at step 7": Case(net=conv_net, change=plant, steps=40, alarm="non_finite"),
    "a frozen layer": Case(
        net=lambda: frozen(plain_net(), 3), optimizer=partial(SGD, lr=0.02, momentum=0.9), alarm="not_learning",
        layers=("3.weight", "3.bias"), cause="frozen"),
    "a frozen convolution": Case(
        net=lambda: frozen(conv_net(), 4), alarm="not_learning", layers=("4.weight", "4.bias"), cause="frozen"),
    "a layer the optimizer does not have": Case(
        net=plain_net, optimizer=all_but_the_hidden, alarm="not_learning", layers=("3.weight", "5.weight"), cause="no optimizer"),
    "a layer that is not used": Case(
        net=Unused, alarm="not_learning", layers=("forgotten.weight", "forgotten.bias"), cause="does not use them"),
    "saturated tanh": Case(net=lambda: scaled(plain_net(nn.Tanh), 30), optimizer=adam, alarm="saturated", layers=("2.tanh",)),
    "saturated tanh, SGD": Case(
        net=lambda: scaled(plain_net(nn.Tanh), 30), optimizer=partial(SGD, lr=0.01, momentum=0.9), alarm="saturated"),
    "lr 1e-9": Case(net=plain_net, optimizer=partial(SGD, lr=1e-9, momentum=0.9), alarm="update_too_small"),
    "lr 1e-9, batch norm": Case(net=conv_net, optimizer=partial(SGD, lr=1e-9, momentum=0.9), alarm="update_too_small"),
    "lr 1e-9, Adam": Case(net=plain_net, optimizer=partial(Adam, lr=1e-9), alarm="update_too_small"),
    "decay that keeps weights small": Case(
        net=no_affine, optimizer=partial(SGD, lr=1.0, weight_decay=0.2), alarm="update_too_large"),
    "random labels": Case(net=plain_net, optimizer=adam, data=shuffled, alarm="stalled"),
    "lr far too low": Case(net=conv_net, optimizer=partial(SGD, lr=1e-4), alarm="stalled"),
    "a clip far below the gradient": Case(
        net=plain_net, optimizer=partial(SGD, lr=0.1, momentum=0.9), clip=0.02, alarm="always_clipped"),
    "black images": Case(net=plain_net, optimizer=adam, data=black, alarm="no_gradient", layers=("1.weight",)),
    "one step × 300": Case(net=conv_net, change=kick, data=partial(draw, noise=1.0), alarm="loss_spike"),
    "64 wrong labels by heart": Case(
        net=plain_net, optimizer=partial(SGD, lr=0.01, momentum=0.9), data=wrong, held_out=True, alarm="overfitting"),
    "above the edge of stability": Case(
        net=lambda: plain_net(depth=1), optimizer=partial(SGD, lr=1.0), data=partial(fixed, 32, 1.0), smoothing=0.1, clip=0.1,
        probes="default,curvature", alarm="unstable_lr", also=("always_clipped",), steps=140),
    "batch norm that lags": Case(net=partial(conv_net, momentum=1e-3), alarm="norm_drift"),
}  # fmt: skip

HEALTHY = {
    "conv net, SGD": Case(net=conv_net),
    "conv net, Adam": Case(net=conv_net, optimizer=adam),
    "conv net, RMSprop": Case(net=conv_net, optimizer=partial(RMSprop, lr=1e-3)),
    "conv net, Adam at 0.01": Case(net=conv_net, optimizer=partial(Adam, lr=0.01)),
    "conv net, clipped now and then": Case(net=conv_net, clip=2.0),
    "conv net, decay": Case(net=conv_net, optimizer=partial(SGD, lr=0.05, momentum=0.9, weight_decay=5e-4)),
    "conv net, warm-up": Case(net=conv_net, lr=lambda step: 0.1 * min(1, step / 100)),
    "conv net, one-cycle": Case(net=conv_net, lr=lambda step: max(1e-9, 0.1 * min(step / 60, (300 - step) / 240)), steps=300),
    "conv net, smoothed labels": Case(net=conv_net, smoothing=0.1),
    "conv net, curvature": Case(net=conv_net, probes="all", seeds=1),
    "plain net, SGD": Case(net=plain_net, optimizer=partial(SGD, lr=0.02, momentum=0.9)),
    "plain net, Adam": Case(net=plain_net, optimizer=adam),
    "plain net, AdamW": Case(net=plain_net, optimizer=partial(AdamW, lr=1e-3, weight_decay=0.1)),
    "plain net, dropout": Case(net=lambda: plain_net(dropout=0.5), optimizer=adam),
    "plain net, held-out images": Case(net=plain_net, optimizer=adam, held_out=True),
    "plain net, learned by heart to a loss of 0": Case(
        net=lambda: plain_net(depth=1), optimizer=partial(SGD, lr=1.0), data=partial(fixed, 32, 8.0)),
    "ten layers of GELU": Case(net=lambda: plain_net(nn.GELU, 10), optimizer=adam),
    "tanh": Case(net=lambda: plain_net(nn.Tanh), optimizer=adam),
    "sigmoid": Case(net=lambda: plain_net(nn.Sigmoid, 3), optimizer=adam),
    "ReLU6": Case(net=lambda: plain_net(nn.ReLU6), optimizer=adam),
    "softmax regression from zero": Case(
        net=lambda: changed(plain_net(depth=1), 1, weight=0, bias=0), optimizer=partial(SGD, lr=0.01, momentum=0.9)),
    "a classifier from zero": Case(net=lambda: changed(conv_net(), 9, weight=0, bias=0)),
    "a branch whose last norm begins at zero": Case(net=lambda: Residual("norm")),
    "a branch whose last convolution begins at zero": Case(net=lambda: Residual("convolution")),
}  # fmt: skip


def seeds_of(cases: dict[str, Case]) -> list[object]:
    return [pytest.param(case, seed, id=f"{name}-{seed}") for name, case in cases.items() for seed in range(case.seeds)]


@pytest.mark.parametrize(("case", "seed"), seeds_of(BROKEN))
def test_a_broken_net_raises_its_alarm_and_no_other(case: Case, seed: int, tmp_path: Path) -> None:
    alarms = train(case, tmp_path, seed).alarms
    assert [alarm.rule for alarm in alarms] == [*case.also, case.alarm], [str(alarm) for alarm in alarms]
    assert set(case.layers) <= set(alarms[-1].layers)
    assert case.cause in alarms[-1].cause
    assert_replays(cl.load_run(tmp_path / "run"))


@pytest.mark.parametrize(("case", "seed"), seeds_of(HEALTHY))
def test_a_healthy_net_raises_none(case: Case, seed: int, tmp_path: Path) -> None:
    watched = train(case, tmp_path, seed)
    assert [str(alarm) for alarm in watched.alarms] == []
    losses = cl.load_run(tmp_path / "run").metrics["train/loss"]
    assert losses[-20:].mean() < 0.9 * losses[0], "not a healthy net"
    assert_replays(cl.load_run(tmp_path / "run"))


def test_every_rule_has_a_net_that_breaks_it() -> None:
    assert {case.alarm for case in BROKEN.values()} == set(RULES)


@pytest.mark.parametrize("scale", [(0.01, 5e-5), (0.05, 1e-3)], ids=["as published", "faster"])
def test_a_healthy_wgan_raises_none(scale: tuple[float, float], tmp_path: Path) -> None:
    """RMSprop, five steps of a critic to one of the generator, losses below zero, and weights that are clipped through `.data`.

    Source: Arjovsky et al. 2017, arXiv:1701.07875: weights in ±0.01, lr 5e-5.
    """
    clip, lr = scale
    torch.manual_seed(0)
    images = torch.tensor(load_digits().data / 8 - 1, dtype=torch.float32)
    generator = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64))
    critic = nn.Sequential(nn.Linear(64, 64), nn.LeakyReLU(0.2), nn.Linear(64, 64), nn.LeakyReLU(0.2), nn.Linear(64, 1))
    both = nn.ModuleDict({"generator": generator, "critic": critic})
    optimizers = [RMSprop(critic.parameters(), lr=lr), RMSprop(generator.parameters(), lr=lr)]
    moved = []
    with cl.watch(both, optimizers, "run", runs_dir=tmp_path, say=None, figures=False,
                  probes="gradient_flow,weight_flow,update_flow") as watched:  # fmt: skip
        for step in range(300):
            fake = generator(torch.randn(32, 8))
            if step % 6 < 5:
                real = images[torch.randint(len(images), (32,))]
                loss = critic(fake.detach()).mean() - critic(real).mean()
            else:
                loss = -critic(fake).mean()
            both.zero_grad()
            loss.backward()
            watched.log(loss=loss)
            old = critic[2].weight.detach().clone()
            optimizers[step % 6 == 5].step()
            moved.append((critic[2].weight - old).norm().item() if step % 6 < 5 else None)
            for p in critic.parameters():
                p.data.clamp_(-clip, clip)
    assert [str(alarm) for alarm in watched.alarms] == []
    assert_replays(cl.load_run(tmp_path / "run"))
    flow = cl.load_run(tmp_path / "run").tables["update_flow"]
    measured = flow["norm"][:, flow.items.index("critic.2.weight")]
    measured = measured[np.isfinite(measured)]
    expected = [change for change in moved if change is not None]
    np.testing.assert_allclose(measured, expected, rtol=1e-3)


def assert_replays(run: Run) -> None:
    """The rules over the finished folder say what they said while it was written."""
    assert [alarm.to_dict() for alarm in diagnose_run(run).raised] == run.alarms


def test_a_planted_nan_is_named_with_its_step_and_samples(tmp_path: Path) -> None:
    watched = train(BROKEN["NaN at step 7"], tmp_path)
    (alarm,) = watched.alarms
    assert alarm.step == 7
    assert "first in the input, samples 5 of the batch" in alarm.evidence
    folder = tmp_path / "run" / "incidents" / "step-00000007"
    kept = {"model.safetensors", "batch.safetensors", "optimizer.safetensors", "incident.json"}
    assert {path.name for path in folder.iterdir()} == kept
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_the_norm_of_a_gradient_that_is_nan_is_nan_and_not_zero(tmp_path: Path) -> None:
    train(BROKEN["NaN at step 7"], tmp_path)
    norms = cl.load_run(tmp_path / "run").metrics["gradient_flow/norm"]
    assert np.isfinite(norms[:6]).all()
    assert np.isnan(norms[6:]).all()
    unused = train(BROKEN["a layer that is not used"], tmp_path / "unused")
    assert np.isfinite(cl.load_run(unused.run.path).metrics["gradient_flow/norm"]).all()


def test_log_refuses_the_names_that_rows_are_told_apart_by(tmp_path: Path) -> None:
    net = plain_net()
    with cl.watch(net, sgd(net.parameters()), "run", runs_dir=tmp_path, say=None, figures=False) as watched:
        for name in ("step", "epoch"):
            with pytest.raises(cl.InputError, match=rf"log\({name}=…\) cannot be used"):
                watched.log(**{name: 3})


def test_steps_that_a_gradient_scaler_skips_are_no_alarm(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = conv_net()
    optimizer = SGD(net.parameters(), 0.0005, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    skipped = 0
    with cl.watch(net, optimizer, "run", runs_dir=tmp_path, every=20, say=None, figures=False) as watched:
        for step in range(1, 101):
            images, labels = draw(step)
            optimizer.zero_grad()
            loss = 100 * F.cross_entropy(net(images), labels)
            scaler.scale(loss).backward()
            watched.log(loss=loss)
            scaler.step(optimizer)
            before = scaler.get_scale()
            scaler.update()
            skipped += scaler.get_scale() < before
    assert skipped
    assert not watched.alarms


# ---- through cl.train ----------------------------------------------------------------------------------------------------


class Poison(nn.Module):
    """From the seventh batch in training on, its fourth image becomes NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("image", torch.zeros(3, 32, 32))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
            if self.calls == 7:
                self.image.copy_(images[3])
        bad = (images == self.image).flatten(1).all(1) & (self.calls >= 7)
        return torch.where(bad[:, None, None, None], torch.nan, images)


def small_net(num_classes: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 5, stride=4), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 49, num_classes))


@pytest.fixture
def registered() -> Iterator[None]:
    nets: dict[str, Callable[[int], nn.Module]] = {
        "small": small_net,
        "frozen": lambda num_classes: frozen(small_net(num_classes), 0),
        "poisoned": lambda num_classes: nn.Sequential(Poison(), nn.Dropout(0.1), *small_net(num_classes)),
        "large": lambda num_classes: nn.Sequential(nn.Flatten(), nn.Linear(3072, 256), nn.ReLU(), nn.Linear(256, num_classes)),
    }
    MODELS.update(nets)
    yield
    for name in nets:
        del MODELS[name]


def config(**changes: object) -> cl.TrainConfig:
    settings: dict[str, object] = dict(data="digits", model="small", epochs=4, batch_size=32, train_images=320, lr=0.02,
                                       schedule="constant", crop_padding=2, flip="none", eval_every=0)  # fmt: skip
    return cl.TrainConfig(**(settings | changes))  # type: ignore[arg-type]


def watching(folder: Path, **changes: object) -> cl.WatchConfig:
    settings: dict[str, object] = dict(name="run", runs_dir=folder, progress="none", forecast=False, figures=False, save_every=0,
                                       save_minutes=0, probe_every=20)  # fmt: skip
    return cl.WatchConfig(**(settings | changes))  # type: ignore[arg-type]


def rules_raised(run: Run) -> list[str]:
    return [alarm["rule"] for alarm in run.alarms]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (dict(), []),
        (dict(optimizer="adam", lr=3e-3, schedule="one-cycle", epochs=10), []),
        (dict(model="frozen"), ["not_learning"]),
        (dict(lr=20.0), ["exploding"]),
        (
            dict(model="large", train_images=40, batch_size=40, lr=0.05, epochs=120, eval_every=10, crop_padding=0),
            ["overfitting"],
        ),
    ],
    ids=["healthy", "healthy, one-cycle", "frozen", "lr × 1000", "overfitting"],
)
@pytest.mark.usefixtures("registered")
def test_runs_of_train(changes: dict[str, object], expected: list[str], tmp_path: Path) -> None:
    run = cl.train(config(**changes), watching(tmp_path))
    assert rules_raised(run) == expected, run.alarms
    assert_replays(run)


def test_what_a_model_means_to_be_frozen_is_no_alarm(tmp_path: Path) -> None:
    """A weight that somebody else freezes in it is one."""
    for others in ((), ("1.groups.1.conv1.weight",)):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Identity(), Airbench(10, widths=(8, 8, 8)))
        for name in others:
            net.get_parameter(name).requires_grad_(False)
        optimizer = SGD([p for p in net.parameters() if p.requires_grad], lr=0.05)
        with cl.watch(net, optimizer, f"run-{len(others)}", runs_dir=tmp_path, figures=False, say=None) as watched:
            for _ in range(40):
                images = torch.randn(16, 3, 32, 32)
                F.cross_entropy(net(images), (images.mean((1, 2, 3)) > 0).long()).backward()
                optimizer.step()
                optimizer.zero_grad()
        named = {layer for alarm in watched.alarms if alarm.rule == "not_learning" for layer in alarm.layers}
        assert named == set(others)


@pytest.mark.usefixtures("registered")
def test_a_nan_in_a_layer_is_named_with_its_images(tmp_path: Path) -> None:
    run = cl.train(config(model="poisoned"), watching(tmp_path))
    assert run.result["state"] == "diverged"
    assert rules_raised(run) == ["non_finite"]
    (alarm,) = run.alarms
    assert (alarm["step"], alarm["layers"]) == (7, ["0"])
    told = json.loads((tmp_path / "run" / "incidents" / "step-00000007" / "incident.json").read_text())
    assert told["samples"] == [3]
    assert len(told["images"]) == 1
    named = f"samples 3 of the batch (images {told['images'][0]} of the training set)"
    assert f"first in the forward at 0, {named}" in alarm["evidence"]
    assert_replays(run)


@pytest.mark.usefixtures("registered")
def test_half_precision_that_overflows_at_first_is_no_alarm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=2.0**24))
    run = cl.train(config(precision="fp16"), watching(tmp_path))
    non_finite = run.tables["gradient_flow"]["non_finite"]
    assert (non_finite > 0).any(), "nothing was skipped"
    assert run.alarms == []


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("stop_at", [13, 27, 100])
def test_a_resume_raises_each_alarm_once(stop_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The frozen layer is noticed at step 20; batch norm's lag, with its few measurements, at 120."""

    def lagging(num_classes: int) -> nn.Module:
        net = frozen(small_net(num_classes), 0)
        nn.init.normal_(net[0].weight)  # a variance that the running one, from 1 on, needs long to reach
        net[1].momentum = 1e-3
        return net

    calls = 0

    def count(module: nn.Module, _: object) -> None:
        nonlocal calls
        calls += module.training
        if module.training and calls == stop_at + 5:
            raise RuntimeError("a power cut")

    def dying(num_classes: int) -> nn.Module:
        net = lagging(num_classes)
        net.register_forward_pre_hook(count)
        return net

    settings = config(model="small", epochs=14, lr=0.05)
    monkeypatch.setitem(MODELS, "small", lagging)
    whole = cl.train(settings, watching(tmp_path / "whole"))
    assert rules_raised(whole) == ["not_learning", "norm_drift"]
    monkeypatch.setitem(MODELS, "small", dying)
    every = stop_at / 10  # in epochs of ten steps
    with pytest.raises(RuntimeError, match="power cut"):
        cl.train(settings, watching(tmp_path / "cut", save_every=every, log_every=7))
    monkeypatch.setitem(MODELS, "small", lagging)
    run = cl.train(settings, watching(tmp_path / "cut", resume="auto", save_every=every, log_every=7))
    assert run.alarms == whole.alarms
    assert_replays(run)


def resnet_config(**changes: object) -> cl.TrainConfig:
    settings: dict[str, object] = dict(model="resnet18", epochs=1, batch_size=6, train_images=240, lr=0.01, schedule="cosine",
                                       weight_decay=5e-4)  # fmt: skip
    return config(**(settings | changes))


def test_a_healthy_resnet18_raises_none(tmp_path: Path) -> None:
    run = cl.train(resnet_config(), watching(tmp_path))
    assert run.alarms == []
    assert run.metrics["train/loss"][-5:].mean() < run.metrics["train/loss"][:5].mean()


if __name__ == "__main__":
    whole = partial(resnet_config, epochs=8, batch_size=32, train_images=1437)
    for number, settings in enumerate([
        whole(lr=0.05),
        whole(optimizer="adam", lr=1e-3, schedule="constant", weight_decay=0.0),
        config(model="simple_cnn", epochs=10, batch_size=64, train_images=1437, optimizer="adam", lr=2e-3, schedule="one-cycle"),
        config(model="resnet9", epochs=4, batch_size=32, train_images=1437, lr=4e-3, weight_decay=5e-3, schedule="one-cycle"),
        config(model="separable", epochs=6, batch_size=32, train_images=1437, lr=0.05, schedule="cosine"),
    ]):  # fmt: skip
        finished = cl.train(settings, watching(Path(sys.argv[1]), name=f"long-{number}", progress="auto"))
        print(settings.model, len(finished.metrics["train/loss"]), "steps:", rules_raised(finished) or "no alarm")
