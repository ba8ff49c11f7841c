"""The command line: through the installed command where a process matters, in this one elsewhere."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
from PIL import Image

import cifarlab as cl
from cifarlab.cli import ALIASES, COMMANDS, main
from cifarlab.recipes import RECIPES, load_recipe
from cifarlab.report.model_card import build_model_card
from cifarlab.report.setup import show_configuration
from cifarlab.runs import Run

COMMAND = Path(sys.executable).with_name("cifarlab")
TINY = ["--train-images", "32", "--batch-size", "16", "--epochs", "1", "--no-forecast"]


def run_command(*arguments: str | Path, program: tuple[str | Path, ...] = (COMMAND,)) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*program, *arguments], capture_output=True, text=True, timeout=200)


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """What is said about bad input: one line on stderr, no traceback, exit code 2."""
    assert main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("cifarlab: ")
    assert captured.err.count("\n") == 1
    return captured.err


def box(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the argument parser says, its frame and line breaks taken away; exit code 2."""
    with pytest.raises(SystemExit) as left:
        main(list(arguments))
    assert left.value.code == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return " ".join(re.sub("[─│╭╮╰╯]", " ", captured.out + captured.err).split())


@pytest.fixture
def received(monkeypatch: pytest.MonkeyPatch) -> list[tuple[cl.TrainConfig, cl.WatchConfig]]:
    """What `train` is called with, instead of training."""
    calls: list[tuple[cl.TrainConfig, cl.WatchConfig]] = []

    def train(config: cl.TrainConfig, watch: cl.WatchConfig) -> None:
        calls.append((config, watch))
        raise RuntimeError("enough")

    monkeypatch.setattr(import_module("cifarlab.train"), "train", train)
    return calls


# ---- what is asked, and what is refused ------------------------------------------------------------------------------


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--help"], ["-h"], ["help"]):
        assert main(arguments) == 0
        told = capsys.readouterr().out
        assert all(f"\n  {command} " in told for command in COMMANDS)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"cifarlab {cl.__version__}\n"
    for command in COMMANDS:
        with pytest.raises(SystemExit) as left:
            main([command, "--help"])
        assert left.value.code == 0
        assert f"usage: cifarlab {command}" in capsys.readouterr().out


def test_the_help_of_a_recipe_shows_its_settings(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "resnet34-cifar100", "--help"])
    told = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "--batch-size INT Images per optimizer step, over all ranks together. (default: 400)" in told


def test_a_typo_suggests_the_nearest_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert "there is no command 'trian'; did you mean 'train'?" in refusal(capsys, "trian")
    assert "there is no recipe 'quik'; did you mean 'quick'?" in refusal(capsys, "train", "quik")
    assert "there is no recipe 'resnet9'" in refusal(capsys, "recipes", "resnet9")
    assert "'resnet_18' is not one of" in refusal(capsys, "train", "--model", "resnet_18", "--data", "digits")
    told = box(capsys, "train", "--epoch", "3")
    assert "Unrecognized options: --epoch" in told
    assert "--epochs FLOAT" in told


def test_of_a_flag_that_takes_several_words_none_is_lost(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`--study A --study B` kept the last. A new flag of that kind is to be gathered too."""
    from cifarlab import cli

    found = {(name, field) for name, command in vars(cli).items() if name.endswith("_command")
             for field, kind in get_type_hints(command, include_extras=True).items()
             if "..." in str(kind) and "Positional" not in str(kind)}  # fmt: skip
    assert found == {("report_command", "study"), ("study_command", "settings")}
    asked: list[Any] = []

    def note(*runs: Path, studies: Any, path: Path | None) -> Path:
        asked.append((runs, studies, path))
        return Path(__file__)

    monkeypatch.setattr("cifarlab.studies.reported.report", note)
    runs, studies = (Path("r"),), (Path("a"), Path("b"), Path("c"))
    for line in ("r --study a b c -o o", "r --study a --study b c -o o", "--study=a r --study=b --study c -o o",
                 "--study=a --study=b --study=c r -o o"):  # fmt: skip
        assert main(["report", *line.split()]) == 0
    assert asked == 4 * [(runs, studies, Path("o"))]


def test_a_bad_setting_is_said_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert "epochs=0.0 cannot be used: it must be a number above 0" in box(capsys, "train", "--epochs", "0")
    assert "name='a/b' cannot be used: it must be a plain folder name" in box(capsys, "train", "--name", "a/b")
    assert "invalid choice 'cosin'" in box(capsys, "train", "--schedule", "cosin")
    assert "--top 0 cannot be used" in refusal(capsys, "predict", "run", "image", "--top", "0")
    assert "no image was named" in refusal(capsys, "predict", "run")


def test_what_is_not_there_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    missing = tmp_path / "nope"
    assert f"data='{missing}' is neither" in refusal(capsys, "train", "--data", missing)
    assert f"data='{missing}' is neither" in refusal(capsys, "data", missing)
    assert f"there is no run folder {missing}" in refusal(capsys, "evaluate", missing)
    assert f"there is no run folder {missing}" in refusal(capsys, "predict", missing, "x.png")
    assert f"there is no run folder {missing}" in refusal(capsys, "train", "--resume", missing)
    assert "device='tpu' is no device" in refusal(capsys, "train", "quick", "--device", "tpu")
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_the_traceback(received: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "quick"]) == 1
    assert capsys.readouterr().err == "cifarlab: RuntimeError: enough (--debug shows where)\n"
    with pytest.raises(RuntimeError, match="enough"):
        main(["train", "quick", "--debug"])
    with pytest.raises(cl.InputError, match="no recipe"):
        main(["--debug", "train", "quik"])


# ---- the learning rate, its plan and its test ------------------------------------------------------------------------


def test_a_schedule_is_drawn_before_training(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in RECIPES:
        assert main(["recipes", name, "--draw"]) == 0
        assert f"figure: {name}-schedule.png" in capsys.readouterr().out
        assert (tmp_path / f"{name}-schedule.png").stat().st_size > 10_000
    assert main(["recipes", "resnet9-onecycle", "--draw", "plan.svg", "--cycle-momentum"]) == 0
    told = capsys.readouterr().out
    assert "2,352 steps = 24 epochs of 98, batch 512: lr 0.004006 at first, 0.004006 at last" in told
    assert re.search(r"  peak +step 490 \(epoch 5\), lr 0\.04006", told)
    drawn = (tmp_path / "plan.svg").read_text()
    assert ">peak<" in drawn
    assert "step 490" in drawn  # both axes, and the lowest momentum
    line = "recipes resnet18-cosine --schedule restarts --restart-epochs 5 --warmup-epochs 5 --draw"
    assert main(line.split()) == 0
    told = capsys.readouterr().out
    assert [told.count(word) for word in ("warm-up ends", "  restart ")] == [1, 3]


def test_drawing_a_plan_needs_no_torch(tmp_path: Path) -> None:
    script = "import sys; from cifarlab.cli import main; sys.exit(main(sys.argv[1:]) or 'torch' in sys.modules)"
    done = run_command("-c", script, "recipes", "quick", "--draw", tmp_path / "a.png", program=(sys.executable,))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a.png").exists()


SHORT = "--train-images 64 --batch-size 16 --from 1e-5 --to 1 --steps 14 --seeds 2"


def test_lr_range_prints_a_table_and_leaves_curves_and_figure(
    tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = f"lr-range quick --model tiny {SHORT} --runs-dir {tmp_path} --name test --device cpu"
    assert main(line.split()) == 0
    told = capsys.readouterr().out
    assert max(len(line) for line in told.splitlines() if "cifarlab train" not in line) <= 100
    assert "  seed 0: 14 points" in told
    assert "learning rates 1e-05 to 1, exponential, 14 steps, 2 seeds; loss of train images" in told
    pasted = re.findall("(?:to paste|or): cifarlab train (.*)", told)  # which run as they stand
    assert len(pasted) == 2
    for number, words in enumerate(map(shlex.split, pasted)):
        assert words[-4:] == ["--device", "cpu", "--runs-dir", str(tmp_path)]
        assert main(["train", *words, "--epochs", "0.2", "--name", f"pasted-{number}", "--no-figures", "--no-forecast"]) == 0
    assert Run(tmp_path / "pasted-1").config.schedule == "one-cycle"
    capsys.readouterr()
    assert {path.name for path in (tmp_path / "test").iterdir()} == {"lr_range.json", "lr_range.png", "seed-0", "seed-1"}
    config = Run(tmp_path / "test" / "seed-1").config
    assert (config.seed, config.schedule, config.lr, config.min_lr) == (1, "range-exponential", 1.0, 1e-5)
    line = line.replace("lr-range quick", "lr-range --recipe quick --linear --json").replace("name test", "name other")
    assert main(line.split()) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["mode"] == "linear"
    assert len(values["curves"]) == 2
    assert values["recipe"] == "quick"


def test_lr_range_as_a_ladder(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = f"lr-range quick --model tiny --train-images 64 --epochs 4 --seeds 1 --val --runs-dir {tmp_path} --name test"
    assert main([*line.split(), "--device", "cpu"]) == 0
    told = capsys.readouterr().out
    assert "learning rates 0.0001 to 0.01, exponential, 4 epochs, 1 seed; loss of val images" in told
    assert "accuracy" in told
    assert (tmp_path / "test" / "lr_accuracy.png").exists()


def test_lr_range_refuses_what_contradicts_itself(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "two ways for the rate to rise" in refusal(capsys, "lr-range", "quick", "--linear", "--exponential")
    assert "two kinds of range test" in refusal(capsys, "lr-range", "quick", "--steps", "9", "--epochs", "2")
    assert "begun anew and not gone on with: leave --resume out" in refusal(capsys, "lr-range", "quick", "--resume", "auto")
    assert "no recipe 'quik'; did you mean 'quick'?" in refusal(capsys, "lr-range", "quik")
    assert "it must rise" in refusal(capsys, "lr-range", "quick", "--from", "1", "--to", "0.1", "--runs-dir", tmp_path)


def test_lr_auto_finds_it_first_and_records_how(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = f"train quick --model tiny --train-images 0 --epochs 0.5 --batch-size 16 --runs-dir {tmp_path} --name run --device cpu"
    assert main([*line.split(), "--no-figures", "--lr", "auto"]) == 0
    told = capsys.readouterr().out
    run, test = Run(tmp_path / "run"), cl.load_range(tmp_path / "run-lr-range")
    assert test.best is not None
    assert run.config.lr == float(f"{test.best.lr:.2g}")
    assert run.config.lr_from == str(tmp_path / "run-lr-range")
    assert cl.load_range(run.path) == test  # a copy in the run's folder
    told_again = f"Its learning rate was found by a range test of 3 seeds ({test.best.name})"
    assert told_again in str(show_configuration(run))  # of the report
    assert told_again in build_model_card(run)
    (run.path / "lr_range.json").unlink()
    assert "found by a range test, which is not there any more" in build_model_card(run)
    assert f"taken: --lr {run.config.lr:.2g} ({test.best.name}: {test.best.reason})" in told
    assert "found by a range test of 3 seeds in" in told
    assert run.config.hash == cl.TrainConfig.from_dict(run.config.to_dict() | {"lr_from": ""}).hash
    assert "leave --lr auto out" in refusal(capsys, "train", "quick", "--lr=auto", "--resume", "auto")


@pytest.mark.parametrize("spelt", ["--lr auto", "--lr=auto", "--learning-rate auto"])
def test_lr_auto_in_every_spelling(spelt: str, received: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def found(given: Any) -> cl.TrainConfig:
        asked.append(spelt)
        return load_recipe("quick", lr=0.5)

    monkeypatch.setattr("cifarlab.cli._with_found_lr", found)
    main(["train", *spelt.split(), "quick"])
    main(["train", "quick", *spelt.split(), "--epochs", "3"])
    assert [config.lr for config, _ in received] == [0.5, 0.5]
    assert asked == [spelt, spelt]


def test_lr_auto_without_ground_asks_for_one(
    tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(import_module("cifarlab.lr_range"), "STEPS", 12)
    monkeypatch.setattr(import_module("cifarlab.lr_range"), "STEP_RANGE", (1e-9, 1e-8))
    told = refusal(capsys, "train", "quick", "--model", "tiny", "--train-images", "64", "--lr", "auto", "--runs-dir", tmp_path)
    assert "no learning rate was found" in told
    assert [path.name.split("-")[:2] for path in tmp_path.iterdir()] == [["lr", "range"]]  # nothing was trained


# ---- what `train` receives -------------------------------------------------------------------------------------------

LAB_A = """--batch-size 64 --epochs 25 --lr 0.15 --momentum 0.9 --weight-decay 5e-4 --wandb-project cifar10-lab2
           --wandb-name my-experiment"""


def test_lab_as_command_line_works_word_for_word(received: list[tuple[cl.TrainConfig, cl.WatchConfig]]) -> None:
    main(["train", *shlex.split(LAB_A)])
    main(["train", *shlex.split(LAB_A), "--no-wandb"])
    for config, watch in received:
        assert config == load_recipe("resnet18-cosine")
        assert config.recipe == "resnet18-cosine"
        assert (watch.wandb_project, watch.wandb_name) == ("cifar10-lab2", "my-experiment")
    assert [watch.wandb for _, watch in received] == [None, False]


@pytest.mark.parametrize(
    ("line", "changes"),
    [
        ("--opt adamw --sched one-cycle -b 32", dict(optimizer="adamw", schedule="one-cycle", batch_size=32)),
        ("--smoothing 0.1 --sched cosine", dict(label_smoothing=0.1, schedule="cosine")),
        ("--amp --wd=0.1 --clip-grad 1", dict(precision="fp16", weight_decay=0.1, clip_norm=1)),
        ("--amp-dtype bf16 --torchcompile --arch resnet9", dict(precision="bf16", compile=True, model="resnet9")),
        ("--mixup 0.2 --cutmix=1 --model-ema-decay 0.99", dict(mixup_alpha=0.2, cutmix_alpha=1, ema_decay=0.99)),
        ("--batch_size 32 --channels-last --no-channels-last", dict(batch_size=32, channels_last=False)),
        ("--learning-rate 0.5 --momentum=0.8", dict(lr=0.5, momentum=0.8)),
        ("--micro-batch-size 64 --epochs 1e1", dict(micro_batch_size=64, epochs=10)),
    ],
)  # fmt: skip
def test_other_spellings(received: list[tuple[cl.TrainConfig, cl.WatchConfig]], line: str, changes: dict[str, Any]) -> None:
    main(["train", "quick", *line.split()])
    main(["train", *line.split(), "quick"])
    assert [config for config, _ in received] == 2 * [load_recipe("quick", **changes)]


def test_every_alias_leads_to_a_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    told = capsys.readouterr().out
    for spelt in ALIASES.values():
        assert f"{spelt[0]} " in told or f"{spelt[0]}," in told


def test_watch_flags(received: list[tuple[cl.TrainConfig, cl.WatchConfig]], tmp_path: Path) -> None:
    main(["train", "quick", "--wandb", "--output", str(tmp_path), "--experiment", "x", "--data-dir", "d", "--no-figures"])
    assert received[0][1] == cl.WatchConfig(wandb=True, runs_dir=tmp_path, name="x", data_dir=Path("d"), figures=False)


@pytest.mark.parametrize(
    ("spelt", "meant"),
    [("--wandb", True), ("--wandb True", True), ("--wandb=False", False), ("--wandb False", False), ("--no-wandb", False)],
)
def test_wandb_with_and_without_a_value(received: list[tuple[cl.TrainConfig, cl.WatchConfig]], spelt: str, meant: bool) -> None:
    main(["train", "quick", *spelt.split(), "--epochs", "2"])
    assert received[0][1].wandb is meant
    assert received[0][0].epochs == 2


@pytest.mark.parametrize("line", ["--micro-batch-size 400 resnet34-cifar100", "--warmup-epochs 30 resnet34-cifar100"])
def test_settings_are_judged_with_the_recipe_that_they_change(
    received: list[tuple[cl.TrainConfig, cl.WatchConfig]], line: str
) -> None:
    """Once they were judged with the default recipe's batch size and epochs first."""
    main(["train", *line.split()])
    assert received[0][0].recipe == "resnet34-cifar100"


def test_a_resume_takes_the_settings_of_its_run(
    received: list[tuple[cl.TrainConfig, cl.WatchConfig]], trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["train", "--resume", str(trained)])
    config, watch = received[0]
    assert config == Run(trained).config
    assert config.recipe == "quick"
    assert watch.resume == str(trained)
    capsys.readouterr()
    assert "is a run of quick, not resnet9-onecycle" in refusal(capsys, "train", "resnet9-onecycle", "--resume", trained)


# ---- the whole way, on digits ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, own_cache: None) -> Path:
    """The folder of a run that the installed command has trained."""
    runs = tmp_path_factory.mktemp("runs")
    done = run_command("train", "quick", *TINY, "--runs-dir", runs, "--name", "run", "--no-figures")
    assert done.returncode == 0, done.stderr
    run = Run(runs / "run")
    assert run.result["step"] == 2
    last = done.stdout.splitlines()[-2:]
    assert re.fullmatch(r"test accuracy \d+\.\d\d %, loss \d+\.\d{4}; trained for \d+\.\d s, \d+\.\d % of it in probes", last[0])
    assert last[1] == f"run folder: {run.path}"
    assert f"test accuracy {100 * run.result['test/accuracy']:.2f} %" in last[0]
    return run.path


def test_evaluate(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shutil.copytree(trained, tmp_path / "run")
    assert main(["evaluate", str(folder)]) == 0
    told = capsys.readouterr().out
    run = Run(folder)
    accuracy = f"top-1 {100 * run.result['test/accuracy']:.2f} %"
    assert f"test: 360 images, loss {run.result['test/loss']:.4f}, {accuracy}, top-5 " in told
    assert "precision" in told
    assert "taken for" in told
    figures = {path.name for path in (folder / "figures").iterdir()}
    assert {"confusion.png", "class_accuracy.png", "mistakes.png", "doubtful.png"} <= figures
    assert "has no split 'val': choose train, test" in refusal(capsys, "evaluate", folder, "--split", "val")


def test_predict(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    for name, shape in (("colour.png", (40, 30, 3)), ("grey.png", (8, 8)), ("alpha.png", (32, 32, 4))):
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(tmp_path / name)
    images = sorted(tmp_path.iterdir())
    assert main(["predict", str(trained), *map(str, images), "--top", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    for line, image in zip(lines, images, strict=True):
        assert re.fullmatch(re.escape(str(image)) + r": (\d \d+\.\d %, ){2}\d \d+\.\d %", line)
    assert main(["predict", str(trained), str(images[0]), "--json", "--top", "10"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["image"] == str(images[0])
    assert sorted(answer["classes"]) == list("0123456789")
    assert sum(answer["classes"].values()) == pytest.approx(1)
    assert list(answer["classes"].values()) == sorted(answer["classes"].values(), reverse=True)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    for name in ("missing.png", "broken.png"):
        assert name in refusal(capsys, "predict", trained, images[0], tmp_path / name)


def test_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sheet = tmp_path / "sheet.png"
    assert main(["data", "digits", "--contact-sheet", str(sheet)]) == 0
    told = capsys.readouterr().out
    assert "1,437 training and 360 test images of 3×32×32, 10 classes" in told
    assert re.search(r"\n 9 +143 +37", told)
    assert "exact duplicates: 0 within train" in told
    with Image.open(sheet) as image:
        assert min(image.size) > 100
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.png"]


def test_recipes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    assert main(["recipes"]) == 0
    told = capsys.readouterr().out
    for name, recipe in RECIPES.items():
        assert re.search(rf"^{name} .*{recipe.petaflops:.3g}", told, re.MULTILINE)
    assert main(["recipes", "simplecnn-adam"]) == 0
    told = capsys.readouterr().out
    assert "Source: lab B" in told
    for key, value in load_recipe("simplecnn-adam").to_dict().items():
        assert re.search(rf"--{key.replace('_', '-')} +{re.escape(str(value))}\n", told)


def test_a_diverged_run_leaves_with_1(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = f"train quick --model {tiny} --epochs 3 --optimizer sgd --schedule constant --lr 1e30 --name run --no-figures"
    assert main([*line.split(), *TINY[:4], "--runs-dir", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert re.match(r"cifarlab: the loss stopped being finite at step \d: lower --lr, or clip", captured.err)
    assert str(tmp_path / "run") in captured.err


@pytest.mark.parametrize("unbuffered", [{}, {"PYTHONUNBUFFERED": "1"}], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("arguments", [["recipes", "quick"], ["--version"], ["--help"], ["train", "--help"]], ids=" ".join)
def test_as_a_module_and_into_a_closed_pipe(arguments: list[str], unbuffered: dict[str, str]) -> None:
    module = (sys.executable, "-m", "cifarlab")
    assert run_command("--version", program=module).stdout == f"cifarlab {cl.__version__}\n"
    reading, writing = os.pipe()
    os.close(reading)  # as `| head` does when it has enough
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"} | unbuffered
    done = subprocess.run([*module, *arguments], stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60, env=environment)
    os.close(writing)
    assert done.stderr == ""
    assert done.returncode == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_output_that_a_full_disk_does_not_take() -> None:
    with Path("/dev/full").open("w") as full:
        line = [sys.executable, "-m", "cifarlab", "recipes", "quick"]
        done = subprocess.run(line, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "No space left on device" in done.stderr


def test_torchrun(tmp_path: Path) -> None:
    program = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "cifarlab")
    line = ["train", "quick", *TINY, "--runs-dir", tmp_path, "--no-figures", "--device", "cpu"]
    done = run_command(*line, program=program)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("run folder: ") == 1
    [folder] = tmp_path.iterdir()
    assert Run(folder).result["state"] == "finished"
    assert len(Run(folder).metrics["train/loss"]) == 2
