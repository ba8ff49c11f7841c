"""Bad input of every kind, typed as a user would: one sentence that names the thing, the place and the remedy, and exit code 2.

Nothing is shown of where in the code it was found unless --debug asks, and nothing is left behind: the folder is as it was.
"""

import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import cifarlab as cl
from cifarlab.cli import main

PROJECT = Path(__file__).parents[1]
Change = Callable[[Path], Any]


@dataclass(frozen=True, kw_only=True)
class Case:
    """given: what is made of a fresh folder first; line: what is typed in it; told: what the sentence must hold."""

    line: str
    told: tuple[str, ...]
    given: Change = lambda folder: None
    environment: tuple[tuple[str, str], ...] = ()


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory, own_cache: None) -> Iterator[Path]:
    """A folder with `run` (finished), `part` (stopped at a checkpoint), `watched`, `study` and `images`."""
    sys.path.insert(0, str(PROJECT / "tests"))
    import tiny_models

    folder = tmp_path_factory.mktemp("kept")
    config = cl.TrainConfig(data="digits", model="tiny", epochs=2, batch_size=16, train_images=32, val_fraction=0.5)
    quiet: dict[str, Any] = dict(runs_dir=folder, progress="none", forecast=False, figures=False)
    for _ in tiny_models.registered():
        cl.train(config, cl.WatchConfig(name="run", **quiet))
        shutil.copytree(folder / "run", folder / "part")
        for name in ("result.json", "model.safetensors", "predictions.npz"):
            (folder / "part" / name).unlink()
        net = torch.nn.Linear(4, 2)
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        with cl.watch(net, optimizer, "watched", runs_dir=folder, say=None, figures=False):
            for _ in range(3):
                optimizer.zero_grad()
                net(torch.ones(2, 4)).square().mean().backward()
                optimizer.step()
        for split in ("train", "test"):
            for label in ("cat", "dog"):
                (folder / "images" / split / label).mkdir(parents=True)
                for k in range(3):
                    pixels = np.random.default_rng(k).integers(0, 256, (32, 32, 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(folder / "images" / split / label / f"{k}.png")
        incident = folder / "run" / "incidents" / "step-00000001"
        incident.mkdir(parents=True)
        shutil.copy(folder / "run" / "model.safetensors", incident)
        (incident / "incident.json").write_text('{"step": 1}')
        save_file({"images": torch.zeros(4, 3, 32, 32), "labels": torch.zeros(4, dtype=torch.int64)},
                  incident / "batch.safetensors")  # fmt: skip
        yield folder
    sys.path.remove(str(PROJECT / "tests"))


def write(name: str, content: bytes | str = b"") -> Change:
    def change(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return change


def with_json(name: str, **changes: Any) -> Change:
    """The JSON object in that file with some of its values changed; Ellipsis takes one away."""

    def change(folder: Path) -> None:
        values = json.loads((folder / name).read_bytes()) | changes
        (folder / name).write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))

    return change


def without(*names: str) -> Change:
    def change(folder: Path) -> None:
        for name in names:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return change


def both(*changes: Change) -> Change:
    return lambda folder: [change(folder) for change in changes]


def in_checkpoint(name: str, content: bytes | Callable[[Path], Any]) -> Change:
    """That file of each of part's checkpoints with other content: of one alone, the one before would be taken."""

    def change(folder: Path) -> None:
        for checkpoint in (folder / "part" / "checkpoints").iterdir():
            path = checkpoint / name
            path.write_bytes(content) if isinstance(content, bytes) else content(path)

    return change


def link(name: str, target: str) -> Change:
    return lambda folder: (folder / name).symlink_to(target)


def cut(name: str, share: float) -> Change:
    return lambda folder: os.truncate(folder / name, int(share * (folder / name).stat().st_size))


TRAIN = "train quick --model tiny --epochs 1 --train-images 32 --batch-size 16 --no-forecast --no-figures --progress none"
STUDY = "study learning-rate --set epochs=1 train_images=64 lr=0.1 --seeds 0 --progress none --folder studies"
RESUME = "train --resume part"
DEEP = "[" * 100_000

SETTINGS = {  # typed, and what the parser then says
    "--epochs 0": ("epochs=0.0 cannot be used", "above 0"),
    "--epochs 1e300": ("epochs=1e+300 cannot be used", "at most"),
    "--epochs nan": ("epochs=nan cannot be used", "finite"),
    "--epochs three": ("--epochs", "could not convert", "three"),
    "--batch-size 0": ("batch_size=0 cannot be used", "at least 1"),
    "--batch-size 1.5": ("--batch-size", "1.5", "invalid literal"),
    "--lr -1": ("lr=-1.0 cannot be used", "at least 0"),
    "--lr inf": ("lr=inf cannot be used", "finite"),
    "--momentum 1": ("momentum=1.0 cannot be used", "below 1"),
    "--weight-decay -0.1": ("weight_decay=-0.1 cannot be used", "at least 0"),
    "--image-size 100000": ("image_size=100000 cannot be used", "at most 4096"),
    "--crop-padding 1000000": ("crop_padding=1000000 cannot be used", "at most 4096"),
    "--micro-batch-size 9999": ("micro_batch_size=9999 cannot be used", "at most batch_size"),
    "--seed -1": ("seed=-1 cannot be used", "at least 0"),
    "--optimizer adan": ("--optimizer", "adan", "adamw"),
    "--precision fp8": ("--precision", "fp8", "bf16"),
    "--threads 1000000": ("threads=1000000 cannot be used", "at most 1024"),
    "--log-every 0": ("log_every=0 cannot be used", "at least 1"),
    "--save-minutes -1": ("save_minutes=-1.0 cannot be used", "at least 0"),
    "--name ../out": ("name='../out' cannot be used", "plain folder name"),
    "--name CON|x": ("name='CON|x' cannot be used", "plain folder name"),
    "--epoch 3": ("Unrecognized options: --epoch", "--epochs"),
    "--warmup-epochs 9999": ("warmup_epochs=9999.0 cannot be used", "less than epochs"),
}

CASES: dict[str, Case] = {
    **{f"train {typed}": Case(line=f"train quick {typed}", told=told) for typed, told in SETTINGS.items()},
    # ---- words -----------------------------------------------------------------------------------------------------------
    "no such command": Case(line="trian", told=("no command 'trian'", "did you mean 'train'", "cifarlab --help")),
    "no such recipe": Case(line="train quik", told=("no recipe 'quik'", "did you mean 'quick'")),
    "no such recipe to show": Case(line="recipes quik", told=("no recipe 'quik'", "did you mean 'quick'")),
    "no such model": Case(line="train quick --model resnet_18", told=("'resnet_18' is not one of", "resnet18")),
    "no such probe": Case(line=f"{TRAIN} --probes gradientflow", told=("gradientflow", "gradient_flow")),
    "probes in parts": Case(line=f"{TRAIN} --probes noise --probes=curvature", told=("--probes", "2 times", "all at once")),
    "seeds in parts": Case(line="study schedules --seeds 0 --seeds 1", told=("--seeds is given 2 times", "--seeds 0,1,2")),
    "values in parts": Case(line="study sensitivity --set lr=0.1 --set lr=0.2", told=("--set lr", "twice", "lr=0.2,…")),
    "no parameter to probe": Case(line=f"{TRAIN} --probe-include nothing.*", told=("probe_include", "nothing.*", "choose")),
    "no such device": Case(line="train quick --device tpu", told=("device='tpu' is no device", "cpu")),
    "no such GPU": Case(line="train quick --device cuda:99", told=("cuda:99", "cpu")),
    "figure of another kind": Case(line="recipes quick --draw plan.gif", told=("plan.gif",)),
    "figure in no folder": Case(line="recipes quick --draw no/plan.png", told=("no/", "cannot be used", "check the path")),
    "RANK is no number": Case(line=TRAIN, environment=(("RANK", "x"),), told=("RANK='x'", "environment", "unset")),
    "WORLD_SIZE is no number": Case(line=TRAIN, environment=(("WORLD_SIZE", "-2"),), told=("WORLD_SIZE='-2'", "unset")),
    "RANK beyond the world": Case(line=TRAIN, environment=(("RANK", "3"),), told=("RANK=3", "WORLD_SIZE=1", "torchrun")),
    # ---- data ------------------------------------------------------------------------------------------------------------
    "no such data": Case(line="data cifar01", told=("data='cifar01' is neither", "did you mean 'cifar10'")),
    "no such folder": Case(line="data nowhere/x", told=("data='nowhere/x' is neither", "check the path")),
    "a name too long": Case(line="data " + "x" * 5000, told=("xxx", "too long", "check the path")),
    "a file for a folder": Case(given=write("file"), line="data file", told=("data='file' is neither", "folder")),
    "an empty folder": Case(given=lambda f: (f / "e").mkdir(), line="data e", told=("e is not a data set", "train/<class>")),
    "labels of another set": Case(line="data digits --labels coarse", told=("labels='coarse'", "'digits'", "must be fine")),
    "images too large": Case(line="data digits --image-size 9999", told=("image_size=9999", "at most 4096")),
    "images that fill memory": Case(line="data digits --image-size 4000", told=("digits at 4000×4000", "GiB", "smaller")),
    "an address of another kind": Case(
        line="data cifar10 --data-dir d --data-url ftp://x/y.tar.gz", told=("data_url='ftp://x/y.tar.gz'", "give the http")),
    "an address for digits": Case(line="data digits --data-url http://x/y", told=("data_url=", "'digits'", "only cifar10")),
    "a torn archive": Case(
        given=write("d/cifar-10-python.tar.gz", b"\x1f\x8b torn"), line="data cifar10 --data-dir d",
        told=("d/cifar-10-python.tar.gz", "not a whole tar.gz", "fetch it again")),
    "no image in a class": Case(
        given=without(*(f"images/test/dog/{k}.png" for k in range(3))), line="data images",
        told=("class folder images/test/dog holds no image", "put some in")),
    "text for an image": Case(
        given=write("images/train/cat/0.png", "hello"), line="data images",
        told=("images/train/cat/0.png is not an image", "move it away or convert it")),
    "a torn image": Case(
        given=cut("images/train/cat/0.png", 0.5), line="data images",
        told=("images/train/cat/0.png is a damaged image", "replace or remove it")),
    "a link out of an image folder": Case(
        given=link("images/train/cat/l.png", "/etc/passwd"), line="data images", told=("l.png leads out of", "delete it")),
    "one part of many parquet files": Case(
        given=both(write("p/train-00000-of-00002.parquet"), write("p/test-00000-of-00001.parquet")), line="data p",
        told=("p holds 1 of the 2 parts", "add the others")),
    "an empty parquet file": Case(
        given=both(write("p/train.parquet"), write("p/test.parquet")), line="data p",
        told=("p/train.parquet is not a sound parquet file", "fetch it again")),
    "a contact sheet below a file": Case(
        given=write("file"), line="data images --contact-sheet file/x.png",
        told=("file/x.png cannot be written", "choose another")),
    "more images than there are": Case(
        line=f"{TRAIN} --train-images 9999", told=("train_images=9999", "digits", "choose at most 1437")),
    "a batch larger than an epoch": Case(
        line=f"{TRAIN} --batch-size 64 --drop-last",
        told=("batch_size=64 with drop_last", "32 training images", "choose at most")),
    # ---- where it goes ---------------------------------------------------------------------------------------------------
    "runs folder below a file": Case(
        given=write("file"), line=f"{TRAIN} --runs-dir file/runs",
        told=("file/runs", "cannot be written", "choose another --runs-dir")),
    "a run of that name": Case(line=f"{TRAIN} --runs-dir . --name run", told=("run folder run exists already", "--resume run")),
    "a folder of that name": Case(
        line=f"{TRAIN} --runs-dir . --name images", told=("run folder images exists already", "--name")),
    # ---- run folders -----------------------------------------------------------------------------------------------------
    "no such run": Case(line="evaluate nowhere", told=("no run folder nowhere", "runs/nowhere")),
    "a folder that is no run": Case(line="evaluate images", told=("images is not a run folder", "config.json", "cifarlab runs")),
    "a run for a data set": Case(line="data run", told=("run is not a data set", "train/<class>")),
    "config.json is torn": Case(
        given=cut("run/config.json", 0.5), line="evaluate run", told=("run/config.json", "damaged", "train anew")),
    "config.json is deep": Case(
        given=write("run/config.json", DEEP), line="evaluate run", told=("run/config.json", "JSON", "train anew")),
    "config.json is a list": Case(
        given=write("run/config.json", "[]"), line="predict run x.png",
        told=("run/config.json holds no JSON object", "train anew")),
    "config.json has a long number": Case(
        given=write("run/config.json", '{"seed": ' + "9" * 100_000 + "}"), line="evaluate run",
        told=("run/config.json", "JSON", "train anew")),
    "config.json has an unknown field": Case(
        given=with_json("run/config.json", batchsize=3), line="evaluate run",
        told=("no field 'batchsize'", "did you mean 'batch_size'")),
    "config.json has a wrong type": Case(
        given=with_json("run/config.json", epochs="3"), line="evaluate run", told=("epochs='3' cannot be used", "of type float")),
    "config.json of an unknown model": Case(
        given=with_json("run/config.json", model="os.system"), line="evaluate run",
        told=("'os.system' is not one of", "resnet18")),
    "dataset.json is missing": Case(
        given=without("run/dataset.json"), line="evaluate run", told=("run/dataset.json is missing", "train anew")),
    **{
        f"dataset.json with {name}={value!r}": Case(
            given=with_json("run/dataset.json", **{name: value}), line=line,
            told=(f"run/dataset.json has no {name}", "train anew"))
        for name, value, line in (
            ("class_names", [], "predict run images/train/cat/0.png"), ("class_names", 7, "evaluate run"),
            ("class_names", [1, 2], "check run"), ("image_size", 10**9, "predict run images/train/cat/0.png"),
            ("image_size", "32", "profile run"), ("mean", [0.5], "predict run images/train/cat/0.png"),
            ("std", [0, 0, 0], "check run"), ("fingerprint", ..., "evaluate run"),
        )
    },
    "other data than the run's": Case(
        given=with_json("run/dataset.json", fingerprint="0"), line="evaluate run",
        told=("digits is not the data", "run was trained on", "bring that back")),
    "no such split": Case(line="evaluate run --split clean", told=("run has no split 'clean'", "choose train")),
    "no weights": Case(
        given=without("part/checkpoints"), line="evaluate part",
        told=("part has no weights yet", "model.safetensors", "train it on")),
    "weights are torn": Case(
        given=cut("run/model.safetensors", 0.5), line="evaluate run",
        told=("run/model.safetensors cannot be read", "train anew")),
    "weights of another network": Case(
        given=lambda f: save_file({"x": torch.zeros(1)}, f / "run" / "model.safetensors"), line="evaluate run",
        told=("weights in run do not fit its model 'tiny'", "train anew")),
    "an image that is missing": Case(line="predict run no.png", told=("no.png", "No such file")),
    "no image": Case(line="predict run", told=("no image was named", "after the run folder")),
    "a folder for an image": Case(line="predict run images", told=("images", "replace or remove")),
    "no class wanted": Case(line="predict run images/train/cat/0.png --top 0", told=("--top 0 cannot be used", "at least 1")),
    "a run that was watched": Case(line="evaluate watched", told=("watched was recorded by cl.watch", "where your model is")),
    "a damaged row": Case(
        given=write("run/metrics.jsonl", '{"step": 1}\n{"lr"\n{"step": 3}\n'), line="diagnose run",
        told=("run/metrics.jsonl has a damaged row at byte 12", "remove that line")),
    "a row of infinite step": Case(
        given=write("run/metrics.jsonl", '{"step": 1e999}\n'), line="diagnose run",
        told=("run/metrics.jsonl has a damaged row", "remove that line")),
    "a row without end": Case(
        given=write("run/metrics.jsonl", '{"step": 1, "' + "x" * (5 << 20) + '": 1}\n'), line="diagnose run",
        told=("run/metrics.jsonl has a line of more than 4 MiB", "remove that line")),
    "no rows": Case(given=write("run/metrics.jsonl"), line="diagnose run", told=("run has no rows yet", "wait")),
    "a table of another program": Case(
        given=write("run/probes/update_flow.rec", "P6 32 32 255\n"), line="diagnose run",
        told=("run/probes/update_flow.rec is no table", "remove the file")),
    "probes.json lists nothing": Case(
        given=write("run/probes.json", '{"parameters": 7}'), line="diagnose run",
        told=("probes.json lists no parameters", "damaged")),
    "no such incident": Case(line="diagnose run --replay 8", told=("run has no incident of step 8", "it has step-00000001")),
    "an incident without its facts": Case(
        given=without("run/incidents/step-00000001/incident.json"), line="diagnose run --replay 1",
        told=("run/incidents/step-00000001", "no incident.json", "name another step")),
    "an incident of other images": Case(
        given=lambda f: save_file({"images": torch.zeros(4, 1, 2, 2), "labels": torch.zeros(4, dtype=torch.int64)},
                                  f / "run/incidents/step-00000001/batch.safetensors"),
        line="diagnose run --replay 1", told=("incident of step 1 in run does not fit", "name another step")),
    "an incident of other classes": Case(
        given=lambda f: save_file({"images": torch.zeros(4, 3, 32, 32), "labels": torch.full((4,), 99)},
                                  f / "run/incidents/step-00000001/batch.safetensors"),
        line="diagnose run --replay 1", told=("incident of step 1 in run does not fit", "name another step")),
    "an alarm of infinite step": Case(
        given=both(write("part/alarms.jsonl", '{"step": 1e999}\n')), line=RESUME,
        told=("part/alarms.jsonl has a damaged line", "remove it")),
    # ---- resuming --------------------------------------------------------------------------------------------------------
    "resume of nothing": Case(line="train --resume nowhere", told=("no run folder nowhere", "runs/nowhere")),
    "resume with another recipe": Case(
        line="train quick --resume part", told=("part is a run of custom, not quick", "leave that out")),
    "resume with another setting": Case(line=f"{RESUME} --lr 0.5", told=("part was begun with lr=0.1", "leave the setting out")),
    "resume with --lr auto": Case(line=f"{RESUME} --lr auto", told=("learning rate of its run", "leave --lr auto out")),
    "a checkpoint without state": Case(
        given=in_checkpoint("trainer.safetensors", lambda path: path.unlink()), line=RESUME,
        told=("part/checkpoints/step-", "no trainer.safetensors", "remove that folder")),
    "a checkpoint that is torn": Case(
        given=in_checkpoint("trainer.safetensors", b"\x20\0\0\0\0\0\0\0{"), line=RESUME,
        told=("trainer.safetensors cannot be read", "remove that folder")),
    "a checkpoint of another format": Case(
        given=in_checkpoint("trainer.safetensors", lambda path: rewrite_state(path, format=99)),
        line=RESUME, told=("trainer.safetensors is no checkpoint of this version", "remove the folder")),
    "a checkpoint without its optimizer": Case(
        given=in_checkpoint("trainer.safetensors", lambda path: rewrite_state(path, optimizer=...)), line=RESUME,
        told=("part/checkpoints/step-", "does not fit", "remove the folder")),
    "a checkpoint with other momentum": Case(
        given=in_checkpoint("trainer.safetensors", lambda path: rewrite_state(path, shrink=True)), line=RESUME,
        told=("part/checkpoints/step-", "does not fit", "remove the folder")),
    "a checkpoint at no step": Case(
        given=in_checkpoint("trainer.safetensors", lambda path: rewrite_state(path, state={"step": -5})), line=RESUME,
        told=("part/checkpoints/step-", "does not fit", "remove the folder")),
    "a checkpoint of another run": Case(
        given=in_checkpoint("trainer.safetensors", lambda path: rewrite_state(path, config="0123")), line=RESUME,
        told=("checkpoint in part belongs to another config", "start a new run")),
    "a checkpoint of other data": Case(
        given=in_checkpoint("trainer.safetensors", lambda path: rewrite_state(path, data="0123")), line=RESUME,
        told=("digits is not the data", "part was begun on", "start a new run")),
    # ---- many runs -------------------------------------------------------------------------------------------------------
    "no folder to list": Case(line="runs nowhere", told=("no folder nowhere", "name the one that holds")),
    "a report on nothing": Case(line="report", told=("name a run folder or more", "a study's folder")),
    "a report on no run": Case(line="report nowhere", told=("no run folder nowhere", "name a folder such as")),
    "a report where there is no folder": Case(
        line="report run -o nowhere/page.html", told=("nowhere/page.html cannot be written", "give another with -o")),
    "a board of a file": Case(line="board run/config.json", told=("run/config.json is a file", "name the folder")),
    "a board at no port": Case(line="board . --port 70000", told=("--port 70000 is no port", "leave it out")),
    "a run to compare": Case(line="compare run", told=("two run folders or more",)),
    "a run to compare with nothing": Case(line="compare run nowhere", told=("no run folder nowhere", "name two or more")),
    "a damaged run to compare": Case(
        given=write("run/result.json", DEEP), line="compare run part",
        told=("run cannot be compared", "damaged", "leave it out")),
    "a CSV of one field": Case(
        given=write("part/results.csv", "a\n" + "x" * 200_000), line="compare run part",
        told=("part cannot be compared", "damaged", "leave it out")),
    "sync to nowhere": Case(line="sync run", told=("where should run go", "--wandb, --tensorboard")),
    "sync of nothing": Case(line="sync nowhere --tensorboard", told=("no run folder nowhere", "runs/nowhere")),
    "sync with damaged costs": Case(
        given=write("run/cost.json", "{}"), line="sync run --tensorboard", told=("run/cost.json is damaged", "remove it")),
    "sync with damaged samples": Case(
        given=write("run/samples.npz", "PK"), line="sync run --tensorboard",
        told=("run/samples.npz cannot be read", "cifarlab evaluate run")),
    # ---- profile ---------------------------------------------------------------------------------------------------------
    "nothing to profile": Case(line="profile", told=("name one network to profile", "such as resnet18")),
    "no such network": Case(line="profile resnet-18", told=("'resnet-18' is not one of", "did you mean 'resnet18'")),
    "a shape of two sides": Case(line="profile resnet18 --input 3x32", told=("--input '3x32' is no shape", "such as 3x32x32")),
    "a shape of nothing": Case(line="profile resnet18 --input 3x0x32", told=("--input '3x0x32' is no shape", "such as 3x32x32")),
    "a shape beyond all": Case(line="profile resnet18 --input 3x9x99999", told=("--input '3x9x99999' is too large", "4096")),
    "a shape of other channels": Case(line="profile tiny --no-time --input 4x32x32", told=("input of shape 1×4×32×32",)),
    "a batch of none": Case(line="profile resnet18 --batch 0", told=("--batch 0 cannot be used", "at least 1")),
    "no class": Case(line="profile tiny --num-classes 0", told=("num_classes=0 cannot be used", "at least 1")),
    "a class for every atom": Case(
        line="profile tiny --num-classes 99999999999", told=("num_classes=99999999999 cannot be used", "at most")),
    "figures into a file": Case(given=write("file"), line="profile tiny --figures file", told=("--figures file", "is a file")),
    "options that exclude": Case(line="profile tiny --json --csv", told=("--csv has no effect beside --json", "leave one")),
    # ---- the range test, the check ---------------------------------------------------------------------------------------
    "a rate that falls": Case(line="lr-range quick --from 1 --to 0.1", told=("must rise",)),
    "a rate from 0": Case(line="lr-range quick --from 0", told=("from 0 to 10", "begin above 0")),
    "a rate of nan": Case(line="lr-range quick --to nan", told=("from 1e-07 to nan", "must rise")),
    "no step": Case(line="lr-range quick --steps 0", told=("0", "at least")),
    "steps without end": Case(line="lr-range quick --steps 99999999999", told=("99999999999", "at most")),
    "no seed": Case(line="lr-range quick --seeds 0", told=("seeds=0", "a number from 1")),
    "steps and epochs": Case(line="lr-range quick --steps 9 --epochs 2", told=("steps=9 and epochs=2", "give one of them")),
    "two ways to rise": Case(line="lr-range quick --linear --exponential", told=("--exponential and --linear", "give one")),
    "a range test of that name": Case(
        given=write("ranged/lr_range.json", "{}"), line="lr-range quick --name ranged --runs-dir .",
        told=("ranged holds a range test", "--name")),
    "a setting beside a run": Case(line="check run --lr 1", told=("--lr has no effect beside a run folder", "leave it out")),
    "a std of 0": Case(line="check quick --mean 0 0 0 --std 0 0 0", told=("--std 0", "above 0")),
    # ---- studies ---------------------------------------------------------------------------------------------------------
    "no study": Case(line="study", told=("name a study", "study --list")),
    "no such study": Case(line="study learning-rat", told=("no study 'learning-rat'", "did you mean 'learning-rate'")),
    "no such field": Case(line="study schedules --set lrr=1", told=("--set lrr", "no such setting", "did you mean 'lr'")),
    "no value": Case(line="study schedules --set lr=", told=("--set 'lr=' cannot be read", "write field=value")),
    "a value of another type": Case(
        line="study schedules --set epochs=x", told=("--set epochs=x cannot be used", "of type float")),
    "a value out of range": Case(line="study learning-rate --set lr=-1,1", told=("lr=-1.0 cannot be used", "at least 0")),
    "values that repeat": Case(line="study learning-rate --set lr=1,1", told=("study learning-rate", "equal things", "repeated")),
    "seeds that repeat": Case(line="study schedules --seeds 0,0", told=("seeds=0,0 cannot be used", "all different")),
    "seeds in words": Case(line="study schedules --seeds one", told=("--seeds 'one' cannot be read", "such as 0,1,2")),
    "a seed below 0": Case(line="study schedules --seeds -1", told=("seed=-1 cannot be used", "at least 0")),
    "a budget of nan": Case(line="study schedules --budget nan", told=("--budget", "at least 0")),
    "threads without end": Case(line="study schedules --threads 9999999", told=("--threads", "1024")),
    "an unknown search": Case(
        line="study sensitivity --search grid --trials 3", told=("--search 'grid' is unknown", "must be tpe")),
    "a search without trials": Case(line="study sensitivity --search tpe", told=("--search and --trials go together",)),
    "nothing to search": Case(
        line="study schedules --search tpe --trials 2", told=("study schedules has nothing to search", "sensitivity")),
    "jobs beside a cluster": Case(line="study schedules --ray auto --jobs 2", told=("--jobs has no effect beside --ray",)),
    "no share of a GPU": Case(line="study schedules --ray auto --gpus -1", told=("--gpus -1", "at least 0")),
    "a study below a file": Case(
        given=write("file"), line=STUDY.replace("--folder studies", "--folder file"),
        told=("file/learning-rate-", "cannot be written", "another --folder")),
    "a run that is none to look into": Case(
        line="study filters --set run=images", told=("images is not a run folder", "config.json")),
}  # fmt: skip


def rewrite_state(path: Path, *, shrink: bool = False, **changes: Any) -> None:
    """The checkpoint's state with some of its values changed; shrink: momentum that is too small for its weights."""
    from cifarlab.checkpoint import load_state, save_state

    state = load_state(path)
    if shrink:
        for buffers in state["optimizer"]["state"].values():
            buffers |= {name: torch.zeros(1) for name, value in buffers.items() if value.ndim}
    for name, value in changes.items():
        state[name] = state[name] | value if isinstance(value, dict) else value
    save_state({name: value for name, value in state.items() if value is not ...}, path)


def everything(folder: Path) -> dict[str, bytes | str]:
    """What is in a folder, so that two such can be compared."""
    found: dict[str, bytes | str] = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"link to {os.readlink(path)}"
        elif path.is_file():
            found[name] = path.read_bytes()
        else:
            found[name] = "folder"
    return found


@pytest.mark.parametrize("name", CASES)
def test_bad_input(
    name: str, kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    case = CASES[name]
    words = case.line.split()
    for source in ("run", "part", "watched", "images"):
        if any(source in text for text in (*words, *case.told)) or case.given is not Case.given:
            shutil.copytree(kept / source, tmp_path / source)
    case.given(tmp_path)
    monkeypatch.chdir(tmp_path)
    for key, value in case.environment:
        monkeypatch.setenv(key, value)
    before = everything(tmp_path)
    capfd.readouterr()
    is_parser = False
    try:
        code = main(words)
    except SystemExit as left:
        code, is_parser = left.code, True
    printed = capfd.readouterr()
    said = re.sub(r"^Decoding .*\n", "", printed.err)  # what takes long is announced
    said = printed.out + said if is_parser else said
    assert code == 2, said
    assert "Traceback" not in said
    assert everything(tmp_path) == before
    if is_parser:  # its frame is of another library: several lines, which may be broken anywhere
        said = " ".join(re.sub("[─│╭╮╰╯]", " ", said).split())
    else:
        assert said.startswith("cifarlab: ")
        assert said.count("\n") == 1, said
    for fragment in case.told:
        assert fragment in said, said
    if not is_parser:
        with pytest.raises((cl.InputError, OSError)):
            main([*words, "--debug"])
        assert everything(tmp_path) == before


def test_the_table_covers_every_command() -> None:
    from cifarlab.cli import COMMANDS

    assert {case.line.split()[0] for case in CASES.values()} >= set(COMMANDS)
    assert len(CASES) >= 100
