"""What a power cut, a bad disk or a broken copy leaves of a run's files: each is read as far as it is whole, or one sentence says
that it is not. Never a traceback, never numbers that are not the run's."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

import cifarlab as cl
from cifarlab.checkpoint import (
    averaged_or_plain,
    find_checkpoints,
    load_checkpoint,
    load_newest,
    load_state,
    load_weights,
    save_state,
    save_weights,
)
from cifarlab.cli import main
from cifarlab.config import InputError
from cifarlab.models import MODELS
from cifarlab.runs import Run

TESTS = Path(__file__).parent
CONFIG = cl.TrainConfig(data="digits", model="tiny", train_images=96, batch_size=16, epochs=2, lr=0.05)

DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "empty": lambda content: b"",
    "one byte": lambda content: content[:1],
    "its head": lambda content: content[:64],
    "half": lambda content: content[: len(content) // 2],
    "all but one byte": lambda content: content[:-1],
    "a foreign tail": lambda content: content + b"\x00\xff{tail",
    "zeros for half": lambda content: content[: len(content) // 2] + bytes(len(content) - len(content) // 2),
    "gone": lambda content: None,
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(a finished run, the same when it had done 9 of its 12 steps and kept checkpoints of steps 3, 6 and, as the last, 9)."""
    sys.path.insert(0, str(TESTS))
    import tiny_models

    folder = tmp_path_factory.mktemp("trained")
    watch: dict[str, Any] = dict(name="run", progress="none", forecast=False, figures=False, save_every=0.5, log_every=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "tiny", tiny_models.tiny)
        whole = cl.train(CONFIG, cl.WatchConfig(runs_dir=folder / "whole", **watch))
        patch.setitem(MODELS, "tiny", tiny_models.dies_at(11, []))
        with pytest.raises(RuntimeError, match="power cut"):
            cl.train(CONFIG, cl.WatchConfig(runs_dir=folder / "cut", **watch))
    alarm = dict(rule="stalled", step=3, noticed=4, layers=[], evidence="e", cause="c", remedy="r", reference="f")
    for path in (whole.path, folder / "cut" / "run"):
        (path / "alarms.jsonl").write_text(json.dumps(alarm) + "\n")
    return whole.path, folder / "cut" / "run"


def damaged(source: Path, folder: Path, name: str, damage: str) -> Path:
    path = Path(shutil.copytree(source, folder / "run"))
    content = DAMAGES[damage]((path / name).read_bytes())
    (path / name).unlink() if content is None else (path / name).write_bytes(content)
    return path


def read(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a command that must not be surprised by anything."""
    code = main([str(word) for word in words])
    told = capsys.readouterr()
    assert code in (0, 1, 2), words
    assert "--debug" not in told.err, f"nobody has foreseen this: {told.err}"
    assert code == 0 or told.err.count("\n") == 1, told.err
    return code, told.out, told.err


FILES = ("config.json", "environment.json", "dataset.json", "metrics.jsonl", "results.csv", "probes.json", "alarms.jsonl",
         "probes/gradient_flow.rec", "cost.json", "evaluation.json", "samples.npz", "result.json")  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_read_as_far_as_it_is_whole_or_named(
    tiny: str, trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, damage: str
) -> None:
    whole, _ = trained
    path = damaged(whole, tmp_path, name, damage)
    commands = {
        "runs": ("runs", tmp_path, "--json"), "compare": ("compare", path, whole, "--json"),
        "diagnose": ("diagnose", path, "--json"), "check": ("check", path, "--json"), "sync": ("sync", path, "--tensorboard"),
    }  # fmt: skip
    said = {command: read(capsys, *words) for command, words in commands.items()}
    for command, (code, _, err) in said.items():
        if code == 2:
            assert Path(name).name in err or "no rows yet" in err or "config.json" in err, f"{command}: {err}"
    listed = json.loads(said["runs"][1])
    assert len(listed) + said["runs"][2].count("is damaged") == 1
    if listed and name not in ("result.json", "results.csv"):  # with these it has not ended, or lacks scores
        assert listed[0]["accuracy"] == Run(whole).result["test/accuracy"]
    if said["diagnose"][0] == 0 and name != "metrics.jsonl":
        assert json.loads(said["diagnose"][1])["steps"] == 12
    for line in said["check"][1].splitlines():
        assert json.loads(line)["rule"] != "test_set_chooses", "rows that are lost are no sign of cheating"


WEIGHTS = ("model.safetensors", "checkpoints/step-00000012/model.safetensors", "checkpoints/step-00000012/trainer.safetensors")


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_weights_are_never_used(trained: tuple[Path, Path], tmp_path: Path, damage: str) -> None:
    for name in WEIGHTS:
        path = damaged(trained[0], tmp_path / Path(name).parent / Path(name).stem, name, damage)
        if name.endswith(".pt") and damage == "a foreign tail":  # a zip file ends where it says so: what is in it is whole
            weights, whole = load_checkpoint((path / name).parent)[0], load_weights(trained[0] / WEIGHTS[1])
            assert all(torch.equal(weights[key], whole[key]) for key in whole)
            continue
        is_final = name == "model.safetensors"
        load, target = (load_weights, path / name) if is_final else (load_checkpoint, (path / name).parent)
        with pytest.raises(InputError, match=re.escape(str(path))):
            load(target)


@pytest.mark.parametrize("name", ["model.safetensors", "trainer.safetensors"])
def test_a_single_flipped_bit_in_a_checkpoint_is_found(trained: tuple[Path, Path], tmp_path: Path, name: str) -> None:
    """Neither format notices it: torch does not check its own file's checksums, and safetensors has none."""
    path = Path(shutil.copytree(trained[0] / "checkpoints" / "step-00000012", tmp_path / "step-00000012"))
    content = bytearray((path / name).read_bytes())
    place = len(content) * 2 // 3
    content[place] ^= 1
    (path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name}.* damaged"):
        load_checkpoint(path)


def test_weights_of_others_which_have_no_checksum_are_read(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    weights = {"a": torch.arange(3.0), "b": torch.tensor(2)}
    save_file(weights, tmp_path / "theirs.safetensors")
    save_weights(weights, tmp_path / "ours.safetensors")
    for name in ("theirs", "ours"):
        found = load_weights(tmp_path / f"{name}.safetensors")
        assert all(torch.equal(found[key], weights[key]) for key in weights)
        found["a"] += 1  # and may be changed


def test_a_file_with_a_checksum_is_laid_out_as_safetensors_does(tmp_path: Path) -> None:
    """Its header is made by hand, so that the tensors need not be laid out twice: others must read it all the same."""
    from safetensors import safe_open
    from safetensors.torch import load_file

    weights = {"naïve.ß": torch.arange(5, dtype=torch.uint8), "b": torch.rand(3, 2), "c": torch.tensor(7), "d": torch.empty(0)}
    for count in range(1, 5):
        chosen = dict(list(weights.items())[:count])
        save_weights(chosen, tmp_path / "x.safetensors")
        found = load_file(tmp_path / "x.safetensors")
        assert found.keys() == chosen.keys()
        assert all(torch.equal(found[name], chosen[name]) for name in chosen)
        content = (tmp_path / "x.safetensors").read_bytes()
        assert int.from_bytes(content[:8], "little") % 8 == 0  # so that mapped tensors are aligned
    with safe_open(tmp_path / "x.safetensors", "pt") as opened:
        assert opened.metadata()["crc32"].isdecimal()


def test_what_a_checkpoint_cannot_hold_is_refused(tmp_path: Path) -> None:
    states: list[tuple[dict[str, Any], str]] = [
        ({"a": {1.5: 2}}, "a has keys that are neither text nor whole numbers"),
        ({"a": [{1, 2}]}, "a.0 is a set, which a checkpoint cannot hold"),
        ({"a": {"b": torch.nn.ReLU()}}, "a.b is a ReLU, which a checkpoint cannot hold"),
    ]  # fmt: skip
    for state, told in states:
        with pytest.raises(TypeError, match=re.escape(told)):
            save_state(state, tmp_path / "x")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("state", ['[1]', '{"dict": [["a", {"b": 1}]]}', '{"dict": [["a", {"tensor": "none"}]]}', "7"])
def test_a_state_of_another_kind_is_no_checkpoint(tmp_path: Path, state: str) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "x", {"cifarlab": f'{{"format": 3, "state": {state}}}'})
    with pytest.raises(InputError, match=r"x cannot be read .* no checkpoint"):
        load_state(tmp_path / "x")
    with pytest.raises(InputError, match="holds no averaged weights that can be read"):
        averaged_or_plain({}, {"average": json.loads(state)})


def test_a_training_whose_best_checkpoint_is_damaged_ends_with_its_last_weights(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It ended in an error, with everything there but these."""
    loop = import_module("cifarlab.train")  # and not the function of that name
    seen: list[dict[str, float]] = []
    evaluate = loop.evaluate_splits

    def first_is_best(*arguments: Any) -> Any:
        scores, logits = evaluate(*arguments)
        seen.append(scores)
        if len(seen) == 2:  # at the last step: a disk hurts the best one now
            (best,) = (tmp_path / "run" / "checkpoints").glob("step-*")
            (best / "model.safetensors").write_bytes((best / "model.safetensors").read_bytes()[:-1])
        return scores | ({"val/accuracy": 1.0} if len(seen) == 1 else {}), logits

    monkeypatch.setattr(loop, "evaluate_splits", first_is_best)
    words = ("train", "quick", "--model", "tiny", "--train-images", "96", "--batch-size", "16", "--epochs", "2", "--no-forecast",
             "--val-fraction", "0.2", "--name", "run", "--runs-dir", tmp_path, "--progress", "none", "--no-figures")  # fmt: skip
    code, out, told = read(capsys, *words)
    run = Run(tmp_path / "run")
    steps = [int(row["step"]) for row in run.metrics.rows if "epoch" in row]
    assert code == 0
    assert told.startswith(f"cifarlab: the weights of step {steps[0]}, best on validation, are lost ({run.path / 'checkpoints'}")
    assert told.endswith(f"those of the last step, {steps[1]}, are reported instead\n")
    assert f"at the last step (on validation {100 * seen[1]['val/accuracy']:.2f} %, step {steps[1]})" in out
    assert run.result["best_lost"] == steps[0]
    assert run.result["reported_step"] == steps[1]
    assert run.result["val/accuracy"] == seen[1]["val/accuracy"]
    assert run.result["test/accuracy"] == pytest.approx(seen[1]["test/accuracy"])
    weights = load_checkpoint(run.path / "checkpoints" / f"step-{steps[1]:08d}")[0]
    final = load_weights(run.path / "model.safetensors")
    assert all(torch.equal(final[name], weights[name]) for name in weights)


# ---- a resume ------------------------------------------------------------------------------------------------------------


def resume(path: Path) -> Run:
    watch = cl.WatchConfig(runs_dir=path.parent, resume=str(path), progress="none", forecast=False, figures=False)
    return cl.train(CONFIG, watch)


def rows(run: Run) -> list[dict[str, float]]:
    return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in run.metrics.rows]


def test_the_checkpoint_before_is_kept_until_the_run_has_ended(trained: tuple[Path, Path]) -> None:
    whole, cut = trained
    assert [path.name for path in find_checkpoints(cut / "checkpoints")] == ["step-00000009", "step-00000006"]
    assert [path.name for path in find_checkpoints(whole / "checkpoints")] == ["step-00000012"]


@pytest.mark.parametrize(
    ("name", "damage"),
    [("trainer.safetensors", "half"), ("model.safetensors", "zeros for half"), ("trainer.safetensors", "gone")],
)
def test_a_resume_takes_the_checkpoint_before_a_damaged_one(
    tiny: str, trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, damage: str
) -> None:
    path = damaged(trained[1], tmp_path, f"checkpoints/step-00000009/{name}", damage)
    run = resume(path)
    told = capsys.readouterr().err
    assert told == f"cifarlab: checkpoint {path / 'checkpoints' / 'step-00000009'} is damaged: step-00000006 is taken instead\n"
    assert rows(run) == rows(Run(trained[0]))
    assert (run.path / "model.safetensors").read_bytes() == (trained[0] / "model.safetensors").read_bytes()


def test_a_resume_takes_the_checkpoint_whose_rows_are_there(
    tiny: str, trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(shutil.copytree(trained[1], tmp_path / "run"))
    lines = (path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (path / "metrics.jsonl").write_bytes(b"".join(lines[:7]) + b"\0" * 500)  # as after a power cut: room that was never filled
    run = resume(path)
    assert "lacks its rows, which end at step 6: step-00000006 is taken instead" in capsys.readouterr().err
    assert rows(run) == rows(Run(trained[0]))


def test_rows_that_no_checkpoint_can_bring_back_are_said(
    tiny: str, trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = damaged(trained[1], tmp_path, "metrics.jsonl", "one byte")
    run = resume(path)
    assert "metrics.jsonl has lost its rows of steps 1 to 9: the run goes on without them" in capsys.readouterr().err
    assert [row["step"] for row in rows(run)] == [10, 11, 12, 12]
    assert (run.path / "model.safetensors").read_bytes() == (trained[0] / "model.safetensors").read_bytes()


def test_without_a_whole_checkpoint_a_resume_says_how_to_begin_anew(
    tiny: str, trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = damaged(trained[1], tmp_path, "checkpoints/step-00000009/trainer.safetensors", "half")
    shutil.rmtree(path / "checkpoints" / "step-00000006")
    words = ("train", "--resume", path, "--progress", "none", "--no-figures")
    code, _, told = read(capsys, *words)
    assert code == 2
    assert f"no checkpoint in {path / 'checkpoints'} is whole; remove that folder, and a resume begins the run anew (" in told
    assert re.search(r"trainer\.safetensors cannot be read \(\w+\): it is damaged or no checkpoint\)\n$", told)
    shutil.rmtree(path / "checkpoints")  # as it says
    assert read(capsys, *words)[0] == 0
    assert rows(Run(path)) == rows(Run(trained[0]))


@pytest.mark.parametrize("damage", ["half", "gone"])
def test_a_resume_makes_again_what_it_can(tiny: str, trained: tuple[Path, Path], tmp_path: Path, damage: str) -> None:
    path = damaged(trained[1], tmp_path, "environment.json", damage)
    for name in ("dataset.json", "cost.json"):
        (path / name).write_bytes((path / name).read_bytes()[:40])
    run = resume(path)
    assert rows(run) == rows(Run(trained[0]))
    assert run.dataset == Run(trained[0]).dataset
    assert run.environment["num_steps"] == 12


def test_the_newest_checkpoint_where_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no checkpoint in"):
        load_newest(tmp_path)


def test_evaluate_names_the_checkpoint_that_it_has_taken(
    tiny: str, trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not the newest, where that is damaged."""
    monkeypatch.setattr("cifarlab.gallery.draw_evaluation_figures", lambda *_: None)  # which takes seconds
    path = damaged(trained[1], tmp_path, "checkpoints/step-00000009/model.safetensors", "zeros for half")
    code, out, err = read(capsys, "evaluate", path, "--device", "cpu")
    assert code == 0
    assert "has not finished: these are the scores of its checkpoint step-00000006\n" in out
    assert err.count("step-00000006 is taken instead") == 1
