"""W&B as a mirror: what it wrote is read from its own file, and nothing that goes wrong with it ends a training."""

import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import cifarlab as cl
from cifarlab.runs import Run
from cifarlab.trackers.wandb import Wandb, is_wanted

wandb = pytest.importorskip("wandb", reason="W&B is not installed (pip install 'cifarlab[wandb]')")

BLOCK = 32 * 1024
PLANTED = "hf_" + "a1B2" * 8


@pytest.fixture(autouse=True)
def own_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """W&B with a home of its own, no key, and nobody to ask."""
    for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "HOME"):
        (tmp_path / "home").mkdir(exist_ok=True)
        monkeypatch.setenv(name, str(tmp_path / "home"))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_PROJECT", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("W&B prompted"))
    monkeypatch.setattr("getpass.getpass", lambda *_: pytest.fail("W&B prompted"))
    yield
    wandb.teardown()  # it keeps the settings of the first use


def train(folder: Path, **watch: Any) -> Run:
    config = cl.TrainConfig(data="digits", model="tiny", train_images=96, batch_size=16, epochs=2, lr=0.05)
    settings = dict(runs_dir=folder, name="run", progress="none", forecast=False, figures=False, wandb_project="a-project")
    return cl.train(config, cl.WatchConfig(**(settings | watch)))


def read_records(run: Run) -> list[Any]:
    """The records of the run's .wandb file: 7 bytes, then LevelDB's log: blocks of 32 KiB, chunks of (crc, length, kind)."""
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.teardown()  # ends W&B's own process, which may still be writing
    [path] = (run.path / "wandb").glob("offline-run-*/*.wandb")
    content, position, joined, records = path.read_bytes(), 7, b"", []
    assert content.startswith(b":W&B")
    while position < len(content):
        if BLOCK - position % BLOCK < 7:
            position += BLOCK - position % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        joined += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, last
            records.append(Record.FromString(joined))
            joined = b""
    return records


def items(part: Any) -> dict[str, Any]:
    return {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in part}


def test_the_rows_the_config_and_the_result_are_in_the_mirror(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["cifarlab", "train", "--data-url", f"https://me:{PLANTED}@example.org"])
    run = train(tmp_path, wandb_mode="offline", wandb_name="my experiment")
    records = read_records(run)
    history = [items(record.history.item) for record in records if record.HasField("history")]
    mirrored = [{key: value for key, value in row.items() if not key.startswith("_")} for row in history]
    assert mirrored == run.metrics.rows
    assert [row["step"] for row in mirrored if "train/loss" in row] == list(range(1, 13))
    assert len([row for row in mirrored if "test/accuracy" in row]) == 2

    begun = next(record.run for record in records if record.HasField("run"))
    assert (begun.project, begun.display_name) == ("a-project", "my experiment")
    config: dict[str, Any] = {}
    for record in records:
        config |= items((record.run if record.HasField("run") else record).config.update)
    for key, value in run.config.to_dict().items():
        assert config[key] == value
    assert config["parameters"] == run.environment["parameters"]

    summary: dict[str, Any] = {}
    for record in records:
        summary |= items(record.summary.update)
    for key, value in run.result.items():
        assert summary[key] == value
    metrics = {record.metric.name or record.metric.glob_name: record.metric for record in records if record.HasField("metric")}
    assert metrics["*"].step_metric == "step"

    for path in (run.path / "wandb").rglob("*"):  # W&B itself would note the bare command line
        assert not (path.is_file() and PLANTED.encode() in path.read_bytes()), path


def test_online_without_a_key_stays_on_this_machine_and_says_so_in_one_line(
    tiny: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = train(tmp_path)
    assert run.result["state"] == "finished"
    errors = capfd.readouterr().err
    assert errors.startswith("W&B has no API key, so its files stay in")
    assert "wandb sync" in errors
    assert errors.count("\n") == 1
    assert len([record for record in read_records(run) if record.HasField("history")]) == 14


def test_the_mode_of_the_environment_holds(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_PROJECT", "of-the-environment")
    run = train(tmp_path, wandb=True, wandb_project="")
    assert capfd.readouterr().err == ""
    assert next(record.run.project for record in read_records(run) if record.HasField("run")) == "of-the-environment"


def test_a_resumed_run_goes_on_in_the_same_mirror(tmp_path: Path) -> None:
    config, watch = cl.TrainConfig(), cl.WatchConfig(wandb_mode="offline")
    ids = []
    for _ in range(2):
        mirror = Wandb(config, watch, tmp_path, {})
        mirror.close()
        ids.append((tmp_path / "wandb_id.txt").read_text())
    assert ids[0] == ids[1] != ""


def test_without_wandb_the_training_goes_on(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    run = train(tmp_path)
    assert run.result["state"] == "finished"
    assert capfd.readouterr().err.startswith("W&B is not installed (pip install 'cifarlab[wandb]'), so nothing is sent to it")


@pytest.mark.parametrize("what", ["init", "log", "update", "finish"])
def test_a_failing_mirror_is_said_once_and_the_training_goes_on(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], what: str
) -> None:
    class Failing:
        id = "abc"
        calls = 0

        def __getattr__(self, name: str) -> Any:
            if name == "summary":
                return self
            return self._fail if name == what else lambda *_, **__: None

        def _fail(self, *_: Any, **__: Any) -> None:
            self.calls += 1
            raise ConnectionError("no route\nto host")

    failing = Failing()
    monkeypatch.setattr(wandb, "init", failing._fail if what == "init" else lambda **_: failing)
    run = train(tmp_path, wandb_mode="offline")
    assert run.result["state"] == "finished"
    assert len(run.metrics["train/loss"]) == 12
    assert failing.calls == 1
    line = "W&B stopped taking rows (ConnectionError: no route to host); the run goes on and its folder has everything\n"
    assert capfd.readouterr().err == line


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, False),
        ({"wandb": True}, True),
        ({"wandb_project": "p"}, True),
        ({"wandb_name": "n"}, True),
        ({"wandb_project": "p", "wandb_name": "n", "wandb": False}, False),
    ],
)
def test_when_a_mirror_is_wanted(settings: dict[str, Any], wanted: bool) -> None:
    assert is_wanted(cl.WatchConfig(**settings)) is wanted
