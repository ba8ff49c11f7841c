"""The run folder as a tracker."""

import sys
from collections.abc import Callable, Iterable
from typing import Any

from cifarlab.diagnosis import Alarm
from cifarlab.records import Measured
from cifarlab.runs import Row, RunFolder
from cifarlab.trackers.fanout import MEANS, Pace


class Local:
    """Writes metrics.jsonl, results.csv, probes/ and alarms.jsonl while the run runs, and result.json when it has ended.

    A disk that is full or fails for a while does not end the run: what it did not take is written with the next flush. Only
    when result.json, at the end, cannot be written either, that is an error.
    """

    def __init__(self, folder: RunFolder, past: Iterable[Row]) -> None:
        self._folder = folder
        self._is_failing = False
        self._lr: Row = {}
        self._try(lambda: folder.results([line for row in past if (line := self._remember(row))]))

    def rows(self, rows: list[Row], pace: Pace) -> None:
        self._folder.check_is_there()
        self._try(lambda: self._folder.rows(rows))
        self._remember(rows[-1])

    def tables(self, tables: list[Measured]) -> None:
        for measured in tables:
            self._try(lambda measured=measured: self._folder.table(measured))  # type: ignore[misc]

    def alarm(self, alarm: Alarm) -> None:
        self._try(lambda: self._folder.alarm(alarm.to_dict()))

    def epoch(self, row: Row, *, is_best: bool) -> None:
        self._try(lambda: self._folder.rows([row]))
        line = self._remember(row)
        self._try(lambda: self._folder.results([line]))

    def finish(self, result: dict[str, Any]) -> None:
        if self._is_failing:
            self._folder.sync()  # writes what was kept, or raises: a result must not stand beside half the rows
        self._folder.write_json("result.json", result)  # last: it says that all else is there

    def close(self) -> None:
        pass

    def _try(self, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as error:
            if not self._is_failing:
                print(f"cifarlab: {self._folder.path} cannot be written ({error.strerror}): the run goes on, keeps what is new "
                      "in memory and tries again; make room on that disk", file=sys.stderr)  # fmt: skip
            self._is_failing = True

    def _remember(self, row: Row) -> Row:
        """The row's line in results.csv, which has one an evaluation, under the names of the step rows, with the last step's LR.

        Of a step's row an empty one: what it says of LR and momentum is remembered.
        """
        if "epoch" not in row:
            self._lr = {key: row[key] for key in ("lr", "momentum") if key in row}
            return {}
        plain = {mean: key for key, mean in MEANS.items()}
        return {plain.get(key, key): value for key, value in row.items()} | self._lr
