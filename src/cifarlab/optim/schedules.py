"""Learning rate and momentum as pure functions of the step. No torch here, so that reports can draw them.

Every kind but the two ranges agrees with its namesake in torch.optim.lr_scheduler at every step, warm-up (LinearLR, then the
kind, in SequentialLR) included.

A schedule counts in ticks: a tick is a step, or an epoch when `schedule_per` is "epoch" (a fraction of an epoch at the end
counts as one). Lengths given in epochs are rounded to whole ticks. A scheduler of PyTorch begins with its first value before
any call of its step(): so update n uses the value of tick n − 1, and a cosine over T ticks does not quite reach `min_lr` (its
last value is that at T − 1 of T).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from cifarlab.config import TrainConfig


@dataclass(frozen=True)
class Schedule:
    """Learning rate and momentum of every update of a run: `lr_at(step)`, `momentum_at(step)`, step = 1 … num_steps.

    Raises ValueError for a step outside the run.
    """

    config: TrainConfig
    steps_per_epoch: int
    num_steps: int

    def lr_at(self, step: int) -> float:
        """Learning rate of update `step`.

        Warm-up rises linearly from `warmup_start` times the value at which the schedule proper begins to that value: `lr`, but
        for one-cycle `lr / div_factor`.
        """
        tick = self._tick(step)
        proper = SCHEDULES[self.config.schedule]
        if tick >= self._warmup_ticks:
            return proper(self.config, tick - self._warmup_ticks, self._num_ticks - self._warmup_ticks, self._ticks_per_epoch)
        start = self.config.warmup_start
        first = self.config.lr / (self.config.div_factor if self.config.schedule == "one-cycle" else 1)
        return first * (start + (1 - start) * tick / self._warmup_ticks)

    def marks(self) -> list[tuple[int, str]]:
        """(step, what begins or is reached there): warm-up's end, the peak of a one-cycle, restarts, steps down."""
        config, found = self.config, []
        if self._warmup_ticks:
            found.append((self._step_of(self._warmup_ticks), "warm-up ends"))
        if config.schedule == "one-cycle":
            after = self._warmup_ticks
            found.append((self._step_of(max(range(after, self._num_ticks), key=self._rate, default=after)), "peak"))
        elif config.schedule in ("restarts", "step"):
            word = "restart" if config.schedule == "restarts" else "decay"
            rates = [self._rate(tick) for tick in range(self._warmup_ticks, self._num_ticks)]
            sign = 1 if word == "restart" else -1
            turns = [k for k in range(1, len(rates)) if sign * (rates[k] - rates[k - 1]) > 0]
            found += [(self._step_of(self._warmup_ticks + k), word) for k in turns]
        return [(step, what) for step, what in found if step <= self.num_steps]

    def _rate(self, tick: int) -> float:
        return self.lr_at(min(self._step_of(tick), self.num_steps))

    def _step_of(self, tick: int) -> int:
        """The first update of a tick."""
        return tick + 1 if self.config.schedule_per == "step" else tick * self.steps_per_epoch + 1

    def momentum_at(self, step: int) -> float | None:
        """Momentum (Adam: beta1) of update `step`, or None where the schedule leaves it alone.

        During warm-up it stays at its first value.
        """
        tick = max(0, self._tick(step) - self._warmup_ticks)
        if self.config.schedule != "one-cycle" or not self.config.cycle_momentum:
            return None
        low, high = self.config.base_momentum, self.config.max_momentum
        return _one_cycle(self.config, tick, max(1, self._num_ticks - self._warmup_ticks), high, low, high)

    def _tick(self, step: int) -> int:
        if not 1 <= step <= self.num_steps:
            raise ValueError(f"step {step} is not in this run: its steps are 1 to {self.num_steps}")
        return step - 1 if self.config.schedule_per == "step" else (step - 1) // self.steps_per_epoch

    @property
    def _ticks_per_epoch(self) -> int:
        return self.steps_per_epoch if self.config.schedule_per == "step" else 1

    @property
    def _num_ticks(self) -> int:
        return self.num_steps if self.config.schedule_per == "step" else math.ceil(self.num_steps / self.steps_per_epoch)

    @property
    def _warmup_ticks(self) -> int:
        return round(self.config.warmup_epochs * self._ticks_per_epoch)


def build_schedule(config: TrainConfig, steps_per_epoch: int, num_steps: int) -> Schedule:
    """The schedule of a run of `num_steps` updates, `steps_per_epoch` of which make an epoch.

    Raises ValueError when either is below 1.
    """
    if steps_per_epoch < 1 or num_steps < 1:
        raise ValueError(f"steps_per_epoch={steps_per_epoch} and num_steps={num_steps} must both be at least 1")
    return Schedule(config, steps_per_epoch, num_steps)


# Each takes (config, tick from 0, number of ticks, ticks per epoch) and gives the learning rate; warm-up is not their concern.


def constant(config: TrainConfig, tick: int, num_ticks: int, ticks_per_epoch: int) -> float:
    """lr"""
    return config.lr


def step(config: TrainConfig, tick: int, num_ticks: int, ticks_per_epoch: int) -> float:
    """lr · decay_factor^⌊t/d⌋, with d = decay_epochs in ticks"""
    decay_ticks = max(1, round(config.decay_epochs * ticks_per_epoch))
    return config.lr * config.decay_factor ** (tick // decay_ticks)


def linear(config: TrainConfig, tick: int, num_ticks: int, ticks_per_epoch: int) -> float:
    """lr + (min_lr − lr) · t/T

    Source: budgeted training, Li et al. 2019, arXiv:1905.04753: the decay to hold on to when a run is short.
    """
    return _linear(config.lr, config.min_lr, tick / num_ticks)


def cosine(config: TrainConfig, tick: int, num_ticks: int, ticks_per_epoch: int) -> float:
    """min_lr + (lr − min_lr) · (1 + cos(π t/T)) / 2

    Source: Loshchilov & Hutter 2016, arXiv:1608.03983, without its restarts.
    """
    return _cosine(config.lr, config.min_lr, tick / num_ticks)


def restarts(config: TrainConfig, tick: int, num_ticks: int, ticks_per_epoch: int) -> float:
    """Cosines from lr to min_lr, each cycle restart_growth times as long as the one before, the first restart_epochs long

    Source: SGDR, Loshchilov & Hutter 2016, arXiv:1608.03983.
    """
    length = max(1, round(config.restart_epochs * ticks_per_epoch))
    if config.restart_growth == 1:
        tick %= length
    while tick >= length:
        tick -= length
        length *= config.restart_growth
    return _cosine(config.lr, config.min_lr, tick / length)


def one_cycle(config: TrainConfig, tick: int, num_ticks: int, ticks_per_epoch: int) -> float:
    """lr/div_factor → lr → lr/div_factor/final_div_factor, the peak at tick peak_at·T − 1, slopes cosine or linear

    Source: Smith & Topin 2017, arXiv:1708.07120, in PyTorch's form (two phases).
    """
    start = config.lr / config.div_factor
    return _one_cycle(config, tick, num_ticks, start, config.lr, start / config.final_div_factor)


def range_exponential(config: TrainConfig, tick: int, num_ticks: int, ticks_per_epoch: int) -> float:
    """min_lr · (lr/min_lr)^(t/(T−1)): the last tick has lr itself

    Source: range tests of Smith 2015, arXiv:1506.01186, on fast.ai's logarithmic axis.
    """
    growth: float = (config.lr / config.min_lr) ** (tick / max(1, num_ticks - 1))
    return config.min_lr * growth


def range_linear(config: TrainConfig, tick: int, num_ticks: int, ticks_per_epoch: int) -> float:
    """min_lr + (lr − min_lr) · t/(T−1): the last tick has lr itself

    Source: range tests of Smith 2015, arXiv:1506.01186.
    """
    return _linear(config.min_lr, config.lr, tick / max(1, num_ticks - 1))


def _one_cycle(config: TrainConfig, tick: int, num_ticks: int, start: float, peak: float, end: float) -> float:
    anneal = _cosine if config.anneal == "cos" else _linear
    peak_tick = config.peak_at * num_ticks - 1
    if tick < peak_tick:
        return anneal(start, peak, tick / peak_tick)
    if tick == peak_tick:  # also where a phase has no length, and PyTorch would divide by 0
        return peak
    return anneal(peak, end, (tick - peak_tick) / (num_ticks - 1 - peak_tick))


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * share))


def _linear(start: float, end: float, share: float) -> float:
    return start + (end - start) * share


SCHEDULES: dict[str, Callable[[TrainConfig, int, int, int], float]] = {
    "constant": constant,
    "step": step,
    "linear": linear,
    "cosine": cosine,
    "restarts": restarts,
    "one-cycle": one_cycle,
    "range-exponential": range_exponential,
    "range-linear": range_linear,
}
