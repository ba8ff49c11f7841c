"""What a person sees while a run runs: a live bar in a terminal, plain lines anywhere else, and one line per epoch that stays.

Looking on must never end a run: a closed pipe, a narrow window or a terminal that knows no Unicode changes what is seen, only.
"""

import math
import os
import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Literal, Self

from cifarlab.diagnosis import Alarm
from cifarlab.records import Measured
from cifarlab.trackers.fanout import MEANS, Pace

if TYPE_CHECKING:
    from rich.live import Live

Row = Mapping[str, float]


def format_seconds(seconds: float) -> str:
    """`1 h 02 min`, `3 min 20 s` or `12.3 s`; `?` where it is not known (negative or not finite)."""
    if not math.isfinite(seconds) or seconds < 0:
        return "?"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    if seconds < 3599.5:
        return f"{round(seconds) // 60} min {round(seconds) % 60:02d} s"
    return f"{round(seconds / 60) // 60} h {round(seconds / 60) % 60:02d} min"


class Terminal:
    """The live view of one run; use it as a context manager, or call `close`, so that the cursor comes back.

    mode: "bar", "lines" (at most one line every `seconds_between` seconds, and the epochs'), "none", or "auto": a bar in a
    terminal, lines elsewhere. A bar becomes lines where the file is no terminal, or TERM is dumb.
    Rows hold metric keys `split/name`; those that a row lacks are left out. Where training images are blends, leave
    `train/accuracy` out of the rows, or give `clean/accuracy`, which is then shown instead.
    """

    def __init__(
        self,
        mode: Literal["auto", "bar", "lines", "none"],
        *,
        num_steps: int,
        steps_per_epoch: int,
        file: IO[str] | None = None,
        seconds_between: float = 10.0,
    ) -> None:
        self._out = _Unbreakable(file if file is not None else sys.stdout)
        can_draw = self._out.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown")
        self.mode = mode if mode in ("lines", "none") else "bar" if can_draw else "lines"
        self._num_steps, self._steps_per_epoch = num_steps, max(1, steps_per_epoch)
        self._num_epochs = max(1, math.ceil(num_steps / self._steps_per_epoch))
        self._seconds_between, self._best_val = seconds_between, -math.inf
        self._shown_at = self._epoch_began = time.monotonic()
        self._live: Live | None = None
        if self.mode == "bar":
            from rich.console import Console

            # The terminal is known to be one, whatever FORCE_COLOR or a test's capture say; NO_COLOR is still obeyed.
            self._console = Console(file=self._out, force_terminal=True, highlight=False, markup=False, emoji=False)  # type: ignore[arg-type]
            # Foreign prints and warnings are lifted above the bar only when it stands on the very stdout they go to.
            self._is_stdout = file is None or file is sys.stdout

    def say(self, text: str) -> None:
        """Prints a line (or several) that stays, above the bar."""
        if self.mode == "bar":
            from rich.text import Text

            self._console.print(Text(text), soft_wrap=True)
        elif self.mode == "lines":
            self._out.write(text + "\n")
            self._out.flush()

    def step(self, step: int, row: Row, images_per_second: float, seconds_left: float) -> None:
        """Shows update `step` (from 1); seconds_left: for the whole run. Call it at each flush of the rows."""
        now = time.monotonic()
        is_first_bar = self.mode == "bar" and self._live is None
        wait = 0.1 if self.mode == "bar" else self._seconds_between
        if self.mode == "none" or (now - self._shown_at < wait and not is_first_bar):
            return
        self._shown_at = now
        epoch = min(max(0, step - 1) // self._steps_per_epoch + 1, self._num_epochs)
        first = (epoch - 1) * self._steps_per_epoch
        length = max(1, min(self._steps_per_epoch, self._num_steps - first))
        parts = [*_scores(row, "train", "clean"), *_pace(row, images_per_second)]
        if self.mode == "lines":
            head = f"epoch {epoch}/{self._num_epochs}  step {step:,}/{self._num_steps:,}"
            self.say("  ".join([head, *(text for _, text in parts), f"{format_seconds(seconds_left)} left"]))
            return
        in_epoch = seconds_left * (first + length - step) / max(1, self._num_steps - step)
        parts += [(1, f"left {format_seconds(seconds_left)}"), (4, f"(epoch {format_seconds(in_epoch)})")]
        self._draw_bar(f"epoch {epoch}/{self._num_epochs}", (step - first) / length, parts)

    def _draw_bar(self, head: str, share: float, parts: list[tuple[int, str]]) -> None:
        from rich.live import Live
        from rich.text import Text

        # One column less than the terminal has: some wrap when the last one is filled. The bar gets what the numbers leave.
        room = self._console.width - 1
        kept = _fit(parts, room - len(head) - 5)
        width = max(4, min(30, room - len(head) - 1 - sum(2 + len(text) for text in kept)))
        done = round(width * min(max(share, 0.0), 1.0))
        full, rest = ("━", "─") if self._out.can_write("━─") else ("#", "-")
        line = Text(head + " ", no_wrap=True, overflow="crop")
        line.append(full * done, "bold cyan").append(rest * (width - done), "bright_black")
        for text in kept:
            line.append("  " + text, "bold red" if "nan" in text or "inf" in text else "")
        line.truncate(room)
        if self._live is None:
            # No refresh thread: the bar changes when there is something new, and never in the midst of another's output.
            self._live = Live(console=self._console, auto_refresh=False, transient=True,
                              redirect_stdout=self._is_stdout, redirect_stderr=self._is_stdout)  # fmt: skip
            self._live.start()
        self._live.update(line, refresh=True)

    def epoch(self, epoch: float, row: Row, *, is_best: bool | None = None) -> None:
        """Prints the line of a finished epoch: scores of each split measured, LR, speed, time, and whether it is the best so far.

        epoch: epochs done, a fraction too; is_best: on validation, by default whether `val/accuracy` is above all before.
        The time is `time/epoch_seconds`, else what passed since the last such line.
        """
        now = time.monotonic()
        seconds, self._epoch_began, self._shown_at = row.get("time/epoch_seconds", now - self._epoch_began), now, now
        accuracy = row.get("val/accuracy", -math.inf)
        is_best = accuracy > self._best_val if is_best is None else is_best
        self._best_val = max(self._best_val, accuracy)
        if self.mode == "none":
            return
        head = f"epoch {epoch:>{len(str(self._num_epochs))}.4g}/{self._num_epochs}"
        # A file gets everything; a narrow terminal what fits on its line: first without the words, then the most important.
        room = self._console.width - 1 - len(head) if self.mode == "bar" else sys.maxsize
        for words in (True, False):
            scores = [_joined(split, _scores(row, split, instead, words=words)) for split, instead in _SPLITS]
            parts = [part for part in scores if part[1]]
            parts += [*_pace(row, row.get("time/images_per_second", math.nan)), (3, format_seconds(seconds))]
            parts += [(0, "best so far" if words else "best")] * is_best
            if len(kept := _fit(parts, room)) == len(parts):
                break
        self.say("  ".join([head, *kept]))

    def close(self) -> None:
        """Takes the bar away and gives the cursor back; what was printed stays, and `say` still prints."""
        if self._live is not None:
            self._live.stop()
        self._live = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class TerminalTracker:
    """The terminal as a tracker of a run: shows means over the rows of each flush, and the row of each evaluation."""

    def __init__(self, terminal: Terminal) -> None:
        self._terminal = terminal
        self._lr: dict[str, float] = {}

    def rows(self, rows: list[dict[str, float]], pace: Pace) -> None:
        shown = dict(rows[-1])
        for key in MEANS:  # one batch's loss jumps too much to be read
            values = [row[key] for row in rows if key in row]
            shown |= {key: sum(values) / len(values)} if values else {}
        self._lr = {"lr": shown["lr"]} if "lr" in shown else {}
        self._terminal.step(int(shown["step"]), shown, pace.images_per_second, pace.seconds_left)

    def tables(self, tables: list[Measured]) -> None:
        pass  # too much for a terminal; alarms tell what matters in them

    def alarm(self, alarm: Alarm) -> None:
        for line in alarm.format():
            self._terminal.say(line)

    def epoch(self, row: dict[str, float], *, is_best: bool) -> None:
        plain = {mean: key for key, mean in MEANS.items()}
        self._terminal.epoch(row["epoch"], self._lr | {plain.get(key, key): value for key, value in row.items()}, is_best=is_best)

    def finish(self, result: dict[str, Any]) -> None:
        pass  # the command line says how the run ended

    def close(self) -> None:
        self._terminal.close()


_SPLITS = (("train", "clean"), ("val", ""), ("test", ""))


def _scores(row: Row, split: str, instead: str = "", *, words: bool = True) -> list[tuple[int, str]]:
    """(priority, text) of a split's loss and accuracy; accuracy is that of the split `instead` where it was measured."""
    parts = []
    if f"{split}/loss" in row:
        parts.append((2, ("loss " if words else "") + f"{row[f'{split}/loss']:.3f}"))
    source = instead if f"{instead}/accuracy" in row else split
    if f"{source}/accuracy" in row:
        name = f"{instead} " if source == instead else "acc " if words else ""
        parts.append((1, f"{name}{100 * row[f'{source}/accuracy']:.1f} %"))
    return parts


def _joined(split: str, parts: list[tuple[int, str]]) -> tuple[int, str]:
    """A split's scores as one piece, so that its name never stands alone; empty without scores. Train is left out first."""
    return 2 if split == "train" else 1, " ".join([split, *(text for _, text in parts)]) if parts else ""


def _pace(row: Row, images_per_second: float) -> list[tuple[int, str]]:
    parts = [(4, f"lr {row['lr']:.3g}")] if "lr" in row else []
    return [*parts, (5, f"{images_per_second:,.0f} img/s")] if math.isfinite(images_per_second) else parts


def _fit(parts: list[tuple[int, str]], room: int) -> list[str]:
    """The texts, in order, that fit with two spaces before each; the highest numbers go first, of equals the last."""
    kept = list(parts)
    while kept and sum(2 + len(text) for _, text in kept) > room:
        worst = max(range(len(kept)), key=lambda k: (kept[k][0], k))
        del kept[worst]
    return [text for _, text in kept]


class _Unbreakable:
    """A text file that never raises: what it cannot encode becomes `?`, and after a broken pipe it swallows everything."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file
        self.encoding = getattr(file, "encoding", None) or "utf-8"
        self._is_open = True

    def can_write(self, text: str) -> bool:
        try:
            text.encode(self.encoding)
        except (UnicodeEncodeError, LookupError):
            return False
        return True

    def write(self, text: str) -> int:
        if not self.can_write(text):
            # Signs that cifarlab itself prints have an ASCII twin; anything else becomes a question mark.
            text = text.translate({ord("…"): "...", ord("×"): "x", ord("–"): "-", ord("→"): "->", ord("±"): "+-", ord("·"): "-"})
            text = text.encode("ascii", errors="replace").decode()
        self._try(lambda: self._file.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self._file.flush)

    def isatty(self) -> bool:
        try:
            return self._file.isatty()
        except (OSError, ValueError, AttributeError):
            return False

    def fileno(self) -> int:
        return self._file.fileno()

    def _try(self, action: Any) -> None:
        if not self._is_open:
            return
        try:
            action()
        except (OSError, ValueError):  # ValueError: the file was closed
            self._is_open = False
            if self._file is sys.__stdout__ and not self._file.closed:
                # Python flushes stdout once more at exit and would complain then: let it write to nowhere.
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._file.fileno())
                os.close(nowhere)
