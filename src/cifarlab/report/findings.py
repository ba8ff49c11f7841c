"""What a run's numbers say, in sentences: each by a rule, with the numbers it rests on and the place that shows them.

A rule looks at `Facts` and gives its `Finding`, or None where its numbers were not measured or say nothing. To add one: write it
here, and add its line to FINDINGS.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from cifarlab.checks.recorded import test_set_chooses
from cifarlab.checks.setup import Setup, find_others
from cifarlab.config import InputError
from cifarlab.figures.style import plain_text
from cifarlab.report.facts import Facts, interval
from cifarlab.runs import Run

Severity = Literal["problem", "warning", "note", "good"]
ORDER: tuple[Severity, ...] = ("problem", "warning", "note", "good")

SECTIONS = {  # id on the page -> what stands there
    "summary": "what was run, and how it ended",
    "curves": "learning curves",
    "learning-rate": "learning rate and momentum over the steps",
    "gradient-flow": "gradients of each layer",
    "update-flow": "updates of each layer, and their ratio to the weights",
    "weight-flow": "weights of each layer",
    "alarms": "what the diagnosis found while it trained",
    "cost": "FLOPs and time of the layers",
    "confusion": "confusion matrix, and the images behind it",
    "classes": "scores of each class",
    "calibration": "reliability diagram and its numbers",
    "mistakes": "the most confident mistakes",
    "configuration": "all settings",
    "environment": "machine, versions, commit",
}

HEALTHY_RATIO = (1e-4, 1e-2)  # of ‖Δw‖/‖w‖, as in figures/update_ratio.py
GRADIENT_SPREAD = 1e3  # of the matrices' median |g|, largest over smallest: healthy nets have some hundred
GAP, LARGE_GAP = 0.02, 0.10  # of train over test accuracy: named, a fault
UNDERFIT = 0.85  # training accuracy below which the net has not learned its own images
SURE = 0.99
PROBE_SHARE = 0.05  # ours take about 1 %; see docs/performance.md


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that the numbers say.

    sentence, recommendation: whole sentences of plain text, which may hold class and layer names as they are: escape them;
    recommendation is empty where there is nothing to do. section: a key of SECTIONS, where the page shows the evidence.
    numbers: what the sentence rests on, each by its name, fractions 0…1.
    """

    rule: str = ""
    severity: Severity
    sentence: str
    section: str
    numbers: dict[str, float | int | str]
    recommendation: str = ""


def find(run: Run) -> list[Finding]:
    """What the run's numbers say, the worst first; of any run: finished, running, diverged, watched, or of an older version.

    Raises InputError where the folder is damaged.
    """
    facts, found = Facts(run), []
    for name, rule in FINDINGS.items():
        try:
            finding = rule(facts)
        except InputError:
            raise
        except (KeyError, ValueError, TypeError, IndexError, AttributeError, OSError) as error:
            raise InputError(f"{run.path} is damaged: its {name.replace('_', ' ')} cannot be told "
                             f"({type(error).__name__}: {error})") from error  # fmt: skip
        if finding:
            found.append(Finding(**{**vars(finding), "rule": name}))
    return sorted(found, key=lambda finding: ORDER.index(finding.severity))


# ---- how it ended, how good it is ----------------------------------------------------------------------------------------


def ending(f: Facts) -> Finding | None:
    """The run did not end as it should: it diverged, was stopped, or is not finished."""
    result = f.run.result
    if not result:
        step = int(f.run.metrics.steps("step").max()) if f.run.metrics.rows else 0
        planned = f.run.environment.get("num_steps") if (f.run.path / "environment.json").exists() else None
        of = f" of {planned:,}" if planned else ""
        resume = "" if f.run.is_watched else f"If no process is at work on it: cifarlab train --resume {f.run.path}."
        return Finding(severity="note", sentence=f"The run has not ended: it has done {step:,}{of} steps.", section="curves",
                       numbers={"step": step}, recommendation=resume)  # fmt: skip
    step = int(result.get("step", 0))
    if result["state"] == "diverged":
        return Finding(severity="problem", sentence=f"The training diverged at step {step:,}: its loss was no longer finite.",
                       section="curves", numbers={"step": step},
                       recommendation="Lower the learning rate (`cifarlab lr-range` finds one), warm up, or clip the "
                       "gradient's norm; `cifarlab diagnose` tells which layer broke first.")  # fmt: skip
    if result["state"] == "climbed" and f.is_training:
        return Finding(severity="problem", sentence=f"The training was stopped at step {step:,}: its loss had climbed above "
                       "stop_loss times its lowest.", section="curves", numbers={"step": step},
                       recommendation="Lower the learning rate, or raise stop_loss if the climb was expected.")  # fmt: skip
    if result["state"] == "stopped":
        return Finding(severity="warning", sentence=f"The loop ended at step {step:,} before its watch was closed.",
                       section="curves", numbers={"step": step},
                       recommendation="See what raised in your loop, or close the watch at its end.")  # fmt: skip
    return None


def accuracy(f: Facts) -> Finding | None:
    """Test accuracy, with what another test set of that size could show."""
    if f.evaluation is None or not math.isfinite(f.test_accuracy):
        return None
    n, (low, high) = len(f.evaluation.labels), f.test_interval
    right = round(f.test_accuracy * n)
    half = 100 * (high - low) / 2
    return Finding(
        severity="note", section="summary",
        sentence=f"{right:,} of {n:,} test images are right: {_percent(f.test_accuracy)}; the images alone leave it uncertain "
        f"from {_percent(low)} to {_percent(high)} (95 % interval).",
        numbers={"test accuracy": f.test_accuracy, "low": low, "high": high, "images": n},
        recommendation=f"Do not compare single runs by less than about {half:.1f} points, but in pairs on the same images and "
        "over several seeds." if half > 0.5 else "",
    )  # fmt: skip


def expected(f: Facts) -> Finding | None:
    """Test accuracy against what the recipe promises, if all settings and the data are the recipe's."""
    if f.recipe is None or f.recipe.accuracy is None or not f.is_official or f.evaluation is None:
        return None
    (low, high), (least, most) = f.test_interval, f.recipe.accuracy
    numbers: dict[str, float | int | str] = {"test accuracy": f.test_accuracy, "low": low, "high": high, "expected": least}
    if most > least:
        numbers["expected, at most"] = most
    promised = _percent(least) if most == least else f"{_percent(least)} to {_percent(most)}"
    told = f"{_percent(f.test_accuracy)} on the test set; the recipe {f.config.recipe} promises {promised}" if f.config else ""
    if high < least:
        return Finding(severity="warning", section="summary", numbers=numbers,
                       sentence=f"Less than expected: {told}, which is above the 95 % interval of the test images "
                       f"({_percent(low)} to {_percent(high)}).",
                       recommendation="Train with other seeds: rounding alone, such as another number of threads makes, can move "
                       "a small test set by points. If all stay below, compare machine, precision and versions with those of the "
                       "promised figure, and run `cifarlab check` on the folder.")  # fmt: skip
    if low > most:
        return Finding(severity="good", section="summary", numbers=numbers, sentence=f"Better than expected: {told}.")
    return Finding(severity="good", section="summary", numbers=numbers,
                   sentence=f"As expected: {told}, within the 95 % interval of the test images.")  # fmt: skip


def data_variant(f: Facts) -> Finding | None:
    """The data are not the public set's own pixels, so that published figures do not apply."""
    if f.config is None or f.is_official or f.config.data not in ("cifar10", "cifar100", "digits"):
        return None
    return Finding(severity="note", section="summary", numbers={"data": plain_text(f.data_source)},
                   sentence="The images are not the data set's own pixels (JPEG-coded, or a part of it), so the accuracy "
                            "cannot be compared with published figures.",
                   recommendation="Compare it with other runs on the same copy only.")  # fmt: skip


def non_finite_logits(f: Facts) -> Finding | None:
    """The network gives NaN or infinity for some test images."""
    if f.evaluation is None or not f.evaluation.num_nonfinite:
        return None
    n, broken = len(f.evaluation.labels), f.evaluation.num_nonfinite
    return Finding(severity="problem", section="summary", numbers={"images": broken},
                   sentence=f"For {broken:,} of {n:,} test images the network gives NaN or infinity; they count as wrong.",
                   recommendation="Evaluate in fp32; if it stays, the weights hold values that are not finite: train with a "
                                  "lower learning rate.")  # fmt: skip


# ---- the curves ----------------------------------------------------------------------------------------------------------


def train_test_gap(f: Facts) -> Finding | None:
    """Accuracy on training images against test images: over-fitting, under-fitting, or neither."""
    if f.config is None or not math.isfinite(f.test_accuracy) or not f.is_training:
        return None
    key = next((key for key in ("clean/accuracy", "train_epoch/accuracy") if len(f.curve(key)[1])), None)
    if key is None or (key == "train_epoch/accuracy" and f.config.is_mixing):
        return None
    rows = [row for row in f.epochs if key in row and row["step"] <= f.run.result.get("reported_step", math.inf)]
    if not rows:
        return None
    train = float(rows[-1][key])
    gap, high = train - f.test_accuracy, f.test_interval[1]
    how = "without augmentation" if key == "clean/accuracy" else "over the last epoch, with its augmentation"
    numbers: dict[str, float | int | str] = {"train accuracy": train, "test accuracy": f.test_accuracy, "gap": gap}
    told = f"{_percent(train)} of the training images are right ({how}), and {_percent(f.test_accuracy)} of the test images"
    if train < UNDERFIT and gap < GAP:
        return Finding(severity="warning", section="curves", numbers=numbers,
                       sentence=f"Under-fitting: only {told}. The network has not learned its own images.",
                       recommendation="See the alarms first: they tell what keeps it from learning." if f.run.alarms else
                       "Train for more epochs, with a higher learning rate or a larger network; augment and regularise less.",
        )  # fmt: skip
    is_shown = math.isnan(high) or train > high
    if gap > LARGE_GAP and is_shown:
        return Finding(severity="warning", section="curves", numbers=numbers,
                       sentence=f"Over-fitting: {told}, {100 * gap:.1f} points less.",
                       recommendation="Augment more (crop, flip, cutout, MixUp), decay weights more, or get more images.",
        )  # fmt: skip
    if gap > GAP and is_shown:
        return Finding(severity="note", section="curves", numbers=numbers,
                       sentence=f"A usual gap: {told}, {100 * gap:.1f} points less.",
                       recommendation="More augmentation may still pay, with more epochs.")  # fmt: skip
    return Finding(severity="good", section="curves", numbers=numbers,
                   sentence=f"No over-fitting shows: {told}.")  # fmt: skip


def still_improving(f: Facts) -> Finding | None:
    """The held-out accuracy was still rising at the end: a straight line through its last third climbs beyond chance."""
    found = _trend(f)
    if found is None or found.low <= 0 or found.gain < 0.003:
        return None
    honest = "" if found.split == "val" else " Decide on it with --val-fraction, so that the test set does not choose."
    return Finding(severity="note", section="curves", numbers=found.numbers,
                   sentence=f"It was still improving: {found.split} accuracy rose by about {100 * found.gain:.1f} points over "
                            f"the last {found.count} evaluations.",
                   recommendation=f"Train for more epochs (the schedule stretches with them).{honest}")  # fmt: skip


def plateau(f: Facts) -> Finding | None:
    """Nothing was gained over the last half: the held-out accuracy moved by less than its own noise."""
    found = _trend(f, share=0.5)
    if found is None or found.count < 6 or abs(found.gain) >= 0.005 or not found.low <= 0 <= found.high:
        return None
    return Finding(severity="note", section="curves", numbers=found.numbers,
                   sentence=f"The last half of the training gained nothing that shows: {found.split} accuracy moved by "
                   f"{100 * found.gain:+.1f} points over the last {found.count} evaluations.",
                   recommendation="Fewer epochs would have done, or a schedule that lets the learning rate fall earlier.",
    )  # fmt: skip


@dataclass(frozen=True)
class Trend:
    """What the held-out accuracy gained over the last `count` evaluations by a straight line, with its 95 % interval."""

    split: str
    count: int
    gain: float
    low: float
    high: float

    @property
    def numbers(self) -> dict[str, float | int | str]:
        return dict(vars(self))


def _trend(f: Facts, share: float = 1 / 3) -> Trend | None:
    """Of the last share of the evaluations, four at least; the interval is that of a slope by least squares."""
    if not f.is_training or f.run.result.get("state") != "finished":
        return None
    split = next((split for split in ("val", "test") if len(f.curve(f"{split}/accuracy")[1])), None)
    if split is None:
        return None
    epochs, values = f.curve(f"{split}/accuracy")
    last = max(4, round(share * len(values)))
    if len(values) < 6 or not np.isfinite(values[-last:]).all():
        return None
    x, y = epochs[-last:], values[-last:]
    centred = x - x.mean()
    slope = float((centred * y).sum() / (centred**2).sum())
    residual = y - y.mean() - slope * centred
    error = math.sqrt(float((residual**2).sum()) / (last - 2) / float((centred**2).sum()))
    from scipy.stats import t

    length, half = float(x[-1] - x[0]), float(t.ppf(0.975, last - 2)) * error
    return Trend(split, last, slope * length, (slope - half) * length, (slope + half) * length)


def better_on_the_way(f: Facts) -> Finding | None:
    """Some epoch had a higher test accuracy than the reported one, which must not be reported instead."""
    epochs, values = f.curve("test/accuracy")
    if len(values) < 3 or not math.isfinite(f.test_accuracy) or not np.isfinite(values).any():
        return None
    best = int(np.nanargmax(values))
    if values[best] - f.test_accuracy < 0.005:
        return None
    return Finding(severity="note", section="curves",
                   numbers={"best test accuracy": float(values[best]), "epoch": float(epochs[best]), "reported": f.test_accuracy},
                   sentence=f"Test accuracy was {_percent(float(values[best]))} after epoch {epochs[best]:g}, above the reported "
                   f"{_percent(f.test_accuracy)}. The best of {len(values)} looks at the test set is too good by selection, so "
                            "the last one counts.",
                   recommendation="To take the best epoch honestly, hold images out: --val-fraction 0.1.")  # fmt: skip


def chosen_on_test(f: Facts) -> Finding | None:
    """The test set has chosen the step, or is about to choose among settings."""
    if f.config is None or not f.run.is_finished:
        return None
    others = find_others(f.run.path.parent, f.config, f.run.path)
    remark = test_set_chooses(Setup(config=f.config, others=others, reported_step=f.run.result.get("reported_step"),
                                    last_step=f.run.result.get("step")))  # fmt: skip
    if remark is None:
        return None
    return Finding(severity="problem" if remark.is_mistake else "warning", section="configuration",
                   numbers={"other runs": len(others), "val_fraction": f.config.val_fraction},
                   sentence=_sentence(remark.told), recommendation=_sentence(remark.remedy))  # fmt: skip


# ---- classes, mistakes, confidence ---------------------------------------------------------------------------------------


def worst_class(f: Facts) -> Finding | None:
    """The class that is recognised least, and whether it is shown to be worse than the others together."""
    measured = np.flatnonzero(f.support)
    if len(measured) < 2:
        return None
    right = np.diag(f.confusion)
    shares = right[measured] / f.support[measured]
    k = int(measured[np.argmin(shares)])
    rest = (int(right.sum()) - int(right[k])) / (int(f.support.sum()) - int(f.support[k]))
    from scipy.stats import norm

    # The worst of K is looked at because it is the worst: its interval is widened for K looks (Bonferroni).
    z = float(norm.ppf(1 - 0.025 / len(measured)))
    low, high = interval(int(right[k]), int(f.support[k]), z)
    name, share = _name(f, k), right[k] / f.support[k]
    numbers: dict[str, float | int | str] = {"class": name, "accuracy": float(share), "low": low, "high": high,
                                             "images": int(f.support[k]), "others": rest}  # fmt: skip
    told = (f"{int(right[k])} of {int(f.support[k])} images of {name} are recognised ({_percent(share)}, 95 % interval "
            f"{_percent(low)} to {_percent(high)}, widened for the worst of {len(measured)}), of the other classes "
            f"{_percent(rest)}")  # fmt: skip
    if high >= rest:
        return Finding(severity="good", section="classes", numbers=numbers,
                       sentence=f"No class is shown to be worse than the others: of the worst, {told}.")  # fmt: skip
    into = np.where(np.arange(len(right)) == k, 0, f.confusion[k])
    mostly = f" It is mostly taken for {_name(f, int(into.argmax()))} ({_times(into.max())})." if into.max() else ""
    return Finding(severity="warning" if rest - share > 0.05 else "note", section="classes", numbers=numbers,
                   sentence=f"One class is worse than the others: {told}.{mostly}",
                   recommendation="Look at its images behind the confusion matrix: wrong labels, too few kinds of images, or "
                   "an augmentation that makes it look like another class.")  # fmt: skip


def confused_pair(f: Facts) -> Finding | None:
    """The two classes that are most often taken for each other, and whether one way more than the other."""
    off = np.where(np.eye(len(f.confusion), dtype=bool), 0, f.confusion)
    both = off + off.T
    if not off.size or both.max() < 3:
        return None
    i, j = (int(k) for k in np.unravel_index(np.argmax(both), both.shape))
    if off[j, i] > off[i, j]:
        i, j = j, i
    there, back = int(off[i, j]), int(off[j, i])
    low, high = interval(there, int(f.support[i]))
    a, b = _name(f, i), _name(f, j)
    from scipy.stats import binomtest

    # Other numbers of images of the two classes would make a lopsided pair out of nothing.
    chance = int(f.support[i]) / int(f.support[i] + f.support[j])
    is_one_sided = float(binomtest(there, there + back, chance).pvalue) < 0.05
    of_all = (there + back) / int(off.sum())
    part = _percent(of_all, 0 if of_all >= 0.05 else 1)
    lopsided = (f" It goes one way more than the other: a lean towards {b}." if is_one_sided else "")  # fmt: skip
    return Finding(
        severity="note", section="confusion",
        numbers={"true": a, "predicted": b, "count": there, "mirror": back, "low": low, "high": high},
        sentence=f"Most confused are {a} and {b}: {there} of {int(f.support[i])} {a} are taken for {b} ({_percent(low)} to "
        f"{_percent(high)}), {back} of {int(f.support[j])} the other way; together {part} of all mistakes.{lopsided}",
        recommendation="Open that cell and look at the images: near-twins need finer features or a larger input, a lean calls "
                       "for a look at the labels and the balance of the two classes.",
    )  # fmt: skip


def calibration(f: Facts) -> Finding | None:
    """Whether probabilities mean what they say: ECE against what chance gives a perfectly calibrated model."""
    c = f.calibration
    if c is None:
        return None
    numbers: dict[str, float | int | str] = {
        "ECE": c.ece, "ECE, equal mass": c.ece_equal_mass, "ECE by chance, up to": c.ece_by_chance,
        "mean confidence": c.mean_confidence, "accuracy": c.accuracy, "largest gap": c.mce, "Brier": c.brier,
    }  # fmt: skip
    told = (f"ECE is {_percent(c.ece, 2)}, where chance alone gives a perfectly calibrated model up to "
            f"{_percent(c.ece_by_chance, 2)}; "
            f"it is {_percent(c.mean_confidence)} sure on average, and right on {_percent(c.accuracy)}")  # fmt: skip
    if c.ece <= c.ece_by_chance:
        return Finding(severity="good", section="calibration", numbers=numbers,
                       sentence=f"Its probabilities can be taken at their word: {told}.")  # fmt: skip
    grave: Severity = "warning" if c.ece > 0.05 else "note"
    if c.overconfidence > c.ece / 2:
        return Finding(severity=grave, section="calibration", numbers=numbers, sentence=f"Over-confident: {told}.",
                       recommendation="If the probabilities are to be used: label smoothing or MixUp, or divide the logits by a "
                       "temperature fitted on held-out images (arXiv:1706.04599).")  # fmt: skip
    if c.overconfidence < -c.ece / 2:
        return Finding(severity=grave, section="calibration", numbers=numbers, sentence=f"Under-confident: {told}.",
                       recommendation="If the probabilities are to be used: less label smoothing or MixUp, or divide the "
                                      "logits by a temperature fitted on held-out images (arXiv:1706.04599).")  # fmt: skip
    return Finding(severity=grave, section="calibration", numbers=numbers,
                   sentence=f"Not calibrated, with bins on either side of the diagonal: {told}.",
                   recommendation="No one temperature mends it; see in which bins the gap lies.")  # fmt: skip


def sure_mistakes(f: Facts) -> Finding | None:
    """Mistakes at more than 99 %: wrong labels, or a model that is sure where it should not be."""
    if f.evaluation is None:
        return None
    e = f.evaluation
    confidence = np.nan_to_num(e.probabilities.max(axis=1, initial=0))
    wrong = (e.predicted >= 0) & (e.predicted != e.labels)
    sure, num_wrong = int((wrong & (confidence > SURE)).sum()), int(wrong.sum())
    if sure < 3:
        return None
    all_sure = int((confidence > SURE).sum())
    too_many = sure > 3 * (1 - SURE) * all_sure  # a calibrated model has at most 1 − SURE of them wrong
    return Finding(
        severity="warning" if too_many else "note", section="mistakes",
        numbers={"sure mistakes": sure, "mistakes": num_wrong, "sure in all": all_sure},
        sentence=f"{sure:,} of {num_wrong:,} mistakes are made with more than {100 * SURE:.0f} % confidence, among "
                 f"{all_sure:,} images "
        "that it is so sure of.",
        recommendation="Look at them: either the label is wrong (tell, or drop it), or the picture misleads in a way that "
        "augmentation can train against.",
    )  # fmt: skip


# ---- inside the network --------------------------------------------------------------------------------------------------


def alarms(f: Facts) -> Finding | None:
    """What the diagnosis found while the run trained; or that it found nothing."""
    raised = f.run.alarms
    if not raised:
        if not f.run.tables or not f.run.metrics.rows:
            return None
        steps = max(len(table) for table in f.run.tables.values())
        return Finding(severity="good", section="alarms", numbers={"alarms": 0, "records": steps},
                       sentence=f"The diagnosis raised no alarm over {steps:,} measured steps.")  # fmt: skip
    first = raised[0]
    rules = list(dict.fromkeys(str(alarm["rule"]).replace("_", " ") for alarm in raised))
    layers = list(first.get("layers") or ())
    where = f" in {plain_text(str(layers[0]), 80)}" if layers else ""
    return Finding(
        severity="warning", section="alarms", numbers={"alarms": len(raised), "first": str(first["rule"]), "step": first["step"]},
        sentence=f"The diagnosis raised {_count(len(raised), 'alarm')} ({', '.join(rules)}). The first, at step "
        f"{first['step']:,}{where}: {plain_text(str(first.get('evidence', '')), 300)}.",
        recommendation=_sentence(plain_text(str(first.get("remedy", "")), 300)),
    )  # fmt: skip


def update_ratio(f: Facts) -> Finding | None:
    """Layers whose updates are far too large or too small beside their weights, while the learning rate was not low."""
    names, values = f.matrices("update_flow", "ratio")
    if not names:
        return None
    with np.errstate(all="ignore"):
        typical = np.array(
            [np.median(column[np.isfinite(column)]) if np.isfinite(column).any() else math.nan for column in values.T]
        )
    low, high = HEALTHY_RATIO
    measured = np.flatnonzero(np.isfinite(typical))
    if not len(measured):
        return None
    logs = np.log10(np.maximum(typical[measured], 1e-12))
    outside = np.maximum(np.maximum(math.log10(low) - logs, logs - math.log10(high)), 0)
    worst = int(measured[np.argmax(outside)])
    off = int((outside > 0).sum())
    middle = float(np.median(typical[measured]))
    numbers: dict[str, float | int | str] = {"median layer": middle, "layers": len(measured), "outside": off}
    if not off:
        return Finding(severity="good", section="update-flow", numbers=numbers,
                       sentence=f"Every layer's updates were of a healthy size while the learning rate was up: ‖Δw‖/‖w‖ of the "
                       f"median layer {middle:.1e}, all between {low:.0e} and {high:.0e}.")  # fmt: skip
    name, value = plain_text(names[worst], 80), float(typical[worst])
    numbers |= {"worst layer": name, "its ratio": value}
    above, is_far = value > high, bool(outside.max() > 0.5)  # decades
    most = f"; {off} of {len(measured)} layers are outside {low:.0e} to {high:.0e}"
    return Finding(
        severity="warning" if is_far else "note", section="update-flow", numbers=numbers,
        sentence=f"The updates of {name} are {'large' if above else 'small'} beside its weights: ‖Δw‖/‖w‖ is {value:.1e} in the "
        f"median while the learning rate was up{most}.",
        recommendation="" if not is_far else "A lower learning rate, at least for that layer." if above else
        "A higher learning rate (`cifarlab lr-range` finds one), or see whether a gradient reaches that layer.",
    )  # fmt: skip


def gradient_flow(f: Facts) -> Finding | None:
    """How far the gradients of the layers lie apart, and which layer has the smallest."""
    names, values = f.matrices("gradient_flow", "mean_abs")
    if len(names) < 2:
        return None
    with np.errstate(all="ignore"):
        typical = np.array(
            [np.median(column[np.isfinite(column)]) if np.isfinite(column).any() else math.nan for column in values.T]
        )
    measured = np.flatnonzero(np.isfinite(typical))
    if len(measured) < 2:
        return None
    weakest, strongest = (int(measured[pick(typical[measured])]) for pick in (np.argmin, np.argmax))
    small, large = float(typical[weakest]), float(typical[strongest])
    a, b = plain_text(names[weakest], 80), plain_text(names[strongest], 80)
    numbers: dict[str, float | int | str] = {"smallest": small, "of": a, "largest": large, "of layer": b, "layers": len(measured)}
    if small == 0:
        return Finding(severity="warning", section="gradient-flow", numbers=numbers,
                       sentence=f"No gradient reaches {a}: its mean |g| is 0 in the median.",
                       recommendation="See whether the loss depends on it: a dead ReLU behind it, a detach, or zero weights.",
        )  # fmt: skip
    factor = large / small
    numbers["factor"] = factor
    told = f"mean |g| runs from {small:.1e} ({a}) to {large:.1e} ({b}), a factor of {factor:,.0f}"
    if factor <= GRADIENT_SPREAD:
        return Finding(
            severity="good", section="gradient-flow", numbers=numbers, sentence=f"Gradients reach every layer: {told}."
        )
    return Finding(severity="warning", section="gradient-flow", numbers=numbers, sentence=f"Gradients lie far apart: {told}.",
                   recommendation="Normalise between layers, add skip connections, or see whether activations saturate on the "
                                  "way to the weak layer.")  # fmt: skip


def averaged_weights(f: Facts) -> Finding | None:
    """The reported numbers are those of averaged weights (EMA), and whether the average had time to catch up."""
    if f.config is None or not f.config.ema_decay or not f.run.is_finished:
        return None
    window, steps = 1 / (1 - f.config.ema_decay), int(f.run.result.get("step", 0))
    if not steps:
        return None
    share = window / steps
    numbers: dict[str, float | int | str] = {"decay": f.config.ema_decay, "window": window, "steps": steps}
    told = f"The reported numbers are those of averaged weights: over about the last {window:,.0f} of {steps:,} steps"
    if share > 0.2:
        return Finding(severity="warning", section="configuration", numbers=numbers,
                       sentence=f"{told}, {100 * share:.0f} % of the training, so the average still holds early weights.",
                       recommendation=f"Lower --ema-decay to {1 - 10 / steps:.4g} or less, or train longer.")  # fmt: skip
    return Finding(severity="note", section="configuration", numbers=numbers, sentence=f"{told}.")


# ---- time ----------------------------------------------------------------------------------------------------------------


def cost(f: Facts) -> Finding | None:
    """How long it took, how many FLOP/s that was, and which layer takes most of them."""
    seconds = float(f.run.result.get("train_seconds") or math.nan)
    _, speeds = f.curve("time/images_per_second")
    if not seconds > 0 or not len(speeds) or not math.isfinite(f.flops_per_image):
        return None
    speed = float(np.median(speeds))
    gflops = speed * f.flops_per_image / 1e9
    total = sum(layer["forward_macs"] for layer in f.layers)
    heavy = max(f.layers, key=lambda layer: layer["forward_macs"])
    share, name = heavy["forward_macs"] / total, plain_text(str(heavy["name"]) or str(heavy.get("kind", "")), 80)
    probes = float(f.run.result.get("probe_share") or 0.0)
    spent = f"; {100 * probes:.1f} % of the time went into probes" if probes > 0.005 else ""
    return Finding(
        severity="note", section="cost",
        numbers={"seconds": seconds, "images per second": speed, "GFLOP/s": gflops, "GFLOP per image": f.flops_per_image / 1e9,
                 "heaviest layer": name, "its share": share},
        sentence=f"Training took {_time(seconds)} at {speed:,.0f} images/s, which is {gflops:,.4g} GFLOP/s (forward and "
                 f"backward, {f.flops_per_image / 1e9:,.3g} GFLOP an image). "
                 f"{name} alone takes {100 * share:.0f} % of the multiply-adds{spent}.",
    )  # fmt: skip


def slow_evaluation(f: Facts) -> Finding | None:
    """A good part of the time went into what is not training: evaluation, saving, drawing."""
    _, epochs = f.curve("time/epoch_seconds")
    seconds, whole = float(f.run.result.get("train_seconds") or math.nan), float(epochs.sum())
    if not f.run.result or not seconds > 0 or not whole > seconds or 1 - seconds / whole < 0.2:
        return None
    share = 1 - seconds / whole
    return Finding(severity="note", section="cost", numbers={"training": seconds, "epochs": whole, "share": share},
                   sentence=f"{100 * share:.0f} % of the epochs' {_time(whole)} was not training but evaluation, saving and "
                            "drawing.",
                   recommendation="Evaluate less often (--eval-every 2), or draw only at the end (--figures-every 0).",
    )  # fmt: skip


def slowed_down(f: Facts) -> Finding | None:
    """Some epochs were trained far more slowly than others: something else ran on the machine."""
    epochs, speeds = f.curve("time/images_per_second")
    if len(speeds) < 4 or not (speeds > 0).all():
        return None
    middle, slow = float(np.median(speeds)), int(speeds.argmin())
    if speeds[slow] > 0.6 * middle:
        return None
    return Finding(severity="note", section="cost",
                   numbers={"median images per second": middle, "slowest": float(speeds[slow]), "epoch": float(epochs[slow])},
                   sentence=f"The machine was not quiet: epoch {epochs[slow]:g} ran at {speeds[slow]:,.0f} images/s, and the "
                            f"median epoch at {middle:,.0f}.",
                   recommendation="Do not compare this run's time with others'.")  # fmt: skip


def probe_cost(f: Facts) -> Finding | None:
    """Probes took more of the time than they should."""
    share = float(f.run.result.get("probe_share") or 0.0)
    if share <= PROBE_SHARE:
        return None
    return Finding(severity="note", section="cost", numbers={"share": share},
                   sentence=f"Probes took {100 * share:.1f} % of the training time.",
                   recommendation="Measure the costly ones less often (--probe-every 1000), or leave some out "
                   "(--probes gradient_flow,update_flow).")  # fmt: skip


def probes_lost(f: Facts) -> Finding | None:
    """Probes failed on the way and were switched off."""
    lost = f.run.result.get("probes_lost") or {}
    if not lost:
        return None
    listed = "; ".join(f"{name}: {plain_text(str(why), 120)}" for name, why in dict(lost).items())
    return Finding(severity="warning", section="alarms", numbers={"probes": len(lost)},
                   sentence=f"{_count(len(lost), 'probe')} failed on the way and measured no more ({listed}).",
                   recommendation="What the alarms say of the rest of the run is incomplete.")  # fmt: skip


def uncommitted(f: Facts) -> Finding | None:
    """The code was changed and not committed, so that the run cannot be repeated from its commit."""
    git = (f.run.environment.get("git") or {}) if (f.run.path / "environment.json").exists() else {}
    if not git.get("changed"):
        return None
    commit = str(git.get("commit", ""))[:10]
    return Finding(severity="note", section="environment", numbers={"commit": commit},
                   sentence=f"The code had changes that are in no commit (on top of {commit}), so the run cannot be repeated "
                            "from it.",
                   recommendation="Commit before a run that is to count.")  # fmt: skip


FINDINGS: dict[str, Callable[[Facts], Finding | None]] = {  # in the order of the page, within a severity
    "ending": ending,
    "non_finite_logits": non_finite_logits,
    "accuracy": accuracy,
    "expected": expected,
    "data_variant": data_variant,
    "chosen_on_test": chosen_on_test,
    "train_test_gap": train_test_gap,
    "still_improving": still_improving,
    "plateau": plateau,
    "better_on_the_way": better_on_the_way,
    "worst_class": worst_class,
    "confused_pair": confused_pair,
    "calibration": calibration,
    "sure_mistakes": sure_mistakes,
    "alarms": alarms,
    "update_ratio": update_ratio,
    "gradient_flow": gradient_flow,
    "averaged_weights": averaged_weights,
    "cost": cost,
    "slow_evaluation": slow_evaluation,
    "slowed_down": slowed_down,
    "probe_cost": probe_cost,
    "probes_lost": probes_lost,
    "uncommitted": uncommitted,
}


# ---- words ---------------------------------------------------------------------------------------------------------------


def _percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f} %"


def _times(number: float) -> str:
    return "once" if number == 1 else f"{number:,.0f} times"


def _name(f: Facts, k: int) -> str:
    """In quotation marks: a class may be called "4"."""
    return f"“{plain_text(f.class_names[k], 60) or f'class {k}'}”"


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}." if text else ""


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'s' * (n != 1)}"


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
