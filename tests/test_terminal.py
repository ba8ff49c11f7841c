"""What a person sees: in a real terminal (a pty), in a pipe, and where something breaks."""

import io
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cifarlab.trackers.fanout import Fanout, Pace
from cifarlab.trackers.terminal import Terminal, TerminalTracker, format_seconds

RUN = """
import sys, time
from cifarlab.trackers.terminal import Terminal
with Terminal("{mode}", num_steps=30, steps_per_epoch=10, seconds_between=0) as terminal:
    terminal.say("device: Frobnicator × 2 [bold]not markup[/bold] · " + "long " * 20)
    for step in range(1, 31):
        terminal.step(step, {{"train/loss": 2.0 - step / 20, "train/accuracy": step / 40, "lr": 0.0412}}, 2301.4, 3 * (30 - step))
        time.sleep(0.105 if step % 10 == 1 else 0)
        if step == 15:
            print("a foreign print")
        if step % 10 == 0:
            terminal.epoch(step // 10, {{"train/loss": 0.5, "train/accuracy": 0.831, "val/loss": 0.6, "val/accuracy": [0, 0.7, 0.6, 0.8][step // 10],
                           "test/loss": 0.7, "test/accuracy": 0.799, "lr": 0.0412, "time/images_per_second": 2301.4}})
    terminal.say("the end")
"""  # noqa: E501


def run_in_pty(columns: int, mode: str = "auto", **environment: str) -> str:
    pty, fcntl, struct, termios = (pytest.importorskip(name) for name in ("pty", "fcntl", "struct", "termios"))
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    clean = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR")}
    child = subprocess.Popen([sys.executable, "-c", RUN.format(mode=mode)], stdin=slave, stdout=slave, stderr=slave,
                             env=clean | {"TERM": "xterm", "PYTHONIOENCODING": "utf-8"} | environment)  # fmt: skip
    os.close(slave)
    seen = b""
    while True:
        try:
            piece = os.read(master, 65536)
        except OSError:  # Linux says EIO where the other end is closed
            break
        if not piece:
            break
        seen += piece
    os.close(master)
    assert child.wait(timeout=30) == 0, seen.decode()
    return seen.decode()


def on_screen(text: str) -> list[str]:
    """What is left to see at the end: the little of a terminal that is needed (return, newline, up, erase line)."""
    screen, row, column = [""], 0, 0
    for token in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|.|\n", text):
        if token == "\n":
            row += 1
            screen += [""] * (row == len(screen))
        elif token == "\r":
            column = 0
        elif token == "\x1b[1A":
            row -= 1
        elif token == "\x1b[2K":
            screen[row] = ""
        elif not token.startswith("\x1b"):
            screen[row] = screen[row][:column].ljust(column) + token + screen[row][column + 1 :]
            column += 1
    return [line for line in screen if line]


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


@pytest.mark.parametrize("columns", [40, 80, 140])
def test_in_a_terminal_there_is_a_bar_and_the_epochs_stay(columns: int) -> None:
    seen = run_in_pty(columns)
    assert seen.count("\x1b[?25l") == seen.count("\x1b[?25h") == 1  # the cursor went and came back
    lines = [line for line in re.split(r"[\r\n]+", plain(seen)) if line]
    bars = [line for line in lines if "━" in line or "─" in line]
    assert len(bars) >= 3
    assert all(len(line) < columns for line in bars)
    assert any("epoch 2/3" in line and "acc" in line and "left" in line for line in bars)
    left = on_screen(seen)
    assert not any("━" in line or "─" in line for line in left)  # the bar is gone
    epochs = [line for line in left if re.match(r"epoch \d/3  [a-z]", line)]
    assert len(epochs) == 3
    assert all(len(line) < columns and "val" in line for line in epochs)
    assert ["best" in line for line in epochs] == [True, False, True]
    assert any("device: Frobnicator × 2 [bold]not markup[/bold]" in line for line in left)
    assert "a foreign print" in left
    assert left[-1] == "the end"
    if columns == 140:
        assert "loss 0.500 acc 83.1 %" in epochs[0]
        assert "val loss 0.600 acc 70.0 %  test loss 0.700 acc 79.9 %  lr 0.0412  2,301 img/s" in epochs[0]
        assert any("2,301 img/s  left " in line for line in bars)


@pytest.mark.parametrize(("mode", "environment"), [("auto", {"TERM": "dumb"}), ("bar", {"TERM": "dumb"}), ("lines", {})])
def test_without_a_capable_terminal_there_are_plain_lines(mode: str, environment: dict[str, str]) -> None:
    seen = run_in_pty(80, mode, **environment)
    assert "\x1b" not in seen
    assert "epoch 2/3  step 15/30  loss 1.250  acc 37.5 %  lr 0.0412  2,301 img/s  45.0 s left" in seen


def test_a_terminal_without_unicode_gets_a_bar_of_ascii() -> None:
    seen = plain(run_in_pty(80, PYTHONIOENCODING="ascii"))
    assert "#--" in seen
    assert "Frobnicator x 2" in seen


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_a_pipe_gets_whole_plain_lines(encoding: str) -> None:
    done = subprocess.run([sys.executable, "-c", RUN.format(mode="auto")], capture_output=True, timeout=60, check=True,
                          env=os.environ | {"PYTHONIOENCODING": encoding, "FORCE_COLOR": "1"})  # fmt: skip
    text = done.stdout.decode(encoding)
    assert done.stderr == b""
    assert "\x1b" not in text
    assert "\r" not in text
    assert len(re.findall(r"^epoch \d/3  train", text, re.M)) == 3
    assert text.endswith("the end\n")


@pytest.mark.skipif(os.name != "posix", reason="broken pipes behave like this on POSIX only")
def test_a_reader_that_leaves_does_not_end_the_run(tmp_path: Path) -> None:
    script = RUN.format(mode="auto").replace('print("a foreign print")', "pass")
    script += f"\nopen({str(tmp_path / 'end')!r}, 'w').close()"
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    child.stdout.close()
    _, errors = child.communicate(timeout=60)
    assert (child.returncode, errors) == (0, b"")
    assert (tmp_path / "end").exists()


def test_a_closed_file_is_borne() -> None:
    file = io.StringIO()
    with Terminal("auto", num_steps=3, steps_per_epoch=1, file=file, seconds_between=0) as terminal:
        file.close()
        terminal.say("nobody hears")
        terminal.step(1, {"train/loss": 1.0}, 1.0, 1.0)
        terminal.epoch(1, {})


def test_lines_come_at_most_so_often_and_epochs_always() -> None:
    file = io.StringIO()
    with Terminal("lines", num_steps=30, steps_per_epoch=10, file=file) as terminal:
        for step in range(1, 31):
            terminal.step(step, {"train/loss": 1.0}, 100.0, 1.0)
            if step % 10 == 0:
                terminal.epoch(step // 10, {"train/loss": 1.0})
    lines = file.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines] == ["epoch 1/3", "epoch 2/3", "epoch 3/3"]


def test_clean_accuracy_stands_in_where_images_are_blends() -> None:
    file = io.StringIO()
    terminal = Terminal("lines", num_steps=10, steps_per_epoch=10, file=file)
    terminal.epoch(1, {"train/loss": 1.5, "train/accuracy": 0.11, "clean/accuracy": 0.77, "time/epoch_seconds": 75.0})
    assert "train loss 1.500 clean 77.0 %  1 min 15 s" in file.getvalue()
    assert "11.0" not in file.getvalue()


def test_none_says_nothing_and_strange_numbers_are_shown() -> None:
    file = io.StringIO()
    with Terminal("none", num_steps=1, steps_per_epoch=10, file=file) as terminal:
        terminal.say("x")
        terminal.step(1, {"train/loss": 1.0}, 1.0, 1.0)
        terminal.epoch(1, {"train/loss": 1.0})
    assert file.getvalue() == ""
    with Terminal("lines", num_steps=1, steps_per_epoch=10, file=file, seconds_between=0) as terminal:
        terminal.step(1, {"train/loss": math.nan}, math.inf, math.nan)
    assert file.getvalue() == "epoch 1/1  step 1/1  loss nan  ? left\n"


def test_the_tracker_shows_means_of_a_flush_and_of_an_epoch() -> None:
    file = io.StringIO()
    tracker = TerminalTracker(Terminal("lines", num_steps=20, steps_per_epoch=10, file=file, seconds_between=0))
    tracker.rows([{"step": 1, "train/loss": 1.0, "lr": 0.1}, {"step": 2, "train/loss": 3.0, "lr": 0.2}], Pace(500.0, 9.0))
    row = {"step": 5, "epoch": 0.5, "train_epoch/loss": 1.75, "test/accuracy": 0.5, "time/epoch_seconds": 2.0}
    tracker.epoch(row, is_best=True)
    tracker.close()
    assert file.getvalue().splitlines() == [
        "epoch 1/2  step 2/20  loss 2.000  lr 0.2  500 img/s  9.0 s left",
        "epoch 0.5/2  train loss 1.750  test acc 50.0 %  lr 0.2  2.0 s  best so far",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.0 s"), (12.34, "12.3 s"), (59.94, "59.9 s"), (59.96, "1 min 00 s"), (200, "3 min 20 s"), (3599.4, "59 min 59 s"),
     (3599.6, "1 h 00 min"), (3720, "1 h 02 min"), (7199, "2 h 00 min"), (90000, "25 h 00 min"),
     (math.nan, "?"), (math.inf, "?"), (-1, "?")],
)  # fmt: skip
def test_seconds_for_people(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(("work", "left"), [(None, 2.0), ([0, 1, 2, 5, 8], 6.0)])
def test_the_time_left_knows_that_later_steps_may_cost_more(work: list[float] | None, left: float) -> None:
    """Small images come first: two of four steps in two seconds, and the other two are three times as dear."""
    told: list[Pace] = []

    class Listener:
        def rows(self, rows: list[dict[str, float]], pace: Pace) -> None:
            told.append(pace)

    fanout = Fanout([Listener()], num_steps=4, steps_per_epoch=4, eval_steps=0, images_at=lambda _: 10, seconds=0.0, past=[],
                    work=work)  # type: ignore[list-item]  # fmt: skip
    fanout.rows([{"step": 1}, {"step": 2}], seconds=2.0)
    assert told == [Pace(10.0, left)]
