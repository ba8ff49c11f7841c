"""A search in place of a grid: Optuna asks, the engine trains, bad trials are pruned by their validation accuracy on the way.

Needs `pip install 'cifarlab[optuna]'`. What was asked and told is in optuna.log of the study's folder (a journal, which bears
being killed), so that the same command goes on; every training is a run folder as always. With several trainings at once
what is asked next depends on which of them ended first: each run is a function of its config still, the list of them is not.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from cifarlab.config import InputError, TrainConfig, WatchConfig
from cifarlab.engines.engine import Engine, Runner
from cifarlab.runs import Run
from cifarlab.studies.conduct import TICK, job_of, note_end
from cifarlab.studies.cost import count_evaluations, forecast_plan
from cifarlab.studies.plan import Plan, cut_base, name_trial, read_ended, write_ended
from cifarlab.studies.progress import Progress
from cifarlab.studies.study import Arm, Study, Trial

FIRST = 5  # trials that are never pruned, so that there is something to compare with


def search_settings(study: Study, plan: Plan, place: Path, watch: WatchConfig, open_engine: Callable[[], Engine],
                    progress: Progress, retries: int) -> Plan:  # fmt: skip
    """The plan with an arm for every config that was tried with the first seed, and base and best once more with every seed."""
    try:
        import optuna
        from optuna.storages.journal import JournalFileBackend
    except ImportError:
        raise InputError("--search needs Optuna: pip install 'cifarlab[optuna]'") from None
    wanted = int(plan.search["trials"])
    if not plan.forecast and (watch.forecast or plan.budget):
        scouts = tuple(Trial("scout", replace(plan.settle(plan.base), seed=k)) for k in range(wanted + 2 * len(plan.seeds) - 1))
        scouted = forecast_plan(replace(plan, trials=scouts), watch, open_engine().slots, progress.say)
        plan = replace(plan, cut=scouted.cut, forecast={**scouted.forecast, "trials": {}})
        plan.save(place)
    base = cut_base(plan)
    if why := why_none_is_pruned(plan):
        progress.say(why)
    journal = place / "optuna.log"  # lines of JSON: nothing in it is ever run
    with _quietly(optuna):
        try:
            asked = optuna.create_study(
                storage=optuna.storages.JournalStorage(JournalFileBackend(str(journal))),
                study_name=plan.study, direction="maximize", load_if_exists=True,
                pruner=optuna.pruners.MedianPruner(n_startup_trials=FIRST, n_warmup_steps=1),
            )  # fmt: skip
            for old in asked.get_trials(deepcopy=False):
                replace(base, **old.user_attrs.get("changes", {}))
        except OSError:
            raise
        except Exception as error:  # optuna checks nothing of what it reads
            raise InputError(f"{journal} is damaged or no journal of this study ({type(error).__name__}): remove it, and the "
                             "search begins anew") from None  # fmt: skip
        for old in asked.get_trials(deepcopy=False):
            if old.state == optuna.trial.TrialState.RUNNING:  # a kill cut it off: its run goes on from its checkpoint
                asked.tell(old.number, state=optuna.trial.TrialState.FAIL)
                asked.enqueue_trial(old.params)
        seed = plan.seeds[0] + len(asked.trials)
        asked.sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=min(10, wanted // 2 + 1))
        _loop(optuna, asked, plan, base, place, watch, open_engine, progress, retries, wanted)
        return _with_trials(optuna, asked, plan, base, place)


def why_none_is_pruned(plan: Plan) -> str:
    """A sentence where no trial of the search can be ended early: it is judged by its evaluations on the way."""
    base, trials = cut_base(plan), int(plan.search["trials"])
    if count_evaluations(base) == 1:
        is_cut = count_evaluations(plan.base) > 1
        remedy = "a larger --budget" if is_cut else f"--set eval_every={base.epochs / 4:.3g}"
        return f"no trial can be pruned, since each is evaluated at its end only; with {remedy} bad ones could end early"
    if trials <= FIRST:
        return f"no trial can be pruned: the first {FIRST} never are, and there are only {trials}"
    return ""


@contextmanager
def _quietly(optuna: Any) -> Iterator[None]:
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(before)


def suggest(trial: Any, name: str, spec: Any) -> Any:
    """A value of ("choice", values), ("log", low, high) or ("uniform", low, high)."""
    kind, *bounds = spec
    if kind == "choice":
        return trial.suggest_categorical(name, bounds[0])
    value = trial.suggest_float(name, bounds[0], bounds[1], log=kind == "log")
    return float(f"{value:.3g}")  # three digits are enough, and can be read


def _loop(optuna: Any, asked: Any, plan: Plan, base: TrainConfig, place: Path, watch: WatchConfig,
          open_engine: Callable[[], Engine], progress: Progress, retries: int, wanted: int) -> None:  # fmt: skip
    states = optuna.trial.TrialState

    def num_ended() -> int:
        ended = (states.COMPLETE, states.PRUNED)
        return sum(t.state in ended or "failed" in t.user_attrs for t in asked.get_trials(deepcopy=False))

    if num_ended() >= wanted:
        return
    engine = open_engine()
    progress.say(engine.description)
    runner = Runner(engine, retries=retries, say=progress.say)
    running: dict[Path, Any] = {}
    pruned: set[Path] = set()
    while num_ended() + len(running) < wanted or running:
        while num_ended() + len(running) < wanted and len(running) < max(1, engine.slots):
            trial = asked.ask()
            changes = {name: suggest(trial, name, spec) for name, spec in plan.search["space"].items()}
            path, config = _place(place, base, changes)
            if path in running:
                asked.tell(trial, state=states.FAIL)
                break
            trial.set_user_attr("changes", changes)
            run = Run(path)
            if run.is_finished or read_ended(place).get(path.name, {}).get("state") == "pruned":
                _tell(asked, states, trial, run)
                continue
            running[path] = trial
            runner.submit([job_of(config, path, plan, watch)])
        if not running:
            continue
        for final in runner.step(TICK):
            path = final.job.path
            trial = running.pop(path)
            if final.how == "stopped" and path in pruned:
                write_ended(place, read_ended(place) | {path.name: {"state": "pruned", "reason": "below the median on the way"}})
                asked.tell(trial, state=states.PRUNED)
                progress.say(f"{path.name}: pruned")
            elif final.how == "done":
                note_end(final, place, progress)
                _tell(asked, states, trial, Run(path))
            else:
                note_end(final, place, progress)
                trial.set_user_attr("failed", True)
                asked.tell(trial, state=states.FAIL)
        for path, trial in running.items():
            job = runner.running.get(path)
            if job and path not in pruned and _is_bad(trial, path):
                pruned.add(path)
                runner.stop(job)
        progress.total = wanted
        progress.show(num_ended(), len(runner.running), math.nan)


def _place(place: Path, base: TrainConfig, changes: Mapping[str, Any]) -> tuple[Path, TrainConfig]:
    config = replace(base, **changes)
    return place / "trials" / name_trial(Trial("searched", config)), config


def _is_bad(trial: Any, path: Path) -> bool:
    """Whether the pruner gives the trial up; it is told each validation accuracy that the run has written."""
    metrics = Run(path).metrics
    if "val/accuracy" not in metrics:
        return False
    for number, value in enumerate(metrics["val/accuracy"].tolist(), start=1):
        trial.report(value if math.isfinite(value) else 0.0, number)  # one that is known already is passed over
    return bool(trial.should_prune())


def _tell(asked: Any, states: Any, trial: Any, run: Run) -> None:
    if run.result.get("state") == "finished":
        asked.tell(trial, float(run.result["val/accuracy"]))
    elif run.is_finished:
        asked.tell(trial, 0.0)  # diverged: the worst there is, so that the sampler keeps away
    else:
        asked.tell(trial, state=states.PRUNED)


def _with_trials(optuna: Any, asked: Any, plan: Plan, base: TrainConfig, place: Path) -> Plan:
    arms, trials, best = [Arm(name="base", is_base=True)], [Trial("base", base)], (-1.0, -1)
    seen: dict[str, int] = {}  # a config may have been asked for twice: before a kill, and after it
    for trial in asked.get_trials(deepcopy=False):
        changes = trial.user_attrs.get("changes")
        if not changes:
            continue
        path, config = _place(place, base, changes)
        if not (path / "config.json").exists():
            continue
        if config.hash not in seen:
            seen[config.hash] = len(arms)
            arms.append(Arm(name="searched", changes=changes))
            trials.append(Trial("searched", config))
        if trial.state == optuna.trial.TrialState.COMPLETE and trial.value > best[0]:
            best = (trial.value, seen[config.hash])
    names = ["base"] + [f"searched {k}" + (" (best)" if k == best[1] else "") for k in range(1, len(arms))]
    arms = [replace(arm, name=name) for arm, name in zip(arms, names, strict=True)]
    trials = [replace(trial, arm=name) for trial, name in zip(trials, names, strict=True)]
    for seed in plan.seeds[1:]:
        confirmed = [trials[0], trials[best[1]]] if best[1] > 0 else []
        trials += [replace(trial, config=replace(trial.config, seed=seed)) for trial in confirmed]
    plan = replace(plan, arms=tuple(arms), trials=tuple(trials))
    plan.save(place)
    return plan
