"""Forecasts against what runs then take, and against arithmetic."""

import importlib
import itertools
import os
import random
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import cifarlab as cl
from cifarlab import forecast
from cifarlab.config import TrainConfig, WatchConfig
from cifarlab.forecast import forecast_run, measure_step
from cifarlab.models import MODELS
from cifarlab.probes.moments import Moments
from cifarlab.profile.counting import count
from cifarlab.recipes import RECIPES

QUIET: dict[str, Any] = {"progress": "none", "forecast": False, "figures": False, "device": "cpu", "threads": 1}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    """Three epochs of a net whose steps take some milliseconds."""

    def build(num_classes: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=2, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, num_classes),
        )  # fmt: skip

    monkeypatch.setitem(MODELS, "small", build)
    return TrainConfig(data="digits", model="small", epochs=3, batch_size=64, brightness=0.2)


class Ticks:
    """A clock that the work itself moves on: `slow` makes a function take so many seconds of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.sizes, self._patch = 0.0, list[int](), monkeypatch
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(time, "process_time", lambda: self.now)

    def __deepcopy__(self, memo: object) -> "Ticks":
        return self

    def slow(self, owner: Any, name: str, seconds: float) -> None:
        work = getattr(owner, name)

        def slowed(*args: Any, **kwargs: Any) -> Any:
            self.now += seconds
            return work(*args, **kwargs)

        self._patch.setattr(owner, name, slowed)


def test_a_run_takes_what_was_forecast(small: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that only the work moves, the forecast is what the run then takes, to the last digit.

    By real clocks, on a quiet machine: benchmarks/forecast.py.
    """
    training = importlib.import_module("cifarlab.train")
    ticks, begun = Ticks(monkeypatch), list[float]()

    class Marked(training.StopSignal):  # type: ignore[name-defined, misc]  # held from the loop's first line to its last
        def __enter__(self) -> Any:
            begun.append(ticks.now)
            return super().__enter__()

        def release(self) -> None:
            begun.append(ticks.now)
            super().release()

    monkeypatch.setattr(training, "StopSignal", Marked)
    ticks.slow(nn.BatchNorm2d, "forward", 0.01)  # a pass, of any number of images
    ticks.slow(nn.utils, "clip_grad_norm_", 0.02)
    ticks.slow(torch.optim.SGD, "step", 0.04)
    ticks.slow(Moments, "of_weights", 0.08)
    ticks.slow(Moments, "exponents", 0.16)  # of a probe of an interval, three times
    ticks.slow(importlib.import_module("cifarlab.checkpoint"), "sync_folder", 5.0)  # twice a checkpoint
    config = replace(small, clip_norm=1.0, eval_every=1.0, train_images=1408)  # 22 whole batches
    told = forecast_run(config, WatchConfig(probe_every=30, **QUIET), budget=5)
    ticks.now, start = 0.0, ticks.now
    assert start > 5
    run = cl.train(config, WatchConfig(probe_every=30, runs_dir=tmp_path, **QUIET))
    assert told.num_steps == run.metrics.rows[-1]["step"] == 66
    assert told.train_seconds == pytest.approx(run.result["train_seconds"])
    assert told.probe_seconds / told.train_seconds == pytest.approx(run.result["probe_share"])
    assert (told.num_checkpoints, told.save_seconds) == (3, pytest.approx(30))
    assert told.seconds == pytest.approx(begun[1] - begun[0], rel=0.01)
    assert told.waited == 0


def test_the_parts_add_up(small: TrainConfig) -> None:
    told = forecast_run(replace(small, eval_every=0.5, epochs=1.5), WatchConfig(**QUIET), budget=0.3)
    assert (told.num_steps, told.num_evaluations) == (34, 3)
    num_images = 1437 + 11 * 64
    assert told.images_per_second * told.train_seconds == pytest.approx(num_images)
    assert told.seconds == told.train_seconds + told.eval_seconds + told.save_seconds
    assert 0 < told.probe_seconds < told.train_seconds
    assert told.num_checkpoints == 2
    step = told.augment_seconds + told.pass_seconds
    steps = num_images / 64 * step + 34 * told.update_seconds
    rare = 2 * told.rare_seconds  # at the first step and at the last
    assert told.train_seconds == pytest.approx(steps + rare + told.warm_up_seconds)
    assert told.low_seconds <= 0.93 * told.seconds < 1.07 * told.seconds <= told.high_seconds + 1e-9
    assert told.petaflops == pytest.approx(1e-15 * num_images * count(MODELS["small"](10), (3, 32, 32)).training_flops)
    assert told.gflops == pytest.approx(1e6 * told.petaflops / told.train_seconds)


def test_smaller_images_at_first_cost_less_and_are_measured_by_themselves(small: TrainConfig) -> None:
    config = replace(small, small_sides="8:0.5,16:0.75", epochs=4, drop_last=True)  # 88 updates: 44, 22, 22
    told = forecast_run(config, WatchConfig(**QUIET), budget=0.6)
    flops = {side: count(MODELS["small"](10), (3, side, side)).training_flops for side in (8, 16, 32)}
    assert told.petaflops == pytest.approx(1e-15 * 64 * (44 * flops[8] + 22 * flops[16] + 22 * flops[32]))
    assert told.num_steps == 88
    step = told.augment_seconds + told.pass_seconds + told.update_seconds
    assert told.train_seconds == pytest.approx(88 * step + 2 * told.rare_seconds + told.warm_up_seconds)


def pretend(monkeypatch: pytest.MonkeyPatch, seconds: list[float], *, running: float = 1.0, load: float = 0.0) -> None:
    """Rounds of 0.1 s, these seconds and 0.1 s, in which the processor ran for that share; no warm-up, evaluations of 1 s."""
    rounds = np.array([[[0.1, 0.1], [took, running * took], [0.1, 0.1]] for took in seconds])
    measured = forecast._Measured(rounds, np.ones((1, 2)), np.zeros(2), np.zeros(2), 0.0)
    monkeypatch.setattr(forecast._Step, "measure", lambda *_, **__: measured)
    monkeypatch.setattr(forecast._Step, "save", lambda *_: np.zeros(2))
    monkeypatch.setattr(os, "getloadavg", lambda: (load * (os.cpu_count() or 1), 0.0, 0.0))


def test_mean_and_interval_are_those_of_the_steps(small: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, [1.0, 1.3, 0.7])
    told = forecast_run(small, WatchConfig(**QUIET), budget=0.2)
    assert told.spread == pytest.approx(0.6 / 1.2)
    assert (told.augment_seconds, told.pass_seconds, told.update_seconds) == pytest.approx((0.1, 1.0, 0.1))
    assert (told.low_seconds / told.seconds, told.high_seconds / told.seconds) == pytest.approx((0.9 / 1.2, 1.5 / 1.2))
    assert told.processor_seconds == pytest.approx(told.seconds)
    # One slow step among many is in the mean, as it will be in the run; the interval is of groups of steps.
    pretend(monkeypatch, [*[1.0] * 31, 17.0])
    told = forecast_run(small, WatchConfig(**QUIET), budget=0.2)
    assert told.pass_seconds == pytest.approx(1.5)
    assert (told.low_seconds / told.seconds, told.high_seconds / told.seconds) == pytest.approx((1.2 / 1.7, 5.2 / 1.7))


def test_a_busy_machine_is_told_in_one_line(small: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    for settings, words in (({}, ""), ({"running": 0.7}, "other work took 30 % of the time"), ({"load": 0.9}, "load 0.9 per")):
        pretend(monkeypatch, [1.0, 1.0], **settings)  # type: ignore[arg-type]
        told = forecast_run(small, WatchConfig(**QUIET), budget=0.2).warning
        assert words in told
        assert bool(words) == bool(told)
        assert len(told.splitlines()) == bool(words)
        assert len(told) <= 100


def test_memory_is_held_and_freed_as_in_the_loop(small: TrainConfig) -> None:
    """It decides on several per cent: gradients go behind the update, logits stay until the next ones."""
    step = forecast._Step(MODELS["small"](10), small, WatchConfig(), torch.device("cpu"))
    batch = torch.randn(64, 3, 32, 32), torch.randint(10, (64,))
    step.measure(lambda _: batch, step.try_out(*batch)[0], budget=60, most_rounds=2)
    assert all(weight.grad is None for weight in step.model.parameters())
    assert step.last is not None
    assert step.last[0].shape == (64, 10)


def test_long_runs_are_measured_longer_and_short_ones_no_longer_than_they_take() -> None:
    assert [forecast._choose_budget(seconds) for seconds in (4, 40, 600, 2400, 4000, 40_000)] == [4, 20, 20, 40, 60, 60]


class Sluggish(nn.Module):
    """Its first call takes longer, as that of any kernel does."""

    def __init__(self, ticks: Ticks) -> None:
        super().__init__()
        self.net, self.ticks = MODELS["small"](10), ticks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.ticks.now += 0.001 * len(x) if self.ticks.sizes else 0.508
        self.ticks.sizes.append(len(x))
        return self.net(x)  # type: ignore[no-any-return]


def test_the_slow_first_step_is_counted_once_and_evaluations_lie_between(
    small: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = Ticks(monkeypatch)
    net = Sluggish(ticks)
    monkeypatch.setitem(MODELS, "sluggish", lambda _: net)
    monkeypatch.setattr(forecast, "count", lambda *_: count(net.net, (3, 32, 32)))
    told = forecast_run(replace(small, model="sluggish"), WatchConfig(**QUIET | {"probes": "none"}), budget=1.5)
    assert told.warm_up_seconds == pytest.approx(0.5)
    assert told.pass_seconds == pytest.approx(0.064)
    looked_at = next(size for size in ticks.sizes if size not in (8, 64))  # by an evaluation
    at = [k for k, size in enumerate(ticks.sizes) if size == looked_at]
    assert any(b - a > 1 for a, b in itertools.pairwise(at))  # steps between them


def test_a_long_measurement_is_announced(
    small: TrainConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend(monkeypatch, [1.0])
    lines: list[str] = []
    forecast_run(small, WatchConfig(**QUIET), budget=3, say=lines.append)
    assert not lines
    forecast_run(small, WatchConfig(**QUIET), budget=3.1, say=lines.append)
    assert lines == ["measuring training steps here, for up to about 3 s"]
    forecast_run(small, WatchConfig(**QUIET), budget=3.1)
    assert capsys.readouterr() == ("", lines[0] + "\n")


class Gamble(nn.Module):
    """Draws from all generators, and sees whether denormals are flushed."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.flushes = MODELS["small"](10), set[bool]()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.flushes.add(sys.float_info.min / 2 == 0)
        return self.net(x) * random.random() * np.random.rand() + torch.rand(())  # type: ignore[no-any-return]


@pytest.mark.parametrize("flush", [False, True])
def test_measuring_leaves_generators_and_denormals_as_they_were(
    small: TrainConfig, flush: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def states() -> tuple[object, ...]:
        return random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()

    net = Gamble()
    monkeypatch.setitem(MODELS, "gamble", lambda _: net)
    monkeypatch.setattr(forecast, "count", lambda *_: count(net.net, (3, 32, 32)))  # the count may draw without flushing
    before = states()
    torch.set_flush_denormal(flush)
    try:
        forecast_run(replace(small, model="gamble"), WatchConfig(**QUIET), budget=0.2)
        assert (sys.float_info.min / 2 == 0) == flush
    finally:
        torch.set_flush_denormal(False)
    assert net.flushes == {True}
    measure_step(net, small, (3, 32, 32), 10, 8, torch.device("cpu"), budget=0.1)
    assert states() == before


def test_the_work_of_a_recipe_is_the_one_it_names() -> None:
    told = forecast_run(RECIPES["quick"].build(), WatchConfig(**QUIET), budget=0.2)
    assert told.petaflops == pytest.approx(RECIPES["quick"].petaflops, rel=2e-3)


@pytest.mark.parametrize("changes", [
    {"data": "cifar100", "labels": "coarse", "train_images": 300, "val_fraction": 0.1, "micro_batch_size": 16},
    {"mixup_alpha": 1.0, "cutmix_alpha": 1.0, "clip_norm": 1.0, "clip_value": 0.1, "ema_decay": 0.9, "optimizer": "adamw"},
    {"precision": "bf16", "channels_last": False, "drop_last": True, "eval_every": 0.0},
], ids=["pieces of cifar100", "mixed, clipped, averaged", "bfloat16"])  # fmt: skip
def test_every_setting_can_be_forecast_without_data(
    small: TrainConfig, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("data was loaded")

    monkeypatch.setattr(forecast, "load_dataset", refuse)
    random, threads = torch.get_rng_state(), torch.get_num_threads()
    told = forecast_run(replace(small, **changes), WatchConfig(**QUIET), budget=0.2)
    assert told.train_seconds > 0 < told.eval_seconds
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.get_num_threads() == threads


def test_a_longer_net_is_forecast_on_fewer_images_within_the_budget(
    small: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = Ticks(monkeypatch)
    net = Sluggish(ticks)
    before = [value.clone() for value in net.state_dict().values()]
    whole = measure_step(net, replace(small, batch_size=8192), (3, 32, 32), 10, 8192, torch.device("cpu"), budget=0.5)
    assert max(ticks.sizes) == 83  # six rounds at least
    assert ticks.now < 0.508 + 2 * 0.5
    assert whole == pytest.approx(8.192)
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), before, strict=True))
    assert net.training
