"""What the board shows of a runs folder: the table, and the parts of a run's page, made anew when its files have changed."""

import gc
import hashlib
import os
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Any

from markupsafe import Markup, escape

from cifarlab.config import InputError
from cifarlab.figures.style import unchecked
from cifarlab.listing import list_runs, sort_runs
from cifarlab.report.charts import pack_section, to_json
from cifarlab.report.page import assemble, build_page, show_run
from cifarlab.report.section import Section
from cifarlab.report.summary import say_under
from cifarlab.runs import Followed, Run, is_held, load_run

SHARE = 0.1
"""Of one processor, at most, that making a page of a run anew may take: a training beside it needs the rest."""
LEAST = 1.0  # seconds between two looks at a run's files
KEPT = 8  # runs whose parts are kept
FOLLOWED = 2  # running runs whose rows are kept, 130 MB of a million: of another one all are read again


@dataclass(frozen=True)
class Part:
    """A section of a run's page. key: changes with its content. data: what page.js draws it from, as JSON."""

    id: str
    title: str
    key: str
    html: str
    data: str

    @classmethod
    def of(cls, section: Section) -> "Part":
        data = to_json(pack_section(section.charts, section.more)) if section.charts or section.more else "null"
        key = hashlib.sha256(f"{section.title}\0{section.html}\0{data}".encode()).hexdigest()[:16]
        return cls(section.id, section.title, key, str(section.html), data)


@dataclass(frozen=True)
class State:
    """A run's parts as they were when its files had this signature; cost: processor seconds that it took to make them."""

    signature: str
    parts: tuple[Part, ...]
    under: tuple[str, ...]
    is_running: bool
    made: float
    cost: float


class LiveRuns:
    """The runs in a folder, for pages that follow them. What is asked for by a name is looked up among the folder's own runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._states: OrderedDict[str, State] = OrderedDict()
        self._followed: OrderedDict[str, Followed] = OrderedDict()
        self._lock = Lock()  # one page at a time: two would only fight for the processor

    def table(self) -> dict[str, Any]:
        """{"runs": [one line each, newest first], "damaged": [sentences]}; both empty while there is no such folder."""
        if not self.folder.is_dir():
            return {"folder": str(self.folder), "runs": [], "damaged": []}
        found, damaged = list_runs(self.folder)
        shown = [run for run in sort_runs(found, "started") if self._is_inside(Path(run.path))]
        return {"folder": str(self.folder), "runs": [asdict(run) for run in shown], "damaged": damaged}

    def find(self, name: str) -> Run | None:
        """The run of that very name; None for anything else, paths and links that lead out of the folder among it."""
        if not name or not self.folder.is_dir() or name not in os.listdir(self.folder):
            return None
        path = self.folder / name
        if not (path.is_dir() and self._is_inside(path)):
            return None
        try:
            return load_run(path)
        except InputError:
            return None

    def page(self, name: str, follow: str) -> str | None:
        """The whole page of a run, with a script more that keeps it up to date."""
        run = self.find(name)
        if run is None:
            return None
        state = self._state(name, run)
        parts = [(part.id, part.title, part.html) for part in state.parts]
        data = [(part.id, part.data) for part in state.parts if part.data != "null"]
        known = to_json({"keys": [part.key for part in state.parts], "running": state.is_running})
        return assemble(name, state.under, parts, data, home=True, follow=follow, known=known)

    def side_by_side(self, names: Sequence[str]) -> str | None:
        """The page of several runs, as they are now; None where one of them is not there."""
        runs = [run for run in map(self.find, names) if run is not None]
        if len(runs) < max(2, len(names)):
            return None
        with self._lock:
            return build_page(runs, home=True)

    def news(self, name: str, known: frozenset[str]) -> str | None:
        """JSON of a run's page: its sections in order, with the content of those whose key is not known; None: no such run."""
        run = self.find(name)
        if run is None:
            return None
        state = self._state(name, run)
        parts = ",".join(
            f'{{"id":{to_json(part.id)},"title":{to_json(part.title)},"key":"{part.key}"'
            + ("" if part.key in known else f',"html":{to_json(part.html)},"data":{part.data}') + "}"
            for part in state.parts
        )  # fmt: skip
        under = Markup(" · ").join(Markup("<bdi>{}</bdi>").format(escape(told)) for told in state.under)
        return f'{{"running":{to_json(state.is_running)},"under":{to_json(str(under))},"sections":[{parts}]}}'

    def _state(self, name: str, run: Run) -> State:
        with self._lock:
            known = self._states.get(name)
            now = time.monotonic()
            has_ended = known is not None and known.is_running and not is_held(run.path)  # then nothing beside it waits
            if known and not has_ended and now - known.made < max(LEAST, known.cost / SHARE):
                return known
            signature = sign(run.path)
            if known and known.signature == signature:
                self._states[name] = known = replace(known, made=now)
            else:
                begun = time.thread_time()  # of the processor: on a busy machine a page waits more than it works
                followed = self._followed.pop(name, None) or Followed(run.path)
                with unchecked():
                    parts = tuple(map(Part.of, show_run(followed.look())))
                gc.collect()  # charts are full of cycles: of a long run five pages came to 1.3 GB before Python looked
                cost = time.thread_time() - begun
                known = State(signature, parts, tuple(say_under(run)), is_held(run.path), time.monotonic(), cost)
                self._states[name] = known
                if known.is_running:
                    self._followed[name] = followed
                    while len(self._followed) > FOLLOWED:
                        self._followed.popitem(last=False)
            self._states.move_to_end(name)
            while len(self._states) > KEPT:
                self._states.popitem(last=False)
            return known

    def _is_inside(self, path: Path) -> bool:
        return path.resolve().parent == self.folder.resolve()


def sign(path: Path) -> str:
    """Changes when a file of the run does that a page is made of, or when somebody begins or ends to hold the run."""
    told = sorted((str(file.relative_to(path)), size, changed) for file, size, changed in _files(path))
    return hashlib.sha256(repr((told, is_held(path))).encode()).hexdigest()


def _files(path: Path) -> Iterator[tuple[Path, int, int]]:
    for folder in (path, path / "probes"):
        try:
            entries = list(os.scandir(folder))
        except OSError:
            continue
        for entry in entries:
            try:
                if entry.is_file(follow_symlinks=False):
                    status = entry.stat()
                    yield Path(entry.path), status.st_size, status.st_mtime_ns
            except OSError:
                continue  # gone meanwhile
