"""What the README shows: its pictures are there, its Python runs, its command lines are understood."""

import importlib
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

import cifarlab as cl
from cifarlab.cli import COMMANDS, main
from cifarlab.config import TrainConfig, WatchConfig
from cifarlab.runs import Run

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, flags=re.DOTALL)
LINES = [line.split("#")[0].strip() for kind, block in BLOCKS if not kind for line in block.splitlines()]
COMMAND_LINES = sorted({line for line in LINES if line.startswith("cifarlab ")})


def test_the_pictures_are_there() -> None:
    found = re.findall(r"!\[.*?\]\((.*?)\)", README)
    assert found
    for picture in found:
        assert (Path(__file__).parent.parent / picture).stat().st_size > 10_000


def test_nothing_is_left_to_fill_in() -> None:
    assert not re.search(r"MEASURED|TODO|FIXME|XXX", README)


def test_make_targets_exist() -> None:
    makefile = (Path(__file__).parent.parent / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", "\n".join(LINES), flags=re.MULTILINE):
        assert f"\n{target}:" in makefile


@pytest.mark.parametrize("line", COMMAND_LINES)
def test_command_lines_are_understood(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Training is replaced by a look at what it was asked; the rest may miss a run folder or file, but no word of the line."""
    asked: list[tuple[TrainConfig, WatchConfig]] = []

    def note(config: TrainConfig, watch: WatchConfig, **_: Any) -> None:
        asked.append((config, watch))
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.import_module("cifarlab.lr_range"), "lr_range", note)  # before it sees another train
    monkeypatch.setattr(importlib.import_module("cifarlab.train"), "train", note)
    monkeypatch.setattr(importlib.import_module("cifarlab.forecast"), "forecast_run", note)
    monkeypatch.setattr(importlib.import_module("cifarlab.board.server"), "serve", lambda *_: None)
    conduct = importlib.import_module("cifarlab.studies.conduct")
    monkeypatch.setattr(conduct, "study", lambda name, base, **choices: note(base, choices["watch"]))
    _, command, *rest = shlex.split(line)
    assert command in COMMANDS
    code = main([command, *rest])
    told = capsys.readouterr().err
    if command in ("train", "lr-range") or "--recipe" in rest or (command == "study" and "--list" not in rest):
        assert code == 130, told
        assert len(asked) == 1
    elif code:
        assert "there is no run folder" in told or "there is no folder runs" in told or "neither cifar10" in told, told


def test_the_python_of_the_page_on_probes_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The loop of one's own first, as the rest reads what it leaves."""
    page = (Path(__file__).parent.parent / "docs" / "probes.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    loader = [(torch.randn(4, 3, 2, 2), torch.randint(3, (4,))) for _ in range(3)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    session: dict[str, Any] = {"model": model, "optimizer": optimizer, "loader": loader, "F": torch.nn.functional}
    blocks.sort(key=lambda block: "cl.watch" not in block)
    assert len(blocks) == 3
    for block in blocks:
        exec(block, session)
    assert len(session["flow"]["norm"]) == 3
    assert "a healthy map is calm" in capsys.readouterr().out


def test_its_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, in one session, as a reader would; nets and epochs of a size for tests."""
    monkeypatch.chdir(tmp_path)
    whole = cl.train
    runs: list[Run] = []

    def short(config: TrainConfig, watch: WatchConfig | None = None) -> Run:
        from dataclasses import replace

        quiet = WatchConfig(progress="none", figures=False, forecast=False)
        runs.append(whole(replace(config, train_images=64, epochs=1), watch or quiet))
        return runs[-1]

    whole_range = cl.lr_range

    def short_range(config: TrainConfig) -> cl.LrRange:
        from dataclasses import replace

        return whole_range(replace(config, train_images=64), WatchConfig(figures=False), steps=6, seeds=1)

    monkeypatch.setattr(cl, "train", short)
    monkeypatch.setattr(cl, "lr_range", short_range)
    from cifarlab.models import MODELS

    session: dict[str, Any] = {"MyNet": MODELS["simple_cnn"]}
    python = [block for kind, block in BLOCKS if kind == "python"]
    assert len(python) >= 3
    for block in python:
        exec(block, session)
    assert len(runs) == 2
    assert session["my_recipe"](epochs=3).epochs == 3
    MODELS.pop("mynet", None)
