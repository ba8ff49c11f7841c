"""The cache of decoded images: used when it is sound, built again when it is stale, torn or foreign."""

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from cifarlab.data.cache import hash_files, load_decoded
from cifarlab.data.dataset import Decoded


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CIFARLAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "decoded"


class Source:
    """Counts how often it is decoded."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> Decoded:
        self.times += 1
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (12, 3, 8, 8), dtype=np.uint8)
        labels = np.arange(12) % 3
        return Decoded(
            images[:8], images[8:], {"fine": labels[:8]}, {"fine": labels[8:]}, {"fine": ("a", "b", "ç")}, "twelve images"
        )


def entry_folder(cache: Path) -> Path:
    (folder,) = [path for path in cache.iterdir() if path.is_dir() and path.name != "seen"]
    return folder


def test_second_time_comes_memory_mapped_and_equal() -> None:
    source = Source()
    first, second = load_decoded("x", source), load_decoded("x", source)
    assert source.times == 1
    images = second.decoded.train_images
    assert isinstance(images, np.memmap)
    assert not images.flags.writeable
    np.testing.assert_array_equal(images, source().train_images)
    assert (first.fingerprints, first.mean, first.decoded.class_names, first.decoded.what) == (
        second.fingerprints,
        second.mean,
        second.decoded.class_names,
        second.decoded.what,
    )
    pixels = source().train_images / 255
    np.testing.assert_allclose(second.mean, pixels.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(second.std, pixels.std((0, 2, 3)), rtol=1e-12)


def test_another_content_is_another_entry(cache: Path) -> None:
    source = Source()
    load_decoded("x", source)
    load_decoded("y", source)
    assert source.times == 2


def flip_byte(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def edit_manifest(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["body"] = manifest["body"].replace("twelve", "eleven")
    (folder / "manifest.json").write_text(json.dumps(manifest))


def replace_by_pickled(folder: Path) -> None:
    np.save(folder / "train_images.npy", np.array([{}], object), allow_pickle=True)


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def put_file_there(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("junk")


DAMAGES = {
    "flipped pixel": lambda folder: flip_byte(folder / "train_images.npy", -100),
    "flipped label": lambda folder: flip_byte(folder / "test_fine.npy", -8),
    "flipped header": lambda folder: flip_byte(folder / "train_images.npy", 60),
    "truncated array": lambda folder: os.truncate(folder / "test_images.npy", 300),
    "emptied array": lambda folder: os.truncate(folder / "test_images.npy", 0),
    "missing array": lambda folder: (folder / "test_images.npy").unlink(),
    "object array": replace_by_pickled,
    "truncated manifest": lambda folder: os.truncate(folder / "manifest.json", 100),
    "edited manifest": edit_manifest,
    "manifest of junk": lambda folder: (folder / "manifest.json").write_text('["junk"]'),
    "manifest not text": lambda folder: (folder / "manifest.json").write_bytes(b"\xff\xfe\0"),
    "empty folder": empty,
    "a file in its place": put_file_there,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_torn_entries_are_built_again(damage: str, cache: Path) -> None:
    source = Source()
    load_decoded("x", source)
    DAMAGES[damage](entry_folder(cache))
    again = load_decoded("x", source)
    assert source.times == 2
    np.testing.assert_array_equal(again.decoded.train_images, source().train_images)
    load_decoded("x", source)
    assert source.times == 3  # one of them was the line above: the mended entry is used


def test_an_entry_of_another_key_or_format_is_not_taken(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Source()
    load_decoded("x", source)
    foreign = entry_folder(cache)
    shutil.copytree(foreign, cache.parent / "copy")
    shutil.rmtree(foreign)
    load_decoded("y", source)
    mine = entry_folder(cache)
    shutil.rmtree(mine)
    shutil.move(cache.parent / "copy", mine)
    load_decoded("y", source)
    assert source.times == 3
    monkeypatch.setattr("cifarlab.data.cache.FORMAT", "another format")
    load_decoded("y", source)
    assert source.times == 4


def test_remains_of_a_killed_builder_are_cleared(cache: Path) -> None:
    source = Source()
    load_decoded("x", source)
    folder = entry_folder(cache)
    (cache / f"{folder.name}.building-dead").mkdir()
    shutil.rmtree(folder)
    load_decoded("x", source)
    assert [path.name for path in cache.iterdir() if path.is_dir()] == [folder.name]


def test_an_unwritable_cache_costs_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("no folder")  # root may write anywhere, but not below a file
    monkeypatch.setenv("CIFARLAB_CACHE", str(tmp_path / "file"))
    entry = load_decoded("x", Source())
    np.testing.assert_array_equal(entry.decoded.train_images, Source()().train_images)
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "CIFARLAB_CACHE" in lines[0]


def test_a_failed_decode_leaves_nothing(cache: Path) -> None:
    def fail() -> Decoded:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        load_decoded("x", fail)
    assert not [path for path in cache.iterdir() if path.is_dir()]
    load_decoded("x", Source())  # and the lock is free


def test_two_at_once_decode_once() -> None:
    source = Source()
    threads = [threading.Thread(target=load_decoded, args=("x", source)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert source.times == 1


def test_hash_follows_content_not_times(tmp_path: Path, cache: Path) -> None:
    file = tmp_path / "a.bin"
    file.write_bytes(b"one")
    first = hash_files([file], tmp_path)
    os.utime(file, (1, 1))
    assert hash_files([file], tmp_path) == first
    times = file.stat()
    file.write_bytes(b"two")  # same size, and the old time put back
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert hash_files([file], tmp_path) != first


def test_known_files_are_not_read_again(tmp_path: Path, cache: Path) -> None:
    file = tmp_path / "a.bin"
    file.write_bytes(b"one")
    first = hash_files([file], tmp_path)
    (note,) = (cache / "seen").iterdir()
    note.write_text("ab" * 32)
    assert hash_files([file], tmp_path) == "ab" * 32  # believed: it was not read
    note.write_text("torn")
    assert hash_files([file], tmp_path) == first


def test_loading_imports_nothing_heavy() -> None:
    program = "import sys, cifarlab.data; print([m for m in ('torch', 'PIL', 'pyarrow', 'sklearn', 'rich') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
