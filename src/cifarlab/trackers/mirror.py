"""A mirror follows a run's folder and sends what is new in it: in a thread of its own while the run runs, or all at once later.

The folder is the truth, so there is nothing to queue: a mirror that is slow, stuck or broken costs the training neither time nor
memory, and `cifarlab sync` sends later what it missed. `mirrors/NAME.json` in the run folder notes how far each has got.
"""

import json
import shlex
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock, Timeout

from cifarlab.config import InputError
from cifarlab.environment import scrub
from cifarlab.runs import Run, write_atomically
from cifarlab.trackers.content import Entry, Feed, Position, check_content, summarize

LOOK_EVERY = 2.0
"""Seconds between two looks at the folder of a running run."""
PATIENCE = 60.0
"""Seconds that the end of a run waits for a mirror that makes no progress."""


class Unavailable(Exception):
    """A mirror cannot take anything: one sentence that says why."""


class Sink(Protocol):
    """Where a mirror's entries go."""

    name: str
    """For people."""
    key: str
    """Of `mirrors/KEY.json` and the option `--KEY`."""
    with_weights: bool
    remark: str
    """After `open`, what the user should know; else empty."""

    def open(self, run: Run, memory: dict[str, Any]) -> str:
        """Gets ready without sending; the name of the destination, each of which has a position of its own.

        memory: what this sink wants to know again the next time; it may change it. Raises Unavailable.
        """

    def begin(self, step: int) -> int:
        """Connects; step: the last one that the run folder says was sent. Gives the last that is really there."""

    def send(self, entry: Entry) -> None: ...

    def flush(self) -> None:
        """Makes sure that what was sent outlives this process."""

    def finish(self, summary: dict[str, Any]) -> None:
        """Closes, with the summary of a run that is over (else it is empty). Raises Unavailable when not all has arrived."""

    def abandon(self) -> None:
        """Lets go of what is open, after a failure or a finish."""


class Mirror:
    """One run, one sink: opens, sends what is new, notes how far it got."""

    def __init__(self, path: Path, sink: Sink) -> None:
        self.sink = sink
        self.sent_steps = self.sent_entries = 0
        self.heartbeat = time.monotonic()  # of the last sign of progress
        self._path = path
        self._file = path / "mirrors" / f"{sink.key}.json"
        self._lock = FileLock(path / "mirrors" / f".{sink.key}.lock", thread_local=False)
        self._has_begun = False

    @property
    def step(self) -> int:
        """The last step that was sent."""
        return self._feed.position.step if hasattr(self, "_feed") else 0

    def open(self) -> None:
        """Raises InputError where another process mirrors this run already, Unavailable where the sink is not to be had."""
        self._file.parent.mkdir(exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise InputError(f"{self._path} is being sent to {self.sink.name} by another process: that one sends all") from None
        for left in self._file.parent.glob(f".{self._file.name}.*.tmp"):  # of a process that was killed while it wrote
            left.unlink(missing_ok=True)
        self._state = self._read_state()
        self._memory: dict[str, Any] = self._state.setdefault("about", {})
        self._destination = self.sink.open(Run(self._path), self._memory)
        self._position = Position.of(self._state.setdefault("positions", {}).get(self._destination, {}))
        self._feed = self._new_feed()

    def begin(self) -> None:
        """Connects, and goes on where the sink really is: after a crash that may be before, or after, what was noted."""
        there = self.sink.begin(self._position.step)
        self.heartbeat = time.monotonic()
        self._has_begun = True
        # Nothing there: another place than it was, or emptied, so that figures and alarms are missing too.
        self._position = Position(there, self._position.alarms, self._position.files) if there else Position()
        self._feed = self._new_feed()
        self._note(is_clean=False)

    @property
    def has_news(self) -> bool:
        """Whether anything is to be sent; False only when the last session ended well, so that its notes hold."""
        return self._destination not in self._state.get("clean", []) or bool(self._new_feed().read())

    def pump(self) -> None:
        """Sends what is new in the folder."""
        while entries := self._feed.read():
            for entry in entries:
                self.sink.send(entry)
                self.sent_entries += 1
                self.sent_steps += bool(entry.scalars)
                self.heartbeat = time.monotonic()
            self.sink.flush()
            self._note(is_clean=False)

    def finish(self) -> None:
        self.sink.finish(summarize(Run(self._path)))
        self._has_begun = False
        self._note(is_clean=True)

    def close(self) -> None:
        """Always called last, after a failure too."""
        try:
            self.sink.abandon()
        except Exception:
            pass  # that it does not work was said already
        finally:
            self._lock.release()

    def _new_feed(self) -> Feed:
        position = Position(self._position.step, [*self._position.alarms], {**self._position.files})
        return Feed(self._path, position, with_weights=self.sink.with_weights)

    def _read_state(self) -> dict[str, Any]:
        try:
            state: dict[str, Any] = json.loads(self._file.read_bytes())
            for position in state["positions"].values():
                Position.of(position)
            is_sound = isinstance(state.get("about", {}), dict) and all(isinstance(name, str) for name in state.get("clean", []))
            return state if is_sound else {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return {}  # none yet, or damaged: the sink knows where it is, or begins anew

    def _note(self, *, is_clean: bool) -> None:
        clean = {*self._state.get("clean", [])} - {self._destination} | ({self._destination} if is_clean else set())
        self._state |= {"clean": sorted(clean)}
        self._state["positions"][self._destination] = asdict(self._feed.position)
        write_atomically(self._file, (json.dumps(self._state, indent=1) + "\n").encode())


class LiveMirror:
    """A mirror of a running run, in a daemon thread; whatever happens to it is said in one line, and the run goes on."""

    def __init__(self, path: Path, sink: Sink) -> None:
        self._mirror, self._path = Mirror(path, sink), path
        self._stop = threading.Event()
        self._said = threading.Lock()  # taken for good by whoever says the one line
        self._thread = threading.Thread(target=self._work, name=f"cifarlab-{sink.key}", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        mirror = self._mirror
        try:
            mirror.open()
            if mirror.sink.remark:
                print(f"cifarlab: {mirror.sink.remark}", file=sys.stderr)
            mirror.begin()
            while not self._stop.wait(LOOK_EVERY):
                mirror.pump()
            mirror.pump()
            mirror.finish()
        except Exception as error:  # trackers raise many types, and none of them may end a training
            self._lose(reason(error))
        finally:
            mirror.close()

    def close(self) -> None:
        """Waits until all is sent, as long as there is progress."""
        self._stop.set()
        self._mirror.heartbeat = time.monotonic()
        while self._thread.is_alive() and time.monotonic() - self._mirror.heartbeat < PATIENCE:
            self._thread.join(0.05)
        if self._thread.is_alive():
            self._lose(f"it has not moved for {PATIENCE:.0f} s")

    def _lose(self, why: str) -> None:
        if self._said.acquire(blocking=False):
            sink, after = self._mirror.sink, f" after step {self._mirror.step:,}" if self._mirror.step else ""
            print(f"cifarlab: {sink.name} gets nothing{after}: {why}. The run goes on and its folder has everything; "
                  f"send it later: cifarlab sync {shlex.quote(str(self._path))} --{sink.key}", file=sys.stderr)  # fmt: skip


def reason(error: BaseException) -> str:
    """Why a mirror failed, on one line, without secrets."""
    told = str(error) if isinstance(error, Unavailable | InputError) else f"{type(error).__name__}: {error}"
    return scrub(" ".join(told.split())).rstrip(". ")


def sync(path: Path, sink: Sink) -> str:
    """Sends what is new in a run's folder, whether it runs or is over, and says what that was.

    Raises InputError when the sink is not to be had, or not all has arrived.
    """
    check_content(Run(path))
    mirror = Mirror(path, sink)
    try:
        mirror.open()
        if not mirror.has_news:
            told = f"{sink.name} has all of {path} up to step {mirror.step:,}: nothing new to send"
            return "\n".join(filter(None, [told, sink.remark]))
        mirror.begin()
        mirror.pump()
        mirror.finish()
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{sink.name} did not take all of {path}: {reason(error)}; the same command tries again") from None
    finally:
        mirror.close()
    state = "" if Run(path).is_finished else "; more to come, the run has not ended"
    told = f"{sink.name} now has {path} up to step {mirror.step:,} ({mirror.sent_steps:,} steps sent{state})"
    return "\n".join(filter(None, [told, sink.remark]))
