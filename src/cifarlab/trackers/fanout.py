"""One place for the loop to tell what happened; it passes it on to the run folder and the terminal."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from cifarlab.diagnosis import Alarm, Diagnosis
from cifarlab.records import Measured, Reading
from cifarlab.runs import Row
from cifarlab.trackers.mirror import LiveMirror

MEANS = {"train/loss": "train_epoch/loss", "train/accuracy": "train_epoch/accuracy"}
"""Metrics of single steps -> name of their mean over the steps since the last evaluation."""


@dataclass(frozen=True)
class Pace:
    """How fast it goes: training alone, evaluation and saving not counted; and the time left, with evaluations in it."""

    images_per_second: float
    seconds_left: float


class Tracker(Protocol):
    """Something that is told what happens in a run."""

    def rows(self, rows: list[Row], pace: Pace) -> None:
        """Rows of single steps, in order."""

    def tables(self, tables: list[Measured]) -> None:
        """What the probes measured in the same steps; called before their rows."""

    def epoch(self, row: Row, *, is_best: bool) -> None:
        """The row of an evaluation: step, epoch, scores, means over the steps since the last one, times."""

    def alarm(self, alarm: Alarm) -> None:
        """The diagnosis has found something; called after the rows in which it shows."""

    def finish(self, result: dict[str, Any]) -> None:
        """The run has ended, well or by divergence, with this result.json."""

    def close(self) -> None:
        """Always called last, after an interruption or a failure too."""


class Fanout:
    """Hands rows to every tracker in turn; keeps the means over an epoch and the pace.

    past: the rows of a resumed run, so that the means over the epoch in which it was interrupted are those of an
    undisturbed run. diagnosis: asked after every flush; it has seen the past already. mirrors: follow the run folder by
    themselves, and are only told when the run has ended. work: what the first 0, 1, … num_steps steps cost together, in any
    unit; without it all cost the same.
    """

    def __init__(self, trackers: list[Tracker], *, num_steps: int, steps_per_epoch: int, eval_steps: int,
                 images_at: Callable[[int], int], seconds: float, past: Sequence[Row], work: Sequence[float] | None = None,
                 diagnosis: Diagnosis | None = None, mirrors: list[LiveMirror] | None = None) -> None:  # fmt: skip
        self._trackers, self._diagnosis, self._mirrors = trackers, diagnosis, [] if mirrors is None else mirrors  # filled later
        self._num_steps, self._steps_per_epoch, self._eval_steps = num_steps, steps_per_epoch, eval_steps
        self._images_at, self._work = images_at, work or range(num_steps + 1)
        self._sums: dict[str, tuple[float, int]] = {}  # of the step rows since the last evaluation: sum and count
        for row in past:
            self._remember(row)
        self._marks = [(int(past[-1]["step"]) if past else 0, seconds)]  # (step, training seconds) at the last few flushes
        self._epoch_mark = (self._marks[0], time.perf_counter())
        self._eval_seconds = 0.0

    def rows(self, rows: list[Row], *, seconds: float, reading: Reading | None = None) -> float:
        """seconds: spent in training so far; reading: what the probes measured in these steps.

        Gives the seconds that went into writing what they measured, and into its diagnosis.
        """
        reading = reading or Reading()
        rows = [row | reading.rows.get(int(row["step"]), {}) for row in rows]
        for row in rows:
            self._remember(row)
        self._marks = [*self._marks, (int(rows[-1]["step"]), seconds)][-8:]
        pace = self._pace(self._marks[0])
        spent = 0.0
        for tracker in self._trackers:
            if reading.tables:
                begun = time.perf_counter()
                tracker.tables(reading.tables)
                spent += time.perf_counter() - begun
            tracker.rows(rows, pace)
        if self._diagnosis:
            begun = time.perf_counter()
            self._raise(self._diagnosis.see(rows, reading.tables))
            spent += time.perf_counter() - begun
        return spent if reading.tables else 0.0

    def epoch(self, scores: Row, *, eval_seconds: float, is_best: bool) -> None:
        self._eval_seconds = eval_seconds
        step, seconds = self._marks[-1]
        row: Row = {"step": step, "epoch": step / self._steps_per_epoch}
        for key, mean_key in MEANS.items():
            if key in self._sums:
                total, count = self._sums[key]
                row[mean_key] = total / count
        row |= scores
        mark, begun = self._epoch_mark
        now = time.perf_counter()
        row |= {"time/train_seconds": seconds, "time/images_per_second": self._pace(mark).images_per_second,
                "time/epoch_seconds": now - begun}  # fmt: skip
        for tracker in self._trackers:
            tracker.epoch(row, is_best=is_best)
        if self._diagnosis:
            self._raise(self._diagnosis.see([row], []))
        self._sums, self._epoch_mark = {}, (self._marks[-1], now)

    def finish(self, result: dict[str, Any]) -> None:
        if self._diagnosis:
            self._raise(self._diagnosis.finish())
        for tracker in self._trackers:
            tracker.finish(result)

    def _remember(self, row: Row) -> None:
        if "epoch" in row:
            self._sums = {}
            return
        for key in MEANS:
            if key in row:
                total, count = self._sums.get(key, (0.0, 0))
                self._sums[key] = (total + row[key], count + 1)

    def _raise(self, alarms: list[Alarm]) -> None:
        for alarm in alarms:
            for tracker in self._trackers:
                tracker.alarm(alarm)

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.close()
        for mirror in self._mirrors:
            mirror.close()

    def __enter__(self) -> "Fanout":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _pace(self, since: tuple[int, float]) -> Pace:
        step, seconds = self._marks[-1]
        elapsed = max(seconds - since[1], 1e-9)
        images = sum(self._images_at(s) for s in range(since[0] + 1, step + 1))
        before, done, all_of_it = (self._work[k] for k in (since[0], step, self._num_steps))
        left = (all_of_it - done) / (done - before) if done > before else self._num_steps - step
        evaluations = (self._num_steps - step) // self._eval_steps if self._eval_steps else 1
        return Pace(images / elapsed, left * elapsed + evaluations * self._eval_seconds)
