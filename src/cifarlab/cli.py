"""The command line: each subcommand is a function here; torch is imported only by those that compute.

Exit codes: 0 done; 1 a failure, a diverged run too; 2 bad input; 130 and 143 stopped by SIGINT and SIGTERM.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from cifarlab.config import InputError, TrainConfig, WatchConfig, did_you_mean
from cifarlab.recipes import RECIPES, load_recipe

HELP = """\
usage: cifarlab COMMAND ...

  train [RECIPE] [--any-setting VALUE ...]   train a network, leave a run folder
  evaluate RUN                               all scores of a run's network on its test set
  predict RUN IMAGE ...                      what a run's network sees in image files
  data [NAME|PATH]                           what a data set holds: counts, statistics, duplicates, a contact sheet
  recipes [NAME]                             the named settings, with source, cost and expected accuracy

`cifarlab COMMAND --help` lists a command's options; --debug shows the traceback of an error; --version the version."""

ALIASES = {  # spellings that users of other trainers have in their fingers
    "-b": ["--batch-size"], "--opt": ["--optimizer"], "--sched": ["--schedule"], "--smoothing": ["--label-smoothing"],
    "--clip-grad": ["--clip-norm"], "--mixup": ["--mixup-alpha"], "--cutmix": ["--cutmix-alpha"], "--wd": ["--weight-decay"],
    "--model-ema-decay": ["--ema-decay"], "--torchcompile": ["--compile"], "--amp": ["--precision", "fp16"],
    "--amp-dtype": ["--precision"], "--output": ["--runs-dir"], "--experiment": ["--name"], "--arch": ["--model"],
    "--wandb": ["--wandb", "True"], "--no-wandb": ["--wandb", "False"],  # True, False or (not given) left open
}  # fmt: skip

RunPath = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN", help="Run folder.")]


@dataclass(frozen=True)
class TrainArguments:
    recipe_name: Annotated[
        str, tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE", help="A name that `cifarlab recipes` lists.")
    ]
    config: TrainConfig
    watch: WatchConfig


def train_command(arguments: list[str]) -> int:
    """Train a network and leave a run folder; every setting of the recipe can be changed by its flag."""
    arguments = [word for argument in arguments for word in _respell(argument)]

    def parse(recipe: str, default: TrainConfig) -> TrainArguments:
        return tyro.cli(tyro.conf.OmitArgPrefixes[TrainArguments], args=arguments, prog="cifarlab train",
                        description=train_command.__doc__, default=TrainArguments(recipe, default, WatchConfig()))  # fmt: skip

    # Twice: what the recipe (or the run to resume) is decides what the flags' defaults are.
    first = parse("", load_recipe("resnet18-cosine"))
    if first.watch.resume in ("", "auto"):
        default = load_recipe(first.recipe_name or first.config.recipe)
    else:
        from cifarlab.runs import load_run

        default = load_run(first.watch.resume).config
    given = parse("", default)

    from cifarlab.train import Interrupted, train

    try:
        run = train(replace(given.config, recipe=default.recipe), given.watch)
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
    told = f"test accuracy {100 * result['test/accuracy']:.2f} %, loss {result['test/loss']:.4f}"
    if result["val/accuracy"] is not None:
        best = f"{100 * result['val/accuracy']:.2f} %, step {result['reported_step']:,}"
        told += f", at the step that was best on validation ({best})"
    print(f"{told}; trained for {result['train_seconds']:.1f} s")
    print(f"run folder: {run.path}")
    return 0


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
    from cifarlab.evaluate import save_evaluation
    from cifarlab.gallery import draw_evaluation_figures
    from cifarlab.inference import evaluate_run
    from cifarlab.runs import load_run

    opened = load_run(run)
    class_names = opened.dataset["class_names"]
    evaluation, images = evaluate_run(opened, split, WatchConfig(data_dir=data_dir, data_url=data_url, device=device))
    folder = run if split == "test" else run / f"evaluation-{split}"
    folder.mkdir(exist_ok=True)
    save_evaluation(folder, evaluation, class_names)
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
    images: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE", help="Image files.")],
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


def data_command(
    name_or_path: Annotated[
        str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME|PATH", help="cifar10, cifar100, digits or a folder.")
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
          f"{duplicates.across} test images that are in train too; {len(duplicates.conflicts)} groups differ in label")  # fmt: skip
    sheet = contact_sheet or Path(f"{dataset.name}-contact-sheet.png")
    print(f"contact sheet: {draw_contact_sheet(dataset, sheet)}")
    return 0


def recipes_command(
    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME", help="Show every setting of this recipe.")] = "",
) -> int:
    """The named settings, with source, cost and expected accuracy."""
    from rich.console import Console
    from rich.table import Table

    if name:
        config = load_recipe(name)
        print((RECIPES[name].build.__doc__ or "").strip().replace("\n    ", "\n"), end="\n\n")
        for key, value in config.to_dict().items():
            print(f"  --{key.replace('_', '-'):20} {value}")
        return 0
    table = Table("recipe", "what", "PFLOP", "expected test accuracy", "source", box=None, pad_edge=False)
    table.columns[0].no_wrap = True
    table.columns[2].justify = "right"
    for key, recipe in RECIPES.items():
        table.add_row(key, _escape(recipe.summary), f"{recipe.petaflops:.3g}", _escape(recipe.expected), _escape(recipe.source))
    Console(highlight=False).print(table)
    print("\nPFLOP: forward + backward of the whole training, 1 multiply-add = 2 FLOP.")
    print("`cifarlab recipes NAME` shows all settings.")
    return 0


def _from_signature(function: Callable[..., int]) -> Callable[[list[str]], int]:
    prog = f"cifarlab {function.__name__.removesuffix('_command')}"
    return lambda arguments: tyro.cli(function, args=arguments, prog=prog)


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": train_command,
    "evaluate": _from_signature(evaluate_command),
    "predict": _from_signature(predict_command),
    "data": _from_signature(data_command),
    "recipes": _from_signature(recipes_command),
}


def main(arguments: list[str] | None = None) -> int:
    """Runs a command line and gives its exit code; errors are one sentence on stderr unless --debug is among the arguments."""
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP)
        return 0
    if arguments[0] == "--version":
        from cifarlab import __version__

        print(f"cifarlab {__version__}")
        return 0
    try:
        if arguments[0] not in COMMANDS:
            raise InputError(f"there is no command {arguments[0]!r}{did_you_mean(arguments[0], COMMANDS)}; see cifarlab --help")
        return COMMANDS[arguments[0]](arguments[1:])
    except KeyboardInterrupt:
        if debug:
            raise
        print("cifarlab: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:  # the reader (head, less) has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if debug:
            raise
        is_input = isinstance(error, InputError)
        told = str(error) if is_input else f"{type(error).__name__}: {error} (--debug shows where)"
        print("cifarlab: " + " ".join(told.split()), file=sys.stderr)
        return 2 if is_input else 1


def _respell(argument: str) -> list[str]:
    flag, equals, value = argument.partition("=")
    flag = flag.replace("_", "-") if flag.startswith("--") else flag
    spelt = ALIASES.get(flag, [flag])
    return [*spelt[:-1], f"{spelt[-1]}={value}"] if equals else spelt


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)
