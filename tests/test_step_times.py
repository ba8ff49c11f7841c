"""The line before a run that says how long it takes: measured at the first start, recalled at the second."""

import json
from pathlib import Path

import pytest
import torch

import cifarlab as cl
from cifarlab.config import TrainConfig, WatchConfig
from cifarlab.data.batches import Batches
from cifarlab.models import create_model
from cifarlab.recipes import load_recipe
from cifarlab.trackers import open as opening
from cifarlab.trackers.step_times import FILE, KEPT, VALID, StepTimes, note_times, recall_times


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes whose steps were measured; each takes a hundredth of a second."""
    shapes: list[tuple[int, ...]] = []

    def measure(model: object, config: object, shape: tuple[int, ...], *_: object, **__: object) -> float:
        shapes.append(shape)
        return 0.01

    monkeypatch.setenv("CIFARLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(opening, "measure_step", measure)
    return shapes


def tell(config: TrainConfig, probes: str = "default", step: int = 0) -> str:
    dataset, device = cl.load_dataset("digits"), torch.device("cpu")
    batches = Batches(dataset.train, config, num_classes=10, mean=dataset.mean, std=dataset.std, device=device)
    lines = opening.forecast(config, WatchConfig(probes=probes), batches, create_model("simple_cnn", 10), step, device)
    return "".join(lines[:1])


def test_a_second_start_of_such_steps_measures_nothing(measured: list[tuple[int, ...]]) -> None:
    config = load_recipe("quick", epochs=100)
    first = tell(config)
    assert measured == [(3, 32, 32)]
    assert "as measured" not in first
    again = tell(config)
    assert measured == [(3, 32, 32)]
    assert again.partition(" on this")[0] == first.partition(" on this")[0] == "  time    about 23.0 s"
    assert "on this machine, as measured at " in again
    assert "as measured" in tell(load_recipe("quick", epochs=50, lr=0.1, seed=3))
    for changes in ({}, {"batch_size": 32}, {"small_sides": "16:0.5"}):
        other = load_recipe("quick", epochs=100, **changes)
        assert "as measured" not in tell(other, probes="none")
    assert measured[1:] == [(3, 32, 32), (3, 32, 32), (3, 16, 16), (3, 32, 32)]


def test_what_is_old_damaged_or_cannot_be_written_is_measured_anew(measured: list[tuple[int, ...]], tmp_path: Path) -> None:
    config = load_recipe("quick", epochs=100)
    tell(config)
    file = tmp_path / "cache" / FILE
    ((name, entry),) = json.loads(file.read_text()).items()
    times = recall_times(name, 1)
    assert times == StepTimes((0.01,), tuple(entry["flops"]), entry["measured"])
    assert recall_times(name, 1, now=entry["measured"] + VALID - 1) == times
    assert recall_times(name, 1, now=entry["measured"] + VALID) is None
    assert recall_times(name, 1, now=entry["measured"] - 1) is None  # by a clock that was put back
    assert recall_times(name, 2) is None
    wrong = [{"seconds": [-1.0]}, {"seconds": ["x"]}, {"seconds": 3}, {"seconds": [float("nan")]}, {"flops": []}, {"flops": [0]},
             {"measured": "now"}]  # fmt: skip
    for damaged in ["{", "[1]", "null", *(json.dumps({name: entry | change}) for change in wrong), json.dumps({name: 7})]:
        file.write_text(damaged)
        assert recall_times(name, 1) is None
        assert "as measured" not in tell(config)
        assert recall_times(name, 1) is not None
    file.unlink()
    file.mkdir()
    assert "as measured" not in tell(config)


def test_nothing_is_told_where_nothing_is_left(measured: list[tuple[int, ...]]) -> None:
    config = load_recipe("quick", epochs=100)
    assert tell(config, step=2300) == ""  # killed between the last step and the evaluation


def test_only_the_newest_are_kept(measured: list[tuple[int, ...]], tmp_path: Path) -> None:
    for number in range(KEPT + 5):
        note_times(str(number), StepTimes((1.0,), (1.0,), float(number + 1)))
    kept = json.loads((tmp_path / "cache" / FILE).read_text())
    assert set(kept) == {str(number) for number in range(5, KEPT + 5)}
