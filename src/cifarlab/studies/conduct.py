"""Conducting a study: plan, forecast, train what is not yet trained, look into the networks, draw, conclude.

Torch is imported where something is measured, trained or analysed; `write_findings` needs none.
"""

import csv
import io
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from filelock import FileLock, Timeout

from cifarlab.config import InputError, TrainConfig, WatchConfig, did_you_mean
from cifarlab.engines.engine import Ended, Engine, Job, Runner
from cifarlab.figures import save_figure
from cifarlab.figures.style import unchecked
from cifarlab.recipes import load_recipe
from cifarlab.runs import Run, write_atomically
from cifarlab.studies import STUDIES
from cifarlab.studies.cost import forecast_plan
from cifarlab.studies.plan import (
    Plan,
    cut_base,
    load_plan,
    load_results,
    make_plan,
    parse_values,
    place_trials,
    read_ended,
    write_ended,
)
from cifarlab.studies.progress import Progress
from cifarlab.studies.study import Results, Study
from cifarlab.trackers.terminal import format_seconds

TICK = 0.5  # seconds between two looks at the engine


class StudyInterrupted(KeyboardInterrupt):
    """A signal asked the study to end; the same command continues it."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}; the same command continues the study")
        self.number = number


def study(
    name: str,
    base: TrainConfig | None = None,
    *,
    seeds: Sequence[int] | None = None,
    values: Mapping[str, Any] | None = None,
    budget: float = 0.0,
    jobs: int = 0,
    threads: int = 1,
    ray: str = "",
    gpus: float | None = None,
    share: bool = True,
    search: str = "",
    trials: int = 0,
    folder: str | Path = "studies",
    watch: WatchConfig | None = None,
    retries: int = 2,
) -> Results:
    """A study from question to conclusion: its folder is made, or continued, and what is in it comes back.

    name: of `STUDIES`. base: the config that it varies (default: recipe quick). values: field -> values in place of the study's
    own, or the one value of a setting or option. budget: minutes that it may take by the forecast; 0 is no limit.
    jobs: trainings at once on this machine (0: what its cores or GPUs take, at `threads` threads each); or ray: a
    cluster's address, with gpus and share as in `RayEngine`. search "tpe" with a number of trials, in place of a grid, where the
    study has a space to search.
    retries: of a crashed training, in a row without a newer checkpoint.

    Equal trials give equal numbers, bit for bit, on whatever engine, at however many at once and in whatever order: on the same
    kind of processor, which is why `threads` is part of the study. Trials that have ended are never trained again.

    Raises InputError for what the user can mend.
    """
    found = find_study(name)
    given = {field: list(each) if isinstance(each, list | tuple) else [each] for field, each in (values or {}).items()}
    searched = _check_search(found, search, trials)
    plan = make_plan(found, base or load_recipe("quick"), given, found.seeds if seeds is None else seeds, threads=threads,
                     budget=budget, search=searched)  # fmt: skip
    asked = watch or WatchConfig()
    watch = replace(asked, **found.watch(plan.base))
    place = Path(folder) / plan.folder_name
    with _held(place), _signals_raise():
        progress = Progress(watch.progress, len(place_trials(place, plan.trials)))
        progress.say(f"study {name}: {found.question}")
        engine: Engine | None = None
        try:

            def open_engine() -> Engine:
                nonlocal engine
                engine = engine or _open_engine(ray, jobs, plan.threads, gpus, share, asked, place)
                return engine

            plan = _begin(plan, place, watch, open_engine, progress)
            watch = replace(watch, **found.watch(cut_base(plan)))  # a shorter training's trajectory needs as many points
            if plan.search:
                from cifarlab.studies.search import search_settings

                plan = search_settings(found, plan, place, watch, open_engine, progress, retries)
            _train_all(plan, place, watch, open_engine, progress, retries)
        finally:
            if engine:
                engine.close()
            progress.close()
        if found.analyse:
            progress.say("looking into the networks")
            (place / "analysis").mkdir(exist_ok=True)
            found.analyse(load_results(place), watch)
        return write_findings(place)


def find_study(name: str) -> Study:
    """The study of that name; raises InputError with the nearest one."""
    if name not in STUDIES:
        raise InputError(f"there is no study {name!r}{did_you_mean(name, STUDIES)}; the studies are {', '.join(STUDIES)}")
    return STUDIES[name]


def study_by_words(name: str, recipe: str, settings: Sequence[str], seeds: str, **choices: Any) -> Results:
    """`study` for the words of a command line."""
    found = find_study(name)
    try:
        numbers = tuple(int(word) for word in seeds.split(",") if word.strip()) if seeds else found.seeds
    except ValueError:
        raise InputError(f"--seeds {seeds!r} cannot be read: write whole numbers with commas, such as 0,1,2") from None
    return study(name, load_recipe(recipe), values=parse_values(found, settings), seeds=numbers, **choices)


def _check_search(found: Study, search: str, trials: int) -> dict[str, Any]:
    if bool(search) != bool(trials) or trials < 0:
        raise InputError("--search and --trials go together: --search tpe --trials 30")
    if search and search != "tpe":
        raise InputError(f"--search {search!r} is unknown: it must be tpe")
    if search and not found.space:
        raise InputError(f"study {found.name} has nothing to search: --search is for the study sensitivity")
    return {"sampler": search, "trials": trials} if search else {}


@contextmanager
def _held(place: Path) -> Iterator[None]:
    """Only one process conducts a study. What is refused before it has a plan leaves no folder behind."""
    fresh = [folder for folder in (place, *place.parents) if not folder.exists()]
    try:
        place.mkdir(parents=True, exist_ok=True)
        with FileLock(place / ".lock").acquire(timeout=0):
            yield
    except InputError:
        if place in fresh and {path.name for path in place.iterdir()} <= {".lock"}:
            (place / ".lock").unlink(missing_ok=True)
            for folder in fresh:
                folder.rmdir()
        raise
    except Timeout:
        raise InputError(f"study {place} is being conducted by another process: wait for it") from None
    except OSError as error:
        if error.filename and Path(str(error.filename)) in (place, place / ".lock"):
            raise InputError(f"study folder {place} cannot be written ({error.strerror}): choose another --folder") from None
        raise


@contextmanager
def _signals_raise() -> Iterator[None]:
    """SIGINT and SIGTERM end the study in order: running trainings save their state."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise StudyInterrupted(number)

    before = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, leave)
    except ValueError:  # not the main thread
        pass
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _open_engine(ray: str, jobs: int, threads: int, gpus: float | None, share: bool, watch: WatchConfig,
                 place: Path) -> Engine:  # fmt: skip
    if ray:
        from cifarlab.engines.ray import RayEngine

        return RayEngine(ray, threads=threads, gpus=gpus, device=watch.device, folder=place, share=share)
    from cifarlab.engines.local import LocalEngine

    return LocalEngine(jobs=jobs, threads=threads, device=watch.device, logs=place / "logs")


def _begin(plan: Plan, place: Path, watch: WatchConfig, open_engine: Callable[[], Engine], progress: Progress) -> Plan:
    """The plan as it was begun before, or a new one with its forecast, written down."""
    if (place / "study.json").exists():
        plan = load_plan(place)
        progress.total = len(place_trials(place, plan.trials))
        progress.say(f"continuing {place}" + (f"; cut to the budget as before: {plan.cut['told']}" if plan.cut else ""))
        return plan
    plan = _settle_precision(plan, watch)
    for note in plan.notes:
        progress.say(f"note: {note}")
    if plan.trials and (watch.forecast or plan.budget):
        plan = forecast_plan(plan, watch, open_engine().slots, progress.say)
        told = f"{plan.forecast['petaflops']:.3g} PFLOP, about {format_seconds(plan.forecast['seconds'])} by steps measured here"
        progress.say(f"{len(place_trials(place, plan.trials))} trainings, {plan.forecast['slots']} at once: {told}")
    plan.save(place)
    return plan


def _settle_precision(plan: Plan, watch: WatchConfig) -> Plan:
    """The plan with one precision for all trials that say `auto`: else those of another machine would compute in another."""
    if not any(config.precision == "auto" for config in (plan.base, *(trial.config for trial in plan.trials))):
        return plan
    from cifarlab.distributed import pick_device, pick_precision

    plan = replace(plan, precision=pick_precision("auto", pick_device(watch.device)))
    trials = tuple(replace(trial, config=plan.settle(trial.config)) for trial in plan.trials)
    note = f"precision auto came to {plan.precision} on the machine that began the study, and holds for every training of it"
    return replace(plan, trials=trials, notes=(*plan.notes, note) if plan.trials or plan.search else plan.notes)


def job_of(config: TrainConfig, path: Path, plan: Plan, watch: WatchConfig) -> Job:
    """A trial as an engine gets it: silent, its figures left to the study."""
    quiet = replace(watch, progress="none", forecast=False, figures=False, wandb=None, threads=plan.threads, resume="auto")
    return Job(config=config, path=path, watch=quiet, threads=plan.threads)


def _train_all(plan: Plan, place: Path, watch: WatchConfig, open_engine: Callable[[], Engine], progress: Progress,
               retries: int) -> None:  # fmt: skip
    """Every trial that has not ended yet."""
    places, ended = place_trials(place, plan.trials), read_ended(place)
    configs = {trial.config.hash: trial.config for trial in plan.trials}
    pruned = {name for name, how in ended.items() if how.get("state") == "pruned"}
    write_ended(place, {name: how for name, how in ended.items() if name in pruned})  # what had failed gets another chance
    jobs = [job_of(configs[key], path, plan, watch) for key, path in places.items()
            if not Run(path).is_finished and path.name not in pruned]  # fmt: skip
    progress.total = len(places)
    if len(jobs) < len(places):
        progress.say(f"{len(places) - len(jobs)} of {len(places)} trainings have ended before: not done again")
    if not jobs:
        return
    engine = open_engine()
    progress.say(engine.description)
    if getattr(engine, "capped", False):
        progress.say(f"note: more at once would have more threads than cores: {engine.slots} it is")
    runner = Runner(engine, retries=retries, say=progress.say)
    runner.submit(jobs)
    clock = Clock(plan.forecast.get("trials", {}), jobs)
    refusals = []
    while runner.open:
        for final in runner.step(TICK):
            note_end(final, place, progress)
            clock.ended(final.job)
            refusals += [final.reason] if final.how == "refused" else []
        progress.show(len(places) - runner.open, len(runner.running), clock.left(runner, engine.slots))
    if len(refusals) == len(jobs) == len(places):  # not one could begin: that is the user's to mend, no result
        raise InputError(refusals[0])


def note_end(final: Ended, place: Path, progress: Progress) -> None:
    """Says how a trial ended, and writes down what its own folder cannot tell."""
    result = Run(final.job.path).result
    if final.how == "done" and result.get("state") == "finished":
        val = result.get("val/accuracy")
        told = f"validation {100 * val:.2f} %" if val is not None else f"test {100 * result['test/accuracy']:.2f} %"
        progress.say(f"{final.job.path.name}: {told}, {format_seconds(result['train_seconds'])}")
    elif final.how == "done":
        progress.say(f"{final.job.path.name}: diverged at step {result.get('step', '?')}")
    elif final.how in ("refused", "crashed"):
        ended = read_ended(place)
        ended[final.job.path.name] = {"state": "failed", "reason": final.reason}
        write_ended(place, ended)
        progress.say(f"{final.job.path.name}: FAILED ({final.reason}); the study goes on without it")


class Clock:
    """Time left, from the forecast of each trial and how long those done here really took."""

    def __init__(self, forecast: Mapping[str, float], jobs: Sequence[Job]) -> None:
        self._forecast = {job.path: float(forecast.get(job.config.hash, job.config.epochs)) for job in jobs}
        self._begun, self._done = time.monotonic(), 0.0
        self._has_forecast = bool(forecast)

    def ended(self, job: Job) -> None:
        self._done += self._forecast.get(job.path, 0.0)

    def left(self, runner: Runner, slots: int) -> float:
        """Seconds; nan while nothing is known."""
        begun = sum(self._forecast.get(path, 0.0) * _share_done(path) for path in runner.running)
        all_left = sum(self._forecast.get(job.path, 0.0) for job in [*runner.waiting, *runner.running.values()]) - begun
        known, elapsed, slots = self._done + begun, time.monotonic() - self._begun, max(slots, 1)
        if known > 0.02 * (known + all_left) and elapsed > 2:
            return all_left * elapsed / known
        return all_left / slots if self._has_forecast else math.nan


def _share_done(path: Path) -> float:
    """Share of a running training's steps that are done, from the end of its rows."""
    try:
        with (path / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 4096))
            last = file.read().rsplit(b"\n", 2)[-2]
        return float(json.loads(last)["step"] / json.loads((path / "environment.json").read_bytes())["num_steps"])
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return 0.0


# ---- findings ------------------------------------------------------------------------------------------------------------


def write_findings(folder: str | Path) -> Results:
    """table.csv, figures and conclusion.md of a study's folder, from what is in it. Needs no torch, and can be done again."""
    results = load_results(folder)
    found = find_study(str(results.record["study"]))
    write_table(results)
    (results.folder / "figures").mkdir(exist_ok=True)
    with unchecked():
        figures = found.draw(results)
        for name, figure in figures.items():
            for ending in ("png", "svg"):
                save_figure(figure, results.folder / "figures" / f"{name}.{ending}")
    write_atomically(results.folder / "conclusion.md", conclusion(found, results, list(figures)).encode())
    return results


COLUMNS = ("val/accuracy", "val/loss", "test/accuracy", "test/loss", "clean/accuracy")


def write_table(results: Results) -> None:
    """table.csv: a line a trial, with what its arm changes, how it ended and its scores at the step that it reports."""
    columns = list(dict.fromkeys(name for arm in results.arms for name in arm.columns))
    arms = {arm.name: arm for arm in results.arms}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["arm", *columns, "seed", "state", *COLUMNS, "gap", "steps", "reported_step", "train_seconds", "run"])
    for outcome in results.outcomes:
        settings, result = arms[outcome.trial.arm].columns, outcome.run.result
        scores = {key: outcome.at_report(key) for key in COLUMNS}
        gap = scores["clean/accuracy"] - scores["val/accuracy"]
        writer.writerow([
            outcome.trial.arm, *(settings.get(name, getattr(results.base, name, "")) for name in columns), outcome.trial.seed,
            outcome.state, *("" if math.isnan(score) else f"{score:.6g}" for score in [*scores.values(), gap]),
            result.get("step", ""), result.get("reported_step", ""),
            f"{result['train_seconds']:.3f}" if "train_seconds" in result else "", f"trials/{outcome.run.path.name}",
        ])  # fmt: skip
    write_atomically(results.folder / "table.csv", text.getvalue().encode())


def conclusion(found: Study, results: Results, figures: Sequence[str]) -> str:
    """The text of conclusion.md."""
    base, record = results.base, results.record
    parts = [f"# {found.name}: {found.question}", f"Source: {found.source}. What counts as an answer: {found.answer}"]
    if results.outcomes:
        what = f"{len({outcome.run.path for outcome in results.outcomes})} trainings of recipe {base.recipe}: {base.model} on " \
               f"{base.data}, seeds {', '.join(map(str, results.seeds))}, {record['threads']} thread(s) each."  # fmt: skip
        parts.append(" ".join([what, *(f"{note[0].upper()}{note[1:]}." for note in record["notes"])]))
        if cut := record["cut"]:
            is_shorter = cut["epochs_share"] < 1 or cut["train_images"]
            holds = "What is said below holds for trainings as short as that." if is_shorter else "The trainings are not shorter."
            if not cut.get("fits", True):
                holds = f"The budget could not be met: the forecast was {record['forecast']['seconds'] / 60:.0f} minutes. {holds}"
            parts.append(f"**Cut to a budget of {cut['budget_minutes']:g} minutes, all trials alike: {cut['told']}.** {holds}")
        parts += [f"**{line}**" for line in troubles(results)]
    parts += ["## Conclusion", found.conclude(results).strip()]
    if figures:
        parts += ["## Figures", "\n".join(f"- [{name}](figures/{name}.svg)" for name in figures)]
    return "\n\n".join(parts) + "\n"


def troubles(results: Results) -> list[str]:
    """What did not go as planned, a sentence each: diverged, failed and unfinished trials by name."""
    told = []
    for state, what in (("diverged", "the loss stopped being finite, and each is counted and drawn as diverged"),
                        ("failed", "the reason is in ended.json, and the same command tries again"),
                        ("unfinished", "the same command continues")):  # fmt: skip
        names = [f"{outcome.trial.arm} (seed {outcome.trial.seed})" for outcome in results.outcomes if outcome.state == state]
        if names:
            shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
            told.append(f"{len(names)} of {len(results.outcomes)} trials {state}: {shown}; {what}.")
    return told


def say_list(file: Any = None) -> None:
    """`cifarlab study --list`."""
    for name, found in STUDIES.items():
        lines = (f"{name:14} {found.question}", f"{'':14} source: {found.source}", f"{'':14} answer: {found.answer}")
        print("\n".join(lines), file=file or sys.stdout)
