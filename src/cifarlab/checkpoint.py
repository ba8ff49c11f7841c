"""Checkpoints: weights as safetensors, the rest of the trainer's state as a torch file that runs no code when it is read.

Each is a folder `checkpoints/step-00000782/`, written under a temporary name, put on the disk and then renamed: it is there
whole or not at all. Random states are not in it: every random draw of a run is a function of (seed, step).
"""

import io
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
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
        if final.exists():  # the same step again, after a resume: the same content
            shutil.rmtree(final)
        os.rename(temporary, final)
        sync_folder(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final


def prune_checkpoints(folder: Path, keep: set[int]) -> None:
    """Removes every checkpoint but those of the given steps, and what a crash left half-written."""
    for path in folder.iterdir():
        if path.is_dir() and path.name not in {f"step-{step:08d}" for step in keep}:
            shutil.rmtree(path, ignore_errors=True)


def find_checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints in that folder, newest first."""
    return sorted((path for path in folder.glob("step-*") if path.is_dir()), reverse=True)


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(model's state_dict, trainer's state), on the CPU; raises InputError for a damaged or foreign one."""
    try:
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
    weights, trainer = load_checkpoint(path)
    averaged: dict[str, Tensor] | None = trainer["average"] and trainer["average"]["module"]
    return averaged or weights


def save_weights(weights: dict[str, Tensor], path: Path) -> None:
    """A safetensors file of the tensors, in plain memory order, written whole or not at all."""
    write_atomically(path, to_bytes({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}))


def load_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; raises InputError when it is missing or damaged."""
    try:
        weights: dict[str, Tensor] = load_file(path)
    except FileNotFoundError:
        raise InputError(f"there are no weights at {path}") from None
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be read ({error}): it is damaged or no safetensors file") from None
    return weights
