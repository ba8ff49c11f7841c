"""`cifarlab runs` and `cifarlab compare`: what they print, word for word, on folders of every kind and state."""

import csv
import io
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from cifarlab import listing
from cifarlab.cli import main
from cifarlab.config import TrainConfig
from cifarlab.listing import format_runs, list_runs, shorten
from cifarlab.recipes import load_recipe
from cifarlab.runs import RunFolder

VERSIONS = {"cifarlab": "0.1.0", "torch": "2.13.0", "python": "3.11.7"}


def make_run(path: Path, config: TrainConfig, *, result: dict[str, Any] | None = None, started: str = "2026-01-31T12:00:00",
             epochs: int = 0, alarms: int = 0) -> Path:  # fmt: skip
    """A run's folder as train leaves it, as far as it got."""
    with RunFolder(path) as folder:
        folder.write_json("config.json", config.to_dict())
        folder.write_json("environment.json", {
            "num_steps": 400, "parameters": 1_146_282, "forward_macs": 80_581_632, "device": "a CPU", "threads": 2, "ranks": 1,
            "git": {"commit": "0123456789abcdef", "changed": False}, "versions": VERSIONS})  # fmt: skip
        rows = [{"step": 100.0 * k, "epoch": float(k), "test/accuracy": 0.5 + k / 100, "time/train_seconds": 61.0 * k}
                for k in range(1, epochs + 1)]  # fmt: skip
        folder.rows([row for k, evaluation in enumerate(rows) for row in (
            *({"step": 100.0 * k + i, "train/loss": 1.0} for i in range(1, 101)), evaluation)])  # fmt: skip
        if rows:
            folder.results(rows)
        for k in range(alarms):
            folder.alarm({"rule": f"rule {k}", "step": 1, "noticed": 20})
        if result:
            folder.write_json("result.json", result)
            macro = {"f1": 0.8, "recall": 0.81, "precision": 0.79} if "test/accuracy" in result else None
            folder.write_json("evaluation.json", {"split": "test", "macro": macro})
    os.utime(path / "config.json", (datetime.fromisoformat(started).timestamp(),) * 2)
    return path


def finished(accuracy: float, seconds: float) -> dict[str, Any]:
    return {"state": "finished", "step": 400, "test/loss": 0.5123, "test/accuracy": accuracy, "test/top5": 0.99,
            "val/accuracy": None, "train_seconds": seconds, "probe_share": 0.012}  # fmt: skip


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    folder = tmp_path / "runs"
    cnn, big = load_recipe("simplecnn-adam"), load_recipe("resnet18-cosine")
    make_run(folder / "simplecnn-adam-1a2b3c-20260131-120000", cnn, result=finished(0.8454, 4980.2), epochs=4)
    make_run(folder / "simplecnn-adam-9f8e7d-20260201-090000", replace(cnn, lr=0.01), epochs=2, alarms=3,
             started="2026-02-01T09:00:00", result={"state": "diverged", "step": 217, "train_seconds": 130.0})  # fmt: skip
    make_run(folder / "resnet18-cosine-0d0d0d-20260202-100000", big, epochs=3, started="2026-02-02T10:00:00")
    make_run(folder / "tried", replace(cnn, recipe="custom", data="my-images"), started="2026-01-01T00:00:00")
    return folder


def test_runs_are_listed_newest_first(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunFolder(runs / "resnet18-cosine-0d0d0d-20260202-100000"):  # a training holds it
        assert main(["runs", str(runs)]) == 0
    assert capsys.readouterr().out == """\
run                           recipe  model       data       accuracy     time  state         alarms
resnet18-cosi…0260202-100000          resnet18    cifar10     53.00 %  0:03:03  running 75 %
simplecnn-ada…0260201-090000          simple_cnn  cifar10     52.00 %  0:02:10  diverged           3
simplecnn-ada…0260131-120000          simple_cnn  cifar10     84.54 %  1:23:00  finished
tried                         custom  simple_cnn  my-images                     interrupted
"""


@pytest.mark.parametrize(
    ("by", "first_words"),
    [
        ("accuracy", ["simplecnn-adam-1a2b3c", "resnet18-cosine-0d0d0d", "simplecnn-adam-9f8e7d", "tried"]),
        ("time", ["simplecnn-adam-9f8e7d", "resnet18-cosine-0d0d0d", "simplecnn-adam-1a2b3c", "tried"]),
        ("name", ["resnet18-cosine-0d0d0d", "simplecnn-adam-1a2b3c", "simplecnn-adam-9f8e7d", "tried"]),
        ("started", ["resnet18-cosine-0d0d0d", "simplecnn-adam-9f8e7d", "simplecnn-adam-1a2b3c", "tried"]),
    ],
)
def test_sorted(runs: Path, by: str, first_words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(runs), "--sort", by, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [run["name"][:22].rstrip("-") for run in found] == first_words
    assert main(["runs", str(runs), "--sort", by, "--csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["name"] for row in rows] == [run["name"] for run in found]
    assert rows[first_words.index("simplecnn-adam-1a2b3c")]["accuracy"] == "0.8454"


def test_what_each_run_is(runs: Path) -> None:
    with RunFolder(runs / "resnet18-cosine-0d0d0d-20260202-100000"):
        found = {run.name.split("-")[0] + run.state: run for run in list_runs(runs)[0]}
    assert set(found) == {"simplecnnfinished", "simplecnndiverged", "resnet18running", "triedinterrupted"}
    running = found["resnet18running"]
    assert (running.accuracy, running.train_seconds, running.step, running.num_steps) == (0.53, 183.0, 300, 400)
    diverged = found["simplecnndiverged"]
    assert (diverged.alarms, diverged.accuracy, diverged.step) == (3, 0.52, 217)
    assert (found["triedinterrupted"].accuracy, found["triedinterrupted"].step) == (None, 0)


def test_damaged_folders_are_named_and_the_rest_is_listed(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (runs / "not-a-run").mkdir()
    (runs / "a-file").write_text("")
    for name, file, content in (
        ("torn", "config.json", b'{"recipe": "x'), ("empty", "config.json", b""), ("list", "config.json", b"[1]"),
        ("binary", "config.json", bytes(range(256))), ("without", "config.json", b"{}"), ("deep", "config.json", b"[" * 100_000),
        ("half", "result.json", b'{"state": "finished"}'),
    ):  # fmt: skip
        (runs / name).mkdir()
        (runs / name / file).write_bytes(content)
    bad = make_run(runs / "bad-rows", load_recipe("quick"))
    (bad / "metrics.jsonl").write_bytes(b"\x00\x01\n\xff\n")
    assert main(["runs", str(runs)]) == 0
    told = capsys.readouterr()
    assert told.out.count("\n") == 5
    lines = told.err.splitlines()
    assert len(lines) == 8
    for name in ("torn", "empty", "list", "binary", "without", "deep", "half", "bad-rows"):
        [line] = [line for line in lines if line.startswith(f"cifarlab: {runs / name} is damaged (")]
        assert line.endswith("): left out")


def test_a_folder_without_runs_and_one_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"there is no run in {tmp_path} yet\n"
    assert main(["runs", str(tmp_path / "none")]) == 2
    assert "there is no folder" in capsys.readouterr().err


def test_a_watched_run_is_listed_too(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "mine") as folder:
        folder.write_json("watch.json", {"model": "MyNet", "optimizers": []})
        folder.rows([{"step": 7.0, "lr": 0.1}])
        [run] = list_runs(tmp_path)[0]
    assert (run.recipe, run.model, run.state, run.step) == ("(watched)", "MyNet", "running", 7)


def test_long_names_fit_into_a_hundred_columns(tmp_path: Path) -> None:
    data = "/a/path/to/" + "images/" * 12
    config = replace(load_recipe("resnet34-cifar100"), recipe="a-recipe-of-my-own-with-a-long-name", data=data)
    for name in ("a" * 120, "resnet34-cifar100-1a2b3c-20260131-120000", "x"):
        make_run(tmp_path / name, config, result=finished(0.7, 200_000.0), alarms=2)
    table = format_runs(list_runs(tmp_path)[0])
    assert max(map(len, table.splitlines())) == 100
    assert "55:33:20" in table
    assert shorten("resnet34-cifar100-1a2b3c-20260131-120000", 30) == "resnet34-cifar…20260131-120000"


def test_five_hundred_runs_without_torch(tmp_path: Path) -> None:
    one = make_run(tmp_path / "run-000", load_recipe("quick"), result=finished(0.5, 10.0), epochs=4, alarms=1)
    for k in range(1, 500):
        shutil.copytree(one, tmp_path / f"run-{k:03}")
    assert len(list_runs(tmp_path)[0]) == 500  # 0.1 s on an idle machine
    code = (f"from cifarlab.cli import main; import sys; main(['runs', {str(tmp_path)!r}]); "
            "sys.exit(str({'torch', 'pandas', 'altair'} & set(sys.modules) or ''))")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.count("\n") == 501
    assert done.stderr == "\n" or not done.stderr


# ---- compare -------------------------------------------------------------------------------------------------------------


def test_compare_prints_what_differs_and_all_results(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = (runs / f"simplecnn-adam-{name}" for name in ("1a2b3c-20260131-120000", "9f8e7d-20260201-090000"))
    assert main(["compare", str(first), str(second)]) == 0
    assert capsys.readouterr().out == f"""\
A  {first}
B  {second}

differing settings      A     B
lr                  0.001  0.01

results                     A           B
state                finished    diverged
step                      400         217
test/accuracy         84.54 %     52.00 %
test/loss              0.5123           –
test/top5             99.00 %           –
probe_share            1.20 %           –
test/macro_f1         80.00 %           –
test/macro_recall     81.00 %           –
train_seconds         1:23:00     0:02:10
alarms                      0           3
parameters          1,146,282   1,146,282
forward_macs       80,581,632  80,581,632
"""


def test_compare_as_json_and_csv(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [str(runs / "simplecnn-adam-1a2b3c-20260131-120000"), str(runs / "tried")]
    assert main(["compare", *paths, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["runs"] == paths
    assert found["settings"] == {"recipe": ["simplecnn-adam", "custom"], "data": ["cifar10", "my-images"]}
    assert found["results"]["test/accuracy"] == [0.8454, None]
    assert main(["compare", *paths, "--csv"]) == 0
    rows = list(csv.reader(io.StringIO(capsys.readouterr().out)))
    assert rows[0] == ["kind", "name", *paths]
    assert ["setting", "data", "cifar10", "my-images"] in rows


def test_compare_names_another_machine_and_other_versions(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = runs / "simplecnn-adam-1a2b3c-20260131-120000", make_run(runs / "again", load_recipe("simplecnn-adam"))
    path = second / "environment.json"
    environment = json.loads(path.read_bytes())
    path.write_text(json.dumps(environment | {"device": "a GPU", "versions": VERSIONS | {"torch": "2.14.0"}}))
    assert main(["compare", str(first), str(second)]) == 0
    table = capsys.readouterr().out.split("\n\n")[1]
    assert [line.split() for line in table.splitlines()[1:]] == [
        ["(device)", "a", "CPU", "a", "GPU"], ["(torch)", "2.13.0", "2.14.0"]]  # fmt: skip


def test_many_runs_are_compared_in_blocks(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quick = load_recipe("quick")
    paths = [str(make_run(runs / f"lr-{k}", replace(quick, lr=0.001 * k), result=finished(0.9, 1.0))) for k in range(1, 31)]
    assert main(["compare", *paths]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines[32:])) <= 100
    shown = [word for line in lines if line.startswith("lr") for word in line.split()[1:]]
    assert len(shown) == 30
    assert any(line.split()[:1] == ["AD"] for line in lines)


@pytest.mark.parametrize(("given", "told"), [(["one"], "two run folders or more"), (["one", "none"], "there is no run folder"),
                                             (["one", "torn"], "damaged or no run folder")])  # fmt: skip
def test_what_cannot_be_compared_is_said(tmp_path: Path, given: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "one", load_recipe("quick"))
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "config.json").write_text("{")
    assert main(["compare", *(str(tmp_path / name) for name in given)]) == 2
    assert told in capsys.readouterr().err


def test_a_copy_was_begun_when_the_run_was(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", load_recipe("quick"), result=finished(0.5, 10.0))
    told = json.loads((path / "environment.json").read_text()) if (path / "environment.json").exists() else {}
    for begun, shown in (("2026-01-31 12:00:00", "2026-01-31 12:00:00"), (None, ""), (7, ""), ("yesterday", "")):
        (path / "environment.json").write_text(json.dumps(told | {"begun": begun}))
        os.utime(path / "config.json", (1e9, 1e9))
        (run,), _ = list_runs(tmp_path)
        assert run.started == shown or (not shown and run.started.startswith("2001-09-09"))


def test_the_last_evaluation_is_found_from_the_end_of_many(tmp_path: Path) -> None:
    """And a line that a kill has torn is none."""
    path = tmp_path / "results.csv"
    for count in (0, 1, 2, 30_000):
        lines = ["step,test/accuracy,val/loss", *(f"{k},0.{k:06},," for k in range(1, count + 1))]
        for torn in ("", f"{count + 1},0.9"):
            path.write_text("\n".join(lines) + "\n" + torn)
            found = listing._last_scores(path)
            assert found == ({"step": f"{count}", "test/accuracy": f"0.{count:06}", "val/loss": None} if count else {})
    path.write_text("step,test/accuracy")
    assert listing._last_scores(path) == {}
    path.write_text("step\n1\n" + "2" * 200_000 + "\n")
    with pytest.raises(ValueError, match="too long"):
        listing._last_scores(path)
