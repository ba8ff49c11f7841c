"""Checkpoints: weights as safetensors, the rest of the trainer's state as a torch file that runs no code when it is read.

Each is a folder `checkpoints/step-00000782/`, written under a temporary name, put on the disk and then renamed: it is there
whole or not at all. What a disk or a copy damages later is found by checksums, which both formats leave to their users:
safetensors has none, and torch does not look at those in its files. Random states are not in a checkpoint: every random draw of
a run is a function of (seed, step).
"""

import io
import json
import os
import shutil
import sys
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor

from cifarlab.config import InputError
from cifarlab.runs import sync_folder, write_atomically

FORMAT = 2


def save_checkpoint(folder: Path, step: int, weights: dict[str, Tensor], trainer: dict[str, Any]) -> Path:
    """Writes `folder/step-…` with the model's state_dict and the trainer's state (tensors, numbers, strings, lists, dicts)."""
    final = folder / f"step-{step:08d}"
    temporary = folder / f".step-{step:08d}.{os.getpid()}.tmp"
    folder.mkdir(exist_ok=True)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        save_weights(weights, temporary / "model.safetensors")
        content = io.BytesIO()  # torch's own file writer hides a full disk behind a RuntimeError
        torch.save({"format": FORMAT, "step": step} | trainer, content)
        (temporary / "trainer.pt").write_bytes(content.getbuffer())
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
    """Removes every checkpoint but those of the given steps, and what a crash left half-written or half-removed."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_dir() and path.name not in {f"step-{step:08d}" for step in keep}:
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


def load_newest(folder: Path, *, rows_until: int | None = None) -> tuple[Path, dict[str, Tensor], dict[str, Any]]:
    """(its folder, model's state_dict, trainer's state) of the newest checkpoint that is whole; of damaged ones a line is said.

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
        if path != found[0]:
            why = "is damaged" if damaged else f"lacks its rows, which end at step {rows_until:,}"
            print(f"cifarlab: checkpoint {found[0]} {why}: {path.name} is taken instead", file=sys.stderr)
        return path, weights, trainer
    if not found:
        raise InputError(f"there is no checkpoint in {folder}")
    raise InputError(f"no checkpoint in {folder} is whole; remove that folder, and a resume begins the run anew ({damaged})")


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(model's state_dict, trainer's state), on the CPU; raises InputError for a damaged or foreign one."""
    try:
        with zipfile.ZipFile(path / "trainer.pt") as archive:
            if archive.testzip() is not None:
                raise zipfile.BadZipFile
        trainer = torch.load(path / "trainer.pt", map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"checkpoint {path} is not whole: it has no trainer.pt; remove the folder") from None
    except Exception as error:  # torch's reader raises half a dozen types for a file that is none of its own
        raise InputError(f"{path / 'trainer.pt'} cannot be read ({type(error).__name__}): it is damaged or no checkpoint; "
                         "remove the folder to go on from the one before") from None  # fmt: skip
    if not isinstance(trainer, dict) or trainer.get("format") != FORMAT:
        raise InputError(f"{path / 'trainer.pt'} is no checkpoint of this version of cifarlab (format {FORMAT})")
    return load_weights(path / "model.safetensors"), trainer


def load_evaluated(path: Path) -> dict[str, Tensor]:
    """The weights that a checkpoint's run is judged by: the averaged ones where there are any."""
    return averaged_or_plain(*load_checkpoint(path))


def averaged_or_plain(weights: dict[str, Tensor], trainer: dict[str, Any]) -> dict[str, Tensor]:
    averaged: dict[str, Tensor] | None = trainer["average"] and trainer["average"]["module"]
    return averaged or weights


def save_weights(weights: dict[str, Tensor], path: Path) -> None:
    """A safetensors file of the tensors, in plain memory order, with a checksum of them, written whole or not at all."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    _, start = _header(content := to_bytes(plain))
    write_atomically(path, to_bytes(plain, {"crc32": str(zlib.crc32(memoryview(content)[start:]))}))


def _header(content: bytes) -> tuple[dict[str, str], int]:
    """(a safetensors file's own words, where its tensors begin)."""
    start = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:start]).get("__metadata__", {}), start


def load_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; raises InputError when it is missing or damaged."""
    try:
        content = path.read_bytes()
        weights: dict[str, Tensor] = from_bytes(content)
    except FileNotFoundError:
        raise InputError(f"there are no weights at {path}") from None
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be read ({error}): it is damaged or no safetensors file") from None
    words, start = _header(content)
    if "crc32" in words and words["crc32"] != str(zlib.crc32(memoryview(content)[start:])):  # others' files have none
        raise InputError(f"{path} is damaged (its checksum is another): bring back a copy of it, or train anew")
    return weights
