"""`cifarlab profile`, as typed."""

import csv
import io
import json
from pathlib import Path

import pytest

from cifarlab.cli import main


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
    assert first["field size"] == [3, 3]
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
    ],
)
def test_bad_input_gets_one_sentence(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", *arguments]) == 2
    errors = capsys.readouterr().err
    assert told in errors
    assert len(errors.splitlines()) == 1
