"""Whatever the module is: everything that is asked of it works, it comes back bit-equal, and the page fits its width."""

import copy
import random
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cifarlab.models import MODELS, create_model
from cifarlab.profile import profile, whole
from cifarlab.profile.compare import compare_counters
from cifarlab.profile.latency import LayerTime
from cifarlab.profile.roofline import Peaks, place_layers


class Twice(nn.Module):
    """One convolution called twice, and a second name for it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.alias, self.norm, self.drop = self.conv, nn.BatchNorm2d(3), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.norm(self.alias(self.conv(x)))) + x  # type: ignore[no-any-return]


class Real(Twice):
    """Meta tensors cannot run it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * float(x.detach().numpy().std() > 0)


class FromList(Twice):
    def forward(self, images: list[Tensor]) -> Tensor:  # type: ignore[override]
        return super().forward(images[0])


class FromDict(Twice):
    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:  # type: ignore[override]
        return {"map": super().forward(batch["image"]) * batch["scale"]}


def frozen() -> nn.Module:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3))
    net[0].requires_grad_(False)
    net[1].eval()
    return net


def compiled() -> nn.Module:
    return torch.compile(Twice(), backend="eager")  # type: ignore[return-value]


def partly_compiled() -> nn.Module:
    return nn.Sequential(torch.compile(Twice(), backend="eager"), nn.Conv2d(3, 2, 1))


IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
INPUTS: dict[str, Any] = {"FromList": [IMAGE], "FromDict": ({"image": IMAGE, "scale": torch.ones(1)},)}


def state_of(net: nn.Module) -> tuple[Any, ...]:
    """All that must stay: keys, values, hooks, flags, attributes and the generators."""
    hooks = [(list(m._forward_hooks), list(m._forward_pre_hooks), list(m._backward_hooks)) for m in net.modules()]
    flags = [(m.training, sorted(vars(m))) for m in net.modules()]
    gradients = [(name, w.requires_grad, None if w.grad is None else w.grad.tolist()) for name, w in net.named_parameters()]
    values = [(key, value.dtype, value.device, value.tolist()) for key, value in net.state_dict().items()]
    generators = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    return hooks, flags, gradients, values, generators


@pytest.mark.parametrize("build", [Twice, Real, FromList, FromDict, frozen, compiled, partly_compiled], ids=lambda f: f.__name__)
def test_everything_works_and_the_module_comes_back_bit_equal(build: Callable[[], nn.Module]) -> None:
    net = build()
    seen: list[int] = []
    next(m for m in net.modules() if isinstance(m, nn.Conv2d)).register_forward_hook(lambda *_: seen.append(1))
    inputs = INPUTS.get(build.__name__, IMAGE)
    with torch.no_grad():
        net(*inputs) if isinstance(inputs, tuple) else net(inputs)  # a compiled one is compiled now, and keeps what that adds
    seen.clear()
    before = copy.deepcopy(state_of(net))
    found = profile(net, inputs=inputs, timed=True, effective=True)
    str(found)
    assert state_of(net) == before
    if build.__name__ not in INPUTS:
        rows = compare_counters(net, (3, 8, 8))
        assert 2 * rows[0].value * len(IMAGE) == found.forward_flops
        assert state_of(net) == before
    assert not seen
    assert found.forward_macs > 0
    assert found.times
    assert found.roofs
    assert found.backward_roofs
    assert found.fields
    assert found.effective is not None
    if build is not frozen:
        twice = next(layer for layer in found.layers if layer.calls == 2)
        assert twice.forward_macs == 2 * 2 * 64 * 81
        assert found.fields[twice.name].size == (5, 5)


def test_printing_leaves_the_generators_alone_the_first_time_too() -> None:
    script = (
        "import random\nfrom torch import nn\nfrom cifarlab.profile import compare_counters, count\n"
        "from cifarlab.profile.compare import format_comparison\nnet = nn.Linear(3, 3)\nstate = random.getstate()\n"
        "str(count(net, (3,)))\nformat_comparison(compare_counters(net, (3,)))\nassert random.getstate() == state"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


@pytest.mark.parametrize("name", MODELS)
def test_the_timed_page_of_every_model_fits_100_columns(name: str) -> None:
    net = create_model(name)
    found = profile(net, (3, 32, 32), batch_size=2)
    peaks = Peaks(gflops=123.456, gbytes_per_second=23.4567)
    for milliseconds in (0.00123456, 12.3456, 123_456.0):
        times = {layer.name: LayerTime(forward_ms=milliseconds, backward_ms=2 * milliseconds) for layer in found.layers}
        roofs = [place_layers(found.layers, times, peaks, backward=backward) for backward in (False, True)]
        timed = whole.Survey(**(vars(found) | {"times": times, "whole": times[found.layers[0].name], "peaks": peaks,
                                               "roofs": roofs[0], "backward_roofs": roofs[1]}))  # fmt: skip
        told = timed.format(title=name).splitlines()
        assert max(map(len, told)) <= 100
