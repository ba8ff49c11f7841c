"""A study's plan: what is asked for becomes a list of trials and the folder that they go to. No torch here.

    studies/<name>-<hash>/
      study.json      the plan: base config, arms, seeds, threads a trial, what a budget cut, every trial's config
      trials/         a run folder for each different config
      ended.json      trials that were pruned or have failed, and why
      analysis/       arrays of the studies that look into trained networks
      table.csv       a line a trial
      figures/        PNG and SVG
      conclusion.md
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from cifarlab.config import InputError, TrainConfig, did_you_mean, is_plain_name
from cifarlab.runs import Run, load_run, write_atomically
from cifarlab.studies.study import Arm, Outcome, Results, Study, Trial, make_trials

VAL_FRACTION = 0.15  # held out where the base holds nothing out: the studies choose, and the test set must not
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that a study's numbers depend on; its hash names the folder. `cut`: what a budget took away, as study.json has it.

    precision: what `auto` came to on the machine that began the study, for every trial alike wherever it is trained.
    """

    study: str
    base: TrainConfig
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    threads: int = 1
    budget: float = 0.0
    options: Mapping[str, Any] = field(default_factory=dict)
    search: Mapping[str, Any] = field(default_factory=dict)
    trials: tuple[Trial, ...] = ()
    cut: Mapping[str, Any] = field(default_factory=dict)
    forecast: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    precision: Literal["", "fp32", "bf16", "fp16"] = ""

    @property
    def hash(self) -> str:
        """12 hex digits over what was asked for; cut and precision follow from it and from the machine, and are not in it."""
        asked = self.to_json()
        for name in ("trials", "cut", "forecast", "notes", "precision", *(("arms",) if self.search else ())):
            del asked[name]
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:12]

    def settle(self, config: TrainConfig) -> TrainConfig:
        """The config with `auto` replaced by the study's precision, where it has one."""
        return replace(config, precision=self.precision) if self.precision and config.precision == "auto" else config

    @property
    def folder_name(self) -> str:
        return f"{self.study}-{self.hash[:8]}"

    def to_json(self) -> dict[str, Any]:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        names = {key: path.name for key, path in place_trials(Path(), self.trials).items()}
        trials = [{"arm": trial.arm, "run": names[trial.config.hash], "config": trial.config.to_dict()} for trial in self.trials]
        values |= {"base": self.base.to_dict(), "arms": [asdict(arm) for arm in self.arms], "trials": trials}
        return {"format": FORMAT} | json.loads(json.dumps(values))  # type: ignore[no-any-return]

    def save(self, folder: Path) -> None:
        write_atomically(folder / "study.json", (json.dumps(self.to_json(), indent=1, ensure_ascii=False) + "\n").encode())


def load_plan(folder: Path) -> Plan:
    """The plan in a study's folder; raises InputError where there is none that this version understands."""
    path = folder / "study.json"
    try:
        values = json.loads(path.read_bytes())
        if values.pop("format") != FORMAT:
            raise ValueError("it is of another version of cifarlab")
        for each in values["trials"]:
            if not (each["run"] and is_plain_name(each["run"])):  # else it would be trained into a folder outside the study's
                raise ValueError(f"{each['run']!r} is no name of a run's folder")
        arms = tuple(Arm(**arm) for arm in values.pop("arms"))
        trials = tuple(Trial(each["arm"], TrainConfig.from_dict(each["config"]), each["run"]) for each in values.pop("trials"))
        base = TrainConfig.from_dict(values.pop("base"))
        seeds, notes = tuple(values.pop("seeds")), tuple(values.pop("notes"))
        plan = Plan(arms=arms, trials=trials, base=base, seeds=seeds, notes=notes, **values)
        _check_plan(plan)
        return plan
    except FileNotFoundError:
        raise InputError(f"{folder} is no study's folder: it has no study.json") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        told = " ".join(str(error).split())[:160]
        raise InputError(f"{path} cannot be read ({told}): the study's folder is damaged, or of another version; choose "
                         "another --folder") from None  # fmt: skip


def _check_plan(plan: Plan) -> None:
    """Raises ValueError or TypeError for one that no study has made."""
    names = [arm.name for arm in plan.arms]
    if not all(isinstance(name, str) for name in (plan.study, *names, *plan.notes, *(trial.arm for trial in plan.trials))):
        raise TypeError("a name is no text")
    if not plan.seeds or not all(type(seed) is int for seed in plan.seeds) or type(plan.threads) is not int:
        raise TypeError("a seed, or the number of threads, is no whole number")
    if not plan.search and not {trial.arm for trial in plan.trials} <= set(names):
        raise ValueError("a trial belongs to no arm")
    if plan.precision not in ("", "fp32", "bf16", "fp16"):
        raise ValueError(f"{plan.precision!r} is no precision")
    if not all(isinstance(part, dict) for part in (plan.options, plan.search, plan.cut, plan.forecast)):
        raise TypeError("options, search, cut or forecast is no object")
    if not all(isinstance(arm.changes, dict) and isinstance(arm.columns, dict) for arm in plan.arms):
        raise TypeError("the changes of an arm are no object")


def make_plan(
    study: Study, base: TrainConfig, values: Mapping[str, Sequence[Any]], seeds: Sequence[int], *, threads: int = 1,
    budget: float = 0.0, search: Mapping[str, Any] | None = None,
) -> Plan:  # fmt: skip
    """The plan of a study on a base; values: what `--set` gave, a list for each field or option.

    Raises InputError for fields that the study cannot vary, for seeds that repeat, and for arms that are no valid config.
    """
    if not seeds or len(set(seeds)) < len(seeds):
        raise InputError(f"seeds={','.join(map(str, seeds))} cannot be used: give one or more, all different")
    options, varied, notes = dict(study.options), {}, []
    for name, given in values.items():
        if name in options:
            options[name] = tuple(given) if isinstance(options[name], tuple | list) else _only(name, given)
        elif name in study.varies or ("*" in study.varies and len(given) > 1):
            varied[name] = list(given)
        elif len(given) == 1:
            base = replace(base, **{name: given[0]})
        else:
            does = ", ".join(field for field in study.varies if field != "*") or "none"
            raise InputError(f"study {study.name} does not go through values of {name}: give one, or use the study that does "
                             f"(fields that it goes through: {does}; `cifarlab study sensitivity` takes any)")  # fmt: skip
    base = study.prepare(base)
    if study.needs_validation and not base.val_fraction:
        base = replace(base, val_fraction=VAL_FRACTION)
        notes.append(f"{100 * VAL_FRACTION:.0f} % of the training images are held out: by them arms are compared, and the step "
                     "that a run reports is chosen; the test set chooses nothing")  # fmt: skip
    if search and study.space:
        space = {name: list(spec) for name, spec in study.space(base, varied).items()}
        search = {**search, "space": space}
    for name in ("run", "other"):
        if options.get(name):
            load_run(str(options[name]))  # refused before there is a folder
    arms = () if search or options.get("run") else tuple(study.plan(base, varied))
    names = [arm.name for arm in arms]
    if len(set(names)) < len(names):
        raise InputError(f"study {study.name} would compare equal things: {', '.join(sorted(names))}; leave repeated values out")
    plan = Plan(study=study.name, base=replace(base, seed=seeds[0]), arms=arms, seeds=tuple(seeds), threads=threads,
                budget=budget, options=options, search=search or {}, notes=tuple(notes))  # fmt: skip
    return replace(plan, trials=tuple(make_trials(base, list(arms), plan.seeds)) if not search else ())


def _only(name: str, given: Sequence[Any]) -> Any:
    if len(given) != 1:
        raise InputError(f"{name}={','.join(map(str, given))} cannot be used: it takes one value")
    return given[0]


def parse_values(study: Study, texts: Sequence[str]) -> dict[str, list[Any]]:
    """`field=v1,v2` as typed values; raises InputError for unknown names and values that are none of the field's."""
    hints, parsed = get_type_hints(TrainConfig), {}
    for text in texts:
        name, equals, listed = text.partition("=")
        name = name.strip().lstrip("-").replace("-", "_")
        if not equals or not listed:
            raise InputError(f"--set {text!r} cannot be read: write field=value or field=value,value, such as lr=0.1,0.01")
        if name in ("seed", "recipe"):
            raise InputError(f"--set {name} cannot be used: " + ("give --seeds" if name == "seed" else "give --recipe"))
        if name in study.options:
            default = study.options[name]
            kind: Any = type(default[0]) if isinstance(default, tuple | list) and default else type(default)
        elif name in hints:
            kind = hints[name]
        else:
            known = [*hints, *study.options]
            raise InputError(f"--set {name}: there is no such setting{did_you_mean(name, known)}")
        if name in parsed:
            raise InputError(f"--set {name} is given twice: give all of its values at once, as in {name}={listed.strip(',')},…")
        parsed[name] = [_parse(name, word.strip(), kind) for word in listed.split(",") if word.strip()]
    return parsed


def _parse(name: str, word: str, kind: Any) -> Any:
    try:
        if get_origin(kind) is Literal:
            if word not in get_args(kind):
                raise ValueError
            return word
        if kind is bool:
            return {"true": True, "false": False}[word.lower()]
        return kind(word)
    except (ValueError, KeyError):
        allowed = ", ".join(map(str, get_args(kind))) if get_origin(kind) is Literal else f"of type {kind.__name__}"
        raise InputError(f"--set {name}={word} cannot be used: it must be "
                         f"{'one of ' if ',' in allowed else ''}{allowed}") from None


def name_trial(trial: Trial) -> str:
    """A trial's run folder: arm, seed, config hash; but as it was once named, whatever has been added to the hash since."""
    if trial.run:
        return trial.run
    arm = "searched" if trial.arm.startswith("searched") else trial.arm  # its number is known only afterwards
    return f"{re.sub(r'[^A-Za-z0-9.=_-]+', '-', arm).strip('-.')[:60]}-s{trial.seed}-{trial.config.hash[:8]}"


def place_trials(folder: Path, trials: Sequence[Trial]) -> dict[str, Path]:
    """Config hash -> run folder: arms that come to the same config share one training, called after the first of them."""
    places: dict[str, Path] = {}
    for trial in trials:
        places.setdefault(trial.config.hash, folder / "trials" / name_trial(trial))
    return places


def cut_config(config: TrainConfig, share: float, images: int = 0, evaluations: int = 0) -> TrainConfig:
    """The config with that share of its epochs and of its schedule's lengths, on so many training images (0: as it is).

    evaluations: at most so many, evenly spread (0: as many as it has, but for those that shorter epochs make needless).
    """
    lengths = ("epochs", "warmup_epochs", "decay_epochs", "restart_epochs")
    changes: dict[str, Any] = {name: float(f"{getattr(config, name) * share:.4g}") for name in lengths}
    if config.eval_every:  # a curve needs points: four at least, where there were as many before
        wanted = min(4.0, config.epochs / config.eval_every)
        changes["eval_every"] = min(config.eval_every, float(f"{changes['epochs'] / wanted:.4g}"))
        if evaluations and changes["epochs"] / changes["eval_every"] > evaluations:
            changes["eval_every"] = float(f"{changes['epochs'] / evaluations:.4g}") if evaluations > 1 else 0.0  # at the end
    return replace(config, **changes, train_images=images or config.train_images)


def cut_base(plan: Plan) -> TrainConfig:
    """The base as it is trained: in the study's precision, and cut to the budget, where that took something away."""
    base, cut = plan.settle(plan.base), plan.cut
    return cut_config(base, cut["epochs_share"], cut["train_images"], cut.get("evaluations", 0)) if cut else base


def read_ended(folder: Path) -> dict[str, dict[str, Any]]:
    """ended.json: run folder name -> {"state": "pruned" or "failed", "reason": …}."""
    try:
        values = json.loads((folder / "ended.json").read_bytes())
        return {name: how for name, how in values.items() if isinstance(how, dict)}
    except (FileNotFoundError, ValueError, AttributeError, RecursionError):
        return {}


def write_ended(folder: Path, ended: Mapping[str, Mapping[str, Any]]) -> None:
    write_atomically(folder / "ended.json", (json.dumps(ended, indent=1, ensure_ascii=False) + "\n").encode())


def load_results(folder: str | Path) -> Results:
    """A study's folder, finished or not, for drawing and concluding; raises InputError where it is none."""
    folder = Path(folder)
    plan = load_plan(folder)
    places, ended = place_trials(folder, plan.trials), read_ended(folder)
    outcomes = []
    for trial in plan.trials:
        run = Run(places[trial.config.hash])
        state = str(run.result.get("state", "")) or str(ended.get(run.path.name, {}).get("state", "unfinished"))
        outcomes.append(Outcome(trial, run, state))
    return Results(folder=folder, base=plan.base, arms=plan.arms, seeds=plan.seeds, outcomes=tuple(outcomes),
                   options=plan.options, record=plan.to_json())  # fmt: skip
