"""The measured points of a loss landscape: a file that grows point by point, and the arrays read back from it. No torch.

    landscape/random-2d-frozen.jsonl     a line of JSON that says what is measured, then one line a point

A point's line is handed to the system whole, so a killed run loses the last second at most, and the same call goes on where it
stopped. What is measured is identified by a hash of weights, directions and images: points of two landscapes never mix.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cifarlab.config import InputError
from cifarlab.runs import LINE_LIMIT

COLUMNS = ("loss", "loss_error", "difference_error", "accuracy")


@dataclass(frozen=True, eq=False)
class Landscape:
    """Loss at the weights centre + x·d₁ + y·d₂, as arrays (Y, X); a line has one row.

    xs: (X,); ys: (Y,), [0] of a line. loss: mean over the images; loss_error: its standard error, s/√n, as an estimate of the
    mean over all images of that kind. difference_error: the standard error of loss − loss at the centre, of the same images; it
    is the smaller the closer by, and it is the one that counts for the shape. accuracy: 0…1, nan where it means nothing.
    num_nonfinite: images whose loss was NaN or infinite, −1 where nothing has been measured yet; loss is nan at both.
    layers: by (row, column) of each point that is not finite, the first layer whose output was not.
    facts: what was measured, as the file's first line has it.
    """

    xs: NDArray[np.float64]
    ys: NDArray[np.float64]
    loss: NDArray[np.float64]
    loss_error: NDArray[np.float64]
    difference_error: NDArray[np.float64]
    accuracy: NDArray[np.float64]
    num_nonfinite: NDArray[np.int64]
    layers: dict[tuple[int, int], str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def is_complete(self) -> bool:
        return bool((self.num_nonfinite >= 0).all())

    def tell_nonfinite(self) -> str:
        """One sentence: at which points the loss is not finite and which layer was the first; empty when all is finite."""
        if not self.layers:
            return ""
        shown = [f"({self.xs[j]:g}, {self.ys[i]:g}) in {layer}" for (i, j), layer in sorted(self.layers.items())]
        more = f" and {len(shown) - 5} more" if len(shown) > 5 else ""
        return f"the loss is not finite at {len(shown)} of {self.loss.size} points: " + ", ".join(shown[:5]) + more


class GridFile:
    """The file of one landscape, opened to go on with it: `done` has the points there are, by (row, column).

    Raises InputError when the file belongs to another landscape, or is none.
    """

    def __init__(self, path: Path | None, facts: dict[str, Any]) -> None:
        self.facts = json.loads(json.dumps(facts))
        self.done: dict[tuple[int, int], dict[str, Any]] = {}
        self._file = None
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.stat().st_size:
            found, self.done, whole = _read(path)
            if found and found != self.facts:
                told = ", ".join(key for key in self.facts | found if self.facts.get(key) != found.get(key))
                raise InputError(f"{path} holds another landscape (different: {told}): remove it, or name another file")
            if whole < path.stat().st_size:
                os.truncate(path, whole)
        self._file = path.open("ab")
        if self._file.tell() == 0:
            self._write([self.facts])

    def append(self, rows: list[dict[str, Any]]) -> None:
        self.done |= {(row["i"], row["j"]): row for row in rows}
        self._write(rows)

    def _write(self, rows: Iterable[dict[str, Any]]) -> None:
        if self._file:
            self._file.write(b"".join(json.dumps(row, allow_nan=False).encode() + b"\n" for row in rows))
            self._file.flush()

    def close(self) -> None:
        if self._file:
            self._file.close()

    @property
    def landscape(self) -> Landscape:
        return _assemble(self.facts, self.done)


def read_landscape(path: Path) -> Landscape:
    """The landscape in that file, as far as it is measured; raises InputError when there is none or it is damaged."""
    if not path.exists():
        raise InputError(f"there is no landscape at {path}")
    facts, done, _ = _read(path)
    if not facts:
        raise InputError(f"{path} is empty: no landscape has been measured into it")
    try:
        return _assemble(facts, done)
    except (ValueError, TypeError, KeyError, IndexError, OverflowError):
        raise InputError(f"{path} is no landscape, or its points are damaged: remove it") from None


def _read(path: Path) -> tuple[dict[str, Any], dict[tuple[int, int], dict[str, Any]], int]:
    """(first line, points, bytes up to the last whole line)."""
    facts: dict[str, Any] = {}
    done: dict[tuple[int, int], dict[str, Any]] = {}
    whole = 0
    with path.open("rb") as file:
        while line := file.readline(LINE_LIMIT):
            if not line.endswith(b"\n") and len(line) < LINE_LIMIT:  # torn by a crash
                break
            try:
                row = json.loads(line)
                if not whole:
                    if row["cifarlab"] != "landscape":
                        raise ValueError
                    facts = row
                else:
                    needed = ("i", "j", *COLUMNS, "nonfinite", "layer")
                    done[int(row["i"]), int(row["j"])] = {column: row[column] for column in needed}
            except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
                raise InputError(f"{path} is no landscape, or damaged at byte {whole}: remove it") from None
            whole += len(line)
    return facts, done, whole


def _assemble(facts: dict[str, Any], done: dict[tuple[int, int], dict[str, Any]]) -> Landscape:
    xs, ys = (np.array(facts[name], dtype=float) for name in ("xs", "ys"))
    if xs.ndim != 1 or ys.ndim != 1 or not all(0 <= i < len(ys) and 0 <= j < len(xs) for i, j in done):
        raise IndexError("a point lies beside the grid")
    arrays = {column: np.full((len(ys), len(xs)), np.nan) for column in COLUMNS}
    num_nonfinite = np.full((len(ys), len(xs)), -1, dtype=np.int64)
    layers = {}
    for (i, j), row in done.items():
        num_nonfinite[i, j] = row["nonfinite"]
        for column, array in arrays.items():
            array[i, j] = np.nan if row[column] is None else row[column]
        if row["nonfinite"]:
            layers[i, j] = str(row["layer"])
    return Landscape(xs, ys, **arrays, num_nonfinite=num_nonfinite, layers=layers, facts=facts)
