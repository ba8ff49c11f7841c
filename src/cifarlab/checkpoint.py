"""Checkpoints: weights as safetensors, and the rest of the trainer's state as safetensors too, its numbers and texts as JSON.

There is no pickle in them, not even one that torch reads with `weights_only`: before torch 2.10 such a file could corrupt
memory (CVE-2026-24747), and cifarlab runs with older ones. Each is a folder `checkpoints/step-00000782/`, written under a
temporary name, put on the disk and then renamed: it is there whole or not at all. What a disk or a copy damages later is found
by a checksum, which safetensors leaves to its users. Random states are not in a checkpoint: every random draw of a run is a
function of (seed, step).
"""

import json
import os
import shutil
import sys
import zlib
from pathlib import Path
from typing import Any

from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor

from cifarlab.config import InputError
from cifarlab.runs import sync_folder, write_atomically

FORMAT = 3
STATE = "trainer.safetensors"


def save_checkpoint(folder: Path, step: int, weights: dict[str, Tensor], trainer: dict[str, Any]) -> Path:
    """Writes `folder/step-…` with the model's state_dict and the trainer's state (tensors, numbers, strings, lists, dicts)."""
    final = folder / f"step-{step:08d}"
    temporary = folder / f".step-{step:08d}.{os.getpid()}.tmp"
    folder.mkdir(exist_ok=True)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        save_weights(weights, temporary / "model.safetensors")
        save_state({"format": FORMAT, "step": step} | trainer, temporary / STATE)
        for path in temporary.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        sync_folder(temporary)
        _remove(final)  # the same step again, after a resume from an older one because this was damaged
        os.rename(temporary, final)
        sync_folder(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final


def prune_checkpoints(folder: Path, keep: set[int]) -> None:
    """Removes every checkpoint but those of the given steps, and what a crash left half-written or half-removed; nothing else."""
    for path in folder.iterdir() if folder.is_dir() else ():
        is_ours = path.match("step-*") or path.match(".step-*.tmp")
        if is_ours and path.is_dir() and path.name not in {f"step-{step:08d}" for step in keep}:
            _remove(path)


def _remove(path: Path) -> None:
    """Under another name first: one that is half-removed when the process dies must not be taken for a checkpoint."""
    doomed = path if path.name.startswith(".") else path.with_name(f".{path.name}.{os.getpid()}.removed.tmp")
    try:
        path.rename(doomed)
    except OSError:
        return  # not there, or it may not be changed: then it may stay
    shutil.rmtree(doomed, ignore_errors=True)


def find_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in that folder, newest first."""
    return sorted((path for path in folder.glob("step-*") if path.is_dir()), reverse=True)


def step_of(path: Path) -> int:
    """The step that a checkpoint's folder is named for."""
    return int(path.name.removeprefix("step-"))


def load_newest(
    folder: Path, *, rows_until: int | None = None, tells: bool = True
) -> tuple[Path, dict[str, Tensor], dict[str, Any]]:
    """(its folder, model's state_dict, trainer's state) of the newest whole checkpoint; of damaged ones it tells in a line.

    rows_until: the last step whose row is there. A checkpoint of a later step is taken only where no other is whole, since the
    rows between would be missing from the run.
    Raises InputError when none is whole.
    """
    found = find_checkpoints(folder)
    covered = [path for path in found if rows_until is None or step_of(path) <= rows_until]
    damaged = ""
    for path in [*covered, *(path for path in found if path not in covered)]:
        try:
            weights, trainer = load_checkpoint(path)
        except InputError as error:
            damaged = damaged or str(error).partition("; ")[0]
            continue
        if path != found[0] and tells:
            why = "is damaged" if damaged else f"lacks its rows, which end at step {rows_until:,}"
            print(f"cifarlab: checkpoint {found[0]} {why}: {path.name} is taken instead", file=sys.stderr)
        return path, weights, trainer
    if not found:
        raise InputError(f"there is no checkpoint in {folder}")
    raise InputError(f"no checkpoint in {folder} is whole; remove that folder, and a resume begins the run anew ({damaged})")


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(model's state_dict, trainer's state), on the CPU; raises InputError for a damaged or foreign one."""
    if not (path / STATE).exists():
        raise InputError(f"checkpoint {path} is not whole: it has no {STATE}; remove the folder")
    trainer = load_state(path / STATE)
    if trainer.get("format") != FORMAT:
        raise InputError(f"{path / STATE} is no checkpoint of this version of cifarlab (format {FORMAT}): remove the folder")
    return load_weights(path / "model.safetensors"), trainer


def load_evaluated(path: Path) -> dict[str, Tensor]:
    """The weights that a checkpoint's run is judged by: the averaged ones where there are any."""
    return averaged_or_plain(*load_checkpoint(path))


def averaged_or_plain(weights: dict[str, Tensor], trainer: dict[str, Any]) -> dict[str, Tensor]:
    """Of a checkpoint that was read; raises InputError where it was not written by a training."""
    average = trainer.get("average") or {"module": weights}
    if not isinstance(average, dict) or not isinstance(average.get("module"), dict):
        raise InputError(f"the {STATE} of a checkpoint holds no averaged weights that can be read: remove its folder")
    averaged: dict[str, Tensor] = average["module"]
    return averaged


def save_state(state: dict[str, Any], path: Path) -> None:
    """Tensors, numbers, texts, None, lists, tuples and dicts with keys of text or whole numbers, as a safetensors file.

    Its metadata hold the whole as JSON, in which each tensor is a reference. Strides are not kept. Whole or not at all.
    """
    tensors: dict[str, Tensor] = {}
    text = json.dumps({"format": FORMAT, "state": _pack(state, "", tensors)})
    _write(tensors, {"cifarlab": text}, path)


def load_state(path: Path) -> dict[str, Any]:
    """What `save_state` wrote, on the CPU; raises InputError for a file that is damaged or none of ours."""
    try:
        tensors, words = _read(path)
        state = _unpack(json.loads(words["cifarlab"])["state"], tensors)
        if not isinstance(state, dict):
            raise TypeError
    except Exception as error:  # a damaged one raises nearly anything
        raise InputError(f"{path} cannot be read ({type(error).__name__}): it is damaged or no checkpoint; "
                         "remove the folder to go on from the one before") from None  # fmt: skip
    return state


def _pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """The value as JSON: a list as it is, a tuple, dict or tensor as an object of one key."""
    match value:
        case Tensor():
            plain = value.detach().cpu().contiguous()
            is_shared = any(plain.data_ptr() == other.data_ptr() for other in tensors.values() if plain.numel())
            tensors[name] = plain.clone() if is_shared else plain  # no two tensors of such a file may share memory
            return {"tensor": name}
        case dict():
            if not all(type(key) in (str, int) for key in value):
                raise TypeError(f"{name or 'the state'} has keys that are neither text nor whole numbers")
            return {"dict": [[key, _pack(item, f"{name}.{key}".lstrip("."), tensors)] for key, item in value.items()]}
        case tuple() | list():
            items = [_pack(item, f"{name}.{k}", tensors) for k, item in enumerate(value)]
            return {"tuple": items} if isinstance(value, tuple) else items
        case None | bool() | int() | float() | str():
            return value
    raise TypeError(f"{name} is a {type(value).__name__}, which a checkpoint cannot hold")


def _unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    match value:
        case {"tensor": str(name)}:
            return tensors[name]
        case {"tuple": list(items)}:
            return tuple(_unpack(item, tensors) for item in items)
        case {"dict": list(pairs)}:
            return {key: _unpack(item, tensors) for key, item in pairs}
        case list():
            return [_unpack(item, tensors) for item in value]
        case dict():
            raise ValueError
    return value


def save_weights(weights: dict[str, Tensor], path: Path) -> None:
    """A safetensors file of the tensors, in plain memory order, with a checksum, written whole or not at all."""
    _write({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, {}, path)


def load_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; raises InputError when it is missing or damaged."""
    try:
        weights, _ = _read(path)
    except FileNotFoundError:
        raise InputError(f"there are no weights at {path}: the folder is not whole, so train anew") from None
    except Exception as error:  # SafetensorError for what it foresees, but KeyError or ValueError for a dtype that torch lacks
        raise InputError(f"{path} cannot be read ({error}): it is damaged or no safetensors file, so bring back a copy, or "
                         "train anew") from None  # fmt: skip
    return weights


def _write(tensors: dict[str, Tensor], words: dict[str, str], path: Path) -> None:
    """The checksum goes into a header made anew in front of the same tensors: they are laid out once, and copied no more."""
    content = to_bytes(tensors, words)
    header, start = _header(content)
    header["__metadata__"] = {**words, "crc32": str(_checksum(content))}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8, as safetensors lays them out
    write_atomically(path, len(text).to_bytes(8, "little") + text, memoryview(content)[start:])


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, the file's own words); raises one of many errors for a damaged one."""
    content = path.read_bytes()
    tensors: dict[str, Tensor] = from_bytes(content)
    words: dict[str, str] = _header(content)[0].get("__metadata__", {})
    if "crc32" in words and words["crc32"] != str(_checksum(content)):  # others' files have none
        raise ValueError("its checksum is another")
    return tensors, words


def _checksum(content: bytes) -> int:
    """Of a safetensors file's tensors, with their names, types and shapes, and its words but for the checksum itself."""
    header, start = _header(content)
    words = {name: word for name, word in header.pop("__metadata__", {}).items() if name != "crc32"}
    return zlib.crc32(json.dumps([header, words], sort_keys=True).encode(), zlib.crc32(memoryview(content)[start:]))


def _header(content: bytes) -> tuple[dict[str, Any], int]:
    """(what a safetensors file begins with, where its tensors begin)."""
    start = 8 + int.from_bytes(content[:8], "little")
    header: dict[str, Any] = json.loads(content[8:start])
    return header, start
