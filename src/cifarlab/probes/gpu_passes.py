"""Whether a GPU runs the passes of moments_triton.py, and runs them right."""

import importlib.util
import sys
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cifarlab.probes.moments_torch import ABS_SUM, SQUARE_SUM, SUM, Rows, count_exponents

if TYPE_CHECKING:
    from cifarlab.probes.moments_triton import Passes

PLAIN = frozenset({Tensor, nn.Parameter})


def are_plain(tensors: Sequence[Tensor], device: torch.device) -> bool:
    """Whether at each one's address lie its entries, as float32 in that device's memory.

    Of a subclass, such as a shard of a larger tensor, nobody knows.
    """
    return all(t.device == device and t.dtype == torch.float32 and type(t) in PLAIN for t in tensors)


def made_current(device: torch.device) -> AbstractContextManager[Any]:
    """The context in which a GPU, of several, is the one that launches and streams are of."""
    is_other = device.type == "cuda" and device.index not in (None, torch.cuda.current_device())
    return torch.cuda.device(device) if is_other else nullcontext()


def is_capturing(device: torch.device) -> bool:
    """Whether what that device is told becomes a CUDA graph of somebody's, which holds the addresses of this one step."""
    with made_current(device):
        return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@cache
def gpu_passes(device: torch.device) -> "type[Passes] | None":
    """`Passes` where they run on that device and give the numbers of torch's operations, else None.

    That is tried here, each kernel as it is used, once in a process. Where Triton is there and they fail, it is said why.
    """
    try:
        if device.type != "cuda" or importlib.util.find_spec("triton") is None:
            return None
        if torch.cuda.get_device_capability(device) < (7, 0):  # which Triton does not know
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Triton's, of what its next version will do
            from triton.runtime import JITFunction

            from cifarlab.probes.moments_triton import Passes, add_blocks

            if not isinstance(add_blocks, JITFunction):  # but interpreted, by somebody's TRITON_INTERPRET: on a CPU's memory
                return None
            if agrees(Passes, device):
                return Passes
        why = "its numbers are others"
    except Exception as error:  # of a compiler, a driver or a launch: any kind
        why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    print(f"cifarlab: probes on {device} measure by torch's operations, more slowly than by Triton's ({why})", file=sys.stderr)
    return None


def agrees(passes: "type[Passes]", device: torch.device) -> bool:
    """Whether the passes give what torch's operations do: each kernel as it is used, of entries that take all of its branches."""
    from cifarlab.probes.moments_triton import BLOCK

    generator = torch.Generator("cpu").manual_seed(0)

    def draw(size: int) -> Tensor:
        return torch.randn(size, generator=generator, device="cpu", dtype=torch.float32)

    # Of one block and of several, of more than are added at a time; with squares out of range; nearly alike; and what is odd.
    now = [draw(5), 1e-30 * draw(4096), draw((passes.rows + 1) * BLOCK + 3), 1 + 1e-4 * draw(4097), draw(300), draw(8192)]
    was = [x + x.abs().max() * draw(x.numel()) for x in now]
    now[2][::7] = 0
    now[4][5:9] = torch.tensor([torch.inf, -torch.inf, 1e-40, -0.0], device="cpu")
    now[5][5000] = torch.nan
    now, was = ([x.to(device) for x in tensors] for tensors in (now, was))
    numels = np.array([x.numel() for x in now], np.int64)
    rows, fused = Rows(numels, device, torch.float32), passes(numels, device)

    expected = rows.weight_moments(now, was, keeps=False)
    kept, is_over = [x.clone() for x in was], torch.ones((), dtype=torch.bool, device=device)
    fused.copy_unless(is_over, now, kept)
    is_good = _are_same(kept, was)
    for keeps in (False, True):
        is_good &= all(map(_are_close, fused.weight_moments(now, kept, keeps=keeps), expected, (numels, numels)))
        is_good &= _are_same(kept, now if keeps else was)
    expected_now = rows.moments(now)
    for copying in (None, (was, kept)):
        is_good &= _are_close(fused.gradient_moments(now, copying), expected_now, numels)
    is_good &= _are_same(kept, was)
    is_good &= bool(fused.gradient_moments([None] * len(now), (now, kept)).isnan().all()) and _are_same(kept, now)
    fused.copy_unless(~is_over, was, kept)
    is_good &= _are_same(kept, was)
    counts = torch.stack([count_exponents(x) for x in now])
    is_good &= torch.equal(fused.exponents(now), counts)
    return is_good and torch.equal(fused.exponents([None, *now[1:]])[1:], counts[1:])


def _are_same(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Bit by bit: a NaN is itself."""
    return all(torch.equal(x.view(torch.int32), y.view(torch.int32)) for x, y in zip(some, others, strict=True))


def _are_close(measured: Tensor, expected: Tensor, numels: NDArray[np.int64]) -> bool:
    """Moments of the same tensors: every one as near as `Moments` says, and the variance that is made of two."""
    x, y = (moments.double().cpu().numpy() for moments in (measured, expected))

    def near(a: NDArray[np.float64], b: NDArray[np.float64], least: NDArray[np.float64] | float = 0.0) -> bool:
        return bool((np.isclose(a, b, rtol=1e-5, atol=0, equal_nan=True) | (np.abs(a - b) <= least)).all())

    def variance(moments: NDArray[np.float64]) -> NDArray[np.float64]:
        mean = moments[:, SUM] / numels
        return np.asarray(moments[:, SQUARE_SUM] / numels - mean**2)

    with np.errstate(invalid="ignore", over="ignore"):
        sums = near(x[:, SUM], y[:, SUM], 1e-6 * y[:, ABS_SUM])
        return sums and near(x[:, ABS_SUM:], y[:, ABS_SUM:]) and near(variance(x), variance(y))
