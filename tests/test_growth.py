"""Nothing grows: not the memory over a training's steps, nor what rows cost when there are many. Counted, not by the clock."""

import gc
import math
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor, nn

import cifarlab as cl
from cifarlab import runs
from cifarlab.models import MODELS
from cifarlab.records import Measured, Table
from cifarlab.runs import Followed, Metrics, Run, RunFolder
from cifarlab.trackers import content
from cifarlab.trackers.content import Feed, Position

ALLOWED = 3.0  # objects a step; a row that is kept is some ten, and there are free lists that come and go
AT = (121, 241, 301)  # steps, each one after a flush and a measurement of the dear probes; all windows are full at the first


def test_a_training_keeps_nothing_of_its_steps(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With every probe, by the objects that Python holds, and the tensors among them. At last something is kept: it is seen."""
    import tiny_models

    passes = 0
    objects: list[int] = []
    tensors: list[int] = []
    kept: list[float] = []

    def note(module: nn.Module, _: tuple[Tensor, ...]) -> None:
        nonlocal passes
        passes += module.training
        if module.training and passes in AT:
            gc.collect()
            tensors.append(sum(issubclass(type(thing), Tensor) for thing in gc.get_objects()))
            objects.append(sys.getallocatedblocks())
        if module.training and passes > AT[1]:
            kept.extend(passes + k / 7 for k in range(8))

    def build(num_classes: int) -> nn.Module:
        model = tiny_models.tiny(num_classes)
        model.register_forward_pre_hook(note)
        return model

    monkeypatch.setitem(MODELS, "tiny", build)
    config = cl.TrainConfig(data="digits", model="tiny", train_images=64, batch_size=16, epochs=76, lr=0.01, eval_every=0)
    watch = cl.WatchConfig(runs_dir=tmp_path, progress="none", forecast=False, figures=False, probes="all", probe_every=60,
                           save_every=15, log_every=20)  # fmt: skip
    cl.train(config, watch)
    assert len(set(tensors)) == 1
    growth = [(objects[k + 1] - objects[k]) / (AT[k + 1] - AT[k]) for k in range(2)]
    assert growth[0] < ALLOWED, growth
    assert growth[1] > 2 * ALLOWED, growth  # eight numbers a step


def many_rows(count: int) -> list[dict[str, float]]:
    keys = ("lr", "momentum", "train/loss", "train/accuracy", "gradient_flow/norm", "weight_flow/norm", "update_flow/ratio")
    return [{"step": step} | {key: step + k / 8 for k, key in enumerate(keys)} for step in range(1, count + 1)]


def test_a_runs_rows_are_held_as_plain_numbers(tmp_path: Path) -> None:
    """16 bytes a value: a million rows of eight keys are 128 MB, and not the gigabyte of Python's own objects."""
    with RunFolder(tmp_path) as folder:
        folder.rows(many_rows(10_000))
    tracemalloc.start()
    metrics = Run(tmp_path).metrics
    size, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(metrics["lr"]) == 10_000
    assert size < 1.3 * 10_000 * (8 * 16 + 4)
    assert peak < 1.5 * 10_000 * (8 * 16 + 4)  # nor is more needed on the way there


def test_rows_are_a_sequence_as_a_list_is() -> None:
    rows: list[dict[str, float]] = [
        {"step": 1, "lr": 0.1, "train/loss": 2.0}, {"step": 2, "lr": 0.2, "train/loss": math.inf}, {"step": 2, "epoch": 1.0},
        {"step": 3, "lr": 0.3, "train/loss": 1.0}, {"step": 3, "train/loss": 1.5, "lr": 0.4},
    ]  # fmt: skip
    metrics = Metrics(rows)
    assert metrics.rows == rows
    assert rows == metrics.rows
    assert metrics.rows != rows[1:]
    assert [metrics.rows[k] for k in range(-5, 5)] == [rows[k] for k in range(-5, 5)]
    assert (metrics.rows[1:4:2], metrics.rows[-2:]) == (rows[1:4:2], rows[-2:])
    assert [list(row) for row in metrics.rows] == [list(row) for row in rows]  # keys in their order
    assert isinstance(metrics.rows[0]["step"], int)
    assert repr(metrics.rows) == repr(rows)
    with pytest.raises(IndexError):
        _ = metrics.rows[5]
    assert not Metrics([]).rows
    assert list(Metrics([]).rows) == []


def test_the_rows_of_evaluations_are_found_among_all() -> None:
    rows: list[dict[str, float]] = [
        {"step": 1, "lr": 0.1}, {"step": 2, "lr": 0.2}, {"step": 2, "epoch": 1.0, "test/loss": 3.0}, {"step": 3, "lr": 0.3},
        {"step": 3, "test/loss": 2.0, "epoch": 1.5, "lr": 0.4}, {"step": 4, "epoch": 2.0},
    ]  # fmt: skip
    for key in ("epoch", "lr", "test/loss", "step", "none"):
        assert Metrics(rows).rows.having(key) == [row for row in rows if key in row]
    assert Metrics().rows.having("step") == []


def test_who_follows_a_run_reads_what_is_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int] = []
    read = runs.read_rows

    def note(path: Path, start: int = 0) -> Any:
        begun.append(start)
        return read(path, start)

    monkeypatch.setattr(runs, "read_rows", note)
    path = tmp_path / "metrics.jsonl"
    followed, rows = Followed(tmp_path), many_rows(300)
    assert not followed.look().metrics.rows  # there is no such file yet
    with RunFolder(tmp_path) as folder:
        ends = [0]
        for part in (rows[:200], rows[200:250], rows[250:]):
            folder.rows(part)
            assert followed.look().metrics.rows == Run(tmp_path).metrics.rows
            ends.append(path.stat().st_size)
        assert [start for start in begun if start] == ends[1:3]
        with path.open("ab") as file:
            file.write(b'{"step": 301, "lr"')  # torn: it is looked at again when it is whole
        assert len(followed.look().metrics.rows) == 300
    path.write_bytes(path.read_bytes()[: ends[1]])
    with RunFolder(tmp_path) as folder:  # a resume that does the steps from 201 on again, and others come of it
        folder.rows([row | {"lr": 7.0} for row in rows[200:]])
        begun.clear()
        assert followed.look().metrics.rows == rows[:200] + [row | {"lr": 7.0} for row in rows[200:]]
        assert begun[0] == 0


def test_a_long_table_is_drawn_in_part() -> None:
    steps = np.arange(2, 2002, 2)
    table = Table("t", ("a", "b"), ("c",), steps, np.arange(2000, dtype=np.float32).reshape(1000, 2, 1))
    assert table.thin(1000) is table
    found = table.thin(100, steps=[7, 14, 9999], tail=3)
    places = np.searchsorted(steps, found.steps)
    assert places.tolist() == sorted({*range(9, 1000, 10), 6, 997, 998, 999})  # of step 7 there is no record
    assert np.array_equal(found.values, table.values[places])


@pytest.mark.parametrize("per_epoch", [1, 10, 1000])
def test_learning_curves_of_a_long_run_are_no_larger_than_those_of_a_short_one(per_epoch: int) -> None:
    """Steps of a watched run are its epochs; a million points were drawn of it."""
    from cifarlab.figures import draw_learning_curves
    from cifarlab.figures.curves import _epoch_means

    steps = np.arange(1, 60_001)
    train, test = (steps / per_epoch, 1 / steps), (steps[::7] / per_epoch, 2 / steps[::7])
    drawn = draw_learning_curves({"train/loss": train, "test/loss": test}).to_dict()
    points = [row for chart in drawn["hconcat"] for layer in chart["layer"] for row in layer["data"].get("values", ())]
    assert 100 < len(points) < 2 * (2 * 1000 + 600)
    if per_epoch > 1:
        numbers = np.ceil(train[0] - 1e-9)
        slow = [(train[0][numbers == k].mean(), train[1][numbers == k].mean()) for k in np.unique(numbers)[:50]]
        assert np.allclose(np.transpose(_epoch_means(*train))[:50], slow)


def test_a_mirror_of_a_long_run_takes_some_steps_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content, "AT_ONCE", 10)
    with RunFolder(tmp_path) as folder:
        folder.rows(many_rows(30))
        folder.rows([{"step": 30, "epoch": 1.0, "test/loss": 2.0}])
        folder.alarm({"rule": "stalled", "step": 12, "noticed": 15})
        folder.write_json("cost.json", {"model": "m", "layers": [], "total": {
            "parameters": 1, "forward_macs": 1, "forward_flops": 2}})  # fmt: skip
        folder.write_json("result.json", {"state": "diverged", "step": 30, "train_seconds": 1.0})
    feed = Feed(tmp_path, Position())
    parts = list(iter(feed.read, []))
    assert [len(part) for part in parts] == [10, 10, 9 + 1]
    entries = [entry for part in parts for entry in part]
    assert [entry.step for entry in entries] == list(range(1, 31))
    assert entries[-1].scalars["test/loss"] == 2.0
    assert [entry.step for entry in entries if entry.alarms] == [15]
    assert [entry.step for entry in entries if entry.sheets] == [30]  # costs and figures come with the newest


def test_a_diagnosis_looks_at_tables_step_by_step(tmp_path: Path) -> None:
    """It made a dictionary of every record of a run, 300 bytes each, before it looked at the first."""
    from cifarlab.diagnosis import Diagnosis, Facts

    steps = np.arange(1, 20_001)
    table = Measured("gradient_flow", ("w",), ("norm", "mean_abs", "max_abs", "non_finite"), steps, np.ones((len(steps), 1, 4)))
    diagnosis = Diagnosis(Facts(), {})
    tracemalloc.start()
    diagnosis.see(({"step": step, "train/loss": 1.0} for step in range(1, 20_001)), [table.table])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert diagnosis.evidence.steps("gradient_flow")[-1] == 20_000
    assert peak < 20_000 * 50
