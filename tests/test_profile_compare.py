"""Other counters' numbers for the same net, by their rules."""

import copy
import random
import sys
import types
from importlib import metadata

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cifarlab.config import InputError
from cifarlab.models import create_model
from cifarlab.profile import compare
from cifarlab.profile.compare import PEERS, Row, compare_counters

# Printed by the tools themselves (fvcore 0.1.5, ptflops 0.7.5, torchinfo 1.8.0, thop 0.1.1; torch 2.13), in evaluation mode.
MEASURED = {
    ("resnet18", (3, 32, 32)): (556659712, 557224970, 555422730, 555432330, 557889024),
    ("resnet9", (3, 32, 32)): (379671552, 380548096, 379261952, 379266432, 380081152),
    ("simple_cnn", (3, 32, 32)): (80909312, 81434634, 80582154, 80582858, 81236992),
    ("simple_cnn", (3, 48, 48)): (176815104, 177995786, 176059914, 176060618, 177533952),
    ("separable", (3, 32, 32)): (116970496, 119133194, 114807818, 114817290, 119100928),
    ("resnet18-imagenet-stem", (3, 64, 64)): (148458496, 148780042, 148050954, 148060554, 148864512),
}


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)


@pytest.mark.parametrize(("name", "shape"), MEASURED)
@pytest.mark.usefixtures("nothing_installed")
def test_rules_give_what_the_tools_print(name: str, shape: tuple[int, ...]) -> None:
    rows = {row.tool: row for row in compare_counters(create_model(name), shape)}
    assert tuple(rows[peer.tool].value for peer in PEERS) == MEASURED[name, shape]
    assert {rows[peer.tool].source for peer in PEERS} == {"by its rule"}
    assert {rows[peer.tool].version for peer in PEERS} == {"not installed"}


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.tool)
def test_an_installed_tool_agrees_with_its_rule(peer: compare.Peer) -> None:
    pytest.importorskip(peer.package, reason=f"{peer.package} is not installed: its rule is held against recorded numbers only")
    for name, shape in [("resnet18", (3, 32, 32)), ("simple_cnn", (3, 48, 48)), ("separable", (3, 32, 32))]:
        row = next(row for row in compare_counters(create_model(name), shape) if row.tool == peer.tool)
        assert row.source == "run", row.note
        assert row.value == peer.count(compare._record(create_model(name), shape))


@pytest.mark.usefixtures("nothing_installed")
def test_the_three_numbers_said_of_resnet18_stand_side_by_side() -> None:
    rows = compare_counters(create_model("resnet18"), (3, 32, 32))
    told = [(row.tool.split()[0], row.unit, row.input_shape, f"{row.value / 1e9:.4f}") for row in rows]
    assert ("cifarlab", "MAC", (3, 32, 32), "0.5554") in told
    assert ("cifarlab", "FLOP", (3, 32, 32), "1.1108") in told
    assert ("torch", "FLOP", (3, 32, 32), "1.1108") in told
    assert ("fvcore", "MAC", (3, 32, 32), "0.5567") in told
    assert ("cifarlab,", "MAC", (3, 224, 224), "1.8141") in told
    assert next(row.printed_unit for row in rows if row.tool == "fvcore") == "flops"


def training_row(rows: list[Row]) -> Row:
    return next(row for row in rows if "backward" in row.rule)


@pytest.mark.usefixtures("nothing_installed")
def test_torchs_surplus_on_grouped_convolutions_is_told() -> None:
    plain = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    assert training_row(compare_counters(plain, (4, 9, 9))).note == ""
    grouped = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8))
    row = training_row(compare_counters(grouped, (4, 9, 9)))
    first, second = 2 * 7 * 7 * 8 * 4 * 9, 2 * 5 * 5 * 8 * 9
    right = 2 * first + 3 * second  # no gradient of the image is needed
    if torch.__version__.startswith("2.13"):  # mended some day
        assert row.value == right + 7 * second
        assert f"{right:,}" in row.note


class Functional(nn.Module):
    """Everything by function: counters that hook modules see nothing of it."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel, self.matrix = nn.Parameter(torch.ones(5, 3, 2, 2)), nn.Parameter(torch.ones(45, 7))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel).relu().flatten(1) @ self.matrix


@pytest.mark.usefixtures("nothing_installed")
def test_functional_calls_are_missed_by_whom_they_are_missed() -> None:
    rows = {row.tool: row.value for row in compare_counters(Functional(), (3, 4, 4))}
    macs = 9 * 5 * 12 + 45 * 7
    assert rows["cifarlab"] == 2 * macs  # the last of its two rows
    assert rows["fvcore"] == rows["ptflops (aten)"] == macs
    assert rows["torchinfo"] == rows["thop"] == 0


def test_an_installed_tool_works_on_a_copy_and_may_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    def leak(module: nn.Module, inputs: tuple[Tensor], verbose: bool) -> tuple[float, float]:
        print("noise")
        module.register_buffer("total_ops", torch.randn(1))
        return 123.0, 0.0

    monkeypatch.setitem(sys.modules, "thop", types.SimpleNamespace(profile=leak))
    monkeypatch.setitem(sys.modules, "torchinfo", types.SimpleNamespace())  # has no summary: it fails
    monkeypatch.setattr(metadata, "version", lambda name: "9.9")
    net = create_model("resnet9")
    before, random = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    rows = {row.tool: row for row in compare_counters(net, (3, 32, 32))}
    assert (rows["thop"].value, rows["thop"].source, rows["thop"].version) == (123, "run", "9.9")
    assert (rows["torchinfo"].value, rows["torchinfo"].source) == (379266432, "by its rule")
    assert "AttributeError" in rows["torchinfo"].note
    assert list(net.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(m.training for m in net.modules())


class Product(nn.Module):
    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.convolution, self.vector = nn.Conv2d(8, 8, 3, groups=groups), nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.mv(self.convolution(x).mean(dim=(2, 3)), self.vector)


@pytest.mark.usefixtures("nothing_installed")
def test_torchs_deficit_is_told_by_its_cause() -> None:
    rows = compare_counters(Product(), (8, 9, 9))
    forward, training = (row for row in rows if row.tool.startswith("torch "))
    # Backward there is a second mv; the matrix' gradient is a product of elements.
    for row, ours in ((forward, rows[1].value), (training, training.value + 2 * 2 * 8)):
        assert row.note == f"cifarlab counts {ours:,}: torch {torch.__version__} does not count mv"
    both = training_row(compare_counters(Product(groups=4), (8, 9, 9))).note
    if torch.__version__.startswith("2.13"):
        assert both.endswith("does not count mv and counts a grouped convolution's weight gradient `groups` times")


@pytest.mark.usefixtures("nothing_installed")
def test_grouped_convolutions_are_not_blamed_for_what_they_did_not_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare.FlopCounterMode, "get_total_flops", lambda _: 2)
    for groups in (1, 8):
        note = training_row(compare_counters(nn.Sequential(nn.Conv2d(8, 8, 3, groups=groups)), (8, 9, 9))).note
        assert note.endswith(f"torch {torch.__version__} counts differently")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_nets_of_other_types_are_compared(dtype: torch.dtype) -> None:
    rows, expected = compare_counters(Product().to(dtype), (8, 9, 9)), compare_counters(Product(), (8, 9, 9))
    assert [(row.tool, row.value, row.source) for row in rows] == [(row.tool, row.value, row.source) for row in expected]


class Gamble(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * random.random() * np.random.rand()


def test_a_net_that_draws_leaves_all_generators_alone() -> None:
    net, before = Gamble(3, 3), (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist())
    compare_counters(net, (3,))
    assert (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()) == before


class Real(nn.Module):
    """Cannot run on meta tensors, for the reason named."""

    def __init__(self, reason: str) -> None:
        super().__init__()
        self.reason, self.conv, self.head = reason, nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 2)
        self.hidden = [torch.ones(8, 8)]  # not registered, so it stays on the CPU

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.reason == "a hidden constant" or (self.reason == "only in evaluation" and not self.training):
            x = x * self.hidden[0]
        if self.reason == "numpy":
            x = x * float(x.detach().numpy().mean() * 0 + 1)
        if self.reason == "a look at a value" and x.sum().item() == 0:
            x = x + 1
        if self.reason == "chosen by value":
            return self.head(x[:, :, (x[0].mean((0, 2)) > -9e9).nonzero()[:, 0]].mean((2, 3)))  # type: ignore[no-any-return]
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


@pytest.mark.usefixtures("nothing_installed")
@pytest.mark.parametrize("reason", ["a hidden constant", "only in evaluation", "numpy", "a look at a value", "chosen by value"])
def test_nets_that_cannot_run_on_meta_are_compared_for_real(reason: str) -> None:
    net, plain = Real(reason), Real("nothing")
    before, generator = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    rows = compare_counters(net, (3, 8, 8))
    assert [row.value for row in rows] == [row.value for row in compare_counters(plain, (3, 8, 8))]
    depends = reason in ("a look at a value", "chosen by value")
    assert {"depends on its values" in row.note for row in rows} == {depends}
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)
    assert max(map(len, compare.format_comparison(rows).splitlines())) <= 100


@pytest.mark.usefixtures("nothing_installed")
def test_torchs_counter_may_fail_and_a_net_only_for_training_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> Row:
        raise RuntimeError("a module it does not know")

    monkeypatch.setattr(compare, "_torch_row", fail)
    rows = compare_counters(Real("nothing"), (3, 8, 8))
    assert rows[1].note == "torch's own counter fails here: RuntimeError"
    assert not any(row.tool.startswith("torch ") for row in rows)

    class Training(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if not self.training:
                raise RuntimeError("only for training")
            return super().forward(x)

    with pytest.raises(InputError, match=r"Training does not run in evaluation mode \(only for training\)"):
        compare_counters(Training(3, 3), (3,))


def test_a_shape_that_does_not_fit_is_told() -> None:
    with pytest.raises(InputError, match="5×32×32"):
        compare_counters(create_model("resnet18"), (5, 32, 32))
