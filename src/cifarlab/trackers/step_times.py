"""What a training step took when it was last measured before a run: a second start like it need not measure for seconds again.

In the cache folder: a JSON file of the newest entries. It is a help and no more: what is damaged, old or cannot be written is
measured anew.
"""

import hashlib
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from cifarlab import __version__
from cifarlab.config import InputError, TrainConfig, WatchConfig
from cifarlab.data.cache import cache_folder
from cifarlab.runs import read_json, write_atomically

FILE = "step_times.json"
VALID = 24 * 3600.0  # seconds: what else a machine has to do changes
KEPT = 200
UNIMPORTANT = {"recipe", "seed", "lr", "lr_from", "min_lr", "epochs", "eval_every"}  # no step takes longer for these


@dataclass(frozen=True)
class StepTimes:
    """Of each size of image that a run has: seconds of one update, and training FLOP of an image; when that was measured
    (seconds since 1970)."""

    seconds: tuple[float, ...]
    flops: tuple[float, ...]
    measured: float


def name_step(config: TrainConfig, watch: WatchConfig, parameters: int, shapes: Sequence[tuple[int, ...]], images: int,
              device: str) -> str:  # fmt: skip
    """A name for steps that cost the same: what is computed, on which device, with how many threads, by which versions."""
    settings = {name: value for name, value in config.to_dict().items() if name not in UNIMPORTANT}
    probes = [watch.probes, watch.probe_every, watch.probe_include, watch.probe_exclude]
    what = [settings, parameters, probes, shapes, images, device, torch.get_num_threads(), torch.__version__, __version__]
    return hashlib.sha256(json.dumps(what, default=str).encode()).hexdigest()[:32]


def recall_times(name: str, stages: int, *, now: float | None = None) -> StepTimes | None:
    """What was measured under that name within a day, for as many sizes of image."""
    try:
        entry = _read()[name]
        seconds, flops = (tuple(float(value) for value in entry[key]) for key in ("seconds", "flops"))
        found = StepTimes(seconds, flops, float(entry["measured"]))
    except (KeyError, TypeError, ValueError):
        return None
    age = (time.time() if now is None else now) - found.measured
    is_sound = len(seconds) == len(flops) == stages and all(math.isfinite(value) and value > 0 for value in (*seconds, *flops))
    return found if is_sound and 0 <= age < VALID else None


def note_times(name: str, times: StepTimes) -> None:
    entries = _read() | {name: asdict(times)}
    newest = sorted(entries, key=lambda key: _age(entries[key]))[-KEPT:]
    try:
        cache_folder().mkdir(parents=True, exist_ok=True)
        write_atomically(cache_folder() / FILE, json.dumps({key: entries[key] for key in newest}).encode())
    except OSError:
        pass  # the next start measures again


def _read() -> dict[str, Any]:
    try:
        return read_json(cache_folder() / FILE)
    except InputError:
        return {}


def _age(entry: Any) -> float:
    measured = entry.get("measured") if isinstance(entry, dict) else None
    return float(measured) if isinstance(measured, int | float) and math.isfinite(measured) else 0.0
