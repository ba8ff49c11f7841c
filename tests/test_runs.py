"""Run folders: a crash may tear what it likes, and what is read back is what was written."""

import errno
import json
import math
import os
import subprocess
import sys
from datetime import datetime, tzinfo
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cifarlab import runs
from cifarlab.config import Failure, InputError, TrainConfig
from cifarlab.runs import (
    Run,
    RunFolder,
    check_entries,
    claim_folder,
    find_unfinished,
    is_torn_start,
    load_run,
    write_atomically,
)

ROWS = [
    {"step": 1, "train/loss": 2.5, "lr": 0.1},
    {"step": 2, "train/loss": 1.25, "lr": 0.05},
    {"step": 2, "epoch": 1.0, "test/loss": 2.0},
]


def written(path: Path, rows: list[dict[str, float]] = ROWS) -> bytes:
    with RunFolder(path) as folder:
        folder.rows(rows)
    return (path / "metrics.jsonl").read_bytes()


def test_rows_come_back_as_columns(tmp_path: Path) -> None:
    written(tmp_path / "run")
    metrics = Run(tmp_path / "run").metrics
    assert list(metrics) == ["step", "train/loss", "lr", "epoch", "test/loss"]
    assert len(metrics) == 5
    np.testing.assert_array_equal(metrics["train/loss"], [2.5, 1.25])
    np.testing.assert_array_equal(metrics.steps("test/loss"), [2])
    assert metrics.rows == ROWS
    assert "3 rows of step, train/loss" in repr(metrics)


def test_a_last_line_torn_at_any_byte_is_passed_over_and_cut_off(tmp_path: Path) -> None:
    """Also one that lacks nothing but its line end: the next row would otherwise be written on the same line."""
    whole = written(tmp_path / "run")
    path = tmp_path / "run" / "metrics.jsonl"
    start = whole.rindex(b"\n", 0, -1) + 1
    for end in range(start, len(whole)):
        path.write_bytes(whole[:end])
        assert Run(path.parent).metrics.rows == ROWS[:2], whole[start:end]
        with RunFolder(path.parent) as folder:
            folder.forget_after(2)
            folder.rows(ROWS[2:])
        assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "line", [b'{"step": 1', b"\xff\xfe", b"[1, 2]", b'{"lr": 1}', b'{"step": "x"}', b'{"step": 1e999}', b"[" * 9999], ids=range(7)
)
def test_a_damaged_row_inside_is_not_passed_over(tmp_path: Path, line: bytes) -> None:
    written(tmp_path)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(line + b"\n" + path.read_bytes())
    with pytest.raises(InputError, match=r"metrics.jsonl has a damaged row at byte 0: remove that line"):
        _ = Run(tmp_path).metrics


def test_values_that_are_not_finite_come_back(tmp_path: Path) -> None:
    line = written(tmp_path, [{"step": 1, "a": math.nan, "b": math.inf, "c": -math.inf}])
    json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    row = Run(tmp_path).metrics.rows[0]
    assert math.isnan(row["a"])
    assert (row["b"], row["c"]) == (math.inf, -math.inf)
    with RunFolder(tmp_path) as folder:
        folder.write_json("result.json", {"state": "diverged", "losses": [math.nan, (1.0, math.inf)]})
    assert Run(tmp_path).result["losses"] == ["nan", [1.0, "inf"]]


@pytest.mark.parametrize(("step", "kept"), [(0, 0), (1, 1), (2, 3), (9, 3)])
def test_rows_after_a_step_are_forgotten(tmp_path: Path, step: int, kept: int) -> None:
    written(tmp_path)
    with RunFolder(tmp_path) as folder:
        folder.forget_after(step)
        folder.rows([{"step": step + 1}])
    assert Run(tmp_path).metrics.rows == [*ROWS[:kept], {"step": step + 1}]


def test_one_process_holds_a_folder(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from cifarlab.runs import RunFolder; RunFolder(Path(sys.argv[1]))"
    with RunFolder(tmp_path):
        other = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, timeout=60)
    assert other.returncode == 1
    assert "is in use by another process: wait for it, or choose another --name" in other.stderr
    RunFolder(tmp_path).close()  # it is free again


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"folder .*file/run cannot be written \(Not a directory\): choose another --runs-dir"):
        RunFolder(tmp_path / "file" / "run")


def test_results_csv_has_a_column_for_every_key(tmp_path: Path) -> None:
    with RunFolder(tmp_path) as folder:
        folder.results([{"step": 1, "lr": 0.5}, {"step": 2, "val/loss": 1.5}])
    assert (tmp_path / "results.csv").read_text() == "step,lr,val/loss\n1,0.5,\n2,,1.5\n"


def test_results_csv_is_added_to_and_written_anew_for_a_new_column_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was written whole at every evaluation, and so took as long as all that had come before."""
    path = tmp_path / "results.csv"
    path.write_text("of a run before\n1")  # torn; a resume begins anew with all rows that are there
    first, second, third, fourth = ({"step": k, "epoch": k / 4, "test/loss": 1 / k} for k in range(1, 5))
    with RunFolder(tmp_path) as folder:
        folder.results([first, second])
        before = path.stat().st_ino
        folder.results([third])
        assert path.stat().st_ino == before  # the same file: not replaced
        assert path.read_text() == f"step,epoch,test/loss\n1,0.25,1.0\n2,0.5,0.5\n3,0.75,{1 / 3}\n"

        def full(*_: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            for row in (fourth | {"val/loss": 2.0}, {"step": 5}):  # for these the file has to be written anew
                with pytest.raises(OSError, match="No space left"):
                    folder.results([row])
        assert path.read_text().count("\n") == 4
        folder.results([{"step": 6}])  # now there is room
        lines = path.read_text().splitlines()
    assert lines[0] == "step,epoch,test/loss,val/loss"
    assert lines[3:] == [f"3,0.75,{1 / 3},", "4,1.0,0.25,2.0", "5,,,", "6,,,"]


def test_results_csv_that_cannot_be_opened_again_loses_no_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_many(_: Path) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    with RunFolder(tmp_path) as folder:
        folder.results([{"step": 1}])
        with monkeypatch.context() as patch:
            patch.setattr("cifarlab.runs.Appender", too_many)
            with pytest.raises(OSError, match="Too many open files"):
                folder.results([{"step": 2, "lr": 0.5}])
        folder.results([{"step": 3}])
        folder.results([{"step": 4}])
    assert (tmp_path / "results.csv").read_text() == "step,lr\n1,\n2,0.5\n3,\n4,\n"


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_content_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    write_atomically(tmp_path / "x.json", b"old")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, function, full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(tmp_path / "x.json", b"new")
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"x.json": b"old"}
    write_atomically(tmp_path / "x.json", b"new")
    assert (tmp_path / "x.json").read_bytes() == b"new"


def begun(path: Path, config: TrainConfig, *, at: int, finished: bool = False) -> Path:
    with RunFolder(path) as folder:
        folder.write_json("config.json", config.to_dict())
        if finished:
            folder.write_json("result.json", {"state": "finished"})
    os.utime(path / "config.json", (at, at))
    return path


def test_the_newest_unfinished_run_of_an_equal_config_is_found(tmp_path: Path) -> None:
    config = TrainConfig(seed=3)
    assert find_unfinished(tmp_path / "none", config) is None
    begun(tmp_path / "old", config, at=100)
    newest = begun(tmp_path / "a-newer", TrainConfig(seed=3, recipe="another label"), at=200)
    begun(tmp_path / "done", config, at=300, finished=True)
    begun(tmp_path / "other", TrainConfig(seed=4), at=400)
    for number, content in enumerate([b"", b'{"see', b"[]", b'{"model_type": "bert"}', b'{"seed": "3"}', b"\xff\0"]):
        (tmp_path / f"junk-{number}").mkdir()
        (tmp_path / f"junk-{number}" / "config.json").write_bytes(content)
    (tmp_path / "folder" / "config.json").mkdir(parents=True)
    (tmp_path / "a file").write_text("")
    found = find_unfinished(tmp_path, config)
    assert found is not None
    assert found.path == newest
    assert find_unfinished(tmp_path, TrainConfig(seed=5)) is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is not a run folder: it has no config.json"),
        (b'{"seed"', "config.json cannot be read as JSON"),
        (b"[]", "config.json holds no JSON object: the run folder is damaged"),
        (b'{"sed": 1}', "TrainConfig has no field 'sed'; did you mean 'seed'?"),
    ],
)
def test_what_is_no_run_is_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(InputError) as caught:
        load_run(tmp_path)
    assert message in str(caught.value)


def test_a_missing_run_and_a_missing_part_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is no run folder .*nope"):
        load_run(tmp_path / "nope")
    run = load_run(begun(tmp_path / "run", TrainConfig(), at=1))
    assert not run.is_finished
    assert (run.result, run.evaluation, len(run.metrics)) == ({}, {}, 0)
    with pytest.raises(InputError, match=r"dataset.json is missing: the run folder is not whole"):
        _ = run.dataset
    assert "not finished" in repr(run)


def test_a_runs_name_says_what_it_is(tmp_path: Path) -> None:
    config = TrainConfig(recipe="quick")
    assert claim_folder(tmp_path / "runs", config).name.startswith(f"quick-{config.hash[:6]}-20")


def test_two_runs_of_one_second_have_two_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one second by the clock: it may have been put back meanwhile."""

    class Stopped(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> "Stopped":
            return cls(2026, 10, 25, 2, 30)

    monkeypatch.setattr(runs, "datetime", Stopped)
    names = [claim_folder(tmp_path, TrainConfig(recipe="quick")).name for _ in range(3)]
    assert names[0].endswith("-20261025-023000")
    assert names[1:] == [f"{names[0]}-2", f"{names[0]}-3"]


@pytest.mark.skipif(not Path("/sys").is_dir(), reason="needs a folder in which nobody may write")
@pytest.mark.parametrize("where", ["/sys/runs", "file/runs"])
def test_a_runs_folder_that_cannot_be_made_is_told(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").touch()
    runs_dir = tmp_path / where  # an absolute one stays as it is
    with pytest.raises(InputError, match="choose another --runs-dir"):
        claim_folder(runs_dir, TrainConfig())
    with pytest.raises(InputError, match="choose another --runs-dir"):
        RunFolder(runs_dir / "run")


def test_remains_of_a_killed_writer_are_cleared(tmp_path: Path) -> None:
    for name in (".config.json.7.tmp", "figures/.lr.png.7.tmp", "checkpoints/.step-00000004.7.tmp/trainer.safetensors"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "mirrors").mkdir()
    (tmp_path / "mirrors" / ".wandb.json.7.tmp").touch()  # perhaps of a `cifarlab sync` that is at work
    written(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob(".*.tmp")) == [".wandb.json.7.tmp"]


def test_a_folder_whose_run_died_before_its_config_was_written_counts_as_empty(tmp_path: Path) -> None:
    assert is_torn_start(tmp_path)
    with RunFolder(tmp_path):
        pass
    (tmp_path / ".config.json.7.tmp").touch()
    assert is_torn_start(tmp_path)
    (tmp_path / "notes.txt").touch()
    assert not is_torn_start(tmp_path)
    (tmp_path / "notes.txt").unlink()
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    assert not is_torn_start(tmp_path)


def test_a_folder_that_is_moved_or_removed_is_noticed(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run") as folder:
        folder.check_is_there()
        (tmp_path / "run").rename(tmp_path / "elsewhere")
        with pytest.raises(Failure, match=r"run folder .*run was moved or removed .*: put it back"):
            folder.check_is_there()


def test_alarms_that_a_full_disk_did_not_take_are_written_before_a_checkpoint(tmp_path: Path) -> None:
    with RunFolder(tmp_path) as folder:
        folder.alarm({"rule": "stalled", "step": 1})
        assert folder._alarms
        folder._alarms._kept = b'{"rule": "exploding", "step": 2}\n'  # as after an OSError
        folder.sync()
        assert [alarm["step"] for alarm in Run(tmp_path).alarms] == [1, 2]


def test_a_file_that_a_running_run_renames_meanwhile_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "result.json").write_text("{}")
    monkeypatch.setattr(runs.os, "walk", lambda path: [(str(path), [], [".result.json.7.tmp", "result.json"])])
    check_entries(tmp_path)


def test_only_the_log_of_wandbs_own_program_may_lie_elsewhere(tmp_path: Path) -> None:
    run = tmp_path / "run"
    logs = run / "wandb" / "offline-run-20260131_120000-abc" / "logs"
    logs.mkdir(parents=True)
    (logs / "debug-core.log").symlink_to(tmp_path / "cache.log")
    check_entries(run)
    for other in (run / "debug-core.log", logs / "debug.log", run / "wandb" / "latest-run"):
        other.symlink_to(tmp_path)
        with pytest.raises(InputError, match="leads out of the run folder"):
            check_entries(run)
        other.unlink()
