"""What a person sees of a running study: a line renewed in a terminal, plain lines elsewhere, one for each trial's end."""

import sys
import time
from typing import IO

from cifarlab.trackers.terminal import format_seconds


class Progress:
    """Done, running, left, and time left. mode: as WatchConfig.progress; lines come at most every `seconds_between` seconds."""

    def __init__(self, mode: str, total: int, *, file: IO[str] | None = None, seconds_between: float = 15.0) -> None:
        self._out = file if file is not None else sys.stdout
        self.mode = mode if mode in ("none", "lines") else "bar" if self._out.isatty() else "lines"
        self.total, self._between, self._shown_at, self._is_drawn = total, seconds_between, time.monotonic(), False

    def say(self, line: str) -> None:
        """A line that stays."""
        if self.mode != "none":
            self._write(("\r\x1b[2K" if self._is_drawn else "") + line + "\n")
            self._is_drawn = False

    def show(self, done: int, running: int, seconds_left: float) -> None:
        left = self.total - done - running
        line = f"{done}/{self.total} done, {running} running, {left} left, {format_seconds(seconds_left)} to go"
        now = time.monotonic()
        if self.mode == "bar":
            width = 24 * done // max(self.total, 1)
            self._write(f"\r\x1b[2K{'━' * width}{'─' * (24 - width)}  {line}"[:100])
            self._is_drawn = True
        elif self.mode == "lines" and now - self._shown_at >= self._between:
            self._shown_at = now
            self._write(line + "\n")

    def close(self) -> None:
        if self._is_drawn:
            self._write("\r\x1b[2K")
            self._is_drawn = False

    def _write(self, text: str) -> None:
        try:
            encoding = getattr(self._out, "encoding", None) or "utf-8"
            self._out.write(text.encode(encoding, errors="replace").decode(encoding))
            self._out.flush()
        except (OSError, ValueError):
            self.mode = "none"  # whoever looked on has left; the study goes on
