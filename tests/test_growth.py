"""Nothing grows: not the memory over a training's steps, nor what rows cost when there are many. Counted, not by the clock."""

import gc
import math
import sys
import tracemalloc
from pathlib import Path

import pytest
from torch import Tensor, nn

import cifarlab as cl
from cifarlab.models import MODELS
from cifarlab.records import Measured
from cifarlab.runs import Metrics, Run, RunFolder
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
    import numpy as np

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
