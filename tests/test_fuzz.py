"""Fuzzing: whatever is done to a file of ours, its reader gives an answer or an InputError, at once and in bounded memory.

Each reader gets a sound file and damaged versions of it: bytes flipped, cut out, put in, repeated, and, where it is JSON, values
replaced by others. In a test run the same few dozen for each reader; `make fuzz` (`python tests/test_fuzz.py SECONDS [READER …]`)
goes on with new ones as long as it is told, and shows the first failure with the smallest damage that brings it about.
"""

import copy
import gzip
import io
import json
import pickle
import random
import resource
import struct
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from PIL import Image

from cifarlab.analysis.grid import GridFile, read_landscape
from cifarlab.checkpoint import load_state, load_weights, save_state, save_weights
from cifarlab.config import InputError, TrainConfig
from cifarlab.data.cifar import CIFAR10, _read_archive, _read_python
from cifarlab.data.folder import read_image
from cifarlab.data.parquet import read_parquet
from cifarlab.diagnosis import diagnose_run
from cifarlab.evaluate import build_evaluation, load_evaluation, load_samples, save_evaluation, save_samples
from cifarlab.listing import compare_runs, format_runs, list_runs
from cifarlab.lr_curve import Curve, LrRange, load_range
from cifarlab.recipes import load_recipe
from cifarlab.records import TableWriter, forget_after, read_table
from cifarlab.runs import Run, RunFolder, load_run
from cifarlab.studies import STUDIES
from cifarlab.studies.plan import load_results, make_plan
from cifarlab.trackers.content import check_content
from cifarlab.train import State

EXAMPLES = 40  # of each reader in a test run
ROUND = 100  # of each reader before the next one has its turn, in `make fuzz`
ROOM = 500 << 20  # bytes that reading damaged versions of a small file may take
Damage = Callable[[bytes], bytes]

HOSTILE = st.one_of(
    st.sampled_from([None, True, -1, 0, 2**70, 1e308, float("inf"), float("nan"), "", "x", "nan", "../x", "9" * 5000]),
    st.sampled_from([[], {}, [[]], [None], {"a": 1}, ["x"] * 3, [0, 0, 0]]),
    st.integers(-(2**63), 2**63), st.text(max_size=4),
)  # fmt: skip


def flips(data: st.DataObject, content: bytes) -> bytes:
    """The content with one to four stretches of it changed."""
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        at, length = data.draw(st.integers(0, len(changed))), data.draw(st.sampled_from([1, 2, 4, 8, 64, 100_000]))
        match data.draw(st.sampled_from(["set", "random", "cut", "truncate", "repeat", "insert"])):
            case "set":
                changed[at : at + length] = data.draw(st.sampled_from([b"\0", b"\xff", b"\x7f", b"\x80"])) * min(length, 8)
            case "random":
                changed[at : at + 1] = data.draw(st.binary(min_size=1, max_size=4))
            case "cut":
                del changed[at : at + length]
            case "truncate":
                del changed[at:]
            case "repeat":
                changed[at:at] = changed[at : at + length]
            case "insert":
                changed[at:at] = data.draw(st.binary(max_size=8))
    return bytes(changed)


def nodes(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value in a JSON tree, at most 400."""
    found, waiting = [], [value]
    while waiting and len(found) < 400:
        container = waiting.pop()
        for key in container if isinstance(container, dict) else range(len(container)):
            found.append((container, key))
            if isinstance(container[key], dict | list):
                waiting.append(container[key])
    return found


def other_values(data: st.DataObject, content: bytes) -> bytes:
    """JSON, or one of the lines of JSON, with one to three of its values replaced, taken away or swapped."""
    lines = content.splitlines(keepends=True) if content.count(b"\n{") else [content]
    place = data.draw(st.integers(0, len(lines) - 1))
    value = json.loads(lines[place])
    for _ in range(data.draw(st.integers(1, 3))):
        if not (found := nodes(value)):
            break
        container, key = found[data.draw(st.integers(0, len(found) - 1))]
        match data.draw(st.sampled_from(["replace", "replace", "remove", "swap"])):
            case "replace":
                container[key] = copy.deepcopy(data.draw(HOSTILE))  # or later damage would change the choices themselves
            case "remove":
                del container[key]
            case "swap":
                other, its_key = found[data.draw(st.integers(0, len(found) - 1))]
                with suppress(IndexError, KeyError):
                    container[key] = json.loads(json.dumps(other[its_key]))
    lines[place] = json.dumps(value).encode() + b"\n"
    return b"".join(lines)


# ---- sound files ---------------------------------------------------------------------------------------------------------


def a_run(path: Path) -> None:
    """A run's folder with all that is read of one."""
    config = TrainConfig(data="digits", epochs=1, batch_size=16)
    rows = [{"step": k, "lr": 0.1, "train/loss": 2.0 / k, "train/accuracy": 0.5, "gradient_flow/norm": 1.0} for k in range(1, 31)]
    with RunFolder(path) as folder:
        folder.write_json("config.json", config.to_dict())
        folder.write_json("environment.json", {
            "num_steps": 30, "steps_per_epoch": 30, "device": "cpu", "versions": {"torch": "2"}, "git": {"commit": "0" * 40},
            "parameters": 4, "forward_macs": 9})  # fmt: skip
        folder.write_json("dataset.json", {
            "name": "digits", "class_names": ["0", "1", "2"], "mean": [0.5] * 3, "std": [0.2] * 3, "image_size": 8,
            "fingerprint": "x", "source": "", "num_train": 9, "num_test": 9})  # fmt: skip
        folder.write_json("probes.json", {"every": 20, "num_classes": 3, "parameters": [
            {"name": "w", "shape": [2, 2], "trainable": True}, {"name": "b", "shape": [2], "trainable": True}]})  # fmt: skip
        folder.write_json("result.json", {
            "state": "finished", "step": 30, "reported_step": 30, "test/loss": 1.0, "test/accuracy": 0.5, "test/top5": None,
            "val/accuracy": None, "train_seconds": 1.0})  # fmt: skip
        total = {"forward_macs": 9, "forward_flops": 18, "parameters": 4}
        layer = total | {"name": "w", "kind": "Linear", "output_shape": [1, 2]}
        folder.write_json("cost.json", {"model": "tiny", "total": total, "layers": [layer]})
        folder.alarm({"rule": "exploding", "step": 3, "noticed": 5, "evidence": "e", "cause": "c", "remedy": "r"})
        folder.rows([*rows, {"step": 30, "epoch": 1.0, "test/loss": 1.0, "test/accuracy": 0.5}])
        folder.results([{"step": 30, "epoch": 1.0, "test/accuracy": 0.5}])
    evaluation = build_evaluation("test", np.eye(9, 3, dtype=np.float32), np.arange(9) % 3)
    save_evaluation(path, evaluation, ["0", "1", "2"])
    save_samples(path, evaluation, np.zeros((9, 3, 8, 8), np.uint8), ["0", "1", "2"])
    tables = {"gradient_flow": ("norm", "max", "non_finite"), "weight_flow": ("norm",), "update_flow": ("ratio",)}
    for name, columns in tables.items():
        writer = TableWriter(path / "probes" / f"{name}.rec", ["w", "b"], columns)
        writer.append(range(1, 31), np.ones((30, 2, len(columns))))
        writer.close()


def all_of_a_run(path: Path) -> None:
    """Every reader of a run's folder, one after the other; what one refuses is still given to the next."""
    readers: list[Callable[[], Any]] = [
        lambda: load_run(path), lambda: Run(path).dataset, lambda: Run(path).environment, lambda: dict(Run(path).metrics),
        lambda: Run(path).alarms, lambda: Run(path).tables, lambda: diagnose_run(Run(path)), lambda: check_content(Run(path)),
        lambda: compare_runs([path, path]), lambda: load_evaluation(path), lambda: load_samples(path),
    ]  # fmt: skip
    for read in readers:
        with suppress(InputError):
            read()
    found, damaged = list_runs(path.parent)  # this one never refuses
    assert len(found) + len(damaged) == 1
    if found:
        format_runs(found)


def a_table(path: Path) -> None:
    writer = TableWriter(path, ["w", "b"], ["norm", "max"])
    writer.append(range(1, 9), np.ones((8, 2, 2)))
    writer.close()


def read_and_cut_table(path: Path) -> None:
    table = read_table(path)
    assert table.values.shape == (len(table), len(table.items), len(table.columns))
    forget_after(path, 3)


def a_state(path: Path) -> None:
    momentum = {k: {"momentum_buffer": torch.ones(3, 2), "step": torch.tensor(5.0)} for k in range(2)}
    groups = [{"lr": 0.1, "betas": (0.9, 0.99), "params": [0, 1]}]
    save_state({"format": 3, "state": vars(State(step=5)), "optimizer": {"state": momentum, "param_groups": groups}}, path)


def read_state(path: Path) -> None:
    state = load_state(path)
    with suppress(KeyError, TypeError, ValueError):  # what `restore` foresees
        assert State.of(state["state"]).step >= 0


def a_study(path: Path) -> None:
    base = load_recipe("quick", epochs=1.0)
    make_plan(STUDIES["learning-rate"], base, {"lr": [0.1, 0.01]}, [0, 1]).save(path.parent)


def read_study(path: Path) -> None:
    for trial in (results := load_results(path.parent)).outcomes:
        assert trial.run.path.parent == path.parent / "trials"
    for arm in results.arms:
        results.of(arm)


def a_range(path: Path) -> None:
    curve = Curve(seed=0, lrs=(0.1, 0.2, 0.4), losses=(2.0, 1.5, 1.8))
    found = LrRange(mode="exponential", per="step", start=0.1, end=0.4, points=3, split="train", curves=(curve,),
                    config=TrainConfig().to_dict(), recipe="custom")  # fmt: skip
    path.write_text(json.dumps(found.to_dict()))


def read_range(path: Path) -> None:
    found = load_range(path.parent)
    assert str(found)
    assert found.paste is not None


def a_landscape(path: Path) -> None:
    facts = {"cifarlab": "landscape", "xs": [0.0, 1.0], "ys": [0.0], "batch_norm": "eval", "num_images": 9}
    file = GridFile(path, facts)
    point = {"loss": 1.0, "loss_error": 0.1, "difference_error": 0.1, "accuracy": 0.5, "nonfinite": 0, "layer": ""}
    file.append([{"i": 0, "j": j} | point for j in range(2)])
    file.close()


def a_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps({b"data": np.zeros((3, 3072), np.uint8), b"labels": [0, 1, 2], b"batch_label": b"x"}, 2))


def an_archive(path: Path) -> None:
    import tarfile

    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name in (*CIFAR10.layouts[0].train, *CIFAR10.layouts[0].test):
            content = pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": [0]}, 2)
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size, info.pax_headers = len(content), {"comment": "ü"}
            tar.addfile(info, io.BytesIO(content))


def a_gzip(path: Path) -> None:
    an_archive(path)
    path.write_bytes(gzip.compress(path.read_bytes(), 1))


def a_parquet(path: Path) -> None:
    content = io.BytesIO()
    Image.new("RGB", (4, 4)).save(content, "PNG")
    names = {"info": {"features": {"label": {"names": ["a", "b"]}}}}
    table = pa.table({"image": [{"bytes": content.getvalue(), "path": "x"}] * 4, "label": [0, 1, 0, 1]})
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(names)}), path)


def an_image(kind: str) -> Callable[[Path], None]:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    return lambda path: Image.fromarray(pixels).save(path, kind)


# ---- the table -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reader:
    """file: its name; make: writes a sound one at that path (or around it); read: what must not fail but by InputError.

    wrap, unwrap: of a file whose checksums or compression would keep all damage from the reader proper.
    """

    file: str
    make: Callable[[Path], None]
    read: Callable[[Path], Any]
    is_json: bool = False
    unwrap: Damage = bytes
    wrap: Damage = bytes


def _in_run(name: str, *, is_json: bool = True) -> Reader:
    return Reader(f"runs/run/{name}", lambda path: a_run(_run_of(path)), lambda path: all_of_a_run(_run_of(path)), is_json)


def _run_of(path: Path) -> Path:
    return next(folder for folder in path.parents if folder.name == "run")


def _array_of(name: str) -> tuple[Damage, Damage]:
    """(one array's file out of an .npz, the .npz with that in the place of every array of the same content)."""
    memory: dict[str, bytes] = {}

    def unwrap(content: bytes) -> bytes:
        memory["whole"] = content
        return zipfile.ZipFile(io.BytesIO(content)).read(f"{name}.npy")

    def wrap(array: bytes) -> bytes:
        out = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(memory["whole"])) as before, zipfile.ZipFile(out, "w") as after:
            for each in before.namelist():
                after.writestr(each, array if each == f"{name}.npy" else before.read(each))
        return out.getvalue()

    return unwrap, wrap


def _header(content: bytes) -> bytes:
    return content[8 : 8 + struct.unpack("<Q", content[:8])[0]]


def _with_header(header: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + bytes(64)


def _weights(path: Path) -> None:
    save_weights({"a": torch.ones(3, 2), "b": torch.zeros(4, dtype=torch.int64)}, path)


READERS: dict[str, Reader] = {
    **{name: _in_run(name) for name in ("config.json", "dataset.json", "environment.json", "probes.json", "result.json",
                                        "cost.json", "evaluation.json", "metrics.jsonl", "alarms.jsonl")},
    **{name: _in_run(name, is_json=False) for name in ("results.csv", "probes/gradient_flow.rec", "predictions.npz",
                                                       "samples.npz")},
    "logits": Reader("runs/run/predictions.npz", lambda path: a_run(path.parent), lambda path: load_evaluation(path.parent),
                     False, *_array_of("logits")),
    "names": Reader("runs/run/predictions.npz", lambda path: a_run(path.parent), lambda path: load_evaluation(path.parent),
                    False, *_array_of("class_names")),
    "images": Reader("runs/run/samples.npz", lambda path: a_run(path.parent), lambda path: load_samples(path.parent),
                     False, *_array_of("images")),
    "table": Reader("x/table.rec", a_table, read_and_cut_table),
    "state": Reader("trainer.safetensors", a_state, read_state),
    "state's header": Reader("trainer.safetensors", a_state, read_state, True, _header, _with_header),
    "weights": Reader("model.safetensors", _weights, load_weights),
    "weights' header": Reader("model.safetensors", _weights, load_weights, True, _header, _with_header),
    "study.json": Reader("study.json", a_study, read_study, True),
    "lr_range.json": Reader("lr_range.json", a_range, read_range, True),
    "landscape": Reader("random-frozen.jsonl", a_landscape, read_landscape, True),
    "pickle": Reader("data_batch_1", a_pickle, lambda path: _read_python(CIFAR10, path.read_bytes(), "it")),
    "archive": Reader("cifar-10-python.tar.gz", an_archive, lambda path: _read_archive(CIFAR10, path), False, bytes,
                      lambda content: gzip.compress(content, 1)),
    "gzip": Reader("cifar-10-python.tar.gz", a_gzip, lambda path: _read_archive(CIFAR10, path)),
    "parquet": Reader("train.parquet", a_parquet, lambda path: read_parquet({"train": [path], "test": [path]}, 4)),
    **{kind: Reader(f"x.{kind.lower()}", an_image(kind), lambda path: read_image(path, 8))
       for kind in ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")},
}  # fmt: skip


@cache
def sound(name: str) -> tuple[Path, bytes]:
    """(the path in a folder of its own, the content) of a sound file, which its reader reads."""
    reader = READERS[name]
    path = Path(tempfile.mkdtemp(prefix="cifarlab-fuzz-")) / "work" / reader.file
    path.parent.mkdir(parents=True)
    reader.make(path)
    content = path.read_bytes()
    if reader.wrap is not bytes and reader.unwrap is bytes:
        path.write_bytes(reader.wrap(content))
    reader.read(path)
    return path, reader.unwrap(content)


def attack(name: str, data: st.DataObject) -> None:
    """One damaged version of a file, given to its reader."""
    reader, (path, content) = READERS[name], sound(name)
    damaged = other_values(data, content) if reader.is_json and data.draw(st.booleans()) else flips(data, content)
    path.write_bytes(reader.wrap(damaged))
    with suppress(InputError), warnings.catch_warnings(action="ignore"):
        reader.read(path)


def attacks_on(name: str) -> Callable[[], None]:
    @given(data=st.data())
    def run(data: st.DataObject) -> None:
        attack(name, data)

    return run


HABITS = dict(deadline=None, database=None, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("name", READERS)
def test_damage_is_refused_or_read(name: str) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begun = time.process_time()

    settings(max_examples=EXAMPLES, derandomize=True, **HABITS)(attacks_on(name))()  # type: ignore[arg-type]
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) << 10 < ROOM
    assert time.process_time() - begun < 60  # of CPU: a reader that goes round in circles, not a slow machine


def fuzz(seconds: float, names: list[str]) -> None:
    """New damage for each reader in turn, until the time is over; the first failure ends it."""
    until, tried = time.monotonic() + seconds, 0
    while time.monotonic() < until:
        for name in random.sample(names, len(names)):
            if time.monotonic() > until:
                break
            number = random.randrange(2**32)
            run = seed(number)(settings(max_examples=ROUND, print_blob=True, **HABITS)(attacks_on(name)))  # type: ignore[arg-type]
            try:
                run()
            except BaseException:
                print(f"reader {name!r}, seed {number}; the damaged file: {sound(name)[0]}", file=sys.stderr)
                raise
            tried += ROUND
        print(f"{tried:,} damaged versions of {len(names)} files: nothing found", flush=True)


if __name__ == "__main__":
    fuzz(float(sys.argv[1]) if sys.argv[1:] else 600.0, sys.argv[2:] or list(READERS))
