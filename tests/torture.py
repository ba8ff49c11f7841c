"""Kills a training at its writing moments and at random ones, resumes it, and compares what is left with an undisturbed run.

    python tests/torture.py [--kills 50] [--seed 0] [--settings tiny] [--every-moment [N]] [--keep FOLDER]

Each attempt is a process forked from this one, so that torch is loaded once. It dies by SIGKILL, half of the time at a moment of
writing: before the n-th opening for writing, rename, removal, truncation or fsync in the run's folder, or in the middle of a row
or record; else after a random time. `make torture` runs fifty; the test suite a few.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import sklearn.metrics  # noqa: F401  # this and the next: what a training imports on its way is imported before the forks
import torch
import torch._dynamo

import cifarlab as cl
import tiny_models
from cifarlab.checkpoint import find_checkpoints, load_checkpoint
from cifarlab.config import TrainConfig, WatchConfig
from cifarlab.models import MODELS
from cifarlab.records import Appender
from cifarlab.runs import Run

WRITING = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")  # audit events, raised before the thing is done


class Moments:
    """Counts the moments at which this process is about to change something below `folder`; kills it at the n-th (0: never)."""

    def __init__(self, folder: Path, at: int) -> None:
        self.folder, self.at, self.count = f"{folder}{os.sep}", at, 0
        sys.addaudithook(self._hook)
        fsync, append = os.fsync, Appender.append

        def counted_fsync(descriptor: int) -> None:
            self.pass_()
            fsync(descriptor)

        def torn_append(appender: Appender, content: bytes) -> None:
            if content and self.count + 1 == self.at:
                append(appender, content[: len(content) // 2])
            self.pass_()
            append(appender, content)

        os.fsync, Appender.append = counted_fsync, torn_append  # type: ignore[assignment, method-assign]

    def pass_(self) -> None:
        self.count += 1
        if self.count == self.at:
            os.kill(os.getpid(), signal.SIGKILL)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in WRITING or (event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            name = arguments[0]
            if isinstance(name, bytes | str | os.PathLike) and os.fspath(name).startswith(self.folder):  # type: ignore[arg-type]
                self.pass_()


def attempt(config: TrainConfig, watch: WatchConfig, *, at: int = 0, after: float = 0.0, count: Path | None = None) -> int:
    """Trains in a forked process, going on where there is something to go on from; its exit status, negative for a signal.

    at, after: killed at that writing moment, or after so many seconds; count: a file for the number of all moments.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code = 1
    try:
        moments = Moments(watch.runs_dir / watch.name, at)
        if after:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)  # which ends a process as SIGKILL does, with nothing run any more
            signal.setitimer(signal.ITIMER_REAL, after)
        cl.train(config, watch)
        if count:
            count.write_text(str(moments.count))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def torture(config: TrainConfig, watch: WatchConfig, kills: int, seed: int, say: Callable[[str], None] = print) -> Counter[str]:
    """Kills that often, over as many runs as it takes; raises AssertionError where one differs from the undisturbed run."""
    chance, tally = random.Random(seed), Counter[str]()
    undisturbed, num_moments, seconds = measure(config, watch)
    say(f"an undisturbed run takes {seconds:.1f} s and has {num_moments} writing moments")
    while tally["killed"] < kills:
        tally["runs"] += 1
        named, told = replace(watch, name=f"killed-{tally['runs']}"), []
        while True:
            left = num_moments // (1 + 2 * bool(told))  # a resumed run has fewer of them before it
            at = chance.randint(1, left) if chance.random() < 0.5 and tally["killed"] < kills else 0
            after = chance.uniform(0, seconds) if not at and tally["killed"] < kills else 0.0
            status = attempt(config, named, at=at, after=after)
            if status == 0:
                break
            told.append(f"moment {at}" if at else f"{after:.3f} s")
            assert status == (-signal.SIGKILL if at else -signal.SIGALRM), f"{named.name} ended with {status} after {told}"
            tally["killed"] += 1
            tally["at a writing moment" if at else "at a random time"] += 1
        compare(undisturbed, snapshot(Run(watch.runs_dir / named.name)), f"{named.name}, killed at {', '.join(told)}")
    say(f"{tally['killed']} kills ({tally['at a writing moment']} at writing moments, {tally['at a random time']} at random "
        f"times) in {tally['runs']} runs: weights, optimizer, scaler, rows, tables, alarms and results are those of the "
        "undisturbed run, bit by bit")  # fmt: skip
    return tally


def every_moment(config: TrainConfig, watch: WatchConfig, step: int = 1) -> int:
    """A run for each writing moment (or each `step`-th), killed there and then gone on with; how many."""
    undisturbed, num_moments, _ = measure(config, watch)
    for at in range(1, num_moments + 1, step):
        named = replace(watch, name=f"at-{at}")
        assert attempt(config, named, at=at) == -signal.SIGKILL
        assert attempt(config, named) == 0, f"the run killed at moment {at} of {num_moments} does not go on"
        compare(undisturbed, snapshot(Run(watch.runs_dir / named.name)), f"killed at moment {at}")
        shutil.rmtree(watch.runs_dir / named.name)
    return len(range(1, num_moments + 1, step))


def measure(config: TrainConfig, watch: WatchConfig) -> tuple[dict[str, Any], int, float]:
    """(snapshot of an undisturbed run, how many writing moments it has, how many seconds it takes), and that two are the same."""
    count = watch.runs_dir / "count"
    assert attempt(config, replace(watch, name="undisturbed")) == 0, "the undisturbed run has failed"
    begun = time.monotonic()
    assert attempt(config, replace(watch, name="counted"), count=count) == 0
    seconds, undisturbed = time.monotonic() - begun, snapshot(Run(watch.runs_dir / "undisturbed"))
    compare(undisturbed, snapshot(Run(watch.runs_dir / "counted")), "two undisturbed runs")
    return undisturbed, int(count.read_text()), seconds


TIMES = ("time/train_seconds", "time/images_per_second", "time/epoch_seconds", "train_seconds", "probe_share")


def snapshot(run: Run) -> dict[str, Any]:
    """Everything in a finished run's folder that does not depend on the clock or on its name."""
    weights, trainer = load_checkpoint(find_checkpoints(run.path / "checkpoints")[0])
    del trainer["state"]["seconds"], trainer["state"]["probe_seconds"]
    files = {str(path.relative_to(run.path)) for path in run.path.rglob("*")}
    predictions = np.load(run.path / "predictions.npz")
    return {
        "files": sorted(files - {"figures"}),
        "rows": [{key: repr(value) for key, value in row.items() if key not in TIMES} for row in run.metrics.rows],
        "tables": {name: (t.items, t.columns, t.steps.tobytes(), t.values.tobytes()) for name, t in run.tables.items()},
        "result": {key: value for key, value in run.result.items() if key not in TIMES},
        "alarms": run.alarms,
        "checkpoint": {name: tensor.numpy().tobytes() for name, tensor in weights.items()},
        "trainer": _plain(trainer),
        "weights": (run.path / "model.safetensors").read_bytes(),
        "predictions": {name: predictions[name].tobytes() for name in predictions.files},
        "config": json.loads((run.path / "config.json").read_bytes()),
        "dataset": run.dataset,
        "results.csv": [[cell for name, cell in zip(_cells(run)[0], line, strict=True) if name not in TIMES]
                        for line in _cells(run)],
    }  # fmt: skip


def _cells(run: Run) -> list[list[str]]:
    return [line.split(",") for line in (run.path / "results.csv").read_text().splitlines()]


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return (str(value.dtype), tuple(value.shape), value.numpy().tobytes())
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def compare(wanted: dict[str, Any], got: dict[str, Any], what: str) -> None:
    for key in wanted:
        if wanted[key] != got[key]:
            more = ""
            if key == "files":
                more = f": {sorted(set(wanted[key]) ^ set(got[key]))}"
            elif isinstance(wanted[key], list):
                pairs = zip(wanted[key], got[key], strict=False)
                k = next((k for k, (a, b) in enumerate(pairs) if a != b), min(len(wanted[key]), len(got[key])))
                more = f" from entry {k} on ({len(got[key])} of them, not {len(wanted[key])}): {got[key][k : k + 1]}"
            raise AssertionError(f"{what}: {key} is not that of the undisturbed run{more}")


SETTINGS: dict[str, dict[str, Any]] = {
    "tiny": dict(train_images=96, batch_size=16, epochs=2, lr=0.05, momentum=0.9, weight_decay=1e-3, val_fraction=0.2),
    "adam": dict(train_images=96, batch_size=16, epochs=2, optimizer="adam", lr=1e-3, schedule="one-cycle", cycle_momentum=True,
                 ema_decay=0.9, mixup_alpha=0.3, precision="fp16"),
}  # fmt: skip


def begin(settings: str, runs_dir: Path, **changes: Any) -> tuple[TrainConfig, WatchConfig]:
    """What is trained, after all that a training imports has been imported, so that a fork has it at once."""
    MODELS["tiny"] = tiny_models.tiny
    watch: dict[str, Any] = dict(runs_dir=runs_dir, resume="auto", progress="none", forecast=False, figures=False,
                                 save_every=0.5, log_every=1, probes="all", probe_every=5, trajectory_every=1)  # fmt: skip
    return cl.TrainConfig(data="digits", model="tiny", **SETTINGS[settings]), cl.WatchConfig(**(watch | changes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--settings", choices=SETTINGS, default="tiny")
    parser.add_argument("--every-moment", type=int, nargs="?", const=1, default=0, metavar="N",
                        help="instead: a run for each writing moment, or each N-th")  # fmt: skip
    parser.add_argument("--keep", type=Path, help="leave the run folders there")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        config, watch = begin(given.settings, given.keep or Path(temporary))
        if given.every_moment:
            count = every_moment(config, watch, given.every_moment)
            print(f"{count} runs, killed at one writing moment each: all went on to the same end, bit by bit")
        else:
            torture(config, watch, given.kills, given.seed)


if __name__ == "__main__":
    main()
