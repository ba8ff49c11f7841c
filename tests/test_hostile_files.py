"""Files made to do harm: none runs code, leads out of its folder, is waited for without end, or takes memory it does not hold.

The payloads would touch a canary. Each command that meets one refuses it with a sentence and exit code 2, in bounded memory.
"""

import io
import json
import os
import pickle
import resource
import shutil
import struct
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import cifarlab as cl
from cifarlab.checkpoint import prune_checkpoints
from cifarlab.cli import main
from cifarlab.data import cifar
from cifarlab.evaluate import load_evaluation
from cifarlab.runs import JSON_LIMIT, Run

PROJECT = Path(__file__).parents[1]
ROOM = 400 << 20  # bytes that a command may take on top: the largest file here claims a thousand times as much


class Evil:
    """Touches the canary when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.canary}",)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory, own_cache: None) -> Iterator[Path]:
    """A folder with a finished run, and `part`, the same stopped at its checkpoint."""
    sys.path.insert(0, str(PROJECT / "tests"))
    import tiny_models

    folder = tmp_path_factory.mktemp("kept")
    config = cl.TrainConfig(data="digits", model="tiny", epochs=1, batch_size=16, train_images=32)
    for _ in tiny_models.registered():
        quiet: dict[str, Any] = dict(progress="none", forecast=False, probes="none", figures=False)
        cl.train(config, cl.WatchConfig(name="run", runs_dir=folder, **quiet))
        shutil.copytree(folder / "run", folder / "part")
        for name in ("result.json", "model.safetensors"):
            (folder / "part" / name).unlink()
        yield folder
    sys.path.remove(str(PROJECT / "tests"))


@pytest.fixture
def folder(kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh copy, in which one stands; beside it lies what nobody may touch."""
    shutil.copytree(kept, tmp_path / "in")
    (tmp_path / "out" / "precious").mkdir(parents=True)
    (tmp_path / "out" / "file").write_text('{"step": 1}\n')
    monkeypatch.chdir(tmp_path / "in")
    return tmp_path / "in"


def refused(folder: Path, capfd: pytest.CaptureFixture[str], line: str) -> str:
    """The sentence that a command refuses with; the canary lives, what lies beside is untouched, memory stays bounded."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    capfd.readouterr()
    code = main(line.split())
    told = [text for text in capfd.readouterr().err.splitlines() if not text.startswith("Decoding ")]
    assert code == 2, told
    assert len(told) == 1
    assert told[0].startswith("cifarlab: ")
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) << 10 < ROOM
    unharmed(folder)
    return told[0]


def unharmed(folder: Path) -> None:
    assert not (folder / "canary").exists()
    beside = folder.parent / "out"
    assert {path.name for path in beside.iterdir()} == {"precious", "file"}
    assert (beside / "file").read_text() == '{"step": 1}\n'
    assert {path.name for path in folder.parent.iterdir()} == {"in", "out"}


def newest(folder: Path) -> Path:
    return max((folder / "part" / "checkpoints").iterdir())


# ---- pickles -------------------------------------------------------------------------------------------------------------


def pickles(canary: Path) -> dict[str, bytes]:
    """The same evil object in every wrapping that some reader might open."""
    evil = Evil(canary)
    as_torch, as_npz, as_npy = io.BytesIO(), io.BytesIO(), io.BytesIO()
    torch.save({"format": 3, "state": evil}, as_torch)
    np.savez(as_npz, **{name: np.array([evil], object) for name in ("images", "true", "predicted", "probability", "logits")})
    np.save(as_npy, np.array([evil], object))
    return {"pickle": pickle.dumps(evil), "pickle, protocol 0": pickle.dumps({"a": [evil]}, 0), "torch": as_torch.getvalue(),
            "npz": as_npz.getvalue(), "npy": as_npy.getvalue()}  # fmt: skip


PLACES = {
    "run/config.json": "evaluate run", "run/dataset.json": "evaluate run", "run/model.safetensors": "evaluate run",
    "run/metrics.jsonl": "diagnose run", "run/alarms.jsonl": "sync run --tensorboard", "run/result.json": "compare run part",
    "run/samples.npz": "sync run --tensorboard", "run/evaluation.json": "sync run --tensorboard",
    "run/probes/update_flow.rec": "diagnose run", "run/probes.json": "diagnose run", "run/cost.json": "sync run --tensorboard",
    "run/picture.png": "predict run run/picture.png", "part/checkpoints/NEWEST/trainer.safetensors": "train --resume part",
    "part/checkpoints/NEWEST/model.safetensors": "train --resume part", "p/train.parquet": "data p",
    "cifar-10-python.tar.gz": "data cifar10 --data-dir .", "cifar-10-batches-py/data_batch_1": "data cifar10 --data-dir .",
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_no_pickle_is_opened_wherever_it_stands(folder: Path, capfd: pytest.CaptureFixture[str], place: str) -> None:
    for name in ("p/test.parquet", *(f"cifar-10-batches-py/{name}" for layout in cifar.CIFAR10.layouts[:1] for name in
                                     (*layout.train, *layout.test))):  # fmt: skip
        if place.startswith(name.partition("/")[0]):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(b"x")
    path = folder / place.replace("NEWEST", newest(folder).name)
    path.parent.mkdir(exist_ok=True)
    for content in pickles(folder / "canary").values():
        path.write_bytes(content + b"\n")
        told = refused(folder, capfd, PLACES[place])
        assert path.name in told or "run cannot be compared" in told


def test_no_pickle_of_the_cache_is_opened(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CIFARLAB_CACHE", str(folder / "cache"))
    for content in pickles(folder / "canary").values():
        cl.load_dataset("digits", image_size=8)
        for file in (*(folder / "cache").rglob("*.npy"), *(folder / "cache").rglob("manifest.json")):
            file.write_bytes(content)
        assert cl.load_dataset("digits", image_size=8).train.images.shape == (1437, 3, 8, 8)
    unharmed(folder)


def test_no_pickle_of_predictions_is_opened(folder: Path) -> None:
    for content in pickles(folder / "canary").values():
        (folder / "run" / "predictions.npz").write_bytes(content)
        with pytest.raises(cl.InputError, match=r"predictions.npz cannot be read .*: remove it and run `cifarlab evaluate"):
            load_evaluation(folder / "run")
    unharmed(folder)


def test_a_parquet_type_that_unpickles_itself_is_refused(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Old pyarrow made an extension type of a pickle in the schema."""
    (folder / "p").mkdir()
    metadata = {b"ARROW:extension:name": b"arrow.py_extension_type",
                b"ARROW:extension:metadata": pickle.dumps(Evil(folder / "canary"))}  # fmt: skip
    schema = pa.schema([pa.field("image", pa.binary(), metadata=metadata), pa.field("label", pa.int64())])
    for split in ("train", "test"):
        pq.write_table(pa.table({"image": [b"x", b"y"], "label": [0, 1]}, schema=schema), folder / "p" / f"{split}.parquet")
    refused(folder, capfd, "data p")


# ---- ways out of a folder --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "alarms.jsonl", "checkpoints", "probes", "figures/x.png",
                                  ".lock", "mirrors", "model.safetensors"])  # fmt: skip
@pytest.mark.parametrize("line", ["train --resume part", "sync part --tensorboard", "evaluate part", "runs ."])
def test_links_out_of_a_run_folder_are_not_followed(
    folder: Path, capfd: pytest.CaptureFixture[str], name: str, line: str
) -> None:
    """A resume would append to a file, cut it, or prune another folder; sync would send it to a server."""
    path = folder / "part" / name
    path.parent.mkdir(exist_ok=True)
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    target = "../../out" if name in ("checkpoints", "probes", "mirrors") else "../../out/file"
    path.symlink_to("../" * name.count("/") + target)
    if line == "runs .":  # it lists the others, and touches none
        assert main(line.split()) == 0
        unharmed(folder)
    else:
        told = refused(folder, capfd, line)
        assert f"part/{name} leads out of the run folder: copy what it points at, or delete it" in told
    assert (folder.parent / "out" / "precious").is_dir()


def test_a_link_inside_a_run_folder_is_fine(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (folder / "run" / "last").symlink_to(next((folder / "run" / "checkpoints").iterdir()))
    (folder / "same").symlink_to("run")
    assert main(["evaluate", "same"]) == 0


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "alarms.jsonl", "result.json", "results.csv"])
def test_a_pipe_is_not_waited_for(folder: Path, capfd: pytest.CaptureFixture[str], name: str) -> None:
    (folder / "run" / name).unlink(missing_ok=True)
    os.mkfifo(folder / "run" / name)
    assert f"run/{name} is neither a file nor a folder: delete it" in refused(folder, capfd, "diagnose run")
    assert "run cannot be compared" in refused(folder, capfd, "compare run part")
    assert main(["runs", "."]) == 0
    assert f"run is damaged (ValueError: {name} is no file): left out" in capfd.readouterr().err


def test_a_checkpoint_folder_is_pruned_of_checkpoints_only(tmp_path: Path) -> None:
    for name in ("step-00000001", "step-00000002", ".step-00000003.7.tmp", "holiday", ".ssh"):
        (tmp_path / name).mkdir()
    prune_checkpoints(tmp_path, keep={2})
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000002", "holiday", ".ssh"}


@pytest.mark.parametrize("name", ["../../../out/run", "/tmp/run", "..", "", "a/b", "a\0b", 7])
def test_a_study_trains_into_its_own_folder_only(folder: Path, capfd: pytest.CaptureFixture[str], name: object) -> None:
    from cifarlab.recipes import load_recipe
    from cifarlab.studies import STUDIES
    from cifarlab.studies.plan import make_plan

    words = "--set epochs=1 lr=0.1 --seeds 0 --progress none --folder studies"
    plan = make_plan(STUDIES["learning-rate"], load_recipe("quick"), {"epochs": [1.0], "lr": [0.1]}, [0])
    place = folder / "studies" / plan.folder_name
    place.mkdir(parents=True)
    values = plan.to_json()
    values["trials"][0]["run"] = name
    (place / "study.json").write_text(json.dumps(values))
    told = refused(folder, capfd, f"study learning-rate {words}")
    assert "study.json cannot be read" in told
    assert "choose another --folder" in told
    assert {path.name for path in place.iterdir()} <= {"study.json", ".lock"}


def test_what_a_cluster_sends_stays_in_its_run_folder(folder: Path) -> None:
    from cifarlab.engines.ray import unpack

    for member in ("../../out/climbed", "/tmp/climbed-out-of-a-run"):
        content = io.BytesIO()
        with tarfile.open(fileobj=content, mode="w") as tar:
            tar.addfile(tarfile.TarInfo(member), io.BytesIO())
        if not member.startswith("/"):  # the filter makes that one relative
            with pytest.raises(tarfile.FilterError):
                unpack(content.getvalue(), folder / "new")
    unharmed(folder)


# ---- more than there is ----------------------------------------------------------------------------------------------------


def npz(path: Path, content: bytes, method: int = zipfile.ZIP_DEFLATED) -> None:
    with zipfile.ZipFile(path, "w", method, compresslevel=1) as archive:
        for name in ("images", "true", "predicted", "probability"):
            archive.writestr(f"{name}.npy", content)


def npy_header(text: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


def claims(kind: str, shape: str) -> bytes:
    return npy_header(f"{{'descr': {kind!r}, 'fortran_order': False, 'shape': {shape}}}\n")


ARRAYS: dict[str, tuple[Callable[[], bytes], str]] = {
    "a header of a terabyte": (lambda: claims("|u1", "(1099511627776,)"), "different sizes"),
    "an overflowing shape": (lambda: claims("<f8", f"({2**62}, 8)"), "different sizes"),
    "a negative shape": (lambda: claims("|u1", "(-1, -1)") + b"x", "cannot be read"),
    "a shape of nothing": (lambda: claims("<U0", f"({2**60},)"), "different sizes"),
    "a header that is a program": (lambda: npy_header("__import__('os').system('touch canary')\n"), "cannot be read"),
    "deflated zeros": (lambda: claims("|u1", "(1,)") + bytes(150 << 20), "more than its size"),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_larger_than_their_file(folder: Path, capfd: pytest.CaptureFixture[str], name: str) -> None:
    content, told = ARRAYS[name]
    npz(folder / "run" / "samples.npz", content())
    assert told in refused(folder, capfd, "sync run --tensorboard")


@pytest.mark.parametrize("length", [2**63 - 1, 2**40, 99_999_999, 8])
def test_safetensors_whose_header_is_longer_than_the_file(folder: Path, capfd: pytest.CaptureFixture[str], length: int) -> None:
    for name in ("run/model.safetensors", f"part/checkpoints/{newest(folder).name}/trainer.safetensors"):
        header = b'{"x":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4]}}'
        (folder / name).write_bytes(struct.pack("<Q", length) + header)
    assert "run/model.safetensors cannot be read" in refused(folder, capfd, "evaluate run")
    assert "trainer.safetensors cannot be read" in refused(folder, capfd, "train --resume part")


def test_json_of_more_than_any_run_has(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for name, line in (("run/config.json", "evaluate run"), ("run/result.json", "compare run part")):
        with (folder / name).open("wb") as file:
            file.truncate(JSON_LIMIT + 1)  # sparse: it takes no disk
        assert "MiB" in refused(folder, capfd, line)
        shutil.copy(folder / "part" / "config.json", folder / "run")


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *more: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


def saved(kind: str, **options: Any) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (16, 16)).save(content, kind, **options)
    return content.getvalue()


PICTURES: dict[str, Callable[[], bytes]] = {
    "PNG of 10 gigapixels": lambda: png(100_000, 100_000),
    "PNG of 4 billion a side": lambda: png(2**32 - 1, 2**32 - 1),
    "PNG just above the limit": lambda: png(8_001, 8_000),
    "PNG with a bomb in its text": lambda: png(16, 16, chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(50 << 20)))),
    "PNG with a bomb in its profile": lambda: png(16, 16, chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(50 << 20)))),
    "JPEG of 4 gigapixels": lambda: saved("JPEG").replace(b"\0\x10\0\x10\x03", b"\xff\xfe\xff\xfe\x03", 1),
    "GIF of 4 gigapixels": lambda: saved("GIF").replace(b"\x10\0\x10\0", b"\xff\xff\xff\xff"),
    "BMP of 4 gigapixels": lambda: saved("BMP").replace(b"\x10\0\0\0\x10\0\0\0", b"\xff\xff\0\0\xff\xff\0\0"),
    "TIFF of 4 gigapixels": lambda: saved("TIFF").replace(struct.pack("<I", 16), struct.pack("<I", 65_535)),
    "PostScript that writes a file": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(canary) (w) file closefile\n",
    "SVG that fetches a file": lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
}


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_larger_than_their_file(folder: Path, capfd: pytest.CaptureFixture[str], name: str) -> None:
    (folder / "x.png").write_bytes(PICTURES[name]())
    assert "x.png" in refused(folder, capfd, "predict run x.png")


def test_a_parquet_file_that_repeats_one_picture_without_end(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (folder / "p").mkdir()
    once = pa.array([os.urandom(60_000)], pa.binary())
    for split, rows in (("train", 40_000), ("test", 2)):
        images = pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), once)
        pq.write_table(pa.table({"image": images, "label": np.zeros(rows, np.int64)}), folder / "p" / f"{split}.parquet",
                       store_schema=False)  # fmt: skip
    assert (folder / "p" / "train.parquet").stat().st_size < 1 << 20  # and 2.4 GB unpacked
    assert "p/train.parquet unpacks to far more than its" in refused(folder, capfd, "data p")


def test_headers_that_call_for_further_headers(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """tarfile follows them by recursion."""
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 1
    block = info.tobuf(tarfile.GNU_FORMAT) + b"x".ljust(512, b"\0")
    import gzip

    (folder / "cifar-10-python.tar.gz").write_bytes(gzip.compress(5_000 * block, 1))
    assert "is not a whole tar.gz archive" in refused(folder, capfd, "data cifar10 --data-dir .")


def test_an_archive_that_unpacks_without_end(
    folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import gzip

    monkeypatch.setattr(cifar, "MAX_ARCHIVE", 16 << 20)  # the true limit takes seconds to reach
    for content in (bytes(20 << 20), tarfile.TarInfo("x").tobuf() + b"\1" * (20 << 20)):
        (folder / "cifar-10-python.tar.gz").write_bytes(gzip.compress(content, 1))
        told = refused(folder, capfd, "data cifar10 --data-dir .")
        assert "more than CIFAR can" in told or "not a whole tar.gz" in told


def test_a_run_is_read_back_as_it_was_written(kept: Path) -> None:
    """None of the limits is in the way of a true run."""
    run = Run(kept / "run")
    assert run.dataset["class_names"] == list("0123456789")
    assert len(load_evaluation(run.path)[1]) == 10
