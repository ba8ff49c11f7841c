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

if TYPE_CHECKING:
    from rich.console import RenderableType

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
    """The live view of one run; use it as a context manager, so that the cursor comes back.

    mode: "bar", "lines" (at most one line every `seconds_between` seconds, and the epochs'), "none", or "auto": a bar in a
    terminal, lines elsewhere. A bar becomes lines where the file is no terminal, or TERM is dumb.
    Rows hold metric keys `split/name`; those that a row lacks are left out. Where training images are blends, leave
    `train/accuracy` out of the rows, or give `clean/accuracy`, which is then shown instead.
    best_val: the best validation accuracy so far (0…1), for a run that is resumed.
    """

    def __init__(
        self,
        mode: Literal["auto", "bar", "lines", "none"],
        *,
        num_steps: int,
        steps_per_epoch: int,
        file: IO[str] | None = None,
        best_val: float = -math.inf,
        seconds_between: float = 10.0,
    ) -> None:
        self._out = _Unbreakable(file if file is not None else sys.stdout)
        can_draw = self._out.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown")
        self.mode = "lines" if mode != "none" and (mode == "lines" or not can_draw) else "none" if mode == "none" else "bar"
        self._num_steps, self._steps_per_epoch = num_steps, max(1, steps_per_epoch)
        self._num_epochs = max(1, math.ceil(num_steps / self._steps_per_epoch))
        self._best_val, self._seconds_between = best_val, seconds_between
        self._shown_at = self._epoch_began = time.monotonic()
        if self.mode == "bar":
            from rich.console import Console
            from rich.live import Live

            # The terminal is known to be one, whatever FORCE_COLOR or a test's capture say; NO_COLOR is still obeyed.
            self._console = Console(file=self._out, force_terminal=True, highlight=False, markup=False, emoji=False)  # type: ignore[arg-type]
            # No refresh thread: the bar changes when there is something new, and never between a write and its flush.
            # Foreign prints and warnings are lifted above the bar only when it stands on the very stdout they go to.
            ours = file is None or file is sys.stdout
            self._live = Live(console=self._console, auto_refresh=False, transient=True, redirect_stdout=ours, redirect_stderr=ours)
            self._live.start()

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
        if self.mode == "none":
            return
        now = time.monotonic()
        if now - self._shown_at < (0.1 if self.mode == "bar" else self._seconds_between) and step < self._num_steps:
            return
        self._shown_at = now
        epoch = min(max(0, step - 1) // self._steps_per_epoch + 1, self._num_epochs)
        first = (epoch - 1) * self._steps_per_epoch
        length = max(1, min(self._steps_per_epoch, self._num_steps - first))
        parts = _scores(row, "train", "clean") + _speed(row, images_per_second)
        if self.mode == "lines":
            head = f"epoch {epoch}/{self._num_epochs}  step {step:,}/{self._num_steps:,}"
            self.say("  ".join([head, *(text for _, text in parts), f"{format_seconds(seconds_left)} left"]))
            return
        share = (step - first) / length
        in_epoch = seconds_left * (length - (step - first)) / max(1, self._num_steps - step)
        parts += [(1, f"run {format_seconds(seconds_left)}"), (4, f"epoch {format_seconds(in_epoch)}")]
        self._live.update(self._draw_bar(f"epoch {epoch}/{self._num_epochs}", share, parts), refresh=True)

    def _draw_bar(self, head: str, share: float, parts: list[tuple[int, str]]) -> "RenderableType":
        from rich.text import Text

        # One column less than the terminal has: some wrap when the last one is filled. The bar gets what the numbers leave.
        room = self._console.width - 1
        kept = _fit(parts, room - len(head) - 8)
        width = max(4, min(30, room - len(head) - 2 - sum(2 + len(text) for text in kept)))
        done = round(width * min(max(share, 0.0), 1.0))
        full, rest = ("━", "━") if self._out.can_write("━") else ("#", "-")
        line = Text(head + " ", no_wrap=True, overflow="crop", end="")
        line.append(full * done, "bold cyan").append(rest * (width - done), "bright_black")
        for text in kept:
            line.append("  " + text, "bold red" if "nan" in text or "inf" in text else "")
        line.truncate(room)
        return line

    def epoch(self, epoch: int, row: Row) -> None:
        """Prints the line of a finished epoch: scores of every split measured, LR, speed, time, and whether it is the best so far.

        The time is what passed since the last such line, evaluation included.
        """
        now = time.monotonic()
        seconds, self._epoch_began, self._shown_at = now - self._epoch_began, now, now
        is_best = row.get("val/accuracy", -math.inf) > self._best_val
        if is_best:
            self._best_val = row["val/accuracy"]
        if self.mode == "none":
            return
        parts = _scores(row, "train", "clean", prefix=True) + _scores(row, "val", prefix=True) + _scores(row, "test", prefix=True)
        parts += [*_speed(row, row.get("time/images_per_second", math.nan)), (4, format_seconds(seconds))]
        parts += [(1, "best so far")] * is_best
        head = f"epoch {epoch:>{len(str(self._num_epochs))}}/{self._num_epochs}"
        # A file gets everything; a narrow terminal what fits on a line, most important first.
        kept = _fit(parts, self._console.width - 1 - len(head)) if self.mode == "bar" else [text for _, text in parts]
        self.say("  ".join([head, *kept]))

    def close(self) -> None:
        """Takes the bar away and gives the cursor back; what was printed stays."""
        if self.mode == "bar":
            self._live.stop()
        self.mode = "none"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _scores(row: Row, split: str, instead: str = "", *, prefix: bool = False) -> list[tuple[int, str]]:
    """(priority, text) of a split's loss and accuracy; accuracy is that of the split `instead` where it was measured."""
    texts = []
    if f"{split}/loss" in row:
        texts.append((2, f"loss {row[f'{split}/loss']:.3f}"))
    source = instead if instead and f"{instead}/accuracy" in row else split
    if f"{source}/accuracy" in row:
        name = "acc" if source == split else source
        texts.append((1, f"{name} {100 * row[f'{source}/accuracy']:.1f} %"))
    if prefix and texts:  # one piece, so that the split's name never stands alone
        return [(texts[-1][0], " ".join([split, *(text for _, text in texts)]))]
    return texts


def _speed(row: Row, images_per_second: float) -> list[tuple[int, str]]:
    parts = [(3, f"lr {row['lr']:.3g}")] if "lr" in row else []
    if math.isfinite(images_per_second):
        parts.append((5, f"{images_per_second:,.0f} img/s"))
    return parts


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
            text = text.translate({ord("…"): "...", ord("×"): "x", ord("–"): "-", ord("→"): "->", ord("±"): "+-"})
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
