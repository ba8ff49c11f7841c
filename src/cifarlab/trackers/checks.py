"""What the recipe check can tell only while a training runs: that every step is clipped."""

from collections import deque
from collections.abc import Callable
from typing import Any

from cifarlab.checks import Setup, judge
from cifarlab.checks.recorded import CLIPPED_ROWS, always_clipped
from cifarlab.config import TrainConfig
from cifarlab.diagnosis import Alarm
from cifarlab.records import Measured
from cifarlab.runs import Row
from cifarlab.trackers.fanout import Pace


class ClippingCheck:
    """Says once, when a hundred steps in a row were clipped, that clipping is no longer the exception."""

    def __init__(self, config: TrainConfig, say: Callable[[str], None]) -> None:
        self._config, self._say = config, say
        self._rows: deque[Row] = deque(maxlen=CLIPPED_ROWS)
        self._is_said = False

    def rows(self, rows: list[Row], pace: Pace) -> None:
        if self._is_said:
            return
        self._rows.extend(rows)
        remark = always_clipped(Setup(config=self._config, rows=list(self._rows)))
        for judged in judge([remark] if remark else [], self._config):
            self._is_said = True
            self._say(f"  check   {judged}")

    def tables(self, tables: list[Measured]) -> None:
        pass

    def epoch(self, row: Row, *, is_best: bool) -> None:
        pass

    def alarm(self, alarm: Alarm) -> None:
        pass

    def finish(self, result: dict[str, Any]) -> None:
        pass

    def close(self) -> None:
        pass
