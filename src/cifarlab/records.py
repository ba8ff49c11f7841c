"""Tables of measurements that grow while a run runs: one record a measured step, read back as a memory-mapped array. No torch.

    probes/gradient_flow.rec     a line of JSON that names items and columns, then records of equal size:
                                 step (int64), values (float32, items × columns), little-endian

A record is some thousand numbers (every parameter tensor, every statistic), so JSON rows would be ten times as large and a
hundred times as slow to read. Equal sizes make a torn last record easy to know, a resume's cut a truncation, and reading
a million steps a matter of opening the file.
"""

import json
import os
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cifarlab.config import InputError

SUFFIX = ".rec"
_HEADER_LIMIT = 1 << 22  # bytes of the first line: far more than any network's parameter names


@dataclass(frozen=True)
class Table:
    """What one probe measured: `table["norm"]` is an array of (steps, items).

    items: names of parameters or layers; columns: names of statistics; steps: int64 (n,), rising;
    values: float32 (n, items, columns), read from the disk when it is looked at.
    """

    name: str
    items: tuple[str, ...]
    columns: tuple[str, ...]
    steps: NDArray[np.int64]
    values: NDArray[np.float32]

    def __getitem__(self, column: str) -> NDArray[np.float32]:
        if column not in self.columns:
            raise KeyError(f"{self.name} has no column {column!r}; it has {', '.join(self.columns)}")
        found: NDArray[np.float32] = self.values[:, :, self.columns.index(column)]
        return found

    def __len__(self) -> int:
        return len(self.steps)

    def between(self, first: int, last: int) -> "Table":
        """The part with first ≤ step ≤ last."""
        start, stop = np.searchsorted(self.steps, [first, last + 1])
        return Table(self.name, self.items, self.columns, self.steps[start:stop], self.values[start:stop])

    def thin(self, at_most: int, steps: Sequence[int] = (), tail: int = 0) -> "Table":
        """Of more than that many records evenly spaced ones, in memory; the last `tail` and those of `steps` are among them.

        Only what is taken is read: a table of a million steps may be larger than the memory.
        """
        if len(self) <= at_most:
            return self
        places = range(len(self) - 1, -1, -len(self) // at_most)  # from the end on, which is taken
        asked = [k for step in steps if (k := bisect_left(self.steps, step)) < len(self) and self.steps[k] == step]
        rows = np.union1d([*places, *asked], np.arange(len(self) - tail, len(self))).astype(np.intp)
        return Table(self.name, self.items, self.columns, np.array(self.steps[rows]), np.array(self.values[rows]))


@dataclass(frozen=True)
class Measured:
    """New records of one table: steps (n,), values (n, items, columns); see `round_as_stored`."""

    name: str
    items: tuple[str, ...]
    columns: tuple[str, ...]
    steps: NDArray[np.int64]
    values: NDArray[np.float64]

    @property
    def table(self) -> Table:
        with np.errstate(over="ignore"):
            return Table(self.name, self.items, self.columns, self.steps, self.values.astype(np.float32))


@dataclass
class Reading:
    """What the probes measured since the last reading: tables, numbers of the whole model for the rows of the same steps, and
    the seconds spent on all probes since then."""

    tables: list[Measured] = field(default_factory=list)
    rows: dict[int, dict[str, float]] = field(default_factory=dict)
    seconds: float = 0.0


def round_as_stored(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The values as they will come back from the file: what is told from them live can then be told again later."""
    with np.errstate(over="ignore"):  # beyond float32's range: Inf
        return values.astype(np.float32).astype(np.float64)


class Appender:
    """A file that only grows, and that a full disk cannot tear: what it does not take is kept, and goes first the next time."""

    LIMIT = 1 << 28  # bytes that are kept at most

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)
        self._kept = b""

    def append(self, content: bytes) -> None:
        """Hands the content to the system, so that a reader or a crash right after finds it. Raises OSError, but keeps it."""
        if len(self._kept) + len(content) > self.LIMIT:
            raise MemoryError(f"{self._file.name} has not taken anything for {len(self._kept):,} bytes: make room on its disk")
        self._kept += content
        while self._kept:
            self._kept = self._kept[self._file.write(self._kept) or 0 :]

    @property
    def size(self) -> int:
        return self._file.seek(0, os.SEEK_END)

    def sync(self) -> None:
        self.append(b"")
        os.fsync(self._file.fileno())

    def truncate(self, size: int) -> None:
        self._file.truncate(size)

    def close(self) -> None:
        """Tries once more to write what was kept."""
        try:
            self.append(b"")
        except OSError:
            pass  # was raised before
        finally:
            self._file.close()


class TableWriter:
    """Appends records to a table's file; one whose items or columns are others than the file's is refused.

    A new file appears with its first line whole, so that neither a crash nor a reader meets half of one.

    Raises InputError then, and when the file cannot be written.
    """

    def __init__(self, path: Path, items: Sequence[str], columns: Sequence[str]) -> None:
        self.items, self.columns = tuple(items), tuple(columns)
        self._type = _record_type(len(items), len(columns))
        header = _header(path.stem, items, columns)
        path.parent.mkdir(exist_ok=True)
        if not path.exists():
            temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
            with temporary.open("wb") as file:
                file.write(header)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        elif (was := _read_header(path)) != json.loads(header):
            raise InputError(f"{path} holds other items or columns ({len(was['items'])} × {len(was['columns'])}) than are "
                             "measured now: resume with the same --probes, or start a new run")  # fmt: skip
        self._file = Appender(path)

    def append(self, steps: ArrayLike, values: ArrayLike) -> None:
        """Hands records to the system: steps (n,), values (n, items, columns)."""
        records = np.empty(len(np.atleast_1d(steps)), self._type)
        records["step"] = steps
        with np.errstate(over="ignore"):  # beyond float32's range: inf
            records["values"] = np.reshape(values, records["values"].shape)
        self._file.append(records.tobytes())

    def sync(self) -> None:
        self._file.sync()

    def close(self) -> None:
        self._file.close()


def read_table(path: Path) -> Table:
    """The table of that file, as far as it is whole; raises InputError where the file is damaged or none of ours."""
    header = _read_header(path)
    items, columns = tuple(header["items"]), tuple(header["columns"])
    kind, start = _record_type(len(items), len(columns)), header["start"]
    count = (path.stat().st_size - start) // kind.itemsize
    records = np.memmap(path, kind, "r", start, (count,)) if count else np.empty(0, kind)
    return Table(path.stem, items, columns, np.asarray(records["step"], np.int64), records["values"])


def forget_after(path: Path, step: int) -> None:
    """Cuts the records of later steps, and what a crash left behind them: a torn record, or zeros in place of some."""
    table = read_table(path)
    bad = (table.steps > step) | (np.diff(table.steps, prepend=0) <= 0)
    keep = int(np.argmax(bad)) if bad.any() else len(table)
    start, size = _read_header(path)["start"], _record_type(len(table.items), len(table.columns)).itemsize
    del table  # its mapping, before the file shrinks under it
    os.truncate(path, start + keep * size)


def _record_type(num_items: int, num_columns: int) -> np.dtype[Any]:
    return np.dtype([("step", "<i8"), ("values", "<f4", (num_items, num_columns))])


def _header(name: str, items: Sequence[str], columns: Sequence[str]) -> bytes:
    text = json.dumps({"cifarlab": "records", "format": 1, "name": name, "items": list(items), "columns": list(columns)})
    return text.encode() + b" " * (-(len(text.encode()) + 1) % 8) + b"\n"  # records aligned to 8 bytes


def _read_header(path: Path) -> dict[str, Any]:
    """The first line; `start` is where the records begin (absent from what is compared: it follows from the rest)."""
    try:
        with path.open("rb") as file:
            line = file.readline(_HEADER_LIMIT)
        header: dict[str, Any] = json.loads(line if line.endswith(b"\n") else b"0")
        lists = [header["items"], header["columns"]]
        is_ours = all(isinstance(names, list) and all(isinstance(name, str) for name in names) for names in lists)
        if header["cifarlab"] != "records" or header["format"] != 1 or not is_ours:
            raise ValueError
        _record_type(len(lists[0]), len(lists[1]))  # numpy refuses records above 2 GB
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): the run folder is not whole") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise InputError(f"{path} is no table of measurements, or its first line is damaged: remove the file") from None
    return _Header(header, start=len(line))


class _Header(dict[str, Any]):
    """Equal to the JSON object it was read from, and knows where the records start."""

    def __init__(self, values: dict[str, Any], start: int) -> None:
        super().__init__(values)
        self.start = start

    def __getitem__(self, key: str) -> Any:
        return self.start if key == "start" else super().__getitem__(key)
