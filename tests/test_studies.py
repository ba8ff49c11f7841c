"""The studies: each end to end through the command, resumed after SIGKILL, cut to a budget; and what their conclusions claim."""

import csv
import importlib
import importlib.util
import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from PIL import Image

import cifarlab as cl
from cifarlab.cli import main
from cifarlab.config import InputError, TrainConfig
from cifarlab.engines.engine import Job, Runner
from cifarlab.models import MODELS
from cifarlab.runs import Run
from cifarlab.studies import STUDIES
from cifarlab.studies.augmentation import active
from cifarlab.studies.comparison import compare
from cifarlab.studies.conduct import Clock, write_findings
from cifarlab.studies.learning_rate import good_rates
from cifarlab.studies.plan import Plan, load_results, make_plan, name_trial, parse_values
from cifarlab.studies.progress import Progress
from cifarlab.studies.sensitivity import importance
from cifarlab.studies.study import Arm, Study, make_trials

TESTS = Path(__file__).parent
FORECAST = importlib.import_module("cifarlab.forecast")  # the package's attribute of that name is a function
OURS = ("learning-rate", "sensitivity", "augmentation", "optimizers", "schedules")
SMALL = ["model=tiny", "train_images=96", "batch_size=16", "epochs=2"]


@pytest.fixture
def models(tiny: str) -> Iterator[None]:
    import study_models

    before = dict(MODELS)
    study_models.register()
    yield
    MODELS.clear()
    MODELS.update(before)


def conduct(capsys: pytest.CaptureFixture[str], folder: Path, name: str, *arguments: str) -> tuple[int, str, Path]:
    """Exit code, what was printed, and the study's folder."""
    code = main(["study", name, "--folder", str(folder), "--jobs", "1", "--device", "cpu", "--progress", "lines", *arguments])
    printed = capsys.readouterr()
    return code, printed.out + printed.err, next(iter(folder.glob(f"{name}-*")), folder)


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "table.csv").open() as file:
        return list(csv.DictReader(file))


# ---- contract of the table -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("recipe", ["quick", "resnet18-cosine", "resnet34-cifar100"])
def test_every_study_fits_every_recipe(name: str, recipe: str) -> None:
    study = STUDIES[name]
    assert study.name == name
    assert study.question.endswith("?")
    assert study.source
    assert study.answer
    plan = make_plan(study, cl.recipes.load_recipe(recipe), {}, (0, 1))
    assert len(plan.trials) == 2 * len(plan.arms)
    hashes = [trial.config.hash for trial in plan.trials]
    assert len(set(hashes)) == len(hashes)  # arms differ
    assert sum(arm.is_base for arm in plan.arms) == 1
    assert all(trial.config.val_fraction for trial in plan.trials)
    assert len({name_trial(trial) for trial in plan.trials}) == len(plan.trials)


def test_plans_are_what_the_labs_ask_for() -> None:
    base = cl.recipes.quick()
    assert {0.1, 0.01, 0.001, 0.0001} <= {arm.changes["lr"] for arm in STUDIES["learning-rate"].plan(base, {})}
    assert len(STUDIES["sensitivity"].plan(base, {})) == 27
    optimizers = {arm.columns["optimizer"] for arm in STUDIES["optimizers"].plan(base, {})}
    assert optimizers == {"sgd", "adam", "adamw", "rmsprop", "muon"}
    schedules = {arm.name for arm in STUDIES["schedules"].plan(base, {})}
    assert schedules == {"one-cycle", "step", "cosine", "restarts", "constant"}
    study, lab = STUDIES["augmentation"], cl.recipes.resnet18_cosine()
    arms = {arm.name: arm for arm in study.plan(study.prepare(lab), {})}
    without, alone = ([name.format(each) for each in ("crop", "flip", "jitter")] for name in ("without {}", "{} alone"))
    assert list(arms) == ["all", *without, *alone, "none"]
    assert active(replace(lab, **arms["without flip"].changes)) == ["crop", "jitter"]
    assert active(replace(lab, **arms["flip alone"].changes)) == ["flip"]
    assert active(replace(lab, **arms["none"].changes)) == []
    assert study.prepare(lab).clean_images > 0


def test_what_cannot_be_studied_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for words, told in (
        (["learning-rat"], "there is no study 'learning-rat'; did you mean 'learning-rate'?"),
        (["schedules", "--set", "lr=0.1,0.2"], "study schedules does not go through values of lr"),
        (["schedules", "--set", "lrr=0.1"], "--set lrr: there is no such setting; did you mean 'lr'?"),
        (["schedules", "--set", "schedule=cosin"], "schedule=cosin cannot be used: it must be one of constant, step"),
        (["schedules", "--set", "epochs=x"], "epochs=x cannot be used: it must be of type float"),
        (["schedules", "--set", "seed=1"], "give --seeds"),
        (["schedules", "--seeds", "0,0"], "seeds=0,0 cannot be used"),
        (["schedules", "--seeds", "a"], "--seeds 'a' cannot be read"),
        (["schedules", "--search", "tpe"], "--search and --trials go together"),
        (["schedules", "--search", "tpe", "--trials", "3"], "has nothing to search"),
        (["schedules", "--ray", "auto", "--jobs", "2"], "--jobs has no effect beside --ray"),
        (["schedules", "--budget", "-1"], "--budget, --jobs and --trials must be at least 0"),
        ([], "name a study"),
        (["schedules", "--set", "model=resnet_18", "--folder", str(tmp_path)], "'resnet_18' is not one of"),
    ):  # fmt: skip
        assert main(["study", *words]) == 2
        printed = capsys.readouterr()
        assert told in printed.err, printed.err
    assert main(["study", "--list"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed and STUDIES[name].question in listed for name in STUDIES)


def test_settings_may_follow_one_flag_or_several() -> None:
    from cifarlab.cli import _gather

    expected = ["x", "--jobs", "1", "--set", "a=1,2", "b=3", "c=4"]
    assert _gather("--set", ["x", "--set", "a=1,2", "b=3", "--jobs", "1", "--set=c=4"], lambda word: "=" in word) == expected
    assert parse_values(STUDIES["schedules"], ["drop-last=true", "lr=1"]) == {"drop_last": [True], "lr": [1.0]}


# ---- end to end ----------------------------------------------------------------------------------------------------------


def check_folder(folder: Path, num_trials: int) -> str:
    """table, figures and conclusion are there and whole; gives the conclusion."""
    rows = rows_of(folder)
    assert len(rows) == num_trials
    for row in rows:
        assert (folder / row["run"] / "config.json").exists()
    pictures = sorted((folder / "figures").glob("*.png"))
    assert len(pictures) >= 2
    for picture in pictures:
        with Image.open(picture) as image:
            assert min(image.size) > 200
        assert ElementTree.parse(picture.with_suffix(".svg")).getroot().tag.endswith("svg")
    text = (folder / "conclusion.md").read_text()
    assert "## Conclusion" in text
    assert "test set chooses nothing" in text
    return text


def test_learning_rate_with_a_run_that_diverges(models: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["--seeds", "0,1", "--set", *SMALL, "lr=0.05,0.02,1e30", "optimizer=sgd"]
    code, told, folder = conduct(capsys, tmp_path, "learning-rate", *settings)
    assert code == 0
    assert "6 trainings, 1 at once" in told  # the forecast, before the start
    assert "diverged at step" in told
    text = check_folder(folder, 6)
    assert "2 of 6 trials diverged: lr 1e+30 (seed 0), lr 1e+30 (seed 1)" in text
    assert "2 of 2 diverged" in text
    assert "Diverged: lr 1e+30." in text
    assert [row["state"] for row in rows_of(folder)].count("diverged") == 2
    assert 1e30 not in good_rates(load_results(folder))
    assert "× 2 diverged" in (folder / "figures" / "accuracy.svg").read_text()
    assert (folder / "figures" / "validation-curves.svg").read_text().count("×") >= 2
    # The same command does nothing again; findings come from the folder alone, also where there is no torch.
    before = {path: path.stat().st_mtime_ns for path in folder.glob("trials/*/result.json")}
    code, told, _ = conduct(capsys, tmp_path, "learning-rate", *settings)
    assert code == 0
    assert "6 of 6 trainings have ended before" in told
    assert before == {path: path.stat().st_mtime_ns for path in folder.glob("trials/*/result.json")}
    (folder / "conclusion.md").unlink()
    script = ("import sys; from cifarlab.studies.conduct import write_findings; "
              f"write_findings({str(folder)!r}); sys.exit('torch' in sys.modules)")  # fmt: skip
    subprocess.run([sys.executable, "-c", script], check=True, timeout=100)
    assert (folder / "conclusion.md").read_text() == text


@pytest.mark.parametrize(
    ("name", "settings", "num_trials", "columns"),
    [
        ("sensitivity", ["batch_size=32,64", "weight_decay=0,0.01", "clip_norm=0,0.5"], 16, ["batch_size", "clip_norm"]),
        ("augmentation", ["crop_padding=2", "cutout=8"], 8, ["crop", "cutout"]),
        ("optimizers", [], 10, ["optimizer", "lr"]),
        ("schedules", [], 10, ["schedule"]),
    ],
)
def test_study(name: str, settings: list[str], num_trials: int, columns: list[str], models: None, tmp_path: Path,
               capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(FORECAST, "measure_step", lambda *_, **__: 0.01)
    small = [word for word in SMALL if word.partition("=")[0] not in {each.partition("=")[0] for each in settings}]
    code, told, folder = conduct(capsys, tmp_path, name, "--seeds", "0,1", "--set", *small, *settings)
    assert code == 0, told
    text = check_folder(folder, num_trials)
    assert "2 pairs of equal seeds, paired t test" in text
    rows = rows_of(folder)
    assert set(columns) <= rows[0].keys()
    assert {row["state"] for row in rows} == {"finished"}
    if name == "sensitivity":
        assert "Share of the differences in validation accuracy" in text
        assert {path.stem for path in (folder / "figures").glob("*.png")} == {"pairs", "importance", "accuracy"}
    if name == "augmentation":
        assert all(float(row["gap"]) == pytest.approx(float(row["clean/accuracy"]) - float(row["val/accuracy"]), abs=2e-6)
                   for row in rows)  # fmt: skip
        assert "generalisation gap" in text
    if name == "optimizers":
        assert "of its runs" in text
    if name == "schedules":
        by_arm = {outcome.trial.arm: outcome.run.metrics["lr"] for outcome in load_results(folder).outcomes}
        assert len(set(by_arm["constant"])) == 1
        assert by_arm["restarts"][4] > by_arm["restarts"][3]  # twelve steps: a cycle of four and one of eight


def test_a_study_has_one_precision_wherever_it_goes_on(models: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipes say auto: a study of one is forecast, and what it was begun in holds for all of its trials, a search's too."""
    from types import SimpleNamespace

    from cifarlab.studies.conduct import _begin
    from cifarlab.studies.plan import cut_base, place_trials

    base = cl.TrainConfig(data="digits", model="tiny", precision="auto", epochs=1, batch_size=16, train_images=32)
    watch, said = cl.WatchConfig(device="cpu", probes="none"), list[str]()
    progress: Any = SimpleNamespace(say=said.append, total=0)
    engine: Any = lambda: SimpleNamespace(slots=1)  # noqa: E731
    plan = make_plan(STUDIES["learning-rate"], base, {"lr": [0.01, 0.02]}, [0])
    for has_bf16 in (True, False):  # it is begun on one machine, and goes on on another
        monkeypatch.setattr("cifarlab.distributed.has_native_bf16", lambda _, found=has_bf16: found)
        begun = _begin(plan, tmp_path, watch, engine, progress)
        assert {trial.config.precision for trial in begun.trials} == {cut_base(begun).precision} == {"bf16"}
        assert begun.hash == plan.hash
        assert load_results(tmp_path).base == plan.base
        assert [path.name for path in place_trials(tmp_path, begun.trials).values()] == list(map(name_trial, begun.trials))
    assert begun.forecast["seconds"] > 0
    assert sum("precision auto came to bf16" in line for line in said) == 1
    searched = replace(make_plan(STUDIES["sensitivity"], base, {}, [0], search={"sampler": "tpe", "trials": 2}), precision="fp32")
    assert cut_base(searched).precision == "fp32"


@pytest.mark.skipif(not importlib.util.find_spec("optuna"), reason="Optuna is not installed: pip install 'cifarlab[optuna]'")
def test_a_search_that_cannot_prune_says_so_when_it_starts(tmp_path: Path) -> None:
    from types import SimpleNamespace

    from cifarlab.studies.search import search_settings

    found, base = STUDIES["sensitivity"], cl.TrainConfig(data="digits", model="tiny", epochs=8, lr=0.01, eval_every=2)
    cut = {"epochs_share": 0.25, "train_images": 0, "evaluations": 1}
    at_end = "no trial can be pruned, since each is evaluated at its end only; with"

    class Begun(Exception):
        pass

    def engine() -> Any:
        raise Begun

    for changes, cuts, trials, expected in (
        ({}, {}, 6, []), ({"eval_every": 0}, {}, 6, [f"{at_end} --set eval_every=2 bad ones could end early"]),
        ({"eval_every": 8}, {}, 6, [f"{at_end} --set eval_every=2 bad ones could end early"]),
        ({}, cut, 6, [f"{at_end} a larger --budget bad ones could end early"]),
        ({}, {}, 5, ["no trial can be pruned: the first 5 never are, and there are only 5"]),
    ):  # fmt: skip
        plan = make_plan(found, replace(base, **changes), {}, [0], search={"sampler": "tpe", "trials": trials})
        said: list[str] = []
        place = tmp_path / str(len(list(tmp_path.iterdir())))
        place.mkdir()
        with pytest.raises(Begun):
            search_settings(found, replace(plan, cut=cuts), place, cl.WatchConfig(forecast=False), engine,
                            SimpleNamespace(say=said.append), 0)  # type: ignore[arg-type]  # fmt: skip
        assert said == expected


@pytest.mark.skipif(not importlib.util.find_spec("optuna"), reason="Optuna is not installed: pip install 'cifarlab[optuna]'")
def test_search_prunes_goes_on_and_is_checked_with_other_seeds(
    models: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import cifarlab.studies.search as search

    bad: list[Path] = []  # the first of them that has got so far

    def is_bad(trial: Any, path: Path) -> bool:
        if trial.number >= 3 and not bad and "val/accuracy" in Run(path).metrics:
            bad.append(path)
        return path in bad

    monkeypatch.setattr(search, "_is_bad", is_bad)
    arguments = ["--seeds", "0,1,2", "--search", "tpe", "--trials", "6", "--set", "model=slow", *SMALL[1:3], "epochs=3",
                 "lr=0.001,0.01,0.05", "weight_decay=0,0.001,0.01"]  # fmt: skip
    notes = []

    def note_and_die(final: Any, place: Path, progress: Any) -> None:
        notes.append(final.job.path.name)
        if len(notes) == 2:
            raise KeyboardInterrupt  # as a kill would: the second trial's end is not told to Optuna
        note(final, place, progress)

    note = search.note_end
    monkeypatch.setattr(search, "note_end", note_and_die)
    assert conduct(capsys, tmp_path, "sensitivity", *arguments)[0] == 130
    folder = next(tmp_path.glob("sensitivity-*"))
    finished = {path: path.stat().st_mtime_ns for path in folder.glob("trials/*/result.json")}
    assert len(finished) == 2
    monkeypatch.setattr(search, "note_end", note)
    code, told, folder = conduct(capsys, tmp_path, "sensitivity", *arguments)
    assert code == 0, told
    assert finished.items() <= {path: path.stat().st_mtime_ns for path in folder.glob("trials/*/result.json")}.items()
    results = load_results(folder)
    assert results.count("pruned") == 1
    assert "pruned" in told
    best = next(arm for arm in results.arms if arm.name.endswith("(best)"))
    assert len(results.of(best)) == len(results.of("base")) == 3
    text = check_folder(folder, len(results.outcomes))
    assert "With the 2 seeds that did not choose it, it differs from the base by" in text
    searched = [arm for arm in results.arms if results.runs(arm) and not arm.is_base]
    assert max(results.values(arm)[0] for arm in searched) == results.values(best)[0]


def test_a_study_killed_in_the_middle_goes_on(models: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """SIGKILL of everything: the same command ends with the numbers of a study that nobody killed."""
    program = [sys.executable, str(TESTS / "study_models.py"), "study", "learning-rate", "--seeds", "0,1", "--progress", "lines",
               "--device", "cpu", "--set", "model=slow", *SMALL[1:], "lr=0.002,0.02", "--folder"]  # fmt: skip
    killed = subprocess.Popen([*program, str(tmp_path / "killed"), "--jobs", "1"], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 100
    while len(list((tmp_path / "killed").glob("*/trials/*/result.json"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    while not list((tmp_path / "killed").glob("*/trials/*-s1-*/metrics.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    folder = next((tmp_path / "killed").glob("learning-rate-*"))
    done = {path: path.stat().st_mtime_ns for path in folder.glob("trials/*/result.json")}
    assert 2 <= len(done) < 4
    capsys.readouterr()
    assert main([*program[2:], str(tmp_path / "killed"), "--jobs", "1"]) == 0
    assert f"{len(done)} of 4 trainings have ended before: not done again" in capsys.readouterr().out
    assert done.items() <= {path: path.stat().st_mtime_ns for path in folder.glob("trials/*/result.json")}.items()
    MODELS["slow"] = MODELS["tiny"]  # the same numbers, sooner
    quiet = cl.WatchConfig(runs_dir=tmp_path / "whole", threads=1, progress="none", forecast=False, figures=False)
    for outcome in load_results(folder).outcomes:
        reference = cl.train(outcome.trial.config, replace(quiet, name=outcome.trial.config.hash))
        rows, others = ([{key: value for key, value in row.items() if not key.startswith("time/")} for row in run.metrics.rows]
                        for run in (outcome.run, reference))  # fmt: skip
        assert rows == others


def test_a_signal_ends_a_study_in_order(models: None, tmp_path: Path) -> None:
    program = [sys.executable, str(TESTS / "study_models.py"), "study", "learning-rate", "--seeds", "0", "--jobs", "1",
               "--folder", str(tmp_path), "--set", "model=slow", *SMALL[1:3], "epochs=99", "lr=0.02"]  # fmt: skip
    running = subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline and not any(path.stat().st_size for path in tmp_path.glob("*/trials/*/metrics.jsonl")):
        time.sleep(0.1)
    running.send_signal(signal.SIGTERM)
    _, told = running.communicate(timeout=60)
    assert running.returncode == 143
    assert "stopped by SIGTERM; the same command continues the study" in told
    assert list(tmp_path.glob("*/trials/*/checkpoints/step-*"))


def test_a_budget_cuts_all_trials_alike_and_says_so(
    models: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []

    def measure(*_: Any, **__: Any) -> float:
        asked.append(0.0)
        return 0.05  # seconds a step of 16 images

    monkeypatch.setattr(FORECAST, "measure_step", measure)
    # 4 trials: 96 images × 40 epochs / 16 × 0.05 s = 12 s, evaluation of 215 + 360 images 40 times 24 s, 1.5 s: 150 s in all
    arguments = ["--seeds", "0,1", "--set", *SMALL[:3], "epochs=40", "lr=0.002,0.02", "--budget", "0.5"]
    code, told, folder = conduct(capsys, tmp_path, "learning-rate", *arguments)
    assert code == 0
    assert "budget: all of it would take about 2.5 min here; to fit 0.5 min every trial is cut alike: epochs ×" in told
    configs = [outcome.trial.config for outcome in load_results(folder).outcomes]
    assert len({config.epochs for config in configs}) == 1
    assert 1 < configs[0].epochs < 40
    assert {config.train_images for config in configs} == {96}
    assert "**Cut to a budget of 0.5 minutes, all trials alike: epochs ×" in (folder / "conclusion.md").read_text()
    record = json.loads((folder / "study.json").read_text())
    assert 20 < record["forecast"]["seconds"] <= 30.1
    measured = len(asked)
    assert conduct(capsys, tmp_path, "learning-rate", *arguments)[0] == 0  # the cut is the plan's: it is not measured anew
    assert len(asked) == measured


def test_a_budget_that_epochs_cannot_meet_cuts_images_too(models: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from cifarlab.studies.cost import forecast_plan

    monkeypatch.setattr(FORECAST, "measure_step", lambda *_, **__: 1.6)  # 0.1 s an image
    base = cl.recipes.quick(model="tiny", batch_size=16, epochs=4, schedule="step", decay_epochs=2)
    plan = make_plan(STUDIES["learning-rate"], base, {"lr": [0.1, 0.01]}, (0,))
    said: list[str] = []
    cut = forecast_plan(replace(plan, budget=2.0), cl.WatchConfig(device="cpu"), 1, said.append)
    configs = [trial.config for trial in cut.trials]
    assert {(config.epochs, config.decay_epochs) for config in configs} == {(1.0, 0.5)}
    assert len({config.train_images for config in configs}) == 1
    assert 32 <= configs[0].train_images < 1200
    assert "training images instead of" in said[0]


def test_evaluations_that_dominate_a_budget_are_cut_before_the_training(models: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A little of a data set is trained on, all of its test set is looked at: training images were cut to nearly none."""
    from cifarlab.studies.cost import forecast_plan

    monkeypatch.setattr(FORECAST, "measure_step", lambda *_, **__: 1.6)  # 0.1 s an image
    base = cl.recipes.quick(model="tiny", batch_size=16, train_images=64, epochs=4, eval_every=0.5)
    plan = make_plan(STUDIES["learning-rate"], base, {"lr": [0.1, 0.01]}, (0,))  # an arm: 26 s of training, 8 × 19 s of looking
    said: list[str] = []

    def cut_to(minutes: float) -> TrainConfig:
        cut = forecast_plan(replace(plan, budget=minutes), cl.WatchConfig(device="cpu"), 1, said.append)
        assert cut.forecast["seconds"] <= 60 * minutes * 1.001
        (config,) = {replace(trial.config, lr=1.0) for trial in cut.trials}
        return config

    once = cut_to(2.0)
    assert (once.epochs, once.train_images, once.eval_every) == (4.0, 64, 0.0)
    assert any("cut alike: evaluated at the end only, not 8 times" in line for line in said)
    often = cut_to(5.0)  # no more is taken away than has to be
    assert (often.epochs, often.train_images) == (4.0, 64)
    assert 1.0 > often.eval_every > 0.5
    too_little = forecast_plan(replace(plan, budget=0.5), cl.WatchConfig(device="cpu"), 1, said.append)
    assert {trial.config.train_images > 48 for trial in too_little.trials} == {True}  # not nearly none, only to be looked at
    assert not too_little.cut["fits"]
    assert any("for the evaluation at the end: give more minutes, or fewer seeds or arms" in line for line in said)
    shorter = cut_to(1.0)
    assert (shorter.train_images, shorter.eval_every) == (64, 0.0)
    assert 1.0 <= shorter.epochs < 4.0


def test_progress_is_lines_in_a_file_and_one_line_in_a_terminal() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    file, terminal = io.StringIO(), Terminal()
    for out in (file, terminal):
        progress = Progress("auto", 9, file=out, seconds_between=0)
        progress.show(3, 2, 90.0)
        progress.say("a trial has ended")
        progress.close()
    assert file.getvalue() == "3/9 done, 2 running, 4 left, 1 min 30 s to go\na trial has ended\n"
    assert terminal.getvalue().endswith("\r\x1b[2Ka trial has ended\n")
    assert terminal.getvalue().count("\n") == 1


def test_time_left_follows_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("cifarlab.studies.conduct.time.monotonic", lambda: now)
    jobs = [Job(config=TrainConfig(seed=k), path=tmp_path / str(k), watch=cl.WatchConfig()) for k in range(4)]
    clock, runner = Clock({job.config.hash: 10.0 for job in jobs}, jobs), Runner(None)  # type: ignore[arg-type]
    runner.waiting, runner.running = jobs[2:], {job.path: job for job in jobs[:2]}
    assert clock.left(runner, 2) == 20.0  # the forecast: four of ten seconds, two at once
    now = 30.0
    clock.ended(jobs[0])
    runner.running.pop(jobs[0].path)
    assert clock.left(runner, 2) == pytest.approx(90.0)  # one of four took 30 s
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "metrics.jsonl").write_text('{"step": 3}\n{"step": 5}\n')
    (tmp_path / "1" / "environment.json").write_text('{"num_steps": 10}')
    assert clock.left(runner, 2) == pytest.approx(25 * 30 / 15)  # and half of another, too


def test_failed_trials_are_told_and_tried_again(models: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--seeds", "0", "--set", *SMALL, "lr=0.002"]
    assert conduct(capsys, tmp_path, "learning-rate", *arguments)[0] == 0
    folder = next(tmp_path.glob("learning-rate-*"))
    run = next(folder.glob("trials/*"))
    (run / "result.json").unlink()
    newest = max((run / "checkpoints").iterdir(), key=lambda path: path.name)
    (newest / "trainer.safetensors").write_bytes(b"torn")
    code, told, _ = conduct(capsys, tmp_path, "learning-rate", *arguments)
    assert code == 2  # nothing could be trained: the user is told why
    assert "it is damaged or no checkpoint" in told
    assert "failed" in (folder / "ended.json").read_text()


# ---- what conclusions claim, on made-up runs -----------------------------------------------------------------------------


def make_study(folder: Path, study: Study, arms: Sequence[Arm], accuracy: Mapping[str, Sequence[float]], **changes: Any) -> Path:
    """A study's folder with one-epoch runs of these validation accuracies, one a seed; nan is a run that diverged."""
    seeds = tuple(range(max(map(len, accuracy.values()))))
    base = replace(TrainConfig(data="digits", model="tiny", val_fraction=0.2), **changes)
    plan = Plan(study=study.name, base=base, arms=tuple(arms), seeds=seeds, trials=tuple(make_trials(base, list(arms), seeds)))
    folder.mkdir(parents=True, exist_ok=True)
    plan.save(folder)
    for trial in plan.trials:
        value = accuracy[trial.arm][trial.seed]
        run = folder / "trials" / name_trial(trial)
        run.mkdir(parents=True)
        (run / "config.json").write_text(json.dumps(trial.config.to_dict()))
        (run / "environment.json").write_text(json.dumps({"steps_per_epoch": 1}))
        row = {"step": 1, "lr": 0.1, "val/accuracy": value, "val/loss": 1.0, "test/accuracy": value, "clean/accuracy": 1.0}
        lost = math.isnan(value)
        (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "lr": 0.1} if lost else row) + "\n")
        result = {"state": "diverged", "step": 1} if lost else {"state": "finished", "step": 1, "reported_step": 1}
        (run / "result.json").write_text(json.dumps(result | {"train_seconds": 1.0}))
    return folder


ARMS = [Arm(name="cosine", is_base=True, changes={"schedule": "cosine"}), Arm(name="step", changes={"schedule": "step"}),
        Arm(name="constant", changes={"schedule": "constant"})]  # fmt: skip


def test_conclusions_claim_no_more_than_the_seeds_allow(tmp_path: Path) -> None:
    noise = [0.0, 0.004, -0.003, 0.002]
    better = {"cosine": [0.90 + x for x in noise], "step": [0.80 + x / 2 for x in noise], "constant": [0.901 - x for x in noise]}
    text = (write_findings(make_study(tmp_path / "a", STUDIES["schedules"], ARMS, better)).folder / "conclusion.md").read_text()
    assert "step is 10." in text
    assert "points lower" in text
    assert "No difference could be shown for constant" in text
    alike = {arm.name: [0.9 + x * (k - 1) for x in noise] for k, arm in enumerate(ARMS)}
    text = (write_findings(make_study(tmp_path / "b", STUDIES["schedules"], ARMS, alike)).folder / "conclusion.md").read_text()
    assert "No difference could be shown for any arm" in text
    one = {"cosine": [0.9], "step": [0.5], "constant": [0.1]}
    text = (write_findings(make_study(tmp_path / "c", STUDIES["schedules"], ARMS, one)).folder / "conclusion.md").read_text()
    assert "With one seed nothing can be said about chance" in text
    assert "±" not in text


def test_an_arm_that_diverges_once_is_never_called_the_best(tmp_path: Path) -> None:
    values = {"cosine": [0.8, 0.8], "step": [0.99, math.nan], "constant": [0.7, 0.7]}
    results = write_findings(make_study(tmp_path / "a", STUDIES["schedules"], ARMS, values))
    text = (results.folder / "conclusion.md").read_text()
    assert "Highest mean validation accuracy: **cosine**" in text
    assert "99.00 %; 1 of 2 diverged" in text
    assert "Too few finished runs for a comparison: step" in text
    assert "1 of 6 trials diverged: step (seed 1)" in text


def test_a_comparison_of_fewer_pairs_says_so(tmp_path: Path) -> None:
    """Three seeds were asked for, one run diverged: two pairs are compared, and their p is not that of three."""
    values = {"cosine": [0.80, 0.81, 0.82], "step": [0.9, 0.911, math.nan], "constant": [0.5, math.nan, 0.81]}
    text = (write_findings(make_study(tmp_path / "a", STUDIES["schedules"], ARMS, values)).folder / "conclusion.md").read_text()
    assert "step is 10.05 points higher" in text
    assert "p = 0.006; only 2 of 3 pairs)" in text  # Holm: twice 2 t.sf(0.1005 / 0.0005, 1)
    assert "constant (only 2 of 3 pairs)" in text
    assert "2 comparisons" in text
    assert "d = " not in text  # two pairs give none


def test_the_best_that_is_a_tie_or_diverges_too_is_told(tmp_path: Path) -> None:
    values = {"cosine": [0.8, 0.9], "step": [0.9, 0.8], "constant": [0.7, 0.7]}
    text = (write_findings(make_study(tmp_path / "a", STUDIES["schedules"], ARMS, values)).folder / "conclusion.md").read_text()
    assert "The very same mean: step." in text
    values = {"cosine": [0.8, math.nan], "step": [math.nan, 0.7], "constant": [math.nan, math.nan]}
    text = (write_findings(make_study(tmp_path / "b", STUDIES["schedules"], ARMS, values)).folder / "conclusion.md").read_text()
    assert "But 1 of its 2 runs diverged, and no arm is without" in text


def test_a_gap_in_the_good_range_is_told(tmp_path: Path) -> None:
    arms = [Arm(name=f"lr {rate:g}", changes={"lr": rate}) for rate in (0.1, 0.01, 0.001)]
    values = {"lr 0.1": [0.93, 0.93], "lr 0.01": [0.8, 0.8], "lr 0.001": [0.925, 0.925]}
    text = (write_findings(make_study(tmp_path, STUDIES["learning-rate"], arms, values)).folder / "conclusion.md").read_text()
    assert "**0.001 to 0.1**, but for 0.01." in text


def test_the_good_range_is_within_a_point_and_never_diverged(tmp_path: Path) -> None:
    arms = [Arm(name=f"lr {rate:g}", changes={"lr": rate}) for rate in (0.1, 0.01, 0.001, 0.0001)]
    values = {"lr 0.1": [0.95, math.nan], "lr 0.01": [0.93, 0.93], "lr 0.001": [0.925, 0.925], "lr 0.0001": [0.9, 0.9]}
    results = write_findings(make_study(tmp_path / "a", STUDIES["learning-rate"], arms, values))
    assert good_rates(results) == [0.001, 0.01]
    assert "**0.001 to 0.01**" in (results.folder / "conclusion.md").read_text()


def test_the_setting_that_matters_is_named(tmp_path: Path) -> None:
    arms = [Arm(name=f"{size} {decay}", changes={"batch_size": size, "weight_decay": decay}, is_base=(size, decay) == (32, 0.0))
            for size in (32, 64) for decay in (0.0, 0.1)]  # fmt: skip
    noise = [0.0, 0.003, -0.002]
    values = {arm.name: [0.9 - 0.2 * (arm.changes["batch_size"] == 64) + x for x in noise] for arm in arms}
    folder = make_study(tmp_path / "a", STUDIES["sensitivity"], arms, values, batch_size=32)
    text = (write_findings(folder).folder / "conclusion.md").read_text()
    assert "**batch_size matters most**" in text
    chance = {arm.name: [0.9 + 0.01 * math.sin(7 * k + 3 * j) for j in range(3)] for k, arm in enumerate(arms)}
    folder = make_study(tmp_path / "b", STUDIES["sensitivity"], arms, chance)
    text = (write_findings(folder).folder / "conclusion.md").read_text()
    assert "No difference could be shown for any of the settings" in text


def test_the_largest_of_many_shares_is_corrected_for_being_chosen(tmp_path: Path) -> None:
    """One of three settings is below 5 % by itself, which happens by chance to one of three in 14 of 100 studies."""
    arms = [Arm(name=f"{a}{b}{c}", changes={"batch_size": a, "weight_decay": b, "clip_norm": c}, is_base=not (b or c or a == 64))
            for a in (32, 64) for b in (0.0, 0.1) for c in (0.0, 1.0)]  # fmt: skip
    noise = [0.3, -0.2, -0.1, 0.4, -0.3, 0.1, 0.2, -0.4]
    means = {arm.name: noise[k] - 0.2 * (arm.changes["batch_size"] == 64) for k, arm in enumerate(arms)}
    values = {arm.name: [0.5 + 0.01 * (means[arm.name] + 0.1 * (-1) ** (j + k)) for j in (0, 1)] for k, arm in enumerate(arms)}
    folder = make_study(tmp_path / "a", STUDIES["sensitivity"], arms, values, batch_size=32)
    results = write_findings(folder)
    alone = importance(results)[0]["batch_size"].p
    text = (folder / "conclusion.md").read_text()
    assert 0.017 < alone < 0.05
    assert "No difference could be shown for any of the settings" in text
    assert f"p = {3 * alone:.2g}" in text


def test_diverged_trainings_and_missing_intervals_are_told_beside_the_shares(tmp_path: Path) -> None:
    arms = [Arm(name=f"{size} {decay}", changes={"batch_size": size, "weight_decay": decay}, is_base=(size, decay) == (32, 0.0))
            for size in (32, 64, 128) for decay in (0.0, 0.1)]  # fmt: skip
    values = {arm.name: [0.9 - 0.1 * k + (0.001 if k == 2 else 0)] for k, arm in enumerate(arms)}
    values["128 0.1"] = [math.nan]
    folder = make_study(tmp_path / "a", STUDIES["sensitivity"], arms, values, batch_size=32)
    text = (write_findings(folder).folder / "conclusion.md").read_text()
    assert "The 1 diverged training(s) are not in these shares" in text
    assert "its interval reaches" not in text  # one seed: there are no intervals
    assert "without intervals the order of settings is open" in text


def test_the_seed_that_chose_a_winner_is_not_in_its_comparison(tmp_path: Path) -> None:
    """Neither in the sentence nor in the table, whose p counted the very number that had chosen."""
    tried = [Arm(name=f"searched {k}" + " (best)" * (k == 2), changes={"lr": 0.1 / k, "momentum": 0.1 * k}) for k in (1, 2, 3)]
    arms = [Arm(name="base", is_base=True), *tried]
    values = {"base": [0.5, 0.6, 0.7], "searched 1": [0.4] * 3, "searched 2 (best)": [0.99, 0.6, 0.7], "searched 3": [0.3] * 3}
    folder = make_study(tmp_path / "a", STUDIES["sensitivity"], arms, values)
    record = json.loads((folder / "study.json").read_text()) | {"search": {"sampler": "tpe", "trials": 3}}
    kept = (arms[0].name, arms[2].name)
    record["trials"] = [each for each in record["trials"] if each["config"]["seed"] == 0 or each["arm"] in kept]
    (folder / "study.json").write_text(json.dumps(record))
    (best,) = [found for name, found in compare(load_results(folder)).items() if "best" in name]
    assert best.difference.n == 2
    assert best.difference.mean == pytest.approx(0)
    assert "searched 1" not in compare(load_results(folder))
    assert "it differs from the base by +0.00 ± 0.00 points" in (write_findings(folder).folder / "conclusion.md").read_text()


def test_a_study_of_an_older_version_is_still_read(tmp_path: Path) -> None:
    """A later version has more settings, so its hashes are others: the folders' names are in study.json."""
    folder = make_study(tmp_path / "a", STUDIES["schedules"], ARMS, {arm.name: [0.8, 0.9] for arm in ARMS})
    record = json.loads((folder / "study.json").read_text())
    for trial in record["trials"]:
        (folder / "trials" / trial["run"]).rename(folder / "trials" / f"old-{trial['run']}")
        trial["run"] = f"old-{trial['run']}"
        del trial["config"]["clip_value"]
    (folder / "study.json").write_text(json.dumps(record))
    assert load_results(folder).count("finished") == 6


def test_a_study_is_conducted_by_one_process(tmp_path: Path) -> None:
    from filelock import FileLock

    plan = make_plan(STUDIES["schedules"], cl.recipes.quick(), {}, (0,))
    (tmp_path / plan.folder_name).mkdir()
    with FileLock(tmp_path / plan.folder_name / ".lock"), pytest.raises(InputError, match="is being conducted by another"):
        cl.study("schedules", cl.recipes.quick(), seeds=(0,), folder=tmp_path)
    assert os.listdir(tmp_path / plan.folder_name) == [".lock"]


def test_the_map_of_a_search_has_its_colours_and_ticks_that_can_be_read(tmp_path: Path) -> None:
    """The legend was lost between maps that share it, and batch sizes read 1e+2 and 1.2e+2."""
    from cifarlab.figures import draw_pairs, save_figure

    sizes = [8, 16, 32, 64, 128] * 6
    decay = [10.0 ** -(1 + k / 6) for k in range(30)]
    settings = {"batch_size": sizes, "weight_decay": decay, "lr": decay[::-1]}
    figure = draw_pairs(settings, [50.0 + k for k in range(30)], is_grid=False)
    save_figure(figure, tmp_path / "pairs.svg")
    drawn = (tmp_path / "pairs.svg").read_text()
    assert drawn.count("validation accuracy (%)") >= 1
    assert all(f">{tick}<" in drawn for tick in ("8", "16", "128", "0.01", "1e-4"))
    assert "e+" not in drawn.replace("e+0", "")
