"""The command line: each subcommand is a function here; torch is imported only by those that compute.

Exit codes: 0 done; 1 a failure, a diverged run too; 2 bad input; 130 and 143 stopped by SIGINT and SIGTERM.
"""

import errno
import io
import json
import math
import os
import re
import shlex
import signal
import sys
import textwrap
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from cifarlab.config import MAX_THREADS, Failure, InputError, TrainConfig, WatchConfig, did_you_mean
from cifarlab.recipes import RECIPES, load_recipe

if TYPE_CHECKING:
    from cifarlab.runs import Run

HELP = """\
usage: cifarlab COMMAND ...

  train [RECIPE] [--any-setting VALUE ...]   train a network, leave a run folder
  evaluate RUN                               all scores of a run's network on its test set
  predict RUN IMAGE ...                      what a run's network sees in image files
  runs [DIR]                                 the runs in a folder: accuracy, time, state; --sort accuracy
  compare RUN RUN ...                        what differs between runs: settings, and results side by side
  sync RUN --wandb|--tensorboard             send a run there, or what is missing of it
  profile MODEL|RUN                          what a network costs, layer by layer; --recipe NAME: a whole training
  diagnose RUN                               what went wrong in a run: alarms with evidence, cause and remedy
  lr-range [RECIPE] [--any-setting VALUE …]  which learning rates it bears, and which to take
  check [RECIPE|RUN] [--any-setting …]       known mistakes in settings, network or run, with the remedy
  data [NAME|PATH]                           what a data set holds: counts, statistics, duplicates, a contact sheet
  board [DIR] [--port N]                     the runs of a folder, live in the browser while they train
  report RUN ... [--study DIR] [-o FILE]     one self-contained page: curves, layers, alarms, confusions with their images
  study NAME [--recipe R] [--seeds 0,1,2]    a question answered by many trainings; --list: which ones
  recipes [NAME [--draw [FILE]]]             the named settings, with source, cost and expected accuracy; their schedule drawn

`cifarlab COMMAND --help` lists a command's options; --debug shows the traceback of an error; --version the version."""

ALIASES = {  # spellings that users of other trainers have in their fingers
    "-b": ["--batch-size"], "--opt": ["--optimizer"], "--sched": ["--schedule"], "--smoothing": ["--label-smoothing"],
    "--clip-grad": ["--clip-norm"], "--mixup": ["--mixup-alpha"], "--cutmix": ["--cutmix-alpha"], "--wd": ["--weight-decay"],
    "--model-ema-decay": ["--ema-decay"], "--torchcompile": ["--compile"], "--amp": ["--precision", "fp16"],
    "--amp-dtype": ["--precision"], "--output": ["--runs-dir"], "--experiment": ["--name"], "--arch": ["--model"],
    "--learning-rate": ["--lr"],
    "--wandb": ["--wandb", "True"], "--no-wandb": ["--wandb", "False"],
}  # fmt: skip

BAD_PATHS = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP)
"""What the system says of a path that the user has named wrongly: bad input, and no failure."""

PLACES = ("data_dir", "data_url", "device", "threads", "runs_dir")  # settings of a command that a line to paste needs too

RunPath = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN", help="Run folder.")]


@dataclass(frozen=True, kw_only=True)
class _UncheckedConfig(TrainConfig):
    """The same flags for the first look, when it is not known yet of which recipe the other settings are."""

    def __post_init__(self) -> None:
        pass


@dataclass(frozen=True)
class TrainArguments:
    recipe_name: Annotated[
        str, tyro.conf.Positional, tyro.conf.arg(metavar="[RECIPE]", help="A name that `cifarlab recipes` lists.")
    ]
    config: TrainConfig
    watch: WatchConfig


@dataclass(frozen=True)
class _FirstLook(TrainArguments):
    config: _UncheckedConfig


def _parse_training(arguments: list[str], prog: str, about: str | None) -> TrainArguments:
    """A recipe's name and any settings, as `train` takes them."""
    following = [*arguments[1:], ""]
    arguments = [word for pair in zip(arguments, following, strict=True) for word in _respell(*pair)]

    def parse(kind: type[TrainArguments], default: TrainConfig, arguments: list[str]) -> TrainArguments:
        return tyro.cli(kind, args=arguments, prog=f"cifarlab {prog}", description=about,
                        default=kind("", default, WatchConfig()), config=(tyro.conf.OmitArgPrefixes,))  # fmt: skip

    # Twice: what the recipe (or the run to resume) is decides what the flags' defaults are, in the help too.
    unhelpful = [word for word in arguments if word not in ("-h", "--help")]
    first = parse(_FirstLook, _UncheckedConfig(**load_recipe("resnet18-cosine").to_dict()), unhelpful)
    if first.watch.resume in ("", "auto"):
        default = load_recipe(first.recipe_name or first.config.recipe)
    else:
        from cifarlab.runs import load_run

        default = load_run(first.watch.resume).config
        if first.recipe_name not in ("", default.recipe):
            raise InputError(f"{first.watch.resume} is a run of {default.recipe}, not {first.recipe_name}: leave that out")
    given = parse(TrainArguments, default, arguments)
    return replace(given, config=replace(given.config, recipe=default.recipe))


def train_command(arguments: list[str]) -> int:
    """Train a network and leave a run folder; every setting of the recipe can be changed by its flag.

    --lr auto finds the learning rate by a range test first, and records how it was found.
    """
    arguments, find_lr = _take_auto(arguments)
    given = _parse_training(arguments, "train", train_command.__doc__)

    from cifarlab.train import Interrupted, train

    try:
        config = _with_found_lr(given) if find_lr else given.config
    except Interrupted as interrupted:
        return _say_begun_anew(interrupted.number)
    try:
        run = train(config, given.watch)
    except Interrupted as interrupted:
        print(f"cifarlab: {interrupted}", file=sys.stderr)
        return 128 + interrupted.number
    if os.environ.get("RANK", "0") != "0":
        return 0
    result = run.result
    if result["state"] == "diverged":
        print(f"cifarlab: the loss stopped being finite at step {result['step']:,}: lower --lr, or clip with --clip-norm 1; "
              f"the rows are in {run.path}", file=sys.stderr)  # fmt: skip
        return 1
    if result["state"] == "climbed":
        print(f"cifarlab: the smoothed loss exceeded {config.stop_loss:g} times its lowest at step {result['step']:,}: lower "
              f"--lr; the rows are in {run.path}", file=sys.stderr)  # fmt: skip
        return 1
    if result["state"] == "swept":
        print(f"the learning rate went from {config.min_lr:g} to {config.lr:g}; `cifarlab lr-range` also says what to take")
        print(f"run folder: {run.path}")
        return 0
    told = f"test accuracy {100 * result['test/accuracy']:.2f} %, loss {result['test/loss']:.4f}"
    if result["val/accuracy"] is not None:
        best = f"{100 * result['val/accuracy']:.2f} %, step {result['reported_step']:,}"
        told += f", at the last step (on validation {best})" if "best_lost" in result else (
            f", at the step that was best on validation ({best})")  # fmt: skip
    probed = f", {100 * result['probe_share']:.1f} % of it in probes" if result["probe_share"] else ""
    print(f"{told}; trained for {result['train_seconds']:.1f} s{probed}")
    print(f"run folder: {run.path}")
    return 0


def _take_auto(arguments: list[str]) -> tuple[list[str], bool]:
    """The arguments without `--lr auto`, and whether it was there."""
    kept, found, words = [], False, iter([*arguments, ""])
    for word in words:
        flag, _, value = word.partition("=")
        following = next(words) if word in ("--lr", "--learning-rate") else ""
        if flag in ("--lr", "--learning-rate") and "auto" in (value, following):
            found = True
        else:
            kept += [word, following] if following else [word]
    return [word for word in kept if word], found


def _with_found_lr(given: TrainArguments) -> TrainConfig:
    """The config with the learning rate of a range test, which is saved in the runs folder."""
    if given.watch.resume:
        raise InputError("a resume goes on with the learning rate of its run: leave --lr auto out")
    from cifarlab.lr_range import lr_range

    is_main = os.environ.get("RANK", "0") == "0"
    say = print if is_main else lambda _: None
    say("looking for the learning rate (a range test; nothing of it stays in the training)")
    found = lr_range(given.config, replace(given.watch, name=f"{given.watch.name}-lr-range" if given.watch.name else ""), say=say)
    for told in found.warnings:
        say(f"  warning: {told}")
    if found.best is None:
        raise InputError(f"no learning rate was found ({found.path}): give --lr, or look closer with cifarlab lr-range")
    say(f"  taken: --lr {found.best.lr:.2g} ({found.best.name}: {found.best.reason})")
    return replace(given.config, lr=float(f"{found.best.lr:.2g}"), lr_from=str(found.path))


def _say_begun_anew(number: int) -> int:
    print(f"cifarlab: stopped by {signal.Signals(number).name}; a range test is not gone on with but begun anew", file=sys.stderr)
    return 128 + number


@dataclass(frozen=True, kw_only=True)
class RangeOptions:
    """Which learning rates a network bears: short runs of the recipe whose rate rises, and what their loss says.

    Takes a recipe and every flag of `cifarlab train` too (`cifarlab train --help`), such as --data, --batch-size and --device.
    The test set is never looked at. Leaves lr_range.json and lr_range.png in a folder of the runs folder.
    """

    start: Annotated[float | None, tyro.conf.arg(name="from", help="Lowest rate (1e-7; with --epochs 1e-4).")] = None
    end: Annotated[float | None, tyro.conf.arg(name="to", help="Highest rate (10; with --epochs 1e-2).")] = None
    steps: Annotated[int | None, tyro.conf.arg(help="Updates of each seed, the rate rising at every one (200).")] = None
    epochs: Annotated[int | None, tyro.conf.arg(help="Instead: a ladder of so many epochs, the rate held in each.")] = None
    exponential: Annotated[bool, tyro.conf.arg(help="Rates grow by a factor (the default).")] = False
    linear: Annotated[bool, tyro.conf.arg(help="Rates grow by a sum.")] = False
    seeds: Annotated[int, tyro.conf.arg(help="Runs, whose median and band are shown.")] = 3
    val: Annotated[bool, tyro.conf.arg(help="Go by the loss of held-out training images instead of the batches'.")] = False
    json: Annotated[bool, tyro.conf.arg(help="Print a JSON object.")] = False


def lr_range_command(arguments: list[str]) -> int:
    """Which learning rates a network bears, and which to take."""
    options, rest = tyro.cli(RangeOptions, args=arguments, prog="cifarlab lr-range", return_unknown_args=True,
                             config=(tyro.conf.FlagCreatePairsOff,))  # fmt: skip
    if options.exponential and options.linear:
        raise InputError("--exponential and --linear are two ways for the rate to rise: give one of them")
    given = _parse_training(rest, "lr-range", RangeOptions.__doc__)
    if given.watch.resume:
        raise InputError("a range test is begun anew and not gone on with: leave --resume out")

    from cifarlab.lr_range import lr_range
    from cifarlab.train import Interrupted

    is_main = os.environ.get("RANK", "0") == "0"
    try:
        found = lr_range(given.config, given.watch, start=options.start, end=options.end, steps=options.steps,
                         epochs=options.epochs, mode="linear" if options.linear else "exponential", seeds=options.seeds,
                         val=options.val, say=None if options.json else print)  # fmt: skip
    except Interrupted as interrupted:
        return _say_begun_anew(interrupted.number)
    if not is_main:
        return 0
    if options.json:
        print(json.dumps(found.to_dict() | {"folder": str(found.path)}, indent=2))
        return 0
    print(found)
    place = "".join(f" --{name.replace('_', '-')} {shlex.quote(str(value))}" for name in PLACES
                    if (value := getattr(given.watch, name)) != getattr(WatchConfig(), name))  # fmt: skip
    for k, line in enumerate(found.paste):
        print(f"{'to paste:' if k == 0 else '      or:'} {line}{place}")
    print(f"curves and figure: {found.path}")
    return 0


@dataclass(frozen=True, kw_only=True)
class CheckOptions:
    """Known mistakes in a recipe, in settings, or in a run, each with its place and the remedy; nothing is trained.

    Takes a recipe or a run's folder, and every flag of `cifarlab train` (`cifarlab train --help`). Exit code 1 where there is a
    mistake; notes are no mistakes.
    """

    mean: Annotated[tuple[float, float, float] | None, tyro.conf.arg(help="What your pipeline subtracts.")] = None
    std: Annotated[tuple[float, float, float] | None, tyro.conf.arg(help="What your pipeline divides by.")] = None
    json: Annotated[bool, tyro.conf.arg(help="One JSON object per remark.")] = False


def check_command(arguments: list[str]) -> int:
    """Known mistakes in settings, network or run, with the remedy."""
    options, rest = tyro.cli(CheckOptions, args=arguments, prog="cifarlab check", return_unknown_args=True,
                             config=(tyro.conf.FlagCreatePairsOff,))  # fmt: skip
    for name, values in (("--mean", options.mean), ("--std", options.std)):
        if values and not all(math.isfinite(value) and (value > 0 or name == "--mean") for value in values):
            given_values = " ".join(f"{value:g}" for value in values)
            raise InputError(f"{name} {given_values} cannot be used: give three finite numbers" + ", above 0" * (name == "--std"))
    run = next((word for word in rest if not word.startswith("-") and Path(word).is_dir() and word not in RECIPES), None)
    is_run = run is not None and rest[0] == run
    if is_run and len(rest) > 1:
        raise InputError(f"{rest[1]} has no effect beside a run folder, whose settings are those it was run with: leave it out")
    given = None if is_run else _parse_training(rest, "check", CheckOptions.__doc__)

    from cifarlab.checks.whole import check

    remarks = check(given.config if given else Path(str(run)), given.watch if given else None, mean=options.mean, std=options.std)
    for remark in remarks:
        told = [json.dumps(asdict(remark), ensure_ascii=False)] if options.json else textwrap.wrap(
            str(remark), 100, subsequent_indent="  ", break_on_hyphens=False)  # fmt: skip
        print("\n".join(told))
    mistakes = sum(remark.is_mistake for remark in remarks)
    if not options.json:
        notes = len(remarks) - mistakes
        print(f"{mistakes or 'no'} known mistake{'s' * (mistakes != 1)}, {notes or 'no'} note{'s' * (notes != 1)}")
    return 1 if mistakes else 0


def evaluate_command(
    run: RunPath,
    split: Literal["test", "val", "train", "clean"] = "test",
    data_dir: Path | None = None,
    data_url: str = "",
    device: str = "auto",
) -> int:
    """All scores of a run's network on a split of its data.

    Writes predictions.npz, evaluation.json and figures: into the run folder for the test set, else into evaluation-SPLIT in it.
    """
    from cifarlab.evaluate import save_evaluation, save_samples
    from cifarlab.gallery import draw_evaluation_figures
    from cifarlab.inference import evaluate_run, name_weights
    from cifarlab.runs import load_run
    from cifarlab.thumbnails import save_thumbnails

    opened = load_run(run)
    if opened.is_watched:
        raise InputError(f"{run} was recorded by cl.watch around a loop of its own: it has no network that can be built here, so "
                         "evaluate it where your model is")
    class_names = opened.dataset["class_names"]
    evaluation, images = evaluate_run(opened, split, WatchConfig(data_dir=data_dir, data_url=data_url, device=device))
    is_final = split == "test" and opened.result.get("state") == "finished"  # else the run's own record is left alone
    folder = run if is_final else run / f"evaluation-{split}"
    if not opened.is_finished:
        print(f"{run} has not finished: these are the scores of {name_weights(opened)}")
    folder.mkdir(exist_ok=True)
    save_evaluation(folder, evaluation, class_names)
    save_samples(folder, evaluation, images.images, class_names)
    save_thumbnails(folder, evaluation, images.images)
    draw_evaluation_figures(folder / "figures", evaluation, images.images, class_names)
    print(evaluation.classification_report(class_names))
    top5 = "" if evaluation.top5 is None else f", top-5 {100 * evaluation.top5:.2f} %"
    print(f"{split}: {len(evaluation.labels):,} images, loss {evaluation.loss:.4f}, top-1 {100 * evaluation.top1:.2f} %{top5}")
    for mistake in evaluation.mistakes(5):
        print(f"  image {mistake['index']:,}: {class_names[mistake['true']]} taken for {class_names[mistake['predicted']]} "
              f"with {100 * mistake['probability']:.1f} %")  # fmt: skip
    print(f"figures, predictions and all scores: {folder}")
    return 0


def predict_command(
    run: RunPath,
    images: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE …", help="Image files.")],
    top: int = 5,
    json_lines: Annotated[bool, tyro.conf.arg(name="json", help="One JSON object per image.")] = False,
    device: str = "auto",
) -> int:
    """The most probable classes of image files, by a run's network."""
    if not images:
        raise InputError("no image was named: write one or more image files after the run folder")
    if top < 1:
        raise InputError(f"--top {top} cannot be used: it must be at least 1")
    from cifarlab.inference import predict

    for prediction in predict(run, list(images), top=top, device=device):
        pairs = list(zip(prediction.classes, prediction.probabilities, strict=True))
        if json_lines:
            print(json.dumps({"image": str(prediction.image), "classes": dict(pairs)}, ensure_ascii=False))
        else:
            print(f"{prediction.image}: " + ", ".join(f"{name} {100 * probability:.1f} %" for name, probability in pairs))
    return 0


def diagnose_command(
    run: RunPath,
    json_out: Annotated[bool, tyro.conf.arg(name="json", help="Print a JSON object.")] = False,
    replay: Annotated[int | None, tyro.conf.arg(help="Do this step of incidents/ again, and say where it breaks.")] = None,
) -> int:
    """What went wrong in a run, finished or not: every alarm with evidence, likely cause, remedy and reference.

    The rules of docs/diagnosis.md look at the folder's rows and probes again. The exit code is 0 with alarms, too: they are
    the answer, and no failure of the command.
    """
    from cifarlab.diagnosis import RULES, diagnose_run
    from cifarlab.runs import load_run

    opened = load_run(run)
    if replay is not None:
        return _replay(opened, replay, json_out)
    rows = opened.metrics.rows
    if not rows:
        raise InputError(f"{run} has no rows yet, so there is nothing to look at: wait until its first steps are written")
    found = diagnose_run(opened)
    steps = int(rows[-1]["step"])
    if json_out:
        told = {"run": str(run), "state": opened.result.get("state", "unfinished"), "steps": steps,
                "alarms": [alarm.to_dict() for alarm in found.raised],
                "unasked": {name: list(needs) for name, needs in found.unasked.items()}}  # fmt: skip
        print(json.dumps(told, indent=2, ensure_ascii=False))
        return 0
    for alarm in found.raised:
        print("\n".join(alarm.format()))
    unfinished = "" if opened.is_finished else " so far"
    asked = [name for name in RULES if name not in found.unasked]
    count = f"{len(found.raised)} alarm{'s' * (len(found.raised) > 1)}" if found.raised else "no alarm"
    lines = [f"{count} in {steps:,} steps{unfinished}; rules: {', '.join(asked)}"]
    if found.unasked:
        without = ", ".join(f"{name} ({' or '.join(needs)})" for name, needs in found.unasked.items())
        lines.append(f"not asked, as nothing of what they need was measured: {without}")
    for line in lines:
        print(textwrap.fill(line, 100, subsequent_indent="  ", break_on_hyphens=False))
    return 0


def _replay(run: "Run", step: int, json_out: bool) -> int:
    from cifarlab.inference import replay_incident

    found = replay_incident(run, step)
    located = found.located
    if json_out:
        print(json.dumps({
            "step": step, "loss": found.loss if math.isfinite(found.loss) else str(found.loss), "is_finite": located is None,
            "place": located.place if located else "", "layer": located.layer if located else "",
            "samples": list(located.samples) if located else [], "images": list(found.images),
            "parameters": list(found.parameters)}, indent=2))  # fmt: skip
        return 0
    lines = [f"step {step:,} done again with its weights and batch: the loss is {found.loss:.4g}"]
    if located is None:
        lines.append("all its gradients are finite here: what broke it is not kept (another device, its precision, or chance)")
    else:
        lines.append(str(located) if located.place == "unknown" else f"not finite {located}")
        if found.images:
            lines.append("these samples are, by their numbers in the run's training set: " + ", ".join(map(str, found.images)))
        names = ", ".join(found.parameters[:6]) + " …" * (len(found.parameters) > 6)
        lines.append(f"gradients that are not finite: {names or 'none'}")
    for line in lines:
        print(textwrap.fill(line, 100, subsequent_indent="  ", break_on_hyphens=False))
    return 0


def sync_command(
    run: RunPath,
    wandb: Annotated[bool, tyro.conf.arg(help="Send it to Weights & Biases.")] = False,
    tensorboard: Annotated[bool, tyro.conf.arg(help="Write TensorBoard's files into the run folder.")] = False,
    wandb_project: Annotated[str, tyro.conf.arg(help="This and the next three: where the run itself has not said it.")] = "",
    wandb_name: str = "",
    wandb_entity: str = "",
    wandb_tags: str = "",
    wandb_mode: Literal["online", "offline"] = "online",
    wandb_weights: Annotated[bool, tyro.conf.arg(help="The final weights too, as an artifact.")] = False,
) -> int:
    """Send what W&B or TensorBoard lacks of a run, finished or running; what they have is not sent again."""
    from cifarlab.runs import load_run
    from cifarlab.trackers.mirror import Sink, sync
    from cifarlab.trackers.tensorboard import Tensorboard
    from cifarlab.trackers.wandb import Wandb

    watch = WatchConfig(wandb_project=wandb_project, wandb_name=wandb_name, wandb_entity=wandb_entity, wandb_tags=wandb_tags,
                        wandb_mode=wandb_mode, wandb_weights=wandb_weights)  # fmt: skip
    sinks: list[Sink] = ([Wandb(watch)] if wandb else []) + ([Tensorboard()] if tensorboard else [])
    if not sinks:
        raise InputError(f"where should {run} go? Say --wandb, --tensorboard or both")
    load_run(run)
    for sink in sinks:
        print(sync(run, sink))
    return 0


def runs_command(
    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="[DIR]", help="Holds the run folders.")] = Path("runs"),
    sort: Annotated[
        Literal["accuracy", "time", "name", "started"], tyro.conf.arg(help="Best, shortest, by name, or newest first.")
    ] = "started",
    json_out: Annotated[bool, tyro.conf.arg(name="json", help="Print a JSON list.")] = False,
    csv_out: Annotated[bool, tyro.conf.arg(name="csv", help="Print comma-separated values.")] = False,
) -> int:
    """The runs in a folder: recipe, accuracy, time and state of each."""
    from cifarlab.listing import FIELDS, format_runs, list_runs, sort_runs

    found, damaged = list_runs(folder)
    found = sort_runs(found, sort)
    if json_out:
        print(json.dumps([asdict(run) for run in found], indent=1, ensure_ascii=False))
    elif csv_out:
        _print_csv([FIELDS, *(tuple(asdict(run).values()) for run in found)])
    elif found:
        print(format_runs(found))
    else:
        print(f"there is no run in {folder} yet")
    for sentence in damaged:
        print(f"cifarlab: {sentence}: left out", file=sys.stderr)
    return 0


def compare_command(
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN RUN …", help="Run folders.")],
    json_out: Annotated[bool, tyro.conf.arg(name="json", help="Print a JSON object.")] = False,
    csv_out: Annotated[bool, tyro.conf.arg(name="csv", help="Print comma-separated values.")] = False,
) -> int:
    """What differs between runs: the settings that are not the same, and all results side by side."""
    from cifarlab.listing import compare_runs, format_comparison

    found = compare_runs(runs)
    if json_out:
        print(json.dumps(asdict(found), indent=1, ensure_ascii=False))
    elif csv_out:
        parts = (("setting", found.settings), ("result", found.results))
        rows = [(kind, name, *values) for kind, part in parts for name, values in part.items()]
        _print_csv([("kind", "name", *found.runs), *rows])
    else:
        print(format_comparison(found))
    return 0


def _print_csv(rows: list[tuple[Any, ...]]) -> None:
    import csv

    csv.writer(sys.stdout, lineterminator="\n").writerows(rows)


def profile_command(
    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[MODEL|RUN]", help="A model or a run folder.")] = "",
    input_shape: Annotated[str, tyro.conf.arg(name="input", help="One image's shape, CxHxW (a run: its own).")] = "",
    batch: int = 1,
    num_classes: int = 10,
    recipe: Annotated[str, tyro.conf.arg(help="Instead of a network: the cost of this whole recipe, and its time here.")] = "",
    compare: Annotated[bool, tyro.conf.arg(help="What other counters report for this very net, and by which rule.")] = False,
    timed: Annotated[bool, tyro.conf.arg(name="time", help="Measure milliseconds and this machine's roofs.")] = True,
    effective: Annotated[bool, tyro.conf.arg(help="The effective receptive field, too.")] = False,
    strict: Annotated[bool, tyro.conf.arg(help="Fail on operations that have no counting rule.")] = False,
    json_out: Annotated[bool, tyro.conf.arg(name="json", help="Print a JSON object.")] = False,
    csv_out: Annotated[bool, tyro.conf.arg(name="csv", help="Print comma-separated values.")] = False,
    figures: Annotated[Path | None, tyro.conf.arg(help="Draw the figures into this folder.")] = None,
    device: str = "auto",
) -> int:
    """What a network costs: MAC and FLOP, bytes, memory, receptive fields and milliseconds, layer by layer."""
    if bool(model) == bool(recipe):
        raise InputError("name one network to profile: a model such as resnet18, a run folder, or --recipe NAME")
    if batch < 1:
        raise InputError(f"--batch {batch} cannot be used: it must be at least 1")
    is_run = Path(model).is_dir()
    given = {  # what differs from the defaults: an option that does nothing is a mistake
        "--input": input_shape, "--batch": batch != 1, "--num-classes": num_classes != 10, "--compare": compare,
        "--no-time": not timed, "--effective": effective, "--strict": strict, "--json": json_out, "--csv": csv_out,
        "--figures": figures, "--device": device != "auto",
    }  # fmt: skip
    for context, rules_out in (
        ("--recipe", recipe and "--input --batch --num-classes --compare --no-time --effective --strict --csv --figures"),
        ("--compare", compare and "--batch --effective --strict --csv --figures --device"),
        ("--json", json_out and "--csv"),
        ("a run folder", is_run and "--num-classes"),
    ):
        if useless := [option for option in (rules_out or "").split() if given[option]]:
            raise InputError(f"{useless[0]} has no effect beside {context}: leave one of them out")
    if recipe:
        return _forecast(recipe, device, json_out)
    shape = _parse_shape(input_shape or "3x32x32")
    if figures:
        there = next(path for path in (figures, *figures.absolute().parents) if path.exists())
        if not (there.is_dir() and os.access(there, os.W_OK)):
            why = "cannot be written to" if there.is_dir() else "is a file"
            raise InputError(f"--figures {figures} cannot be made a folder: {there} {why}")
    if not is_run and os.sep in model:
        raise InputError(f"there is no run folder {model!r}: give the path of one, or the name of a model such as resnet18")

    import torch

    from cifarlab.distributed import pick_device
    from cifarlab.inference import load_model
    from cifarlab.models import create_model
    from cifarlab.profile.compare import compare_counters, format_comparison
    from cifarlab.profile.report import to_csv, to_json
    from cifarlab.profile.whole import draw_survey, survey
    from cifarlab.runs import load_run

    if is_run:
        run = load_run(model)
        shape = shape if input_shape else (3, *2 * (run.dataset["image_size"],))
        module, title = load_model(run), f"{run.config.model} of {model}"
    else:
        module, title = create_model(model, num_classes), model
        module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # as training has it
    if compare:
        rows = compare_counters(module, shape)
        print(json.dumps([asdict(row) for row in rows], indent=2, ensure_ascii=False) if json_out else format_comparison(rows))
        return 0
    found = survey(module.to(pick_device(device)), shape, batch_size=batch, timed=timed, effective=effective, strict=strict)
    if json_out:
        print(to_json(found, found.keyed_columns, {"measured": found.measured, "effective": found.effective_sizes}))
    else:
        print(to_csv(found, found.keyed_columns) if csv_out else found.format(title=title))
    if figures:
        drawn = draw_survey(found, figures, title=title)
        print("figures: " + ", ".join(map(str, drawn)), file=sys.stderr if json_out or csv_out else sys.stdout)
    return 0


def _forecast(name: str, device: str, json_out: bool) -> int:
    from cifarlab.forecast import forecast_run
    from cifarlab.profile.report import wrap
    from cifarlab.trackers.terminal import format_seconds

    config = load_recipe(name)
    found = forecast_run(config, WatchConfig(device=device))
    if json_out:
        more = {"seconds": found.seconds, "gflops": found.gflops, "warning": found.warning}
        print(json.dumps({"recipe": name, **asdict(found), **more}, indent=2, ensure_ascii=False))
        return 0
    step = found.augment_seconds + found.pass_seconds + found.update_seconds
    parts = {"augmentation": found.augment_seconds, "forward + backward": found.pass_seconds, "update": found.update_seconds}
    for sentence in (
        f"{name}: {found.petaflops:.4g} PFLOP, forward + backward of {found.num_steps:,} steps of {config.batch_size} images "
        "(convolutions, linear layers, matrix products; 1 multiply-add = 2 FLOP)",
        f"here: about {format_seconds(found.seconds)}, {format_seconds(found.low_seconds)} to "
        f"{format_seconds(found.high_seconds)} by what was measured; of it training {format_seconds(found.train_seconds)} "
        f"({found.images_per_second:,.0f} images/s, {found.gflops:,.0f} GFLOP/s, "
        f"{100 * found.probe_seconds / found.train_seconds:.1f} % in probes), {found.num_evaluations} evaluations "
        f"{format_seconds(found.eval_seconds)}, {found.num_checkpoints} checkpoints {format_seconds(found.save_seconds)}; "
        "start-up and figures come on top",
        f"a step: {1000 * step:.0f} ms: " + ", ".join(f"{part} {100 * time / step:.0f} %" for part, time in parts.items())
        + f"; between the slowest and the fastest that were measured lie {100 * found.spread:.0f} %",
        found.warning,
    ):
        print("\n".join(wrap(sentence)))
    return 0


def _parse_shape(text: str) -> tuple[int, int, int]:
    sides = [side.strip().lstrip("0") for side in re.split("[x×,]", text.lower())]
    if len(sides) != 3 or not all(side.isdecimal() for side in sides):
        raise InputError(f"--input {text[:80]!r} is no shape of an image: write channels, height and width, such as 3x32x32")
    if any(len(side) > 4 or int(side) > 4096 for side in sides):
        raise InputError(f"--input {text[:80]!r} is too large: no side of an image can be more than 4096")
    return int(sides[0]), int(sides[1]), int(sides[2])


def data_command(
    name_or_path: Annotated[
        str, tyro.conf.Positional, tyro.conf.arg(metavar="[NAME|PATH]", help="cifar10, cifar100, digits or a folder.")
    ] = "digits",
    labels: Literal["fine", "coarse"] = "fine",
    image_size: int = 32,
    data_dir: Path | None = None,
    data_url: str = "",
    contact_sheet: Path | None = None,
) -> int:
    """What a data set holds: where it was found, counts per class, statistics, exact duplicates; a contact sheet as a PNG."""
    from rich.console import Console
    from rich.table import Table

    from cifarlab.data import load_dataset
    from cifarlab.data.dataset import measure_statistics
    from cifarlab.data.inspect import count_classes, draw_contact_sheet, find_duplicates

    dataset = load_dataset(name_or_path, data_dir=data_dir, data_url=data_url, labels=labels, image_size=image_size)
    print(f"{dataset.name}: {dataset.source}")
    side = dataset.train.images.shape[-1]
    sizes = f"{len(dataset.train):,} training and {len(dataset.test):,} test images"
    print(f"{sizes} of 3×{side}×{side}, {dataset.num_classes} classes")
    mean, std = measure_statistics(dataset.train.images)
    for what, values in (("mean", (dataset.mean, mean)), ("std", (dataset.std, std))):
        used, measured = (" ".join(f"{value:.4f}" for value in triple) for triple in values)
        print(f"{what:5} used {used} · measured on the training images {measured}")
    table = Table("class", "train", "test", box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    counts = count_classes(dataset)
    for name, train, test in zip(dataset.class_names, counts["train"], counts["test"], strict=True):
        table.add_row(_escape(name), f"{train:,}", f"{test:,}")
    Console(highlight=False).print(table)
    duplicates = find_duplicates(dataset)
    print(f"exact duplicates: {duplicates.within('train')} within train, {duplicates.within('test')} within test, "
          f"{duplicates.across} test images that are in train too; {len(duplicates.conflicts)} with unequal labels")  # fmt: skip
    sheet = contact_sheet or Path(f"{dataset.name}-contact-sheet.png")
    print(f"contact sheet: {draw_contact_sheet(dataset, sheet)}")
    return 0


def recipes_command(
    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[NAME]", help="Show every setting of this recipe.")] = "",
    draw: Annotated[str | None, tyro.conf.arg(metavar="[FILE]", help="Draw its learning rate and momentum over steps and epochs "
                    "(.png or .svg; any setting of `train` may follow).")] = None,
) -> int:  # fmt: skip
    """The named settings, with source, cost and expected accuracy."""
    assert draw is None  # `_recipes` has seen to it
    if name:
        config = load_recipe(name)
        print((RECIPES[name].build.__doc__ or "").strip().replace("\n    ", "\n"), end="\n\n")
        for key, value in config.to_dict().items():
            print(f"  --{key.replace('_', '-'):20} {value}")
        return 0
    for key, recipe in RECIPES.items():
        print(f"{key:18} {recipe.petaflops:8.3g} PFLOP   expected: {recipe.expected}")
        for line in textwrap.wrap(f"{recipe.summary}. Source: {recipe.source}", 78):
            print(f"  {line}")
    print("\nPFLOP: forward + backward of the whole training, 1 multiply-add = 2 FLOP.")
    print("`cifarlab recipes NAME` shows all settings.")
    return 0


def study_command(
    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[NAME]", help="A name that --list shows.")] = "",
    list_all: Annotated[bool, tyro.conf.arg(name="list", help="Studies: question, source, what counts as an answer.")] = False,
    recipe: Annotated[str, tyro.conf.arg(help="The config that the study varies.")] = "quick",
    seeds: Annotated[str, tyro.conf.arg(help="Seeds of every arm, such as 0,1,2 (default: the study's).")] = "",
    settings: Annotated[
        tuple[str, ...],
        tyro.conf.arg(name="set", metavar="FIELD=V1,V2 …", help="A setting's value, or the values that the study goes through."),
    ] = (),
    budget: Annotated[float, tyro.conf.arg(metavar="MINUTES", help="Cut all trials alike to fit (0 = no limit).")] = 0.0,
    jobs: Annotated[int, tyro.conf.arg(help="Trainings at once here (0 = what cores or GPUs take).")] = 0,
    threads: Annotated[int, tyro.conf.arg(help="CPU threads of each training; sums depend on it.")] = 1,
    ray: Annotated[str, tyro.conf.arg(metavar="ADDRESS", help="Train on a Ray cluster: auto, host:port, ray://…, local.")] = "",
    gpus: Annotated[float | None, tyro.conf.arg(help="On Ray: GPUs of each training, a fraction too.")] = None,
    share: Annotated[bool, tyro.conf.arg(help="On Ray: workers that see the study's folder write into it themselves.")] = True,
    search: Annotated[str, tyro.conf.arg(help="tpe: search instead of a grid.")] = "",
    trials: Annotated[int, tyro.conf.arg(help="How many a search tries.")] = 0,
    folder: Annotated[Path, tyro.conf.arg(help="Folder that holds the studies' folders.")] = Path("studies"),
    device: str = "auto",
    data_dir: Path | None = None,
    progress: Literal["auto", "bar", "lines", "none"] = "auto",
) -> int:
    """A question answered by many trainings: figures, a table, and a conclusion that claims no more than the seeds allow.

    The same command continues a study that was stopped or killed; what has ended is not trained again.
    """
    from cifarlab.studies.conduct import StudyInterrupted, say_list, study_by_words

    if list_all:
        say_list()
        return 0
    if not name:
        raise InputError("name a study; `cifarlab study --list` shows them")
    if not (0 <= budget < math.inf and min(jobs, trials) >= 0 and 1 <= threads <= MAX_THREADS):
        raise InputError(f"--budget, --jobs and --trials must be at least 0 and finite, --threads from 1 to {MAX_THREADS}")
    if gpus is not None and not 0 <= gpus < math.inf:
        raise InputError(f"--gpus {gpus:g} cannot be used: it must be at least 0 and finite")
    if ray and jobs:
        raise InputError("--jobs has no effect beside --ray: the cluster's cores decide")
    try:
        results = study_by_words(
            name, recipe, settings, seeds, budget=budget, jobs=jobs, threads=threads, ray=ray, gpus=gpus, share=share,
            search=search, trials=trials, folder=folder, watch=WatchConfig(device=device, data_dir=data_dir, progress=progress),
        )  # fmt: skip
    except StudyInterrupted as interrupted:
        print(f"cifarlab: {interrupted}", file=sys.stderr)
        return 128 + interrupted.number
    print((results.folder / "conclusion.md").read_text(encoding="utf-8"))
    print(f"study folder: {results.folder}")
    return 1 if results.outcomes and not any(outcome.state == "finished" for outcome in results.outcomes) else 0


def board_command(
    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="[DIR]", help="Holds the run folders.")] = Path("runs"),
    port: Annotated[int, tyro.conf.arg(metavar="PORT", help="0: 8338, or the next one that is free.")] = 0,
    host: Annotated[
        str, tyro.conf.arg(metavar="ADDRESS", help="Another one than this opens the board to other machines.")
    ] = "127.0.0.1",
) -> int:
    """The runs of a folder as live pages on this machine: a table of all, and each one's report while it trains."""
    from cifarlab.board.server import serve

    if not 0 <= port <= 65535:
        raise InputError(f"--port {port} is no port: choose one from 1024 to 65535, or leave it out")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file: name the folder that holds the run folders")
    serve(folder, host, port)
    return 0


def report_command(
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN …", help="Run folders.")] = (),
    study: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="DIR …", help="Folders of studies, to stand on the page too.")] = (),
    output: Annotated[Path | None, tyro.conf.arg(aliases=("-o",), metavar="FILE", help="Where the page is written (default: "
                      "report.html in the run's or the study's folder, of several in the working folder).")] = None,
) -> int:  # fmt: skip
    """One self-contained page of a run, of several side by side, or of studies: opens by double click, without a network.

    Every training leaves one in its folder already; this writes it anew, of runs that are not finished too.
    """
    from cifarlab.studies.reported import report

    written = report(*runs, studies=study, path=output)
    print(f"report: {written} ({written.stat().st_size / 1e6:.1f} MB)")
    return 0


def _gather(flag: str, arguments: list[str], is_value: Callable[[str], bool] | None = None) -> list[str]:
    """All that follows any of that flag behind a single one: `--set a=1 b=2` and `--set a=1 --set b=2` are the same.

    Of a flag that is given twice the parser would keep the last. is_value: which words are the flag's (default: those up to the
    next flag, and only the one in `--flag=word`).
    """
    others, values, is_open = [], [], False
    for argument in arguments:
        if argument == flag or argument.startswith(f"{flag}="):
            is_open = argument == flag or is_value is not None
            values += [argument.removeprefix(f"{flag}=")] * (argument != flag)
        elif is_open and not argument.startswith("-") and (is_value is None or is_value(argument)):
            values.append(argument)
        else:
            is_open = False
            others.append(argument)
    return [*others, flag, *values] if values else others


LISTS = {  # flags that take a list in one word -> how that is written
    "study": {"--seeds": "0,1,2"},
    "": {"--probes": "gradient_flow,curvature", "--probe-include": "conv*,fc*", "--probe-exclude": "bn*,*.bias",
         "--wandb-tags": "a,b", "--small-sides": "16:0.4,24:0.8"},
}  # fmt: skip


def _refuse_lists_in_parts(arguments: list[str]) -> None:
    """Of a flag that is given twice the last counts: as it should be for a number, but not for a list."""
    flags = [argument.partition("=")[0].replace("_", "-") for argument in arguments if argument.startswith("--")]
    for flag, all_at_once in (LISTS.get(arguments[0], {}) | LISTS[""]).items():
        if flags.count(flag) > 1:
            raise InputError(f"{flag} is given {flags.count(flag)} times, and only the last would count: give all at once, such "
                             f"as {flag} {all_at_once}")  # fmt: skip


def _from_signature(function: Callable[..., int]) -> Callable[[list[str]], int]:
    prog = f"cifarlab {function.__name__.removesuffix('_command')}"
    return lambda arguments: tyro.cli(function, args=arguments, prog=prog)


def _recipes(arguments: list[str]) -> int:
    """`recipes`, and its --draw, whose file may be left out and beside which any setting may be given."""
    if "--draw" not in arguments or {"-h", "--help"} & set(arguments):
        return _from_signature(recipes_command)(arguments)
    place = arguments.index("--draw")
    named = arguments[place + 1] if arguments[place + 1 : place + 2] else ""
    file = Path(named) if named.endswith((".png", ".svg")) else None
    given = _parse_training(arguments[:place] + arguments[place + 1 + (file is not None) :], "recipes", recipes_command.__doc__)

    from cifarlab.data.splits import BUILT_IN, count_steps, count_train_images
    from cifarlab.figures import save_figure
    from cifarlab.gallery import draw_plan
    from cifarlab.optim.schedules import build_schedule

    config, dataset = given.config, None
    if config.data not in BUILT_IN:
        from cifarlab.data import load_dataset

        dataset = load_dataset(config.data, data_dir=given.watch.data_dir, labels=config.labels, image_size=config.image_size)
    steps_per_epoch = count_steps(count_train_images(config, dataset), config)
    plan = build_schedule(config, steps_per_epoch, max(1, round(config.epochs * steps_per_epoch)))
    title = f"Schedule of {config.recipe}: {config.schedule}, {config.optimizer}"
    drawn = save_figure(draw_plan(plan, title), file or Path(f"{config.recipe}-schedule.png"))
    print(f"{plan.num_steps:,} steps = {config.epochs:g} epochs of {steps_per_epoch:,}, batch {config.batch_size}: "
          f"lr {plan.lr_at(1):.4g} at first, {plan.lr_at(plan.num_steps):.4g} at last")  # fmt: skip
    for step, what in plan.marks():
        print(f"  {what:14} step {step:,} (epoch {step / steps_per_epoch:.3g}), lr {plan.lr_at(step):.4g}")
    print(f"figure: {drawn}")
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": train_command,
    "evaluate": _from_signature(evaluate_command),
    "predict": _from_signature(predict_command),
    "runs": _from_signature(runs_command),
    "compare": _from_signature(compare_command),
    "sync": _from_signature(sync_command),
    "profile": _from_signature(profile_command),
    "diagnose": _from_signature(diagnose_command),
    "lr-range": lr_range_command,
    "check": check_command,
    "report": lambda arguments: _from_signature(report_command)(_gather("--study", arguments)),
    "board": _from_signature(board_command),
    "study": lambda arguments: _from_signature(study_command)(_gather("--set", arguments, lambda word: "=" in word)),
    "data": _from_signature(data_command),
    "recipes": _recipes,
}


def main(arguments: list[str] | None = None) -> int:
    """Runs a command line and gives its exit code; errors are one sentence on stderr unless --debug is among the arguments."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if isinstance(sys.stdout, io.TextIOWrapper):  # a file's name, or a × on a terminal without it, must not end a command
        sys.stdout.reconfigure(errors="backslashreplace")
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        try:
            return _run(arguments)
        finally:
            _flush_output()  # here, where it is known what to say of an error, and not when the interpreter ends
    except KeyboardInterrupt:
        if debug:
            raise
        print("cifarlab: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:  # the reader (head, less) has had enough
        return 1
    except Exception as error:
        if debug:
            raise
        is_input = isinstance(error, InputError)
        from cifarlab.environment import scrub

        told = str(error) if is_input or isinstance(error, Failure) else _say_unforeseen(error)
        if isinstance(error, OSError) and error.errno in BAD_PATHS and error.filename is not None:
            is_input, told = True, f"{error.filename} cannot be used ({error.strerror}): check the path and its permissions"
        print("cifarlab: " + scrub(" ".join(told.split())), file=sys.stderr)
        return 2 if is_input else 1


def _flush_output() -> None:
    """What is printed but not written yet goes out; where that fails it is dropped, so that it does not fail again at the end."""
    if sys.stdout is None:  # closed by whoever started the program
        return
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP)
        return 0
    if arguments[0] == "--version":
        from cifarlab import __version__

        print(f"cifarlab {__version__}")
        return 0
    if arguments[0] not in COMMANDS:
        raise InputError(f"there is no command {arguments[0]!r}{did_you_mean(arguments[0], COMMANDS)}; see cifarlab --help")
    _refuse_lists_in_parts(arguments)
    return COMMANDS[arguments[0]](arguments[1:])


REFUSED_BY_DISK = {
    errno.ENOSPC: "make room on its disk", errno.EDQUOT: "make room within your quota", errno.EFBIG: "raise ulimit -f",
    errno.EROFS: "choose a folder that can be written to", errno.EACCES: "choose a folder that you may write to",
    errno.EPERM: "choose a folder that you may write to", errno.ENOENT: "was its folder moved or removed meanwhile?",
    errno.EIO: "its disk is failing: copy what you need of it",
}  # fmt: skip


def _say_unforeseen(error: Exception) -> str:
    """One sentence about an error that no line of ours has foreseen; of what the system refuses: which file, why, what to do."""
    if isinstance(error, OSError) and error.errno in REFUSED_BY_DISK:
        # What write() and fsync() refuse, they refuse without a name.
        named = error.filename2 or error.filename or "a file of it"
        return f"{named} could not be written or read ({error.strerror}): {REFUSED_BY_DISK[error.errno]}, then run the same again"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported here
        why = str(error).partition(". ")[0]
        return (f"there is not enough memory{f' ({why})' if why else ''}: end what else holds it, or take a smaller network, "
                "batch or set of images")  # fmt: skip
    return f"{type(error).__name__}: {error} (--debug shows where)"


def _respell(argument: str, following: str) -> list[str]:
    """The argument in our spelling; an alias that stands for a value too gives way to a value that is there."""
    flag, equals, value = argument.partition("=")
    flag = flag.replace("_", "-") if flag.startswith("--") else flag
    spelt = ALIASES.get(flag, [flag])
    if equals:
        return [f"{spelt[0]}={value}"]
    return spelt[:1] if following in ("True", "False", "None") else spelt


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)
