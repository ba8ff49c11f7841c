"""What a study will cost on this machine, from a few measured steps, and what a budget leaves of it.

Imports torch where it measures.
"""

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from cifarlab.config import TrainConfig, WatchConfig
from cifarlab.engines.local import count_cores
from cifarlab.studies.plan import Plan, cut_config
from cifarlab.studies.study import Trial

EVALUATING = 0.25  # share of a budget that evaluations may take before they are made rarer
TRAINING = 0.2  # share of its time that a trial trains at least, whatever the budget: less would only be looked at
MEASURED = 6  # kinds of step that are measured; others take the time of the most alike
START_UP = 1.5  # seconds that a trial takes beside training and evaluation: building, saving, scoring; measured on digits


@dataclass(frozen=True)
class Costs:
    """seconds: by config hash, on one slot; petaflops: of all trainings (forward + backward, conv and linear).

    training, evaluating: shares of the seconds that steps take, and evaluations between and at the end; the rest is start-up.
    """

    seconds: Mapping[str, float]
    petaflops: float
    training: float
    evaluating: float

    def wall(self, slots: int) -> float:
        """Seconds for all with so many at once: no less than the longest takes."""
        return max([sum(self.seconds.values()) / max(slots, 1), *self.seconds.values()])


class Scale:
    """Measures steps once, then tells the cost of any config of the study."""

    def __init__(self, trials: Sequence[Trial], watch: WatchConfig, threads: int, budget: float = 1.0) -> None:
        import torch

        from cifarlab.data.load import load_dataset
        from cifarlab.distributed import pick_device
        from cifarlab.forecast import measure_step
        from cifarlab.models import create_model
        from cifarlab.profile.counting import count

        device = pick_device(watch.device)
        self._sizes: dict[tuple[object, ...], tuple[int, int]] = {}
        self._times: dict[tuple[object, ...], float] = {}
        self._flops: dict[tuple[object, ...], float] = {}  # of an image in training, the mean over a run
        self._share: dict[tuple[object, ...], float] = {}  # of that of a whole image: below 1 where smaller ones come first
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            for config in (trial.config for trial in trials):
                if _data(config) not in self._sizes or _net(config) not in self._flops or len(self._times) < MEASURED:
                    create_model(config.model)  # a wrong name is found before data are read
                    dataset = load_dataset(config.data, data_dir=watch.data_dir, data_url=watch.data_url, labels=config.labels,
                                           image_size=config.image_size, statistics=config.statistics)  # fmt: skip
                    self._sizes[_data(config)] = len(dataset.train), len(dataset.test)
                    shape = (3, *dataset.train.images.shape[2:])
                    if _net(config) not in self._flops:
                        net = create_model(config.model, dataset.num_classes)
                        whole = mean = float(count(net, shape).training_flops)
                        begun = 0.0
                        for side, until in config.stages:
                            mean += (until - begun) * (count(net, (3, side, side)).training_flops - whole)
                            begun = until
                        self._flops[_net(config)], self._share[_net(config)] = mean, mean / whole if whole else 1.0
                    if _step(config) not in self._times and (len(self._times) < MEASURED or not self._alike(config)):
                        model = create_model(config.model, dataset.num_classes).to(device)
                        layout = torch.channels_last if config.channels_last else torch.contiguous_format
                        model = model.to(memory_format=layout)  # type: ignore[call-overload]
                        images = config.batch_size
                        took = measure_step(model, config, shape, dataset.num_classes, images, device, watch, budget=budget)
                        self._times[_step(config)] = took / images
        finally:
            torch.set_num_threads(before)

    def _alike(self, config: TrainConfig) -> list[float]:
        """Seconds an image of the steps of the same network, the nearest batch size first."""
        same = [(abs(key[-1] - config.batch_size), time) for key, time in self._times.items()  # type: ignore[operator]
                if key[:2] == _step(config)[:2]]  # fmt: skip
        return [time for _, time in sorted(same)]

    def costs(self, trials: Sequence[Trial]) -> Costs:
        from cifarlab.data.splits import CLEAN_IMAGES

        seconds, evaluating, flops = {}, {}, 0.0
        for config in {trial.config.hash: trial.config for trial in trials}.values():
            num_train, num_test = self._sizes[_data(config)]
            num_val = round(num_train * config.val_fraction)
            num_train = min(config.train_images or num_train, num_train - num_val)
            num_clean = config.clean_images or (CLEAN_IMAGES if config.is_mixing else 0)
            looked_at = count_evaluations(config) * (num_val + num_test + min(num_clean, num_train))
            per_image = self._times.get(_step(config)) or self._alike(config)[0]
            trained = self._share[_net(config)] * config.epochs * num_train
            evaluating[config.hash] = per_image * looked_at / 3  # no backward pass, no update
            seconds[config.hash] = per_image * trained + evaluating[config.hash] + START_UP
            flops += self._flops[_net(config)] * config.epochs * num_train
        total = sum(seconds.values())
        looking = sum(evaluating.values()) / total
        return Costs(seconds, 1e-15 * flops, 1 - looking - START_UP * len(seconds) / total, looking)

    def num_train(self, config: TrainConfig) -> int:
        num_train = self._sizes[_data(config)][0]
        return min(config.train_images or num_train, num_train - round(num_train * config.val_fraction))


def count_evaluations(config: TrainConfig) -> int:
    """How often a training is evaluated, the end included."""
    return max(1, math.ceil(config.epochs / config.eval_every - 1e-6)) if config.eval_every else 1


def _data(config: TrainConfig) -> tuple[object, ...]:
    return (config.data, config.labels, config.image_size, config.statistics)


def _net(config: TrainConfig) -> tuple[object, ...]:
    return (config.model, config.small_sides, *_data(config))


def _step(config: TrainConfig) -> tuple[object, ...]:
    return (config.model, config.precision, config.optimizer, config.micro_batch_size, config.channels_last, config.batch_size)


def forecast_plan(plan: Plan, watch: WatchConfig, slots: int, say: Callable[[str], None]) -> Plan:
    """The plan with its forecast and, where there is a budget that it exceeds, with every trial cut by the same share.

    First evaluations are made rarer, as far as to a single one at the end, where they would take more than a quarter of the
    budget; then epochs are cut, down to one; if that is not enough, training images too. Where what cannot be cut (start-up, and
    the evaluation at the end) leaves next to nothing to training, the budget is exceeded, and that is said. A budget is for
    planning: the forecast is made to fit it, and nothing is broken off when the machine turns out slower.
    """
    begun = time.perf_counter()
    scale = Scale(plan.trials, watch, plan.threads)
    costs = scale.costs(plan.trials)
    wall, trials, cut = costs.wall(slots), plan.trials, {}
    if plan.budget and wall > 60 * plan.budget:
        asked, share, images = wall, 1.0, 0
        evaluations, most = 0, max(count_evaluations(trial.config) for trial in plan.trials)
        each = costs.evaluating * wall / most
        affordable = max(EVALUATING * 60 * plan.budget, 60 * plan.budget - (1 - costs.evaluating) * wall) / each
        if affordable < most:
            evaluations = max(1, int(affordable))
            trials = tuple(Trial(trial.arm, cut_config(trial.config, share, images, evaluations)) for trial in plan.trials)
            costs = scale.costs(trials)
            wall = costs.wall(slots)
        shortest = min(trial.config.epochs for trial in plan.trials)
        least_share = min(1.0, 1 / shortest)
        most_images = min(scale.num_train(trial.config) for trial in plan.trials)
        least_images = min(most_images, 2 * max(trial.config.batch_size for trial in plan.trials))
        target = max(60 * plan.budget, wall * (1 - costs.training) / (1 - TRAINING))
        for _ in range(60):  # start-up and evaluation do not shrink in proportion: closer step by step
            if wall <= target:
                break
            factor = max(0.02, target / wall)
            if share > least_share:
                share = max(least_share, share * factor)
            elif (images or most_images) > least_images:
                images = max(least_images, int((images or most_images) * factor))
            else:
                break
            trials = tuple(Trial(trial.arm, cut_config(trial.config, share, images, evaluations)) for trial in plan.trials)
            costs = scale.costs(trials)
            wall = costs.wall(slots)
        parts = [f"epochs × {share:.3g}"] * (share < 1)
        if images:
            parts.append(f"{images:,} training images instead of {most_images:,}")
        now = max(count_evaluations(trial.config) for trial in trials)
        if now < most:
            parts.append(f"evaluated at the end only, not {most} times" if now == 1 else f"{now} evaluations instead of {most}")
        told = ", ".join(parts) or "by nothing, they are short already"
        cut = {"epochs_share": share, "train_images": images, "evaluations": evaluations, "budget_minutes": plan.budget,
               "told": told, "asked_seconds": asked, "fits": wall <= 60 * plan.budget * 1.001}  # fmt: skip
        more = "" if cut["fits"] else f"; less than that makes no sense, and about {wall / 60:.1f} min remain"
        if not cut["fits"] and costs.training < 0.5:
            fixed = wall * (1 - costs.training) / 60
            more += (f", {fixed:.1f} of them for starting and for the evaluation at the end: give more minutes, or fewer seeds "
                     "or arms")  # fmt: skip
        say(f"budget: all of it would take about {asked / 60:.1f} min here; to fit {plan.budget:g} min every trial is cut alike: "
            + told + more)  # fmt: skip
    load = os.getloadavg()[0] / count_cores() if hasattr(os, "getloadavg") else 0.0
    if load > 0.5:
        say(f"note: the machine is busy (load {load:.1f} a core), so this is for one as busy as now")
    forecast = {"petaflops": costs.petaflops, "seconds": wall, "slots": slots, "trials": dict(costs.seconds),
                "measuring_seconds": time.perf_counter() - begun}  # fmt: skip
    return replace(plan, trials=trials, cut=cut, forecast=forecast)

