"""What an engine is, and how jobs get through one: slots filled, crashed jobs started again from their last checkpoint.

A job is a TrainConfig and the folder of its run. An engine starts jobs and says how they ended; everything that decides about
them is here, so that all engines behave alike. No torch here.
"""

import base64
import importlib
import pickle
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from cifarlab.config import InputError, TrainConfig, WatchConfig


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training to be done: its config, the folder of its run, and the watch settings of it.

    threads: CPU threads it computes with, everywhere: another number sums in another order, and the last digits differ.
    """

    config: TrainConfig
    path: Path
    watch: WatchConfig
    threads: int = 1

    def message(self, path: Path | None = None) -> dict[str, Any]:
        """The job as JSON, for another process; path: where the run's folder is over there."""
        path = (path or self.path).absolute()
        here = {"name": path.name, "runs_dir": str(path.parent), "threads": self.threads, "resume": "auto"}
        watch = {name: str(value) if isinstance(value, Path) else value for name, value in vars(self.watch).items()} | here
        return {"config": self.config.to_dict(), "watch": watch, "path": str(path), "sys_path": sys.path}


@dataclass(frozen=True)
class Ended:
    """How a started job ended. `done`: its run is finished or diverged; `stopped`: on demand, its state saved; `refused`: by an
    InputError, so that another try would be refused too; `crashed`: the process or its machine died."""

    job: Job
    how: Literal["done", "stopped", "refused", "crashed"]
    reason: str = ""


class Engine(Protocol):
    """Where jobs run. `slots` may change while they do, as machines of a cluster come and go."""

    @property
    def slots(self) -> int: ...
    @property
    def description(self) -> str: ...
    def start(self, job: Job) -> None: ...
    def wait(self, seconds: float) -> list[Ended]: ...
    def stop(self, job: Job) -> None: ...
    def close(self) -> None: ...


class Runner:
    """Jobs through an engine: `submit` what is to be done, then `step` until nothing is `open`.

    A crashed job is started again and goes on from its last checkpoint; `retries` times in a row without a newer checkpoint,
    and it has failed. The other jobs go on.
    """

    def __init__(self, engine: Engine, *, retries: int = 2, say: Callable[[str], None] = lambda line: None) -> None:
        self.engine, self.retries, self.say = engine, retries, say
        self.waiting: list[Job] = []
        self.running: dict[Path, Job] = {}
        self.stopping: set[Path] = set()
        self._tries: dict[Path, tuple[int, str]] = {}  # tries since the newest checkpoint was this one

    def submit(self, jobs: Iterable[Job]) -> None:
        self.waiting += jobs

    @property
    def open(self) -> int:
        return len(self.waiting) + len(self.running)

    def stop(self, job: Job) -> None:
        """Ends a running job after its next step; its state is saved."""
        if job.path not in self.stopping:
            self.stopping.add(job.path)
            self.engine.stop(job)

    def step(self, seconds: float) -> list[Ended]:
        """Fills the slots, waits up to so long for a job to end, and gives those that ended for good."""
        while self.waiting and len(self.running) < self.engine.slots:
            job = self.waiting.pop(0)
            self.running[job.path] = job
            self.engine.start(job)
        if not self.running:
            time.sleep(min(seconds, 1.0))  # no slot at all: a cluster whose machines are still to come
            return []
        final = []
        for ended in self.engine.wait(seconds):
            job = self.running.pop(ended.job.path)
            self.stopping.discard(job.path)
            if ended.how == "crashed" and self._may_try_again(job):
                self.say(f"{job.path.name} crashed ({ended.reason}): it goes on from its last checkpoint")
                self.waiting.insert(0, job)
            else:
                final.append(ended)
        return final

    def _may_try_again(self, job: Job) -> bool:
        newest = max((path.name for path in (job.path / "checkpoints").glob("step-*")), default="")
        tries, before = self._tries.get(job.path, (0, newest))
        tries = tries + 1 if newest == before else 1
        self._tries[job.path] = (tries, newest)
        return tries <= self.retries


def pack_model(name: str, dumps: Callable[[Any], bytes] = pickle.dumps) -> str:
    """The builder of a model of the user's own, for another process; "" for a built-in one.

    Raises InputError for one that another process cannot find.
    """
    models = sys.modules.get("cifarlab.models")  # who has registered a model has imported this
    builder = models.MODELS.get(name) if models else None
    home = getattr(builder, "__module__", "") or ""
    if builder is None or home.startswith("cifarlab."):
        return ""
    try:
        if home == "__main__" and dumps is pickle.dumps:
            raise pickle.PicklingError
        return base64.b64encode(dumps(builder)).decode()
    except (pickle.PicklingError, AttributeError, TypeError):
        raise InputError(f"model {name!r} cannot be built in another process: put the function that builds it (no lambda) into a "
                         "module of its own, and import it from there") from None  # fmt: skip


def unpack_model(name: str, packed: str, sys_path: list[str]) -> None:
    """Registers the builder that `pack_model` packed."""
    if not packed:
        return
    sys.path += [path for path in sys_path if path not in sys.path and Path(path).is_dir()]
    importlib.import_module("cifarlab.models").MODELS[name] = pickle.loads(base64.b64decode(packed))


def clear_torn_start(path: Path) -> None:
    """Empties a run folder that a crash left before its config was written: nothing of worth is in it, and train would refuse."""
    if path.is_dir() and not (path / "config.json").exists():
        import shutil

        shutil.rmtree(path)
