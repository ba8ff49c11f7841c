"""What W&B and TensorBoard wrote, read back from their own files: W&B's by a decoder of its own, TensorBoard's by its reader."""

import json
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BLOCK = 32 * 1024


@dataclass
class WandbFile:
    """history: W&B's step -> row; order: the steps as they were written; files of media are under `folder`."""

    history: dict[int, dict[str, Any]] = field(default_factory=dict)
    order: list[int] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    alerts: list[Any] = field(default_factory=list)
    artifacts: list[Any] = field(default_factory=list)
    runs: list[Any] = field(default_factory=list)
    exit_codes: list[int] = field(default_factory=list)
    preemptions: int = 0
    folders: list[Path] = field(default_factory=list)

    def media(self, value: dict[str, Any]) -> Path:
        [found] = [folder / "files" / value["path"] for folder in self.folders if (folder / "files" / value["path"]).exists()]
        return found

    def table(self, value: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
        content = json.loads(self.media(value).read_text())
        return content["columns"], content["data"]


def read_wandb(run: Path, *, whole: bool = True) -> WandbFile:
    """All offline files of a run, in order: 7 bytes, then LevelDB's log: blocks of 32 KiB, chunks of (crc, length, kind).

    whole: no file is cut off, as it is where the disk was full.
    """
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.teardown()  # ends W&B's own process, which may still be writing
    found = WandbFile()
    for path in sorted(run.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        found.folders.append(path.parent)
        content, position, joined = path.read_bytes(), 7, b""
        assert content.startswith(b":W&B")
        while position < len(content):
            if BLOCK - position % BLOCK < 7:
                position += BLOCK - position % BLOCK
                continue
            _, length, kind = struct.unpack_from("<IHB", content, position)
            if not whole and position + 7 + length > len(content):
                break
            joined += content[position + 7 : position + 7 + length]
            position += 7 + length
            if kind in (1, 4):  # whole, last
                _take(found, Record.FromString(joined))
                joined = b""
    return found


def _take(found: WandbFile, record: Any) -> None:
    kind = record.WhichOneof("record_type")
    if kind == "history":
        row = {key: value for key, value in _items(record.history.item).items() if not key.startswith("_")}
        step = record.history.step.num
        assert step not in found.history, f"W&B got step {step} twice"
        found.history[step] = row
        found.order.append(step)
    elif kind == "run":
        found.runs.append(record.run)
        found.config |= _items(record.run.config.update)
    elif kind == "config":
        found.config |= _items(record.config.update)
    elif kind == "summary":
        found.summary |= _items(record.summary.update)
    elif kind == "metric":
        found.metrics[record.metric.name or record.metric.glob_name] = record.metric
    elif kind == "alert":
        found.alerts.append(record.alert)
    elif kind == "artifact":
        found.artifacts.append(record.artifact)
    elif kind == "preempting":
        found.preemptions += 1
    elif kind == "exit":
        found.exit_codes.append(record.exit.exit_code)


def _items(part: Any) -> dict[str, Any]:
    """W&B writes a nested object as one item a leaf."""
    found: dict[str, Any] = {}
    for item in part:
        *outer, last = list(item.nested_key) or [item.key]
        place = found
        for key in outer:
            place = place.setdefault(key, {})
        place[last] = json.loads(item.value_json)
    return found


def read_tensorboard(run: Path) -> Any:
    """TensorBoard's own reader over the run's files, keeping everything."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(run / "tensorboard"), size_guidance=dict.fromkeys(
        ("scalars", "images", "histograms", "tensors", "compressedHistograms"), 0))  # fmt: skip
    reader.Reload()
    return reader
