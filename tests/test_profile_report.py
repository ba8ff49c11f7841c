"""A profile printed: units never in doubt, nothing cut off at 100 columns, JSON and CSV with the exact counts."""

import csv
import io
import json
import re
from dataclasses import replace

import pytest
import torch
from torch import nn

from cifarlab.models import MODELS, create_model
from cifarlab.profile import Profile, format_table, profile, to_csv, to_json
from cifarlab.profile.report import _bar, _bytes, _short

IMAGE = (3, 32, 32)


def build(name: str) -> nn.Module:
    with torch.device("meta"):  # no time is spent on drawing weights that nobody needs
        return create_model(name)


@pytest.fixture(scope="module")
def resnet18() -> Profile:
    return profile(build("resnet18"), IMAGE)


@pytest.mark.parametrize(
    ("name", "backward"), [("resnet18-imagenet-stem", True), ("resnet9", False), ("resnet9", True), ("separable", True)]
)
def test_every_model_fits_100_columns_uncut(name: str, backward: bool) -> None:
    told = format_table(profile(build(name), IMAGE, batch_size=2, backward=backward))
    assert max(map(len, told.splitlines())) <= 100
    assert "…" not in told.split("most expensive")[0]
    assert ("fwd+bwd" in told) == ("both  " in told) == backward


def test_both_units_the_rule_the_input_and_the_total_are_told(resnet18: Profile) -> None:
    told = format_table(resnet18, title="resnet18")
    assert told.startswith("resnet18 · input 1×3×32×32")
    assert "555,422,720 MAC = 1,110,845,440 FLOP, and 5,726,218 other FLOP" in told
    assert " ".join(resnet18.rule.split()) in " ".join(told.split())
    assert "11,173,962 (11,173,962 trainable), 44.7 MB" in told
    assert "every operation met is counted" in told


def test_every_layer_has_a_row_under_its_parents(resnet18: Profile) -> None:
    work, memory = (table.splitlines() for table in format_table(resnet18).split("\n\n")[1:3])
    rows = [line for line in work[2:] if line.strip("─")]
    at = next(i for i, line in enumerate(rows) if line.startswith("  layer2"))
    assert [line.split("1×")[0].rstrip() for line in rows[at : at + 4]] == [
        "  layer2", "    0 BasicBlock", "      downsample", "        0 Conv2d",
    ]  # fmt: skip
    assert re.search(r"8\.19k +2\.10M +4\.19M +12\.6M +65\.5k +0\.4 %", rows[at + 3])
    containers = 1 + 4 + 3 - 1  # the root works itself; layer1 … layer4 and three downsample do not
    assert len(rows) == len(resnet18.layers) + containers
    assert len(memory) == len(work)


def test_the_most_expensive_layers_are_named_with_a_reason(resnet18: Profile) -> None:
    told = " ".join(format_table(resnet18).split("most expensive")[1].split())
    assert "27 % of the FLOP: 4 layers of 3×3 convolution 64→64 at 32×32 (layer1.0.conv1 … layer1.1.conv2); 147k of" in told
    assert "112 FLOP/byte: bound by compute" in told
    assert "80 % of the bytes moved forward: Conv2d; the largest single layer is layer4.0.conv2" in told
    assert "bound by memory here (ridge at 200)" in format_table(resnet18, ridge=200.0)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("ridge", [None, 12.3])
def test_each_insight_is_one_line_under_the_name_of_its_layers(name: str, ridge: float | None) -> None:
    told = format_table(profile(build(name), IMAGE, batch_size=2), ridge=ridge)
    lines = told.split("most expensive, forward + backward:\n")[1].split("\nevery operation")[0].splitlines()
    assert len(lines) == 2 * 5  # three by work, two by memory
    for named, insight in zip(lines[::2], lines[1::2], strict=True):
        assert re.match(r"  \d+ % of .*;$", named)
        about_memory = r"the largest single layer is \S+ \(.* with "
        assert re.match(rf"      (\S+ of \S+ parameters .*: (bound by|compute or)|{about_memory})", insight)


def test_more_columns_are_merged_by_layer_and_get_their_own_table_when_too_many(resnet18: Profile) -> None:
    columns = {"field": {"conv1": (3, 3), "layer1.0.conv1": (5, 7)}, "ms forward": {"conv1": 0.123456}}
    few = format_table(resnet18, columns)
    assert re.search(r"  conv1 Conv2d .* 3 +0\.123$", few, re.MULTILINE)
    assert re.search(r"      conv1 Conv2d .* 5×7$", few, re.MULTILINE)
    many = format_table(resnet18, columns | {f"number {i} of many": {"fc": i} for i in range(9)})
    assert max(map(len, many.splitlines())) <= 150
    assert re.search(r"^  fc Linear +0 +1 +2 +3 +4 +5 +6 +7 +8$", many, re.MULTILINE)
    assert many.count("fc Linear") == 3 > few.count("fc Linear")


def test_what_is_not_counted_is_said() -> None:
    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.erfinv(x)

    told = format_table(profile(Odd(), (4,), backward=False))
    assert "NOT COUNTED, for want of a rule: erfinv (1×)" in told
    assert "every operation" not in told
    plain = profile(nn.Linear(4, 3), (4,))
    told = format_table(replace(plain, device="cpu", notes=("a remark",)))
    assert "note: a remark" in told
    assert "counted on cpu" in " ".join(told.split())
    assert format_table(profile(nn.Identity(), (4,)))  # nothing at all is no error


def test_json_and_csv_have_the_exact_counts(resnet18: Profile) -> None:
    columns = {"field": {"conv1": (3, 3)}}
    told = json.loads(to_json(resnet18, columns))
    assert told["total"]["forward_macs"] == sum(layer["forward_macs"] for layer in told["layers"]) == 555_422_720
    assert told["total"]["training_flops"] == resnet18.training_flops
    assert (told["input_shapes"], told["uncounted"], told["rule"]) == ([[1, 3, 32, 32]], {}, resnet18.rule)
    assert told["layers"][1]["field"] == [3, 3]
    assert told["layers"][2]["field"] is None

    rows = list(csv.DictReader(io.StringIO(to_csv(resnet18, columns))))
    assert [row["name"] for row in rows] == [layer.name for layer in resnet18.layers]
    assert sum(int(row["parameters"]) for row in rows) == 11_173_962
    assert (rows[1]["output_shape"], rows[1]["field"], rows[2]["field"]) == ("1x64x32x32", "3x3", "")


def test_short_numbers() -> None:
    numbers = (0, 7, 999, 1000, 9994, 9996, 99_949, 99_950, 999_499, 999_600, 37_748_736, 1_110_845_440)
    told = ["", "7", "999", "1.00k", "9.99k", "10.0k", "99.9k", "100k", "999k", "1.00M", "37.7M", "1.11G"]
    assert [_short(number) for number in numbers] == told
    assert [_bytes(number) for number in (0, 12, 44_695_848)] == ["0B", "12B", "44.7 MB"]
    assert [_bar(share, 2) for share in (0, 0.5, 0.5625, 1)] == ["", "█", "█▏", "██"]
