"""`cifarlab profile`, as typed."""

import csv
import io
import itertools
import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cifarlab as cl
from cifarlab import forecast
from cifarlab.cli import main
from cifarlab.config import TrainConfig, WatchConfig
from cifarlab.models import MODELS
from cifarlab.profile import whole


def test_the_table_states_units_shape_and_rule(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "resnet18", "--no-time"]) == 0
    told = capsys.readouterr().out
    assert all(len(line) <= 100 for line in told.splitlines())
    assert "1×3×32×32" in told
    assert "rule: 1 MAC (multiply-add) = 2 FLOP" in told
    assert "555,422,720 MAC = 1,110,845,440 FLOP" in told
    assert "11,173,962" in told


def test_json_and_csv_have_exact_numbers_and_receptive_fields(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "simple_cnn", "--no-time", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["total"]["forward_flops"] == 161_163_264
    first = next(layer for layer in found["layers"] if layer["kind"] == "Conv2d")
    assert first["field_size_pixels"] == [3, 3]
    assert main(["profile", "simple_cnn", "--no-time", "--csv", "--batch", "2", "--input", "3,32,32"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert sum(int(row["forward_macs"]) for row in rows) == 161_163_264  # two images, MAC


def test_times_roofs_and_figures(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["profile", "simple_cnn", "--batch", "4", "--effective", "--figures", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "measured at batch 4" in told
    assert "GFLOP/s in matrix products" in told
    assert "effective receptive field" in told
    assert {path.name for path in tmp_path.iterdir()} == {
        "flops.png", "receptive_field.png", "roofline.png", "effective_field.png",
    }  # fmt: skip


def test_lines_fit_and_json_has_what_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "separable", "--batch", "2", "--effective"]) == 0
    told = capsys.readouterr().out
    assert "effective receptive field" in told
    assert max(map(len, told.splitlines())) <= 100
    heading, below = next(pair for pair in itertools.pairwise(told.splitlines()) if "roof%" in pair[0])
    assert heading.split().count("GFLOP/s") == heading.split().count("roof%") == 2  # forward and backward
    assert below.split().count("bwd") == 3
    assert main(["profile", "simple_cnn", "--batch", "2", "--effective", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["measured"]) == {
        "batch", "forward_ms", "backward_ms", "peak_gflops", "peak_gbytes_per_second", "threads",
    }  # fmt: skip
    assert found["measured"]["batch"] == 2
    assert set(found["effective"]) == {"layer", "mass_side_pixels", "core_side_pixels"}
    first = next(layer for layer in found["layers"] if layer["kind"] == "Conv2d")
    assert first["ms_forward"] > 0
    assert first["gflops_forward"] > 0
    assert 0 < first["share_of_roof"] < 20  # a share, not percent
    assert 0 < first["share_of_roof_backward"] < 20
    assert first["ms_backward"] > 0
    assert first["gflops_backward"] > 0
    assert {first["bound_by"], first["bound_by_backward"]} <= {"compute", "memory"}
    assert all(key.isidentifier() for key in first)


def test_a_run_is_profiled_as_it_was_trained(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = TrainConfig(data="digits", model=tiny, epochs=0.1)
    run = cl.train(config, WatchConfig(runs_dir=tmp_path, progress="none", forecast=False, figures=False, device="cpu"))
    capsys.readouterr()
    assert main(["profile", str(run.path), "--no-time"]) == 0
    told = capsys.readouterr().out
    assert "".join(told.split()).startswith(f"tinyof{run.path}")  # wrapped anywhere, as the path is long
    assert "1×3×32×32" in told
    assert main(["profile", str(run.path), "--no-time", "--json", "--batch", "2"]) == 0
    assert json.loads(capsys.readouterr().out)["total"]["forward_macs"] == 2 * (7 * 7 * 4 * 75 + 196 * 10)
    assert main(["profile", str(run.path), "--compare", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["value"] == 7 * 7 * 4 * 75 + 196 * 10


def test_strict_fails_on_what_has_no_rule(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.erfinv(x)

    monkeypatch.setitem(MODELS, "odd", lambda _: nn.Sequential(nn.Conv2d(3, 4, 3), Odd()))
    assert main(["profile", "odd", "--no-time"]) == 0
    assert "NOT COUNTED, for want of a rule: erfinv (2×)" in capsys.readouterr().out
    assert main(["profile", "odd", "--no-time", "--strict"]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert "operations without a counting rule: erfinv (2×)" in told.err
    assert len(told.err.splitlines()) == 1


def test_a_recipe_and_a_comparison_as_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["profile", "simple_cnn", "--compare", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert next(row for row in rows if row["unit"] == "MAC")["value"] == 161_163_264 // 2
    quickly = partial(forecast.forecast_run, budget=0.5)
    monkeypatch.setattr(forecast, "forecast_run", quickly)
    assert main(["profile", "--recipe", "quick", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["recipe"] == "quick"
    assert found["seconds"] == pytest.approx(found["train_seconds"] + found["eval_seconds"] + found["save_seconds"])
    assert main(["profile", "--recipe", "quick"]) == 0
    told = capsys.readouterr().out
    assert "PFLOP" in told
    assert re.search(r"here: about [\w. ]+ s, [\w. ]+ s to [\w. ]+ s by what was measured", " ".join(told.split()))
    assert max(map(len, told.splitlines())) <= 100


def test_the_figure_of_a_batch_says_that_it_is_of_one_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[list[int], str]] = []

    def draw(names: list[str], forward: list[int], backward: list[int], *, title: str) -> Any:
        drawn.append((forward, title))
        return whole.draw_receptive_field(["a"], [3], 8)

    monkeypatch.setattr(whole, "draw_flops", draw)
    whole.draw_survey(whole.survey(nn.Conv2d(3, 4, 3), (3, 8, 8), batch_size=5), tmp_path, title="a net")
    assert drawn == [([36 * 27 * 4], "FLOP by layer, for one image: a net")]


def test_the_roofline_has_both_passes_of_every_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[list[str], list[str]]] = []

    def draw(names: list[str], x: list[float], y: list[float], weight: list[float], passes: list[str], **_: Any) -> Any:
        assert len(x) == len(y) == len(weight) == len(names)
        drawn.append((names, passes))
        return whole.draw_receptive_field(["a"], [3], 8)

    monkeypatch.setattr(whole, "draw_roofline", draw)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    for backward in (True, False):
        whole.draw_survey(whole.survey(net, (3, 8, 8), timed=True, backward=backward), tmp_path, title="a net")
    assert drawn == [(["0", "1", "0 bwd", "1 bwd"], 2 * ["forward"] + 2 * ["backward"]), (["0", "1"], 2 * ["forward"])]


def test_what_cannot_be_followed_is_told_to_programs_too() -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.cumsum(2)

    found = whole.survey(nn.Sequential(nn.Conv2d(3, 4, 3), Odd()), (3, 8, 8))
    assert found.keyed_columns["field_unknown_behind"] == {"1": "cumsum"}
    assert found.remarks == ["receptive fields behind these operations are not known: cumsum"]


def test_fields_without_one_stride_are_told_in_the_table_and_to_programs() -> None:
    class Drift(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, :, ::2, ::2] + x[:, :, :8, :8]

    found = whole.survey(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), Drift()), (3, 16, 16))
    assert found.remarks == [
        "field stride varies where branches of different strides meet: size is that of the largest field there"
    ]
    assert found.columns["field size"] == {"0": (3, 3), "1": (10, 10)}
    assert found.keyed_columns["field_stride_pixels"] == {"0": (1, 1), "1": "varies"}
    assert "varies" in str(found)


def test_bad_requests_are_refused_before_anything_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "inside"):
        assert main(["profile", "resnet18", "--figures", str(path)]) == 2
        assert "cannot be made a folder" in capsys.readouterr().err


def test_the_comparison_explains_three_numbers_of_one_net(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "resnet18", "--compare"]) == 0
    told = capsys.readouterr().out
    assert all(len(line) <= 100 for line in told.splitlines())
    assert len(told.splitlines()) < 40  # one screen
    for number in ("1.1108 G FLOP", "0.5567 G flops", "1.8141 G MAC", "3×224×224"):
        assert number in told


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["resnet-18"], "did you mean 'resnet18'"),
        ([], "name one network"),
        (["resnet18", "--recipe", "quick"], "name one network"),
        (["resnet18", "--input", "3x32"], "'3x32' is no shape"),
        (["resnet18", "--input", "3x0x32"], "'3x0x32' is no shape"),
        (["resnet18", "--input", "4x32x32"], "fails on input of shape 1×4×32×32"),
        (["resnet18", "--batch", "0"], "--batch 0 cannot be used"),
        (["--recipe", "quik"], "did you mean 'quick'"),
        (["."], "has no config.json"),
        (["/nonexist/run"], "there is no run folder '/nonexist/run'"),
        (["resnet18", "--input", "3x99999x99999"], "is too large"),
        (["resnet18", "--input", "3x" + 5000 * "9" + "x3"], "is too large"),
        (["resnet18", "--batch", "100000000"], "this machine has"),
        (["resnet18", "--json", "--csv"], "--csv has no effect beside --json"),
        (["resnet18", "--compare", "--batch", "4"], "--batch has no effect beside --compare"),
        (["resnet18", "--compare", "--csv"], "--csv has no effect beside --compare"),
        (["resnet18", "--compare", "--effective"], "--effective has no effect beside --compare"),
        (["--recipe", "quick", "--csv"], "--csv has no effect beside --recipe"),
        (["--recipe", "quick", "--input", "3x32x32"], "--input has no effect beside --recipe"),
        (["--recipe", "quick", "--no-time"], "--no-time has no effect beside --recipe"),
        ([".", "--num-classes", "7"], "--num-classes has no effect beside a run folder"),
    ],
)
def test_bad_input_gets_one_sentence(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", *arguments]) == 2
    errors = capsys.readouterr().err
    assert told in errors
    assert len(errors.splitlines()) == 1
