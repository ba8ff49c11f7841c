"""Decoded images kept on disk, so that the second start takes no time.

    <cache>/decoded/<key>/           manifest.json, train_images.npy, test_images.npy, labels: one .npy for each set and split
    <cache>/decoded/seen/<listing>   content hash of files that were hashed before, by their names, sizes and times

The key is a hash of the source's content and of what is made from it, so an entry never goes stale: changed files have
another key. Every array and the manifest carry a CRC-32 that is checked at each start (0.1 s for CIFAR-10), so a torn
entry, or one that is not ours, is found and built again.
"""

import contextlib
import hashlib
import json
import os
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cifarlab.data.dataset import Decoded, measure_statistics

FORMAT = "cifarlab decoded images 1"  # a change of decoding or of this file's layout needs a new number


@dataclass(frozen=True)
class Entry:
    """A decoded source, its fingerprint for each set of labels, and the measured statistics of its training images."""

    decoded: Decoded
    fingerprints: dict[str, str]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def cache_folder() -> Path:
    """$CIFARLAB_CACHE, else the platform's cache folder (~/.cache/cifarlab on Linux)."""
    if folder := os.environ.get("CIFARLAB_CACHE"):
        return Path(folder).expanduser()
    import platformdirs

    return platformdirs.user_cache_path("cifarlab")


def hash_files(files: Sequence[Path], root: Path) -> str:
    """SHA-256 of the files' names below `root` and contents; files seen before, unchanged, are not read again.

    Unchanged means: same path, inode, size, and times of change, of which the system sets one (ctime) at every write.
    """
    listing = hashlib.sha256(str(root.resolve()).encode())
    for file in files:
        stat = file.stat()
        fields = (str(file.relative_to(root)), stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
        listing.update(repr(fields).encode())
    seen = cache_folder() / "decoded" / "seen" / listing.hexdigest()
    with contextlib.suppress(OSError, ValueError):
        known = seen.read_text("ascii")
        if len(bytes.fromhex(known)) == 32:
            return known

    content = hashlib.sha256()
    for file in files:
        content.update(repr((file.relative_to(root).as_posix(), file.stat().st_size)).encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                content.update(block)
    with contextlib.suppress(OSError):  # without the note the next start only reads the files again
        seen.parent.mkdir(parents=True, exist_ok=True)
        note = seen.with_suffix(f".{os.getpid()}")
        note.write_text(content.hexdigest(), "ascii")
        os.replace(note, seen)
    return content.hexdigest()


def load_decoded(content: str, decode: Callable[[], Decoded]) -> Entry:
    """The entry of the source that `content` describes; decoded by `decode` unless a sound one is in the cache.

    The images and labels of a cached entry are memory-mapped and read-only. Two processes decode once. A cache that cannot
    be written costs one line on stderr: the arrays then stay in memory.
    """
    key = hashlib.sha256(f"{FORMAT}\n{content}".encode()).hexdigest()[:32]
    folder = cache_folder() / "decoded" / key
    if entry := _read(folder, key):
        return entry
    # The lock is taken before decoding, and freed by the system if its holder dies.
    lock = None
    try:
        from filelock import FileLock

        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.with_suffix(".lock"))
        lock.acquire()
    except (OSError, NotImplementedError) as error:
        _warn(error)
        return _measure(decode())
    try:
        if entry := _read(folder, key):  # another process was faster
            return entry
        entry = _measure(decode())
        try:
            _write(folder, key, entry)
        except OSError as error:
            _warn(error)
            return entry
        return _read(folder, key) or entry
    finally:
        lock.release()


def _warn(error: Exception) -> None:
    print(
        f"cifarlab: decoded images are not kept, because {cache_folder()} cannot be written ({error}): "
        "set CIFARLAB_CACHE to a folder that can",
        file=sys.stderr,
    )


def _measure(decoded: Decoded) -> Entry:
    pixels = hashlib.sha256()
    for images in (decoded.train_images, decoded.test_images):
        pixels.update(repr(images.shape).encode())
        pixels.update(np.ascontiguousarray(images).data)
    fingerprints = {}
    for kind, names in decoded.class_names.items():
        digest = pixels.copy()
        digest.update(decoded.train_labels[kind].tobytes() + decoded.test_labels[kind].tobytes() + repr(names).encode())
        fingerprints[kind] = digest.hexdigest()[:32]
    return Entry(decoded, fingerprints, *measure_statistics(decoded.train_images))


def _arrays(decoded: Decoded) -> dict[str, NDArray[Any]]:
    arrays: dict[str, NDArray[Any]] = {"train_images": decoded.train_images, "test_images": decoded.test_images}
    for kind in decoded.class_names:
        arrays[f"train_{kind}"] = decoded.train_labels[kind]
        arrays[f"test_{kind}"] = decoded.test_labels[kind]
    return arrays


def _write(folder: Path, key: str, entry: Entry) -> None:
    for left in folder.parent.glob(f"{key}.building-*"):  # of a process that was killed; ours is the only one alive
        shutil.rmtree(left, ignore_errors=True)
    building = Path(tempfile.mkdtemp(prefix=f"{key}.building-", dir=folder.parent))
    try:
        facts = {}
        for name, array in _arrays(entry.decoded).items():
            with (building / f"{name}.npy").open("wb") as file:
                np.save(file, np.ascontiguousarray(array), allow_pickle=False)
                file.flush()
                os.fsync(file.fileno())
            crc = zlib.crc32(np.ascontiguousarray(array).data)
            facts[name] = {"dtype": array.dtype.str, "shape": list(array.shape), "crc32": crc}
        body = {
            "format": FORMAT,
            "key": key,
            "arrays": facts,
            "class_names": entry.decoded.class_names,
            "what": entry.decoded.what,
            "fingerprints": entry.fingerprints,
            "mean": entry.mean,
            "std": entry.std,
        }
        text = json.dumps(body, sort_keys=True)
        with (building / "manifest.json").open("w", encoding="utf-8") as manifest:
            manifest.write(json.dumps({"crc32": zlib.crc32(text.encode()), "body": text}))
            manifest.flush()
            os.fsync(manifest.fileno())
        if folder.is_symlink() or folder.is_file():
            folder.unlink()
        elif folder.exists():  # torn or foreign, else it would have been read
            shutil.rmtree(folder)
        os.replace(building, folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _read(folder: Path, key: str) -> Entry | None:
    """The entry in `folder`; None when it is not there, torn, or not ours."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
        if zlib.crc32(manifest["body"].encode()) != manifest["crc32"]:
            return None
        body = json.loads(manifest["body"])
        if body["format"] != FORMAT or body["key"] != key:
            return None
        arrays: dict[str, NDArray[Any]] = {}
        for name, facts in body["arrays"].items():
            array = np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            if array.dtype.str != facts["dtype"] or list(array.shape) != facts["shape"] or not array.flags.c_contiguous:
                return None
            if zlib.crc32(array.data) != facts["crc32"]:
                return None
            arrays[name] = array
        names = {kind: tuple(names) for kind, names in body["class_names"].items()}
        decoded = Decoded(
            arrays["train_images"],
            arrays["test_images"],
            {kind: arrays[f"train_{kind}"] for kind in names},
            {kind: arrays[f"test_{kind}"] for kind in names},
            names,
            body["what"],
        )
        mean, std = body["mean"], body["std"]
        return Entry(decoded, body["fingerprints"], (mean[0], mean[1], mean[2]), (std[0], std[1], std[2]))
    # Whatever a torn file brings about, tokenize.TokenError from NumPy's header reader among it: the entry is built again.
    except Exception:
        return None
