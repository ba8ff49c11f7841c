"""Times of layers, the machine's roofs, and layers under them."""

import copy
import random
import time
from collections.abc import Callable
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cifarlab.config import InputError
from cifarlab.figures import draw_roofline
from cifarlab.models import MODELS, create_model
from cifarlab.profile import latency, roofline
from cifarlab.profile.counting import LayerCost, count
from cifarlab.profile.latency import LayerTime, measure_layers, measure_whole
from cifarlab.profile.roofline import LayerRoof, Peaks, beaten_peak, measure_peaks, place_layers

CPU = torch.device("cpu")


class _SleepFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor, forward: float, backward: float) -> Tensor:
        ctx.seconds = backward  # type: ignore[attr-defined]
        time.sleep(forward)
        return x.clone()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        time.sleep(ctx.seconds)  # type: ignore[attr-defined]
        return gradient, None, None


class Sleep(nn.Module):
    """A layer whose times are known, at least from below."""

    def __init__(self, forward: float, backward: float) -> None:
        super().__init__()
        self.seconds = forward, backward
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return _SleepFunction.apply(x * self.scale, *self.seconds)


class Residual(nn.Module):
    """Work of its own between, after and beside its children, one of which is in-place; another is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Sleep(0.02, 0.01), Sleep(0.005, 0.03)
        self.relu, self.unused = nn.ReLU(inplace=True), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = _SleepFunction.apply(self.first(x), 0.0, 0.04)
        return self.relu(self.second(self.second(y))) + _SleepFunction.apply(x, 0.03, 0.0)


def test_every_layer_gets_its_own_time_forward_and_backward() -> None:
    net = nn.Sequential(Sleep(0.01, 0.02), Residual())  # the first input needs no gradient
    times = measure_layers(net, torch.ones(2, 3), repeats=3)
    expected = {"0": (10, 20), "1": (30, 40), "1.first": (20, 10), "1.second": (10, 60), "1.relu": (0, 0)}
    assert list(times) == list(expected)
    for name, (forward, backward) in expected.items():
        assert forward <= times[name].forward_ms < forward + 25, name  # what sleeps may oversleep on a busy machine
        assert backward <= times[name].backward_ms < backward + 25, name
    whole = measure_whole(net, torch.ones(2, 3), repeats=3)
    assert 70 <= whole.forward_ms < 110
    assert 130 <= whole.backward_ms < 180


def test_layers_of_a_net_are_those_that_are_counted() -> None:
    net, images = create_model("resnet18"), torch.randn(2, 3, 32, 32)
    times = measure_layers(net, images, repeats=2)
    counted = count(net, (3, 32, 32), batch_size=2)
    assert {layer.name for layer in counted.layers if layer.forward_macs or layer.forward_other} <= times.keys()
    assert all(times[layer.name].backward_ms > 0 for layer in counted.layers if layer.backward_macs)


def test_the_module_and_the_random_state_stay_as_they_were() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.ReLU(inplace=True), nn.Flatten(),
                        nn.Linear(144, 2))  # fmt: skip
    seen: list[int] = []
    net[0].register_forward_hook(lambda *_: seen.append(1))
    net[1].eval()
    images = torch.randn(2, 3, 8, 8)
    net(images).sum().backward()
    before, flags = copy.deepcopy(net.state_dict()), [m.training for m in net.modules()]
    gradient, random = net[0].weight.grad.clone(), torch.get_rng_state()
    seen.clear()
    measure_layers(net, images, repeats=2)
    measure_whole(net, images, repeats=2)
    assert list(net.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert [m.training for m in net.modules()] == flags
    assert torch.equal(net[0].weight.grad, gradient)
    assert torch.equal(torch.get_rng_state(), random)
    assert not seen
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in net.modules()) == 1


@pytest.mark.parametrize("name", MODELS)
def test_every_model_is_timed_at_batch_1(name: str) -> None:
    net, images = create_model(name), torch.randn(1, 3, 32, 32)  # the ImageNet stem leaves one pixel: no batch norm trains on it
    times = measure_layers(net, images, repeats=1)
    assert all(times[layer.name].backward_ms > 0 for layer in count(net, (3, 32, 32)).layers if layer.backward_macs)
    assert measure_whole(net, images, repeats=1).backward_ms > 0
    assert all(part.training for part in net.modules())


def random_states() -> tuple[object, ...]:
    return random.getstate(), tuple(map(str, np.random.get_state())), torch.get_rng_state().tolist()


class Gamble(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * random.random() * np.random.rand() + torch.rand(())


def test_modules_that_draw_leave_all_generators_alone() -> None:
    before = random_states()
    net = Gamble(3, 3)
    torch.set_rng_state(torch.tensor(before[-1], dtype=torch.uint8))
    measure_layers(net, torch.ones(2, 3), repeats=2)
    measure_whole(net, torch.ones(2, 3), repeats=2)
    measure_peaks(CPU, seconds=0.1)
    assert random_states() == before


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(3, 4)

    def forward(self, x: list[Tensor], *, extra: Tensor) -> dict[str, Tensor]:
        return {"a": self.a(x[0]), "b": self.b(extra), "size": torch.tensor(3)}


def test_inputs_by_keyword_nested_outputs_frozen_and_compiled_nets() -> None:
    net, x = Nested(), torch.ones(2, 3)
    net.b.requires_grad_(False)
    times = measure_layers(net, {"x": [x], "extra": x}, repeats=2)
    assert times["a"].backward_ms > 0 == times["b"].backward_ms
    assert list(measure_layers(torch.compile(nn.Linear(3, 3), backend="eager"), (x,), repeats=1)) == [""]
    assert measure_whole(nn.ReLU(), x, repeats=1).backward_ms < 1


def test_bad_input_is_told_in_one_sentence() -> None:
    with pytest.raises(InputError, match="2×5"):
        measure_layers(nn.Linear(3, 3), torch.ones(2, 5))
    with pytest.raises(InputError, match="repeats=0"):
        measure_whole(nn.Linear(3, 3), torch.ones(2, 3), repeats=0)


def test_peaks_are_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = measure_peaks(CPU, seconds=0.4)
    assert 0.5 < peaks.gflops < 1e5
    assert 0.1 < peaks.gbytes_per_second < 1e4
    assert peaks.attainable(0) == 0
    assert peaks.attainable(peaks.ridge) == pytest.approx(peaks.gflops)

    def ten_milliseconds(run: Callable[[], object], device: torch.device, seconds: float) -> float:
        run()
        return 0.01

    monkeypatch.setattr(roofline, "_fastest", ten_milliseconds)
    peaks = measure_peaks(CPU, seconds=0.1)
    assert peaks == Peaks(gflops=2 * 2048**3 / 1e7, gbytes_per_second=3 * 2**26 / 1e7)  # largest product, triad


def test_peaks_are_those_of_matrix_products_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    multiply, seen, sides = torch.mm, [], ((16, 16, 16), (8, 64, 8), (32, 32, 32))
    monkeypatch.setattr(roofline, "SIDES", sides)
    monkeypatch.setattr(torch, "mm", lambda a, b, out: (seen.append((*a.shape, b.shape[1])), multiply(a, b, out=out)))
    monkeypatch.setattr(torch.nn.functional, "conv2d", None)
    measure_peaks(CPU, seconds=0.4)
    turns = [now for now, before in zip(seen, [None, *seen], strict=False) if now != before]
    assert set(turns) == set(sides)
    assert len(turns) > 6


def test_layers_that_beat_the_peak_are_named() -> None:
    def roof(gflops: float) -> LayerRoof:
        return LayerRoof(flop=1, gflops=gflops, intensity=9, bound="compute", share=gflops / 100)

    peaks = Peaks(gflops=100, gbytes_per_second=20)
    assert beaten_peak({"a": roof(99), "b": roof(100)}, peaks) == ""
    told = beaten_peak({"a": roof(101), "b": roof(99), "c": roof(130), "d": roof(105), "e": roof(102)}, peaks)
    assert told.startswith("faster than 100 GFLOP/s in matrix products: c, d, e and 1 more (up to 130)")


def test_the_figure_names_its_peak_and_counts_who_beats_it() -> None:
    def subtitle(gflops: list[float]) -> str:
        chart = draw_roofline(["a", "b", "c"], [9, 9, 9], gflops, [1, 1, 1], peak_gflops=100, peak_gbytes_per_second=20)
        return " ".join(chart.to_dict()["title"]["subtitle"])

    assert "100 GFLOP/s in matrix products, 20 GB/s" in subtitle([99, 100, 50])
    assert "beat" not in subtitle([99, 100, 50])
    assert "2 layers beat the matrix products" in subtitle([101, 110, 50])


def test_the_figure_shows_both_passes_by_their_shape() -> None:
    peaks = {"peak_gflops": 100.0, "peak_gbytes_per_second": 20.0}
    chart = draw_roofline(["a", "a bwd"], [9, 4], [50, 30], [1, 2], ["forward", "backward"], **peaks).to_dict()
    dots = next(rows for rows in chart["datasets"].values() if rows and "pass" in rows[0])
    assert {(dot["layer"], dot["pass"], dot["bound"]) for dot in dots} == {
        ("a", "forward", "limited by arithmetic"), ("a bwd", "backward", "limited by memory"),
    }  # fmt: skip
    with pytest.raises(InputError, match="1 passes do not fit"):
        draw_roofline(["a", "b"], [9, 4], [50, 30], [1, 2], ["forward"], **peaks)
    with pytest.raises(InputError, match="sideways"):
        draw_roofline(["a"], [9], [50], [1], ["sideways"], **peaks)


class Event:
    """CUDA's timing event, of which each stream has its own clock: a moment is the number of events recorded there so far."""

    recorded: ClassVar[dict[str, int]] = {}

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self, stream: str) -> None:
        self.stream, self.moment = stream, self.recorded.setdefault(stream, 0)
        self.recorded[stream] += 1

    def elapsed_time(self, end: "Event") -> float:
        assert self.stream == end.stream
        return float(end.moment - self.moment)


def test_a_gpu_is_timed_by_events_in_the_stream_of_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[torch.device] = []
    monkeypatch.setattr(Event, "recorded", {})
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    second = torch.device("cuda:1")  # not the current one
    begun = latency._now(second)
    ended = latency._now(second)
    assert not waited  # two moments in a stream do not stop it
    latency.wait_for(second)
    assert waited == [second]
    assert latency._milliseconds(begun, ended) == 1.0
    assert Event.recorded == {"stream of cuda:1": 2}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_layers_add_up_to_the_whole_on_a_gpu() -> None:
    net, images = create_model("resnet18").cuda(), torch.randn(256, 3, 32, 32, device="cuda")
    before = torch.backends.cudnn.benchmark
    times, whole = measure_layers(net, images, repeats=5), measure_whole(net, images, repeats=5)
    assert torch.backends.cudnn.benchmark == before
    assert sum(layer.forward_ms for layer in times.values()) == pytest.approx(whole.forward_ms, rel=0.3)
    assert sum(layer.backward_ms for layer in times.values()) == pytest.approx(whole.backward_ms, rel=0.3)
    begun = time.perf_counter()
    for _ in range(5):
        net(images).sum().backward()
    torch.cuda.synchronize()
    assert whole.forward_ms + whole.backward_ms == pytest.approx(200 * (time.perf_counter() - begun), rel=0.5)
    peaks = measure_peaks("cuda")
    assert peaks.gflops > 1000
    assert peaks.gbytes_per_second > 100


def test_layers_are_placed_by_the_ridge_point() -> None:
    def layer(name: str, macs: int, other: int, num_bytes: int) -> LayerCost:
        return LayerCost(name=name, kind="", output_shape=None, calls=1, parameters=0, trainable_parameters=0, forward_macs=macs,
                         backward_macs=2 * macs, forward_other=other, backward_other=0, bytes_read=num_bytes // 2,
                         bytes_written=num_bytes // 2, backward_bytes=num_bytes, activation_bytes=0)  # fmt: skip

    peaks = Peaks(gflops=100, gbytes_per_second=10)
    layers = [layer("conv", 500_000, 0, 50_000), layer("norm", 0, 10_000, 20_000), layer("view", 0, 0, 0), layer("idle", 9, 9, 9)]
    times = {name: LayerTime(forward_ms=0.02, backward_ms=0.05) for name in ("conv", "norm", "view")}
    placed = place_layers(layers, times, peaks)
    assert list(placed) == ["conv", "norm"]
    assert placed["conv"].bound == "compute"
    assert (placed["conv"].gflops, placed["conv"].intensity, placed["conv"].share) == pytest.approx((50, 20, 0.5))
    assert placed["norm"].bound == "memory"
    assert (placed["norm"].gflops, placed["norm"].intensity, placed["norm"].share) == pytest.approx((0.5, 0.5, 0.1))
    assert place_layers(layers, times, peaks, backward=True)["conv"].gflops == pytest.approx(40)
