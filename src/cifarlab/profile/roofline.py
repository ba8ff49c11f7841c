"""What this machine can do at most, and how near each layer comes to it.

Source: Williams, Waterman and Patterson, "Roofline", CACM 52 (2009). Ours differs: both roofs are measured, not taken from a
data sheet, and bytes are those that a layer's operations must read and write, without any reuse in caches between operations.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from cifarlab.profile.latency import LayerTime, wait_for

if TYPE_CHECKING:
    from cifarlab.profile.counting import LayerCost


@dataclass(frozen=True, kw_only=True)
class Peaks:
    """The two roofs: 10⁹ FLOP/s (a multiply-add is two) and 10⁹ bytes/s, of the device with the threads torch has now."""

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
    bound: which roof is over it, by the ridge point; share: achieved of attainable. A share above 1 says that the layer found
    its data in a cache; a low one that neither roof limits it, but calls, small sizes or a slow kernel.
    """

    flop: int
    gflops: float
    intensity: float
    bound: Literal["compute", "memory"]
    share: float


def measure_peaks(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, *, seconds: float = 1.0) -> Peaks:
    """This machine's own peaks: the fastest square matrix product or 3×3 convolution, and the fastest copy or triad a + s·b.

    The best of all tries, for about `seconds` and the set-up, since whatever else runs here only slows. Bytes count as in the
    STREAM benchmark (what is read and what is written, not the reading that a write may cause), on arrays of 64 MiB, beyond
    any cache. The convolution is there because it can be the faster of the two: its kernels come from another library than
    the product's (105 to 85 GFLOP/s on an AMD core), and on a GPU it uses TF32 by torch's defaults where a product does not.
    Needs 200 MiB meanwhile; the random state stays as it is.
    """
    device = torch.device(device)
    with torch.no_grad():
        sizes = (512, 1024, 2048) if device.type == "cpu" else (2048, 4096, 8192)
        gflops = max(_matmul_rate(n, device, dtype, seconds / 8) for n in sizes)
        gflops = max(gflops, _convolution_rate(device, dtype, seconds / 8))
        return Peaks(gflops=gflops / 1e9, gbytes_per_second=_memory_rate(device, seconds / 2) / 1e9)


def place_layers(
    layers: Iterable["LayerCost"], times: Mapping[str, LayerTime], peaks: Peaks, *, backward: bool = False
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


def _matmul_rate(n: int, device: torch.device, dtype: torch.dtype, seconds: float) -> float:
    a, b, out = (torch.full((n, n), 0.5, device=device, dtype=dtype) for _ in range(3))
    return 2 * n**3 / _fastest(lambda: torch.mm(a, b, out=out), device, seconds)


def _convolution_rate(device: torch.device, dtype: torch.dtype, seconds: float) -> float:
    n, c = (8, 256) if device.type == "cpu" else (256, 512)
    images, weight = (torch.full(shape, 0.5, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
                      for shape in ((n, c, 16, 16), (c, c, 3, 3)))  # fmt: skip
    flop = 2 * images.numel() * c * 9
    return flop / _fastest(lambda: torch.nn.functional.conv2d(images, weight, padding=1), device, seconds)


def _memory_rate(device: torch.device, seconds: float) -> float:
    num_bytes = 2**26
    a, b, out = (torch.full((num_bytes // 4,), 0.5, device=device) for _ in range(3))  # float32: a CPU copies bfloat16 slower
    copied = 2 * num_bytes / _fastest(lambda: out.copy_(a), device, seconds / 2)
    return max(copied, 3 * num_bytes / _fastest(lambda: torch.add(a, b, alpha=2, out=out), device, seconds / 2))


def _fastest(run: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Seconds of the quickest of many runs. A GPU is given several at a time, so that its start does not count."""
    runs = 1 if device.type == "cpu" else 10
    run()
    wait_for(device)
    best, end, tries = float("inf"), time.perf_counter() + seconds, 0
    while tries < 2 or time.perf_counter() < end:
        begun = time.perf_counter()
        for _ in range(runs):
            run()
        wait_for(device)
        best, tries = min(best, (time.perf_counter() - begun) / runs), tries + 1
    return best
