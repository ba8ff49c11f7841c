"""Schedules and optimizers against PyTorch's own, averaged weights against arithmetic by hand."""

import copy
import io
import math
import subprocess
import sys
import warnings
from dataclasses import replace
from typing import Any, get_args, get_type_hints

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, reject, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import lr_scheduler as lrs

from cifarlab.config import InputError, TrainConfig
from cifarlab.optim.ema import WeightAverage, recompute_batch_norm
from cifarlab.optim.optimizers import build_optimizer, set_lr
from cifarlab.optim.schedules import SCHEDULES, build_schedule

OPTIMIZERS = get_args(get_type_hints(TrainConfig)["optimizer"])


# ---- schedules


def torch_values(config: TrainConfig, steps_per_epoch: int, num_steps: int) -> list[tuple[float, float]]:
    """Learning rate and momentum of every update, from PyTorch's schedulers."""
    per_step = config.schedule_per == "step"
    ticks_per_epoch = steps_per_epoch if per_step else 1
    num_ticks = num_steps if per_step else math.ceil(num_steps / steps_per_epoch)
    warmup = round(config.warmup_epochs * ticks_per_epoch)
    total = num_ticks - warmup
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=config.lr, momentum=config.momentum)
    scheduler: lrs.LRScheduler
    match config.schedule:
        case "constant":
            scheduler = lrs.ConstantLR(optimizer, factor=1.0)
        case "step":
            scheduler = lrs.StepLR(optimizer, max(1, round(config.decay_epochs * ticks_per_epoch)), config.decay_factor)
        case "linear":
            scheduler = lrs.LinearLR(optimizer, 1.0, config.min_lr / config.lr, total)
        case "cosine":
            scheduler = lrs.CosineAnnealingLR(optimizer, total, config.min_lr)
        case "restarts":
            length = max(1, round(config.restart_epochs * ticks_per_epoch))
            scheduler = lrs.CosineAnnealingWarmRestarts(optimizer, length, config.restart_growth, config.min_lr)
        case "one-cycle":
            scheduler = lrs.OneCycleLR(
                optimizer, config.lr, total, pct_start=config.peak_at, anneal_strategy=config.anneal,
                cycle_momentum=config.cycle_momentum, base_momentum=config.base_momentum, max_momentum=config.max_momentum,
                div_factor=config.div_factor, final_div_factor=config.final_div_factor,
            )  # fmt: skip
        case "range-exponential":
            rise = (config.lr / config.min_lr) ** (1 / max(1, total - 1))
            scheduler = lrs.LambdaLR(optimizer, lambda tick: config.min_lr / config.lr * rise**tick)
        case "range-linear":
            slope = (1 - config.min_lr / config.lr) / max(1, total - 1)
            scheduler = lrs.LambdaLR(optimizer, lambda tick: config.min_lr / config.lr + slope * tick)
    if warmup:
        linear = lrs.LinearLR(optimizer, config.warmup_start, total_iters=warmup)
        scheduler = lrs.SequentialLR(optimizer, [linear, scheduler], [warmup])
    values = []
    for tick in range(num_ticks):
        group = optimizer.param_groups[0]
        values += [(float(group["lr"]), group["momentum"])] * (1 if per_step else steps_per_epoch)
        optimizer.step()
        if tick + 1 < num_ticks:
            scheduler.step()
    return values[:num_steps]


@st.composite
def runs(draw: st.DrawFn) -> tuple[TrainConfig, int, int]:
    """A config, steps per epoch and number of steps, with at least two ticks after the warm-up."""
    steps_per_epoch = draw(st.integers(1, 12))
    epochs = draw(st.integers(2, 40) | st.floats(2, 40))
    lr = draw(st.floats(1e-4, 1))
    per = draw(st.sampled_from(["step", "epoch"]))
    schedule = draw(st.sampled_from(list(SCHEDULES)))
    is_range = schedule.startswith("range")
    config = TrainConfig(
        epochs=epochs, lr=lr, schedule=schedule, schedule_per=per,
        min_lr=lr * draw(st.sampled_from([1e-6, 0.01, 0.5] if is_range else [0.0, 0.01, 0.5])),
        warmup_epochs=0.0 if is_range else draw(st.just(0.0) | st.floats(0, epochs - 2, exclude_max=epochs > 2)),
        warmup_start=draw(st.floats(0.01, 1)),
        decay_epochs=draw(st.floats(0.5, 20)), decay_factor=draw(st.floats(0.1, 1)),
        restart_epochs=draw(st.floats(0.5, 20)), restart_growth=draw(st.integers(1, 3)),
        peak_at=draw(st.floats(0.01, 1)), div_factor=draw(st.floats(1, 100)), final_div_factor=draw(st.floats(1, 1e5)),
        anneal=draw(st.sampled_from(["cos", "linear"])), cycle_momentum=draw(st.booleans()),
    )  # fmt: skip
    return config, steps_per_epoch, round(epochs * steps_per_epoch)


LAB_D = TrainConfig(
    epochs=24, lr=0.04006, schedule="one-cycle", peak_at=5 / 24, anneal="linear", div_factor=10, final_div_factor=1,
    cycle_momentum=True,
)  # fmt: skip


@settings(max_examples=300, deadline=None, derandomize=True)
@example((LAB_D, 98, 98 * 24))
@example((replace(LAB_D, anneal="cos", schedule_per="epoch", warmup_epochs=3), 7, 7 * 24))
@example((TrainConfig(epochs=25, lr=0.15, schedule="cosine"), 100, 2500))
# Too short for a rise: torch warms up to lr / div_factor all the same.
@example((TrainConfig(epochs=4, lr=1, schedule="one-cycle", warmup_epochs=1, warmup_start=1, peak_at=0.25, div_factor=1), 1, 4))
@given(runs())
def test_schedules_agree_with_torch(run: tuple[TrainConfig, int, int]) -> None:
    config, steps_per_epoch, num_steps = run
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # older SequentialLR warns of a deprecation of its own
        try:
            expected = torch_values(config, steps_per_epoch, num_steps)
        except ZeroDivisionError:  # OneCycleLR with a phase of no length; test_one_cycle_phases_without_length has ours
            reject()
    schedule = build_schedule(config, steps_per_epoch, num_steps)
    assert len(expected) == num_steps
    for step, (lr, momentum) in enumerate(expected, 1):
        # torch's recursive forms gather rounding errors of the size of lr, which shows where the value goes to 0.
        assert schedule.lr_at(step) == pytest.approx(lr, rel=1e-12, abs=1e-12 * config.lr), step
        ours = schedule.momentum_at(step)
        assert (config.momentum if ours is None else ours) == pytest.approx(momentum, rel=1e-12), step


def test_the_labs_one_cycle_by_hand() -> None:
    """1 → 10 tenths of the peak over 5 of 24 epochs, then back; momentum 0.95 → 0.85 → 0.95."""
    schedule = build_schedule(LAB_D, 98, 98 * 24)
    assert schedule.lr_at(1) == pytest.approx(0.004006)
    assert schedule.lr_at(5 * 98) == pytest.approx(0.04006)
    assert schedule.lr_at(24 * 98) == pytest.approx(0.004006)
    assert [schedule.momentum_at(s) for s in (1, 5 * 98, 24 * 98)] == pytest.approx([0.95, 0.85, 0.95])
    assert build_schedule(replace(LAB_D, cycle_momentum=False), 98, 98 * 24).momentum_at(1) is None


def test_one_cycle_phases_without_length() -> None:
    """A peak on the very first tick, where torch's OneCycleLR divides by zero."""
    config = TrainConfig(epochs=2, schedule="one-cycle", peak_at=0.5, cycle_momentum=True)
    schedule = build_schedule(config, 1, 2)
    assert schedule.lr_at(1) == config.lr
    assert schedule.momentum_at(1) == config.base_momentum
    assert schedule.lr_at(2) == pytest.approx(config.lr / 25 / 1e4)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("per", ["step", "epoch"])
def test_shortest_runs(name: Any, per: Any) -> None:
    """One update, and a warm-up that rounds to the whole run, still give a usable value."""
    is_range = name.startswith("range")
    for warmup_epochs in (0.0,) if is_range else (0.0, 0.9):
        config = TrainConfig(epochs=1, schedule=name, schedule_per=per, warmup_epochs=warmup_epochs, cycle_momentum=True,
                             min_lr=0.01 * is_range)  # fmt: skip
        for num_steps in (1, 3):
            schedule = build_schedule(config, num_steps, num_steps)
            assert all(0 < schedule.lr_at(s) <= config.lr for s in range(1, num_steps + 1))
            assert schedule.momentum_at(num_steps) is None or name == "one-cycle"


def test_a_range_reaches_both_its_ends() -> None:
    for name, middle in (("range-exponential", 1e-2), ("range-linear", 0.50005)):
        config = TrainConfig(epochs=3, schedule=name, lr=1.0, min_lr=1e-4)
        by_step = build_schedule(config, 7, 21)
        assert [by_step.lr_at(step) for step in (1, 11, 21)] == pytest.approx([1e-4, middle, 1.0])
        ladder = build_schedule(replace(config, schedule_per="epoch"), 7, 21)
        assert [ladder.lr_at(step) for step in range(1, 22)] == pytest.approx([1e-4] * 7 + [middle] * 7 + [1.0] * 7)


def test_turning_points_are_where_the_rate_turns() -> None:
    def marks(num_epochs: int = 10, **settings: Any) -> list[tuple[int, str]]:
        return build_schedule(TrainConfig(epochs=num_epochs, lr=1.0, **settings), 20, 20 * num_epochs).marks()

    assert marks(schedule="cosine") == marks(schedule="constant") == []
    assert marks(schedule="cosine", warmup_epochs=2) == [(41, "warm-up ends")]  # the first update at the full rate
    assert marks(schedule="one-cycle", peak_at=0.3) == [(60, "peak")]
    assert marks(schedule="one-cycle", peak_at=0.5, warmup_epochs=2) == [(41, "warm-up ends"), (120, "peak")]
    assert marks(schedule="restarts", restart_epochs=2, restart_growth=2) == [(41, "restart"), (121, "restart")]
    assert marks(schedule="step", decay_epochs=4) == [(81, "decay"), (161, "decay")]
    assert marks(schedule="step", decay_epochs=4, schedule_per="epoch") == [(81, "decay"), (161, "decay")]
    plan = build_schedule(LAB_D, 98, 98 * 24)
    assert plan.marks() == [(490, "peak")]
    assert plan.lr_at(490) == max(plan.lr_at(step) for step in range(1, 98 * 24 + 1))


def test_schedule_refuses_steps_outside_the_run() -> None:
    schedule = build_schedule(TrainConfig(), 10, 20)
    for step in (0, 21):
        with pytest.raises(ValueError, match="1 to 20"):
            schedule.lr_at(step)
        with pytest.raises(ValueError, match="1 to 20"):
            schedule.momentum_at(step)
    with pytest.raises(ValueError, match="num_steps=0"):
        build_schedule(TrainConfig(), 10, 0)


def test_schedules_are_those_of_the_config_and_need_no_torch() -> None:
    assert tuple(SCHEDULES) == get_args(get_type_hints(TrainConfig)["schedule"])
    subprocess.run(
        [sys.executable, "-c", "import sys, cifarlab.optim.schedules; sys.exit('torch' in sys.modules)"], check=True, timeout=60
    )


# ---- optimizers


def small_net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5),
        nn.Conv2d(8, 16, 3, stride=2, bias=False), nn.BatchNorm2d(16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5),
    )  # fmt: skip
    return net.to(memory_format=torch.channels_last)


def train_steps(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        torch.manual_seed(step)  # dropout
        images = torch.randn(8, 3, 16, 16, generator=generator).contiguous(memory_format=torch.channels_last)
        labels = torch.randint(5, (8,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(net(images), labels).backward()
        optimizer.step()


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def optimizer_config(name: Any, **changes: Any) -> TrainConfig:
    values = {"lr": 0.02, "momentum": 0.8, "nesterov": name == "sgd", "beta1": 0.85, "beta2": 0.98, "alpha": 0.97, "eps": 1e-3}
    return TrainConfig(optimizer=name, weight_decay=0.1, **values | changes)


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "muon"])  # which has its own twin in test_muon.py
def test_optimizers_agree_with_torchs_plain_ones(name: str) -> None:
    """Every setting arrives, and the fused kernels do in channels_last what the loop over tensors does."""
    plain = {
        "sgd": lambda p: torch.optim.SGD(p, 0.02, momentum=0.8, nesterov=True, weight_decay=0.1, foreach=False),
        "adam": lambda p: torch.optim.Adam(p, 0.02, (0.85, 0.98), 1e-3, weight_decay=0.1, foreach=False),
        "adamw": lambda p: torch.optim.AdamW(p, 0.02, (0.85, 0.98), 1e-3, weight_decay=0.1, foreach=False),
        "rmsprop": lambda p: torch.optim.RMSprop(p, 0.02, 0.97, 1e-3, weight_decay=0.1, momentum=0.8, foreach=False),
    }
    ours, twin = small_net(), small_net()
    train_steps(ours, build_optimizer(ours, optimizer_config(name)), range(5))
    train_steps(twin, plain[name](twin.parameters()), range(5))
    for a, b in zip(ours.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_repeat_bit_for_bit(name: str) -> None:
    first, second = small_net(), small_net()
    for net in (first, second):
        train_steps(net, build_optimizer(net, optimizer_config(name)), range(5))
    assert same_weights(first, second)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_that_lost_its_memory_order_goes_on_exactly(name: str) -> None:
    """Fused CPU kernels ignore strides: state that comes back contiguous must be laid out like the weights again."""
    net = small_net()
    optimizer = build_optimizer(net, optimizer_config(name))
    train_steps(net, optimizer, range(3))
    resumed = copy.deepcopy(net)
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        for key, value in state.items():
            state[key] = value.contiguous()
    loaded = build_optimizer(resumed, optimizer_config(name))
    loaded.load_state_dict(saved)
    train_steps(net, optimizer, range(3, 6))
    train_steps(resumed, loaded, range(3, 6))
    assert same_weights(net, resumed)


@pytest.mark.parametrize("decay_norms", [True, False])
def test_weight_decay_spares_norms_and_biases_on_request(decay_norms: bool) -> None:
    """With gradients of zero, plain SGD multiplies what decays by 1 − lr · weight_decay and leaves the rest."""
    net = small_net()
    config = TrainConfig(optimizer="sgd", lr=0.5, momentum=0, weight_decay=0.2, decay_norms=decay_norms)
    optimizer = build_optimizer(net, config)
    before = [p.detach().clone() for p in net.parameters()]
    for param in net.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    for param, old in zip(net.parameters(), before, strict=True):
        torch.testing.assert_close(param.detach(), old * (0.9 if decay_norms or old.ndim > 1 else 1.0))


def test_frozen_parameters_are_left_out() -> None:
    net = small_net()
    net[0].requires_grad_(False)
    groups = build_optimizer(net, TrainConfig(decay_norms=False)).param_groups
    assert sum(len(group["params"]) for group in groups) == len(list(net.parameters())) - 2


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_set_lr_reaches_every_group(name: str) -> None:
    optimizer = build_optimizer(small_net(), optimizer_config(name, decay_norms=False))
    count = 3 if name == "muon" else 2  # the last layer's matrix is a group of its own there
    set_lr(optimizer, 0.25)
    momentum = [group["betas"] if "betas" in group else group["momentum"] for group in optimizer.param_groups]
    assert momentum == ([(0.85, 0.98)] * 2 if name.startswith("adam") else [0.8] * count)
    set_lr(optimizer, 0.5, momentum=0.6)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5] * count
    momentum = [group["betas"] if "betas" in group else group["momentum"] for group in optimizer.param_groups]
    assert momentum == ([(0.6, 0.98)] * 2 if name.startswith("adam") else [0.6] * count)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_biases_and_the_last_layer_may_learn_at_rates_of_their_own(name: str) -> None:
    net = small_net()
    optimizer = build_optimizer(net, optimizer_config(name, lr=0.02, bias_lr=64, head_lr=0.5))
    rates = {id(param): group["lr"] for group in optimizer.param_groups for param in group["params"]}
    head = net[8]
    assert isinstance(head, nn.Linear)
    for factor_of_lr in (0.02, 0.1):
        expected = {id(param): factor_of_lr * (64 if param.ndim == 1 else 0.5 if param is head.weight else 1)
                    for param in net.parameters()}  # fmt: skip
        assert rates == pytest.approx(expected)
        set_lr(optimizer, 0.1)
        rates = {id(param): group["lr"] for group in optimizer.param_groups for param in group["params"]}


# ---- averaged weights


def test_average_by_hand() -> None:
    """Decay 2/11, 3/12, … up to the given one; float buffers averaged alike, whole numbers copied."""
    net = nn.BatchNorm1d(1)
    average = WeightAverage(net, decay=0.25)
    expected_weight, expected_mean = 1.0, 0.0
    for step, decay in enumerate((2 / 11, 0.25, 0.25), 1):
        with torch.no_grad():
            net.weight.fill_(step * 10.0)
            net(torch.tensor([[step * 1.0], [step * 3.0]]))
        average.update(net)
        assert isinstance(net.running_mean, Tensor)
        expected_weight = decay * expected_weight + (1 - decay) * step * 10
        expected_mean = decay * expected_mean + (1 - decay) * net.running_mean.item()
        assert average.module.weight.item() == pytest.approx(expected_weight)
        assert average.module.running_mean.item() == pytest.approx(expected_mean)
        assert int(average.module.num_batches_tracked) == step


def test_average_leaves_the_model_alone() -> None:
    nets = small_net(), small_net()
    optimizers = [build_optimizer(net, optimizer_config("sgd")) for net in nets]
    average = WeightAverage(nets[0], decay=0.9)
    for step in range(4):
        for net, optimizer in zip(nets, optimizers, strict=True):
            train_steps(net, optimizer, range(step, step + 1))
        average.update(nets[0])
    assert same_weights(*nets)
    assert nets[0].training
    assert not average.module.training
    assert not any(p.requires_grad for p in average.module.parameters())
    assert not same_weights(nets[0], average.module)


def test_average_goes_on_from_its_state() -> None:
    net = small_net()
    optimizer = build_optimizer(net, optimizer_config("sgd"))
    average = WeightAverage(net, decay=0.99)
    train_steps(net, optimizer, range(3))
    average.update(net)
    file = io.BytesIO()
    torch.save(average.state_dict(), file)
    file.seek(0)
    resumed = WeightAverage(small_net(seed=1), decay=0.99)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    train_steps(net, optimizer, range(3, 5))
    for a in (average, resumed):
        a.update(net)
    assert same_weights(average.module, resumed.module)


def test_average_refuses_a_decay_of_one() -> None:
    with pytest.raises(InputError, match=r"decay=1\.0 .* below 1"):
        WeightAverage(small_net(), decay=1.0)


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.mean((0, 2, 3)), x.var((0, 2, 3))


@torch.no_grad()
def test_recomputed_statistics_are_those_of_the_data() -> None:
    """In one batch: mean and unbiased variance of all activations, in the second norm too, and dropout is off."""
    net = small_net()
    images = torch.randn(24, 3, 16, 16)
    net[1].running_mean.fill_(math.nan)
    recompute_batch_norm(net, [images])
    convolved = net[0](images)
    deeper = net[4](F.batch_norm(convolved, None, None, net[1].weight, net[1].bias, training=True).relu())
    for norm, x in ((net[1], convolved), (net[5], deeper)):
        mean, variance = statistics(x)
        torch.testing.assert_close(norm.running_mean, mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(norm.running_var, variance, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_recomputed_statistics_weigh_every_image_alike() -> None:
    net = small_net()
    images = torch.randn(24, 3, 16, 16) + torch.arange(24).reshape(24, 1, 1, 1)
    batches = images.split([10, 10, 4])
    recompute_batch_norm(net, iter(batches))
    convolved = net[0](images)
    variances = torch.stack([statistics(x)[1] for x in convolved.split([10, 10, 4])])
    torch.testing.assert_close(net[1].running_mean, statistics(convolved)[0])
    torch.testing.assert_close(net[1].running_var, torch.tensor([10.0, 10.0, 4.0]) @ variances / 24)


def test_recompute_restores_flags_even_after_an_error() -> None:
    net = small_net()
    net[1].momentum, net[5].momentum = 0.3, None
    net[5].eval()
    flags = [m.training for m in net.modules()]
    for batches, error in (([], InputError), ([torch.randn(2, 3, 16, 16), torch.randn(2, 4, 16, 16)], RuntimeError)):
        with pytest.raises(error):
            recompute_batch_norm(net, batches)
        assert [m.training for m in net.modules()] == flags
        assert (net[1].momentum, net[5].momentum) == (0.3, None)
