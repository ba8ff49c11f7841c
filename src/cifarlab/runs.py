"""A run's folder: rows written so that a crash cannot hurt them, and read back as numpy columns. No torch here.

    runs/<name>/
      config.json        the TrainConfig: what was run
      environment.json   versions, machine, git commit, command (secrets taken out)
      dataset.json       class names, statistics, counts, fingerprint
      metrics.jsonl      one row a step, and one at each evaluation; append-only
      results.csv        one line an epoch, for spreadsheets
      probes.json        what is probed: parameters, shapes, which probes;  probes/*.rec: what they measured, see records.py
      alarms.jsonl       what the diagnosis found, one alarm a line
      incidents/         step-…: what is needed to do a step again whose gradients were not finite
      checkpoints/       step-…: weights and trainer state; the best on validation and the last (while the run runs the last two)
      trajectory/        step-….safetensors: weights along the way, where --trajectory-every asked for them
      model.safetensors  the weights behind the reported numbers
      predictions.npz    logits and labels of the last evaluation;  evaluation.json: its metrics;  samples.npz: some of its images
      thumbnails.npz     the images behind its confusion matrix, small: those that a report shows
      cost.json          parameters, MAC and FLOP of each layer
      mirrors/           how far W&B and TensorBoard have got;  wandb/, tensorboard/: their own files
      figures/           PNG files;  report.html: all of it on one page, see report/page.py
      result.json        written last: how the run ended
"""

import contextlib
import csv
import io
import json
import math
import os
import shutil
import stat
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from cifarlab import records
from cifarlab.config import MAX_IMAGE_SIZE, Failure, InputError, TrainConfig
from cifarlab.records import Appender, Measured, Table, TableWriter, read_table

TAIL = 1 << 16  # bytes at the end of the rows, where the last one is looked for
JSON_LIMIT = 1 << 26  # bytes of a JSON file; an evaluation of 3,000 classes takes 45 MB
LINE_LIMIT = 1 << 22  # bytes of a row or an alarm

Row = dict[str, float]  # "step" and metric keys `split/name`; `time/…` keys are the only ones that differ between equal runs


class RunFolder:
    """The writing side of a run's folder; only one process may hold it."""

    def __init__(self, path: Path, *, name: str = "--name", runs_dir: str = "--runs-dir") -> None:
        """Creates or opens the folder and locks it; raises InputError when another process holds it.

        name, runs_dir: what the caller's user knows the two settings as.
        """
        try:
            path.mkdir(parents=True, exist_ok=True)
            check_entries(path)
            self._lock = FileLock(path / ".lock")
            self._lock.acquire(timeout=0.3)  # `cifarlab runs` holds it for an instant, to see whether anybody does
        except Timeout:
            raise InputError(f"run folder {path} is in use by another process: wait for it, or choose another {name}") from None
        except OSError as error:
            raise InputError(f"run folder {path} cannot be written ({error.strerror}): choose another {runs_dir}") from None
        self.path = path
        _clear_remains(path)
        self._metrics = Appender(path / "metrics.jsonl")
        self._alarms: Appender | None = None
        self._tables: dict[str, TableWriter] = {}
        self._waiting: dict[str, list[Measured]] = {}  # for a disk on which their file can be made
        self._results = ResultsWriter(path / "results.csv")

    def close(self) -> None:
        self._metrics.close()
        if self._alarms:
            self._alarms.close()
        for table in self._tables.values():
            table.close()
        self._results.close()
        self._lock.release()

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write_json(self, name: str, value: Any) -> None:
        write_atomically(self.path / name, (json.dumps(_encode(value), indent=2, ensure_ascii=False) + "\n").encode())

    def rows(self, rows: list[Row]) -> None:
        """Appends rows and hands them to the system, so that a reader or a crash right after finds them whole."""
        self._metrics.append(b"".join(json.dumps(_encode(row)).encode() + b"\n" for row in rows))

    def table(self, measured: Measured) -> None:
        """Appends a probe's records to probes/NAME.rec. What the disk does not take is kept, and goes first the next time.

        Raises OSError then, and InputError where items or columns are others than the table's.
        """
        self._waiting.setdefault(measured.name, []).append(measured)
        self._write_waiting(measured.name)

    def _write_waiting(self, name: str) -> None:
        path, waiting = self.path / "probes" / f"{name}{records.SUFFIX}", self._waiting[name]
        if waiting and name not in self._tables:
            try:
                self._tables[name] = TableWriter(path, waiting[0].items, waiting[0].columns)
            except InputError:
                waiting.clear()
                raise
        while waiting:
            part, writer = waiting.pop(0), self._tables[name]
            if (part.items, part.columns) != (writer.items, writer.columns):
                raise InputError(f"{path} holds {len(writer.items)} items of {len(writer.columns)} columns; {len(part.items)} of "
                                 f"{len(part.columns)}, or others, cannot be added to it")  # fmt: skip
            writer.append(part.steps, part.values)

    def alarm(self, alarm: dict[str, Any]) -> None:
        """Appends an alarm (with its "step") to alarms.jsonl."""
        self._alarms = self._alarms or Appender(self.path / "alarms.jsonl")
        self._alarms.append(json.dumps(_encode(alarm), ensure_ascii=False).encode() + b"\n")

    def sync(self) -> None:
        """Waits until rows and records are on the disk: before a checkpoint claims that they are."""
        self._metrics.sync()
        for name in self._waiting:
            self._write_waiting(name)
        for table in self._tables.values():
            table.sync()
        if self._alarms:
            self._alarms.sync()
        self._results.sync()

    def check_is_there(self) -> None:
        """Raises Failure when the folder was moved or removed: what is written now would be found by nobody."""
        try:
            (self.path / "metrics.jsonl").stat()
        except (FileNotFoundError, NotADirectoryError):
            raise Failure(f"run folder {self.path} was moved or removed while its run was running, so the run has ended: put it "
                          "back and continue it with --resume, or start a new run") from None  # fmt: skip
        except OSError:
            pass  # a file system that does not answer for a while: what it does not take is kept

    def forget_after(self, step: int) -> int:
        """Cuts rows, records and alarms of steps that a resume is about to do again, and what is torn at the end.

        Gives the step of the last row that is there: an earlier one than `step` where a damaged disk has lost rows.
        """
        keep = last = 0
        for start, row in read_rows(self.path / "metrics.jsonl"):
            if row["step"] > step:
                break
            keep, last = start, int(row["step"])
        self._metrics.truncate(keep)
        for path in self.path.glob(f"probes/*{records.SUFFIX}"):
            records.forget_after(path, step)
        # By when an alarm was raised, not by the earlier step it tells of: what is raised again must not be there twice.
        kept = [alarm for alarm in Run(self.path).alarms if alarm.get("noticed", alarm["step"]) <= step]
        if (self.path / "alarms.jsonl").exists():
            write_atomically(self.path / "alarms.jsonl", b"".join(
                json.dumps(_encode(alarm), ensure_ascii=False).encode() + b"\n" for alarm in kept))  # fmt: skip
        return last

    def results(self, epoch_rows: Sequence[Row]) -> None:
        """Adds a line to results.csv for each row. The first call begins the file anew: a resume gives it all rows so far."""
        self._results.add(epoch_rows)


class ResultsWriter:
    """results.csv: lines are added to it, and it is written anew only for a row with a column that it lacks.

    Written whole at each evaluation it cost as much as all evaluations before: a hundred thousand of them took hours. What the
    disk does not take is kept, and goes first the next time. A torn last line is left by a kill; no reader takes it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._columns: tuple[str, ...] = ()
        self._file: Appender | None = None
        self._waiting: list[Row] = []

    def add(self, rows: Sequence[Row]) -> None:
        self._waiting += rows
        self.flush()

    def flush(self) -> None:
        """Writes what is waiting; raises OSError, but keeps it."""
        if self._file:
            self._file.append(b"")
        columns = tuple(dict.fromkeys([*self._columns, *(key for row in self._waiting for key in row)]))
        if self._file and columns == self._columns:
            text = _as_csv(self._waiting, columns)
            self._waiting = []
            self._file.append(text)
        elif self._waiting:
            before: list[Any] = []
            if self._columns:  # begun by us, even if it could not be opened again
                with self._path.open(newline="", encoding="utf-8") as file:
                    before = list(csv.DictReader(file))
            names: Any = dict(zip(columns, columns, strict=True))
            write_atomically(self._path, _as_csv([names, *before, *self._waiting], columns))
            self._columns, self._waiting = columns, []
            if self._file:
                self._file.close()
            self._file = None
            self._file = Appender(self._path)

    def sync(self) -> None:
        self.flush()
        if self._file:
            self._file.sync()

    def close(self) -> None:
        """Tries once more to write what was kept."""
        try:
            self.flush()
        except OSError:
            pass  # was raised before
        finally:
            if self._file:
                self._file.close()


def _as_csv(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> bytes:
    text = io.StringIO()
    csv.DictWriter(text, columns, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()


def _clear_remains(path: Path) -> None:
    """Removes what a process that was killed while it wrote has left in its run's folder; mirrors hold and clear their own."""
    for left in path.glob("**/.*.tmp"):
        if left.relative_to(path).parts[0] != "mirrors":
            with contextlib.suppress(OSError):
                shutil.rmtree(left) if left.is_dir() else left.unlink()


class Metrics(Mapping[str, NDArray[np.float64]]):
    """The rows of a run as columns: `metrics["train/loss"]`, with the steps they belong to in `steps("train/loss")`.

    Held as plain arrays, 16 bytes a value: as objects of Python a million rows of eight keys took 1.1 GB.
    """

    def __init__(self, rows: Iterable[Row] = ()) -> None:
        self._columns: dict[str, tuple[array[float], array[int]]] = {}
        self._kinds: dict[tuple[str, ...], int] = {}  # which keys a row has: a handful, numbered
        self._kind_of = array("I")
        for row in rows:
            self.append(row)

    def append(self, row: Row) -> None:
        step = int(row["step"])
        self._kind_of.append(self._kinds.setdefault(tuple(row), len(self._kinds)))
        for key, value in row.items():
            if key not in self._columns:
                self._columns[key] = (array("d"), array("q"))
            values, steps = self._columns[key]
            values.append(value)
            steps.append(step)

    @property
    def rows(self) -> "Rows":
        return Rows(self._columns, list(self._kinds), self._kind_of)

    def __getitem__(self, key: str) -> NDArray[np.float64]:
        return np.array(self._columns[key][0], dtype=np.float64)

    def steps(self, key: str) -> NDArray[np.int64]:
        return np.array(self._columns[key][1], dtype=np.int64)

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)

    def __repr__(self) -> str:
        return f"Metrics({len(self._kind_of)} rows of {', '.join(self._columns)})"


class Rows(Sequence[Row]):
    """The rows behind a run's columns in their order, each put together when it is looked at."""

    def __init__(self, columns: "dict[str, tuple[array[float], array[int]]]", kinds: list[tuple[str, ...]],
                 kind_of: "array[int]") -> None:  # fmt: skip
        self._columns, self._kinds, self._kind_of = columns, kinds, kind_of

    def __len__(self) -> int:
        return len(self._kind_of)

    def __iter__(self) -> Iterator[Row]:
        columns: dict[str, Iterator[float]] = {key: iter(values) for key, (values, _) in self._columns.items()}
        columns["step"] = iter(self._columns["step"][1]) if self._columns else iter(())  # whole numbers
        for kind in self._kind_of:
            yield {key: next(columns[key]) for key in self._kinds[kind]}

    @overload
    def __getitem__(self, place: int) -> Row: ...
    @overload
    def __getitem__(self, place: slice) -> list[Row]: ...
    def __getitem__(self, place: int | slice) -> Row | list[Row]:
        if isinstance(place, slice):
            return list(self)[place]
        place = range(len(self))[place]
        kinds = np.frombuffer(self._kind_of, np.uintc)[:place]
        row: Row = {}
        for key in self._kinds[self._kind_of[place]]:
            before = np.isin(kinds, [k for k, keys in enumerate(self._kinds) if key in keys]).sum()
            row[key] = self._columns[key][key == "step"][int(before)]
        return row

    def having(self, key: str) -> list[Row]:
        """The rows that have this key, such as the evaluations among a million steps: only those are put together."""
        kind_of = np.array(self._kind_of)  # a view would forbid the array to grow
        places = np.flatnonzero(np.isin(kind_of, [k for k, keys in enumerate(self._kinds) if key in keys]))
        rows: list[Row] = [{} for _ in places]
        for name, columns in self._columns.items():
            has = np.isin(kind_of, [k for k, keys in enumerate(self._kinds) if name in keys])
            before = np.cumsum(has)[places] - 1
            values = columns[name == "step"]
            for row, is_there, k in zip(rows, has[places].tolist(), before.tolist(), strict=True):
                if is_there:
                    row[name] = values[k]
        return rows

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]  # as lists have none

    def __repr__(self) -> str:
        return repr(list(self))


@dataclass(frozen=True)
class Run:
    """The reading side of a run's folder: finished, running or interrupted."""

    path: Path

    @property
    def is_watched(self) -> bool:
        """Whether this was recorded by `watch` around somebody's own loop, so that there is no config, data set or weights."""
        return not (self.path / "config.json").exists() and (self.path / "watch.json").exists()

    @cached_property
    def config(self) -> TrainConfig:
        if self.is_watched:
            raise InputError(f"{self.path} was recorded by cl.watch around a loop of its own: it has no settings to go by")
        return TrainConfig.from_dict(read_json(self.path / "config.json"))

    @cached_property
    def environment(self) -> dict[str, Any]:
        return read_json(self.path / "environment.json")

    @cached_property
    def dataset(self) -> dict[str, Any]:
        """Class names, statistics, image size and fingerprint of the data; raises InputError where one cannot be used."""
        path = self.path / "dataset.json"
        facts = read_json(path)
        names, side = facts.get("class_names"), facts.get("image_size")
        sound = {
            "class_names": isinstance(names, list) and bool(names) and all(isinstance(name, str) for name in names),
            "image_size": type(side) is int and 1 <= side <= MAX_IMAGE_SIZE,
            "mean": _is_triple(facts.get("mean")),
            "std": _is_triple(facts.get("std")) and min(facts["std"]) > 0,
            "fingerprint": isinstance(facts.get("fingerprint"), str),
        }
        if bad := [name for name, is_sound in sound.items() if not is_sound]:
            raise InputError(f"{path} has no {bad[0]} that can be used: the run folder is damaged, so train anew")
        return facts

    @cached_property
    def metrics(self) -> Metrics:
        return Metrics(row for _, row in read_rows(self.path / "metrics.jsonl"))

    @property
    def last_step(self) -> int:
        """The step of the last whole row, without reading the others; 0 where there is none."""
        try:
            return last_step(self.path / "metrics.jsonl")
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            raise InputError(f"{self.path / 'metrics.jsonl'} has a damaged row at its end: remove that line") from None

    @cached_property
    def tables(self) -> dict[str, Table]:
        """What the probes measured, by probe: `run.tables["gradient_flow"]["norm"]` is an array of (steps, parameters)."""
        return {path.stem: read_table(path) for path in sorted(self.path.glob(f"probes/*{records.SUFFIX}"))}

    @property
    def probed(self) -> dict[str, Any]:
        """What is probed: parameters with shapes, in the network's order. Empty where nothing is."""
        path = self.path / "probes.json"
        return read_json(path) if path.exists() else {}

    @property
    def alarms(self) -> list[dict[str, Any]]:
        """What the diagnosis found while the run ran, in order; a torn last line is passed over."""
        path = self.path / "alarms.jsonl"
        lines = _read_limited(path).split(b"\n")[:-1] if path.exists() else []
        try:
            return [{**json.loads(line), "step": int(json.loads(line)["step"])} for line in lines]
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            raise InputError(f"{path} has a damaged line: remove it") from None

    def incident(self, step: int) -> dict[str, Any] | None:
        """What was found out about a step whose gradients were not finite (see incidents/); None where there is none."""
        path = self.path / "incidents" / f"step-{step:08d}" / "incident.json"
        return read_json(path) if path.exists() else None

    @property
    def is_finished(self) -> bool:
        return (self.path / "result.json").exists()

    @property
    def result(self) -> dict[str, Any]:
        """How the run ended: `state`, accuracies, seconds. Empty while it has not.

        state: "finished"; "diverged" (the loss was not finite) or "climbed" (above stop_loss times its lowest) at `step`;
        "swept" (a range test that reached its end); "stopped" (a watched loop that an error ended, or whose watch nobody closed).
        probes_lost: those that failed on the way and were switched off, with the reason; absent where there are none.
        best_lost: the step that was best on validation, where its checkpoint was damaged, so that the last step is reported.
        """
        return read_json(self.path / "result.json") if self.is_finished else {}

    @property
    def evaluation(self) -> dict[str, Any]:
        """The metrics of the last evaluation. Empty while there has been none."""
        path = self.path / "evaluation.json"
        return read_json(path) if path.exists() else {}

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}: {self.result or 'not finished'})"


class Followed:
    """A run that may still be running: each look gives it with all of its rows so far, and reads only those that are new.

    Where the rows are others than they were, as after a resume that has cut some, they are read anew.
    """

    MARK = 4096  # bytes before the end of what was read, by which it is known again

    def __init__(self, path: Path) -> None:
        self._path = path
        self._begin()

    def _begin(self) -> None:
        self._metrics, self._offset, self._mark = Metrics(), 0, b""

    def look(self) -> Run:
        """Its rows grow with the next look; raises InputError as `Run.metrics` does."""
        path = self._path / "metrics.jsonl"
        if self._mark_at(self._offset) != self._mark:
            self._begin()
        for offset, row in read_rows(path, self._offset):
            self._metrics.append(row)
            self._offset = offset
        self._mark = self._mark_at(self._offset)
        run = Run(self._path)
        vars(run)["metrics"] = self._metrics  # in place of what the property would read
        return run

    def _mark_at(self, offset: int) -> bytes:
        try:
            with (self._path / "metrics.jsonl").open("rb") as file:
                file.seek(max(0, offset - self.MARK))
                return file.read(min(offset, self.MARK))
        except FileNotFoundError:
            return b""


def load_run(path: str | Path) -> Run:
    """The run in that folder; raises InputError when it is none."""
    path = Path(path)
    if not path.is_dir():
        raise InputError(f"there is no run folder {path}: name a folder such as runs/{path.name or 'NAME'}")
    run = Run(path)
    if not run.is_watched and not (path / "config.json").exists():
        raise InputError(f"{path} is not a run folder: it has no config.json, so name one that `cifarlab runs` lists")
    check_entries(path)
    if not run.is_watched:
        _ = run.config  # a torn or foreign config.json is found here, not later
    return run


def check_entries(path: Path) -> None:
    """Raises InputError where a link in a run's folder leads out of it, or something in it is neither file nor folder.

    A run folder may be somebody else's. What is appended to, cut, pruned or sent to a tracker must lie in it, and a pipe would
    be waited for without end. Costs a look at each entry; a link to the run folder itself is fine, and so is W&B's own link to
    the log of its program, wandb/…/logs/debug-core.log, which it leaves in every run and nobody here opens.
    """
    inside = path.resolve()
    for folder, folders, files in os.walk(path):
        for name in (*folders, *files):
            entry = Path(folder, name)
            try:
                mode = entry.lstat().st_mode
            except FileNotFoundError:  # a run at work here has just given a new file its name
                continue
            if stat.S_ISLNK(mode):
                if entry.relative_to(path).match("wandb/*run-*/logs/debug-core.log"):
                    continue
                if not entry.resolve().is_relative_to(inside):
                    raise InputError(f"link {entry} leads out of the run folder: copy what it points at, or delete it")
            elif not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
                raise InputError(f"{entry} is neither a file nor a folder: delete it, it is no part of a run")


def claim_folder(runs_dir: Path, config: TrainConfig) -> Path:
    """A new run's folder: recipe, config hash, time; with a number behind it where another was begun in the same second.

    That may be one of an hour ago, when the clock was put back. The folder is made here, so that it is nobody else's.
    Raises InputError when that cannot be done.
    """
    name, number = f"{config.recipe}-{config.hash[:6]}-{datetime.now():%Y%m%d-%H%M%S}", 1
    while True:
        path = runs_dir / (name if number == 1 else f"{name}-{number}")
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            number += 1
            if not path.is_dir():  # it is runs_dir that is a file
                raise InputError(f"{runs_dir} is no folder, so no run can be made in it: choose another --runs-dir") from None
        except OSError as error:
            raise InputError(f"run folder {path} cannot be written ({error.strerror}): choose another --runs-dir") from None


def is_torn_start(path: Path) -> bool:
    """Whether that folder holds no more than what a crash leaves that comes before a run's config is written, or nothing."""
    return all(child.name == ".lock" or (child.name.startswith(".") and child.name.endswith(".tmp"))
               or (child.name == "metrics.jsonl" and not child.stat().st_size) for child in path.iterdir())  # fmt: skip


def find_unfinished(runs_dir: Path, config: TrainConfig) -> Run | None:
    """The newest run of an equal config that has not ended and that no process is at work on; precision `auto` equals any."""
    found = []
    for path in runs_dir.glob("*/config.json"):
        run = Run(path.parent)
        try:
            if not run.is_finished and config.matches(run.config) and not is_held(path.parent):
                found.append((path.stat().st_mtime_ns, run))
        except (InputError, OSError):
            continue  # another version's run, or a torn one: not ours to continue
    return max(found, key=lambda pair: pair[0])[1] if found else None


def is_held(path: Path) -> bool:
    """Whether a process is at work in that run folder."""
    if not (path / ".lock").is_file() or (path / ".lock").is_symlink():  # to open a link could empty what it points at
        return False
    try:
        with FileLock(path / ".lock").acquire(timeout=0):
            return False
    except Timeout:
        return True
    except OSError:  # somebody else's folder, where nothing may be written
        return False


def write_atomically(path: Path, *content: bytes | memoryview) -> None:
    """Puts the content, one part behind the other, under that name whole or not at all, also through a power cut."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            for part in content:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(path)) from None  # a full disk refuses write() without a name
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Puts the folder's own entries on the disk: a rename lives there, not in the file."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _encode(value: Any) -> Any:
    """JSON has no word for what is not finite: "nan", "inf" and "-inf", which float() reads back."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _encode(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_encode(item) for item in value]
    return value


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a run's folder; raises InputError where there is none, or a damaged one."""
    try:
        value = json.loads(_read_limited(path))
    except FileNotFoundError:
        raise InputError(f"{path} is missing: the run folder is not whole, so train anew or name another") from None
    except InputError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        told = f"{type(error).__name__}: {error}"[:120]
        raise InputError(f"{path} cannot be read as JSON ({told}): the run folder is damaged, so train anew") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} holds no JSON object: the run folder is damaged, so train anew")
    return value


def last_step(path: Path) -> int:
    """The step of the last whole row, from the file's end; 0 without any. Raises one of several errors for a damaged one."""
    if not path.exists():
        return 0
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
        lines = file.read().split(b"\n")
    return int(json.loads(lines[-2])["step"]) if len(lines) > 1 else 0


def _read_limited(path: Path) -> bytes:
    """The file's content; raises InputError where that is more than such a file can have, so that memory is bounded."""
    with path.open("rb") as file:
        content = file.read(JSON_LIMIT + 1)
    if len(content) > JSON_LIMIT:
        raise InputError(f"{path} has more than {JSON_LIMIT >> 20} MiB, more than any of ours: remove it")
    return content


def _is_triple(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(type(x) in (int, float) and math.isfinite(x) for x in value)


def read_rows(path: Path, start: int = 0) -> Iterator[tuple[int, Row]]:
    """(offset after the row, row) for every whole row from `start` on; a torn last line, as a crash leaves it, is passed over."""
    if not path.exists():
        return
    offset = start
    with path.open("rb") as file:
        file.seek(start)
        while line := file.readline(LINE_LIMIT):
            if len(line) == LINE_LIMIT:
                raise InputError(f"{path} has a line of more than {LINE_LIMIT >> 20} MiB at byte {offset}: remove that line")
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            try:
                row = json.loads(line)
                yield offset, {key: float(value) for key, value in row.items()} | {"step": int(row["step"])}
            except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
                raise InputError(f"{path} has a damaged row at byte {offset - len(line)}: remove that line") from None
