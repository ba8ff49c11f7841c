"""What a learning-rate range test has measured, and what it says: pure functions of the saved curves. No torch here.

A step test raises the learning rate at every update; its losses are noisy, and are smoothed. A ladder holds each rate for an
epoch; its points are means over an epoch and are taken as they are.
"""

import json
import math
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from cifarlab.config import InputError, TrainConfig
from cifarlab.recipes import RECIPES, load_recipe

Array = NDArray[np.float64]
MAX_POINTS = 1_000_000
FILE = "lr_range.json"
FEW = 10  # points below which a curve says nothing
DISAGREE = 10.0  # factor between the seeds' answers above which they are no answer
CYCLE = ("schedule", "schedule_per", "min_lr", "warmup_epochs", "div_factor", "final_div_factor", "anneal", "decay_epochs",
         "decay_factor", "restart_epochs", "restart_growth")  # settings that a one-cycle line does not take over  # fmt: skip
FAMILY = ("data", "labels", "model", "batch_size", "optimizer")  # settings that move the good learning rate most


def memory_of(num_points: int) -> float:
    """β of the exponential smoothing of a curve of so many points: its memory is 1/25 of the curve, at most 50 points."""
    return min(0.98, max(0.0, 1 - 25 / max(num_points, 1)))


def smooth(values: Sequence[float] | Array, beta: float) -> Array:
    """Exponential mean with bias correction: Σ βⁱ x(t−i) / Σ βⁱ, i = 0 … t

    Without the correction the first points would be drawn to 0, and the lowest loss be found where nothing was learnt.
    """
    total, weight, smoothed = 0.0, 0.0, np.empty(len(values))
    for k, value in enumerate(values):
        total, weight = beta * total + value, beta * weight + 1
        smoothed[k] = total / weight
    return smoothed


class Climb:
    """Follows a run's training loss and tells when it has to end: not finite, or smoothed above `factor` times its lowest.

    factor 0 looks at finiteness only. num_points: how many the run will have, which sets the smoothing. halfway: it must also
    be more than halfway back to the first loss, as in range tests: of a loss that has come down to 0.1, four times as much is
    one hard batch, and no divergence. rows, until: those of a resumed run, up to that step.
    """

    def __init__(self, factor: float, num_points: int, rows: Iterable[dict[str, float]] = (), until: int = 0, *,
                 halfway: bool = False) -> None:  # fmt: skip
        self._factor, self._beta, self._back = factor, memory_of(num_points), 0.5 if halfway else 0.0
        self._total = self._weight = 0.0
        self._first = math.nan
        self._lowest = math.inf
        self.find_end(row for row in rows if row["step"] <= until and "train/loss" in row)

    def find_end(self, rows: Iterable[dict[str, float]]) -> tuple[int, str]:
        """(step, "diverged" or "climbed") of the first of these rows at which the run has to end, else (0, "")."""
        for row in rows:
            loss = row["train/loss"]
            if not math.isfinite(loss):
                return int(row["step"]), "diverged"
            if self._factor and not row.get("train/skipped"):
                self._total, self._weight = self._beta * self._total + loss, self._beta * self._weight + 1
                smoothed = self._total / self._weight
                self._lowest = min(self._lowest, smoothed)
                self._first = loss if math.isnan(self._first) else self._first
                least = self._lowest + self._back * (self._first - self._lowest) if self._back else 0.0
                if smoothed > max(self._factor * self._lowest, least):
                    return int(row["step"]), "climbed"
        return 0, ""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One seed's points, in the order measured; the last of a curve that diverged is not among them.

    lrs, losses: of a step test the training loss of every update that was made (those that an fp16 scaler skipped are no
    points), or with a held-out slice its loss where it was measured; of a ladder one mean an epoch. accuracies (0…1): ladders
    only. end: "swept" to the end, or ended before, "climbed" or "diverged" (see Climb). skipped: updates skipped by the scaler.
    """

    seed: int
    lrs: tuple[float, ...]
    losses: tuple[float, ...]
    accuracies: tuple[float, ...] = ()
    end: str = "swept"
    skipped: int = 0


@dataclass(frozen=True)
class Suggestion:
    """A learning rate, and why."""

    name: str
    lr: float
    reason: str


@dataclass(frozen=True, kw_only=True, repr=False)
class LrRange:
    """A finished range test: `print(found)` is the table, `found.suggestions` and `found.warnings` are what it says.

    start, end: the rates asked for; points: how many were planned for each seed; split: whose loss the points are.
    config: settings of the run that is to be trained (empty for somebody's own objects); recipe: its label. shares: of the
    highest rate, for each parameter group of somebody's own optimizer.
    """

    mode: Literal["exponential", "linear"]
    per: Literal["step", "epoch"]
    start: float
    end: float
    points: int
    split: Literal["train", "val"]
    curves: tuple[Curve, ...]
    config: dict[str, Any] = field(default_factory=dict)
    recipe: str = ""
    shares: tuple[float, ...] = ()
    path: Path | None = field(default=None, compare=False)

    # ---- the curve over seeds --------------------------------------------------------------------------------------------

    @cached_property
    def lrs(self) -> Array:
        """The rates planned, in order."""
        share = np.arange(self.points) / max(1, self.points - 1)
        if self.mode == "linear":
            return self.start + (self.end - self.start) * share
        rates: Array = self.start * (self.end / self.start) ** share
        return rates

    @cached_property
    def smoothed(self) -> Array:
        """(seeds, points): each seed's smoothed loss at `lrs`; inf from where the seed had stopped, NaN where nothing is known.

        A mean over past points belongs to the mean of their rates, so rates are averaged with the same weights: a loss that is
        linear along the axis is left as it is, and nothing lags behind.
        """
        beta = 0.0 if self.per == "epoch" else memory_of(self.points)
        rows = np.full((len(self.curves), self.points), np.nan)
        axis = self._axis(self.lrs)
        tolerance = 1e-9 * (1 + abs(float(axis[-1]))) if self.mode == "exponential" else 1e-9 * self.end
        for row, curve in zip(rows, self.curves, strict=True):
            if curve.lrs:
                at = smooth(self._axis(np.array(curve.lrs)), beta)
                inside = (axis >= at[0] - tolerance) & (axis <= at[-1] + tolerance)
                row[inside] = np.interp(axis[inside], at, smooth(curve.losses, beta))
            if curve.end != "swept":
                reached = self._axis(np.array(curve.lrs[-1:] or (self.start,)))[0]
                row[np.isnan(row) & (axis > reached - tolerance)] = np.inf
        return rows

    @cached_property
    def median(self) -> Array:
        """(points,): median over the seeds; NaN or inf where most seeds have nothing."""
        return _over_seeds(self.smoothed, np.median)

    @cached_property
    def band(self) -> tuple[Array, Array]:
        """(points,) twice: lowest and highest seed."""
        return _over_seeds(self.smoothed, np.min), _over_seeds(self.smoothed, np.max)

    @cached_property
    def accuracy(self) -> Array:
        """(seeds, rungs) of a ladder, NaN where a seed had stopped; no rungs otherwise."""
        rows = np.full((len(self.curves), self.points if self.per == "epoch" else 0), np.nan)
        for row, curve in zip(rows, self.curves, strict=True):
            count = min(len(row), len(curve.accuracies))
            row[:count] = curve.accuracies[:count]
        return rows

    @cached_property
    def diverged_at(self) -> float:
        """The rate that the median seed could not bear; inf where it bore all."""
        reached = [curve.lrs[-1] if curve.lrs else self.start for curve in self.curves
                   if curve.end != "swept" and not self._began_broken(curve)]  # fmt: skip
        return float(np.median(reached)) if 2 * len(reached) > len(self.curves) else math.inf

    # ---- what it says ----------------------------------------------------------------------------------------------------

    @cached_property
    def suggestions(self) -> tuple[Suggestion, ...]:
        """Each with its reason; none where the curve gives no ground (see `warnings`)."""
        return self._read[0]

    @cached_property
    def warnings(self) -> tuple[str, ...]:
        """What makes the suggestions doubtful, or is why there are none."""
        return self._read[1]

    @property
    def best(self) -> Suggestion | None:
        """What `--lr auto` takes: the accuracy peak of a ladder; of a step test the valley, but minimum/2 for a one-cycle's peak.

        Where that is not suggested, the first there is.
        """
        return self._peak if self.config.get("schedule") == "one-cycle" else self._pick("valley")

    @property
    def _peak(self) -> Suggestion | None:
        """The rate for a one-cycle to climb to: it is reached after a warm-up, and not held."""
        return self._pick("minimum/2")

    def _pick(self, name: str) -> Suggestion | None:
        named = {suggestion.name: suggestion for suggestion in self.suggestions}
        return named.get("accuracy peak") or named.get(name) or next(iter(self.suggestions), None)

    @property
    def paste(self) -> tuple[str, ...]:
        """Lines with the learning rate found: as the recipe's schedule has it, and as the peak of a one-cycle.

        Command lines with every setting that differs from the recipe's; Python for somebody's own `optimizer`, `loader` and
        `epochs`, with a rate for each parameter group where they differ, and the momentum left as it was when it was tested.
        """
        if self.best is None or self._peak is None:
            return ()
        lr, peak = f"{self.best.lr:.2g}", f"{self._peak.lr:.2g}"
        if not self.config:
            rates, peaks = (", ".join(f"{share * found.lr:.2g}" for share in self.shares) for found in (self.best, self._peak))
            differ = len(set(self.shares)) > 1
            one_cycle = (f"torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr={f'[{peaks}]' if differ else peak}, "
                         "total_steps=epochs * len(loader), cycle_momentum=False)")  # fmt: skip
            if not differ:
                return f"lr={lr}", one_cycle
            return f'for group, lr in zip(optimizer.param_groups, [{rates}]): group["lr"] = lr', one_cycle
        name = self.recipe if self.recipe in RECIPES else ""
        plain = load_recipe(name or "resnet18-cosine").to_dict()  # which `cifarlab train` begins with
        own = {key: _flag(key, value) for key, value in self.config.items()
               if key not in ("recipe", "lr", "lr_from", "seed") and value != plain[key]}  # fmt: skip
        head = " ".join(["cifarlab train", *filter(None, [name, *own.values()])])
        bare = " ".join(["cifarlab train", *filter(None, [name, *(flag for key, flag in own.items() if key not in CYCLE)])])
        div = "10 --final-div-factor 1 --anneal linear" if self.per == "epoch" else "25"
        return f"{head} --lr {lr}", f"{bare} --schedule one-cycle --lr {peak} --div-factor {div}"

    @cached_property
    def _read(self) -> tuple[tuple[Suggestion, ...], tuple[str, ...]]:
        if self.per == "epoch":
            return suggest_by_accuracy(self.lrs, self.accuracy, stopped=math.isfinite(self.diverged_at))
        if 2 * sum(map(self._began_broken, self.curves)) > len(self.curves):
            return (), ("the very first loss is not finite, which no learning rate can be blamed for: look at inputs, labels and "
                        "loss",)  # fmt: skip
        if (measured := int(np.median([len(curve.losses) for curve in self.curves]))) < FEW:
            return (), (_too_few(measured, math.isfinite(self.diverged_at)),)
        noise = [_noise(self, curve) for curve in self.curves if len(curve.losses) >= FEW]
        answers = [suggest(self.lrs, row, linear=self.mode == "linear", noise=math.nan)[0] for row in self.smoothed]
        suggestions, warnings = suggest(
            self.lrs, self.median, linear=self.mode == "linear", noise=float(np.median(noise)) if noise else math.nan,
            stopped=math.isfinite(self.diverged_at),
        )  # fmt: skip
        valleys = [found.lr for answer in answers for found in answer if found.name == "valley"]
        if len(valleys) > 1 and max(valleys) > DISAGREE * min(valleys):
            told = f"the seeds disagree: their valleys lie from {min(valleys):.2g} to {max(valleys):.2g}"
            warnings += (f"{told}, more than {DISAGREE:g} times apart; take more --steps or --seeds",)
        return suggestions, warnings

    def _began_broken(self, curve: Curve) -> bool:
        """Whether its very first loss, before any update, was not finite."""
        is_each = self.per == "step" and self.split == "train"  # elsewhere a point comes after many updates
        return is_each and curve.end == "diverged" and not curve.lrs and not curve.skipped

    def _axis(self, lrs: Array) -> Array:
        return np.log(lrs) if self.mode == "exponential" else lrs

    # ---- for people ------------------------------------------------------------------------------------------------------

    def table(self, at_most: int = 25) -> list[str]:
        """Lines of at most 100 columns: rate, loss of each seed's middle (median, lowest, highest), accuracy of a ladder."""
        shown = np.flatnonzero(np.isfinite(self.median))
        if len(shown) > at_most:
            shown = shown[np.unique(np.linspace(0, len(shown) - 1, at_most).round().astype(int))]
        has_accuracy = self.accuracy.size > 0
        unit = "epoch" if self.per == "epoch" else "point"
        head = f"  {unit:>5}  {'lr':>9}  {self.split + ' loss':>10}  {'lowest':>9}  {'highest':>9}"
        lines = [head + (f"  {'accuracy':>9}  {'lowest':>8}  {'highest':>8}" if has_accuracy else "")]
        names: dict[int, list[str]] = {}
        for suggestion in self.suggestions:
            place = int(np.abs(self._axis(self.lrs[shown]) - self._axis(np.array([suggestion.lr]))[0]).argmin())
            names.setdefault(place, []).append(suggestion.name)
        for place, k in enumerate(shown):
            low, high = self.band[0][k], self.band[1][k]
            line = f"  {k + 1:5}  {self.lrs[k]:9.3g}  {_loss(self.median[k]):>10}  {_loss(low):>9}  {_loss(high):>9}"
            if has_accuracy:
                values = 100 * self.accuracy[:, k]
                seen = values[np.isfinite(values)]
                triple = (np.median(seen), seen.min(), seen.max()) if len(seen) else (math.nan,) * 3
                line += "".join(f"  {value:{width}.2f} %" for value, width in zip(triple, (7, 6, 6), strict=True))
            lines.append(line + (f"  ← {', '.join(names[place])}" if place in names else ""))
        return lines

    def __str__(self) -> str:
        seeds = f"{len(self.curves)} seed{'s' * (len(self.curves) != 1)}"
        what = f"{self.points} {self.per}s" if self.points != 1 else f"1 {self.per}"
        lines = [f"learning rates {self.start:g} to {self.end:g}, {self.mode}, {what}, {seeds}; loss of {self.split} images"]
        lines += self.table()
        if math.isfinite(self.diverged_at):
            lines.append(f"  the loss broke away at about {self.diverged_at:.2g}")
        if skipped := sum(curve.skipped for curve in self.curves):
            lines.append(f"  {skipped} updates were skipped by the fp16 scaler: they are no points")
        lines += [f"  {found.name:14} {found.lr:9.2g}   {found.reason}" for found in self.suggestions]
        lines += [f"  warning: {told}" for told in self.warnings]
        return "\n".join(wrapped for line in lines for wrapped in _wrap(line))

    __repr__ = __str__  # what a notebook's cell shows: the table, and not thousands of numbers

    # ---- as a file -------------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the points, and what follows from them for whoever reads the file without cifarlab."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.compare}
        values["curves"] = [asdict(curve) for curve in self.curves]
        best = self.best.name if self.best else None
        return values | {"suggestions": [asdict(s) for s in self.suggestions], "best": best, "warnings": list(self.warnings),
                         "diverged_at": self.diverged_at if math.isfinite(self.diverged_at) else None,
                         "paste": list(self.paste)}  # fmt: skip

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The test that `to_dict` wrote; what follows from its points is found anew."""
        known = {f.name for f in fields(cls) if f.compare}
        kept = {key: value for key, value in values.items() if key in known}
        curves = []
        for curve in kept["curves"]:
            points: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in curve.items()}
            curves.append(Curve(**points))
        found = cls(**(kept | {"curves": tuple(curves), "shares": tuple(kept.get("shares", ()))}))
        _check(found)
        return found


def _check(found: LrRange) -> None:
    """Raises ValueError or TypeError for what no range test can have written."""
    if found.mode not in ("exponential", "linear") or found.per not in ("step", "epoch") or not isinstance(found.config, dict):
        raise ValueError("its mode, unit or config is none of ours")
    if not all(isinstance(share, float) and 0 <= share <= 1 for share in found.shares):
        raise TypeError("a group's share is none")
    if not all(isinstance(text, str) for text in (found.split, found.recipe, *found.config)):
        raise TypeError("a name is no text")
    least = 0.0 if found.mode == "linear" else 1e-300
    if not (least <= found.start < found.end < math.inf and type(found.points) is int and 1 <= found.points <= MAX_POINTS):
        raise ValueError("its rates do not rise, or its points are too many")
    if not found.curves:
        raise ValueError("it has no curve")
    for curve in found.curves:
        rates, rest = np.array(curve.lrs, float), np.array(curve.losses, float)
        accuracies = np.array(curve.accuracies, float)
        if rates.ndim != 1 or rates.shape != rest.shape or accuracies.shape not in (rates.shape, (0,)):
            raise ValueError("a curve has not one loss for each rate")
        if len(rates) > found.points or (rates < least).any() or not np.isfinite(rates).all() or (np.diff(rates) < 0).any():
            raise ValueError("the rates of a curve do not rise")
        if not isinstance(curve.end, str) or type(curve.seed) is not int or type(curve.skipped) is not int:
            raise TypeError("a curve's seed or end is none")


def load_range(folder: str | Path) -> LrRange:
    """The range test saved in that folder; raises InputError when there is none, or it is damaged."""
    path = Path(folder) / FILE
    try:
        return replace(LrRange.from_dict(json.loads(path.read_bytes())), path=Path(folder))
    except OSError:
        raise InputError(f"there is no {path}: run cifarlab lr-range, which writes it") from None
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError, OverflowError, ArithmeticError) as error:
        told = " ".join(str(error).split())[:120]
        raise InputError(f"{path} is damaged ({told}): run cifarlab lr-range again") from None


def tell_origin(folder: Path, config: TrainConfig) -> str:
    """How a run of `--lr auto` came by its learning rate, in a sentence, by the copy in its folder; else an empty string."""
    if not config.lr_from:
        return ""
    try:
        test = load_range(folder)
    except InputError:
        return "Its learning rate was found by a range test, which is not there any more."
    seeds = f"{len(test.curves)} seed{'s' * (len(test.curves) != 1)}"
    return f"Its learning rate was found by a range test of {seeds}" + (f" ({test.best.name})." if test.best else ".")


def find_range(runs_dir: Path, config: dict[str, Any]) -> LrRange | None:
    """The newest range test in a runs folder for settings of the same family: data, model, batch size and optimizer."""
    found: list[tuple[int, LrRange]] = []
    for path in runs_dir.glob(f"*/{FILE}"):
        try:
            test, written = load_range(path.parent), path.stat().st_mtime_ns
        except (InputError, OSError):
            continue  # a damaged one says nothing
        if test.config and all(test.config.get(name) == config[name] for name in FAMILY):
            found.append((written, test))
    return max(found, key=lambda each: each[0])[1] if found else None


# ---- reading a curve -----------------------------------------------------------------------------------------------------


def suggest(
    lrs: Array, loss: Array, *, linear: bool = False, noise: float = math.nan, stopped: bool = True
) -> tuple[tuple[Suggestion, ...], tuple[str, ...]]:
    """(suggestions, warnings) of a smoothed curve, which counts up to its first value that is not finite.

    steepest: where the loss falls fastest along the axis (ln lr, or lr of a linear test). valley: two thirds along the stretch
    over which the loss falls, from the last point above 90 % of the whole drop to the first below 10 %. minimum/10: a tenth of
    the rate with the lowest loss; minimum/2: half of it, for the peak of a one-cycle. noise: standard deviation of the smoothed
    curve, where known.

    Source: steepest and minimum/10 as in fastai's lr_find; a one-cycle's peak near the largest rate that still lowers the loss is
    Smith 2018 (arXiv:1803.09820), half of it is ours; the valley is the idea of its pull request 3377, which takes the
    longest decreasing subsequence instead; ours begins where the fall does, however long a noisy plateau lies before it.
    """
    known = np.flatnonzero(~np.isnan(loss))
    lrs, loss = lrs[known], loss[known]
    count = int(np.argmax(~np.isfinite(loss))) if not np.isfinite(loss).all() else len(loss)
    lrs, loss = lrs[:count], loss[:count]
    if count < FEW:
        return (), (_too_few(count, stopped),)
    bottom = int(loss.argmin())
    begin = float(np.median(loss[: max(1, count // 20)]))
    drop = begin - float(loss[bottom])
    if bottom == 0 or drop <= max(4 * noise if math.isfinite(noise) else 0.0, 0.02 * abs(begin)):
        if stopped and bottom <= count // 4:
            return (), ("the loss only rises: every rate of this test is too high; begin at a lower --from",)
        amount = f"{max(drop, 0):.3g}" + (f", and its noise is {noise:.2g}" if math.isfinite(noise) else "")
        return (), (f"the loss never falls clearly (by {amount}): nothing was learnt; take a higher --to, or more --steps",)
    axis = lrs if linear else np.log(lrs)
    slope = np.gradient(loss, axis)[: bottom + 1]
    steep = int(slope.argmin())
    first = int(np.flatnonzero(loss[: bottom + 1] >= begin - 0.1 * drop)[-1:].max(initial=0))
    last = first + int(np.argmax(loss[first : bottom + 1] <= begin - 0.9 * drop))
    place = axis[first] + 2 / 3 * (axis[last] - axis[first])
    valley = float(place if linear else np.exp(place))
    found = [
        Suggestion("valley", valley, f"two thirds along the fall, which lasts from {lrs[first]:.2g} to {lrs[last]:.2g}"),
        Suggestion("steepest", float(lrs[steep]), f"here the loss falls fastest, at {loss[steep]:.3g} between {begin:.3g} and "
                                                  f"{loss[bottom]:.3g}"),
    ]  # fmt: skip
    faint: tuple[str, ...] = ()
    if drop < 10 * noise:  # never where the noise is not known
        faint = (f"the fall is only {drop / noise:.0f} times the curve's noise: more --steps or --seeds would make it sure",)
    if bottom < count - 1:
        found.append(Suggestion("minimum/10", float(lrs[bottom]) / 10, "a tenth of the rate with the lowest loss, "
                                f"{lrs[bottom]:.2g}, after which it rises"))  # fmt: skip
        found.append(Suggestion("minimum/2", float(lrs[bottom]) / 2, "half of the rate with the lowest loss: for the peak of a "
                                "one-cycle, which warms up to it and does not hold it"))  # fmt: skip
        return tuple(found), faint
    told = f"the loss was still falling at {lrs[bottom]:.2g}, where the curve ends: the good rates may be higher; raise --to"
    return tuple(found), (*faint, told)


def suggest_by_accuracy(lrs: Array, accuracy: Array, *, stopped: bool = False) -> tuple[tuple[Suggestion, ...], tuple[str, ...]]:
    """(suggestions, warnings) of a ladder; accuracy: (seeds, rungs), 0…1, NaN where not measured.

    The accuracy peak is the rung with the highest median. Training goes on from rung to rung, so that later rungs stand on what
    earlier ones learnt: the peak leans to higher rates, and is where a schedule may peak rather than a rate to hold.
    """
    seen = np.isfinite(accuracy).sum(axis=0) > accuracy.shape[0] // 2
    rungs = int(np.argmax(~seen)) if not seen.all() else len(seen)
    if rungs < 3:
        return (), (f"the ladder has {rungs} rungs with an accuracy, too few to compare: take more --epochs, or a lower --from",)
    median = np.nanmedian(accuracy[:, :rungs], axis=0)
    peak = int(median.argmax())
    if peak == 0:
        return (), (f"accuracy only falls from the first rung ({lrs[0]:.2g}) on: begin at a lower --from",)
    told = f"the rung with the highest accuracy, {100 * median[peak]:.2f} %; the next has "
    found = Suggestion("accuracy peak", float(lrs[peak]), told + f"{100 * median[peak + 1]:.2f} %" if peak + 1 < rungs
                       else f"the last rung has the highest accuracy, {100 * median[peak]:.2f} %")  # fmt: skip
    if peak == rungs - 1 and not stopped:
        return (found,), (f"accuracy was still rising at the last rung ({lrs[peak]:.2g}), as it does while training goes on: "
                          "the good rates may be higher; raise --to",)  # fmt: skip
    peaks = [float(lrs[int(np.nanargmax(row))]) for row in accuracy[:, :rungs] if np.isfinite(row).any()]
    if max(peaks) > DISAGREE * min(peaks):
        return (found,), (f"the seeds disagree: their peaks lie from {min(peaks):.2g} to {max(peaks):.2g}; take more --seeds",)
    return (found,), ()


def _too_few(count: int, stopped: bool) -> str:
    why = "stopped" if stopped else "ended"
    return f"the test {why} after {count} points, too few to read: begin at a lower --from, or take more --steps"


def _noise(test: LrRange, curve: Curve) -> float:
    """Standard deviation that chance gives the smoothed median, from the differences of neighbouring points."""
    beta = memory_of(test.points)
    steps = np.diff(np.asarray(curve.losses))
    single = 1.4826 * float(np.median(np.abs(steps - np.median(steps)))) / math.sqrt(2)
    return single * math.sqrt((1 - beta) / (1 + beta)) / math.sqrt(len(test.curves))


def _over_seeds(rows: Array, how: Any) -> Array:
    """`how` over the seeds at each point, NaN where any seed has nothing; a stopped one counts as inf."""
    merged = np.full(rows.shape[1], np.nan)
    known = ~np.isnan(rows).any(axis=0) if len(rows) else np.zeros(rows.shape[1], bool)
    with np.errstate(invalid="ignore"):  # the mean of two middle ones, both inf
        merged[known] = how(np.minimum(rows[:, known], 1e300), axis=0)
    merged[merged >= 1e299] = np.inf
    return merged


def _flag(name: str, value: Any) -> str:
    flag = name.replace("_", "-")
    return f"--{flag}" if value is True else f"--no-{flag}" if value is False else f"--{flag} {shlex.quote(str(value))}"


def _loss(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1e4 else f"{value:.2e}" if math.isfinite(value) else "–"


def _wrap(line: str, width: int = 100) -> list[str]:
    if len(line) <= width:
        return [line]
    at = line.rfind(" ", 0, width)
    indent = 29 if line.startswith("  ") and not line.startswith("  warning") else 4
    return [line[:at], *_wrap(" " * indent + line[at + 1 :], width)]
