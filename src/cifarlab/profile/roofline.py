"""What this machine can do at most, and how near each layer comes to it.

Source: Williams, Waterman and Patterson, "Roofline", CACM 52 (2009). Ours differs: both roofs are measured, not taken from a
data sheet, and bytes are those that a layer's operations must read and write, without any reuse in caches between operations.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from cifarlab.profile.counting import LayerCost, random_states_kept
from cifarlab.profile.latency import LayerTime, wait_for

# (m, k, n) of the products tried for the peak
SIDES = ((256, 256, 256), (384, 384, 384), (512, 512, 512), (1024, 1024, 1024), (2048, 2048, 2048), (256, 2304, 256),
         (1024, 576, 64), (64, 576, 1024), (128, 1152, 256))  # fmt: skip
GPU_SIDES = ((2048, 2048, 2048), (4096, 4096, 4096), (8192, 8192, 8192), (16384, 4608, 512))


@dataclass(frozen=True, kw_only=True)
class Peaks:
    """The two roofs: 10⁹ FLOP/s in matrix products (a multiply-add is two), 10⁹ bytes/s; of the device, with torch's threads."""

    gflops: float
    gbytes_per_second: float

    @property
    def ridge(self) -> float:
        """FLOP/byte from which on arithmetic, not memory, is what limits."""
        return self.gflops / self.gbytes_per_second

    def attainable(self, intensity: float) -> float:
        """min(peak, intensity · bandwidth) in GFLOP/s: the most that FLOP/byte allows."""
        return min(self.gflops, intensity * self.gbytes_per_second)


@dataclass(frozen=True, kw_only=True)
class LayerRoof:
    """Where a layer lies under the roof.

    flop: of the pass, 2·MAC and the other operations; gflops: achieved, 10⁹ FLOP/s; intensity: FLOP per byte read or written;
    bound: which roof is over it, by the ridge point; share: achieved of attainable. A share above 1 says of a layer bound by
    memory that it found its data in a cache; of one bound by compute that its kernel beats the library's matrix product, as
    convolutions may, or that the machine was busy while the peak was measured. A low one says that neither roof limits it,
    but calls, small sizes or a slow kernel.
    """

    flop: int
    gflops: float
    intensity: float
    bound: Literal["compute", "memory"]
    share: float


def measure_peaks(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, *, seconds: float = 2.0) -> Peaks:
    """This machine's own peaks: the fastest of its matrix products, and the fastest copy or triad a + s·b.

    The best of all tries, for about `seconds` and the set-up, since whatever else runs here only slows. Products are square and,
    as convolutions make them, oblong; they take turns, so that a busy moment meets all. Small ones are often the fastest: on
    a shared AMD core 256³ and 384³ reached 100 GFLOP/s, 2048³ 84 (33 while its neighbour was busy). On a GPU a 1×1 convolution,
    which is a matrix product, is tried too: it uses TF32 by torch's defaults where `mm` does not, as a net's convolutions do.
    Bytes count as in the STREAM benchmark (what is read and what is written, not the reading that a write may cause), on
    arrays of 64 MiB, on a GPU 256 MiB, beyond any cache. Needs 300 MiB meanwhile, on a GPU 2 GiB; the random states stay as
    they are.
    """
    device = torch.device(device)
    with torch.no_grad(), random_states_kept(device):
        products = [_product(*sides, device, dtype) for sides in (SIDES if device.type == "cpu" else GPU_SIDES)]
        if device.type != "cpu":
            products.append(_pointwise(device, dtype))
        gflops = _best_rate(products, device, 0.75 * seconds) / 1e9
        del products  # they are as large as what follows
        return Peaks(gflops=gflops, gbytes_per_second=_memory_rate(device, 0.25 * seconds) / 1e9)


def place_layers(
    layers: Iterable[LayerCost], times: Mapping[str, LayerTime], peaks: Peaks, *, backward: bool = False
) -> dict[str, LayerRoof]:
    """Every layer that was timed and does arithmetic, under the roof: name -> LayerRoof; of the backward pass if asked for.

    layers: of a `Profile`; times: of `measure_layers` on inputs of the same batch size and type.
    """
    placed: dict[str, LayerRoof] = {}
    for layer in layers:
        flop = 2 * layer.backward_macs + layer.backward_other if backward else 2 * layer.forward_macs + layer.forward_other
        num_bytes = layer.backward_bytes if backward else layer.bytes_read + layer.bytes_written
        measured = times.get(layer.name)
        milliseconds = (measured.backward_ms if backward else measured.forward_ms) if measured else 0.0
        if flop and num_bytes and milliseconds > 0:
            gflops, intensity = flop / milliseconds / 1e6, flop / num_bytes
            placed[layer.name] = LayerRoof(
                flop=flop, gflops=gflops, intensity=intensity, bound="compute" if intensity >= peaks.ridge else "memory",
                share=gflops / peaks.attainable(intensity),
            )  # fmt: skip
    return placed


def beaten_peak(roofs: Mapping[str, LayerRoof], peaks: Peaks) -> str:
    """A sentence naming the layers that were faster than the machine's peak in matrix products, fastest first, or ""."""
    faster = sorted((name for name, roof in roofs.items() if roof.gflops > peaks.gflops), key=lambda name: -roofs[name].gflops)
    if not faster:
        return ""
    told = ", ".join(name or "the net itself" for name in faster[:3]) + (f" and {len(faster) - 3} more" if faster[3:] else "")
    return (f"faster than {peaks.gflops:,.0f} GFLOP/s in matrix products: {told} (up to {roofs[faster[0]].gflops:,.0f}); their "
            "kernels beat the library's product, or the machine was busy while the peak was measured")  # fmt: skip


Product = tuple[int, Callable[[], object]]
"""FLOP of a product, and what does it."""


def _product(m: int, k: int, n: int, device: torch.device, dtype: torch.dtype) -> Product:
    a, b, out = (torch.full(shape, 0.5, device=device, dtype=dtype) for shape in ((m, k), (k, n), (m, n)))
    return 2 * m * k * n, lambda: torch.mm(a, b, out=out)


def _pointwise(device: torch.device, dtype: torch.dtype) -> Product:
    images, weight = (torch.full(shape, 0.5, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
                      for shape in ((64, 2048, 16, 16), (2048, 2048, 1, 1)))  # fmt: skip
    return 2 * images.numel() * 2048, lambda: torch.nn.functional.conv2d(images, weight)


def _best_rate(products: list[Product], device: torch.device, seconds: float) -> float:
    """FLOP/s of the fastest; each has its turn when it has had the least time."""
    best, spent, end = 0.0, [0.0] * len(products), time.perf_counter() + seconds
    while not all(spent) or time.perf_counter() < end:
        turn = spent.index(min(spent))
        flop, run = products[turn]
        begun = time.perf_counter()
        best = max(best, flop / _fastest(run, device, seconds / 50))
        spent[turn] += max(time.perf_counter() - begun, 1e-9)
    return best


def _memory_rate(device: torch.device, seconds: float) -> float:
    num_bytes = 2**26 if device.type == "cpu" else 2**28  # an H100's cache has 50 MiB
    a, b, out = (torch.full((num_bytes // 4,), 0.5, device=device) for _ in range(3))  # float32: a CPU copies bfloat16 slower
    copied = 2 * num_bytes / _fastest(lambda: out.copy_(a), device, seconds / 2)
    return max(copied, 3 * num_bytes / _fastest(lambda: torch.add(a, b, alpha=2, out=out), device, seconds / 2))


def _fastest(run: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Seconds of the quickest of many runs, at least one. A GPU is given several at a time, so that its start does not count."""
    runs = 1 if device.type == "cpu" else 10
    best, end = float("inf"), time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < end:
        begun = time.perf_counter()
        for _ in range(runs):
            run()
        wait_for(device)
        best = min(best, (time.perf_counter() - begun) / runs)
    return best
