"""Moments of many tensors at once, without a pass per statistic, a kernel per tensor or a wait for the device.

Three ways to the same numbers:

- float32 on a CPU: `moments.c`, one pass over memory for all six, on torch's own threads.
- float32 on a GPU with Triton: `moments_triton.py`, the same passes in two launches each. The result stays on the device.
- everything else: `moments_torch.py`, the tensors side by side in one buffer, and each moment one reduction over its rows.
"""

import ctypes
import importlib.util
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from operator import attrgetter, is_
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cifarlab.probes.gpu_passes import PLAIN, are_plain, gpu_passes
from cifarlab.probes.moments_torch import NON_FINITE, NUM_BINS, SQUARE_SUM, SUM, Rows, count_exponents, dense

if TYPE_CHECKING:
    from cifarlab.probes.moments_triton import Passes

BLOCK = 2**16  # entries that a thread takes at a time; the sums of the blocks are added in their order, whoever made them
SMALL = 1024  # entries of a tensor that is looked at whole: all biases and norms of a network are a few kB
FOR_THREADS = 2**18  # entries in all, below which one thread is done before another is awake
T = TypeVar("T")
_FORM = attrgetter("shape", "dtype", "device", "__class__")


class Moments:
    """Measures tensors like the ones given: the same number, shapes, device and types each time; `fits` tells whether they are.

    The compiled passes, and those on a GPU, are handed bare addresses. So of each gradient is seen, in each call, that it has as
    many entries as its weight and lies in the same memory, else it is taken for none (one that is older than a weight which was
    replaced); and of the weights whoever calls sees to it, by `fits`. All of this is done once a step, when forward and backward
    have emptied the processor's caches and every line of Python costs ten times what it does in a loop (20 to 80 µs): hence what
    is kept from call to call.
    Results are (tensors, 6) of float64 (float32 where the device has no other): COLUMNS. They lie on the tensors' device; on a
    CPU they are ready when a method returns. By the compiled passes the three sums are those of strips of 256 entries in float32,
    right to 1e-6 of a strip's sum of sizes, or of squares (5e-6 where the compiler makes no SIMD of it); of strips whose entries
    are nearly all alike, or too large or small to be squared in float32, in float64. So a variance is right to 1e-5 (5e-5).
    By the passes on a GPU the same holds of strips of 4,096 entries.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.num_tensors = len(tensors)
        self._sizes = [t.numel() for t in tensors]
        self.numels = np.array(self._sizes, np.int64)
        self._forms = list(map(_FORM, tensors))
        self._gradient_forms = [(shape, dtype, device, Tensor) for shape, dtype, device, _ in self._forms]
        self._strides = [t.stride() if dense(t) is t else None for t in tensors]
        self.device = tensors[0].device if tensors else torch.device("cpu")
        self._dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
        is_plain = are_plain(tensors, self.device)
        self.is_compiled = is_plain and self.device.type == "cpu" and _library() is not None
        self._kernels = gpu_passes(self.device) if is_plain and tensors and not self.is_compiled else None
        self._by_address = self.is_compiled or self._kernels is not None
        self._passes: Passes | None = None
        blocks = [(k, start, min(BLOCK, size - start)) for k, size in enumerate(self._sizes) for start in range(0, size, BLOCK)]
        self._blocks = np.array(blocks, np.int64).reshape(-1, 3)
        self._room = np.empty((2, len(blocks), 6))
        self._blocks_at, self._room_at, self._numels_at = map(_address, (self._blocks, self._room, self.numels))
        self._is_large = sum(self._sizes) >= FOR_THREADS
        self._place: tuple[list[int], list[tuple[int, ...]]] | None = None  # addresses and strides of weights that C reads there
        self._laid_weights: list[Tensor] = []  # that lie there
        self._weights: tuple[Sequence[Tensor], Any] = (), None  # the same, and their addresses as C takes them
        self._old: tuple[Sequence[Tensor], Any] = (), None  # the copies that `of_weights` was given last, and their addresses
        self._last: Tensor | None = None  # that `of` returned
        self._last_is_finite = False
        self._rows: Rows | None = None

    @property
    def way(self) -> str:
        """What measures: C, Triton or torch."""
        return "C" if self.is_compiled else "Triton" if self._kernels else "torch"

    def fits(self, tensors: Sequence[Tensor]) -> bool:
        """Whether weights still have the shapes, types and devices of those given: `model.to(…)` and pruning change them."""
        return list(map(_FORM, tensors)) == self._forms

    def of(self, tensors: Sequence[Tensor | None], copying: tuple[Sequence[Tensor], Sequence[Tensor]] | None = None) -> Tensor:
        """Each tensor's moments; of None (a parameter without a gradient) NaN.

        copying: (weights, old), of which the same holds as in `of_weights`; in the same pass `old` becomes the weights.
        """
        if self._kernels:
            laid_out, known = copying and (self._laid_out(copying[0]), copying[1]), self._laid(tensors)
            if (found := self._try(lambda passes: passes.gradient_moments(known, laid_out))) is not None:
                return found
        if not self.is_compiled:
            laid: Sequence[Tensor | None] = [None if t is None else dense(t) for t in self._known(tensors)]
            result = self._in_rows.moments(laid)
            if copying:
                self.copy(*copying)
        else:
            laid = self._laid(tensors)
            copied = (self._weights_at(copying[0]), self._old_at(copying[1])) if copying else (None, None)
            result = torch.empty(self.num_tensors, 6, dtype=torch.float64)
            num_bad = _library().cifarlab_gradient_moments(*self._plan, self.num_tensors, _pointers(laid), *copied, self._room_at,
                                                           result.data_ptr())  # fmt: skip
            self._last, self._last_is_finite = result, num_bad == 0
        if laid is not tensors and (missing := [k for k, t in enumerate(laid) if t is None]):
            result[missing] = torch.nan
        return result

    def is_finite(self, measured: Tensor) -> bool:
        """Whether all entries were of the tensors whose moments `of` returned. On another device than a CPU this waits for it."""
        return self._last_is_finite if measured is self._last else not bool((measured[:, NON_FINITE] > 0).any())

    def of_weights(self, weights: Sequence[Tensor], old: Sequence[Tensor], *, keeps: bool) -> tuple[Tensor, Tensor]:
        """The moments of the weights, and those of weights − old.

        keeps: afterwards `old` holds the weights; else it is left alone. weights: such as `fits`, since the caller looked last;
        old: made by `copies`. The counts (zeros, non_finite) are those of the compiled pass: left 0.
        """
        if self._kernels:
            laid = self._laid_out(weights)
            if (both := self._try(lambda passes: passes.weight_moments(laid, old, keeps=keeps))) is not None:
                return both
        if not self.is_compiled:
            return self._in_rows.weight_moments([dense(w) for w in weights], old, keeps=keeps)
        out = torch.empty(2, self.num_tensors, 6, dtype=torch.float64)
        _library().cifarlab_weight_moments(*self._plan, self.num_tensors, self._weights_at(weights), self._old_at(old), keeps,
                                                 self._room_at, out.data_ptr())  # fmt: skip
        of_weights, of_updates = out.unbind()
        return of_weights, of_updates

    def copies(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """Room for the weights as they were, in the memory order that `of_weights` walks, and the weights in it."""
        return [dense(w.detach()).clone() for w in weights]

    def copy(self, weights: Sequence[Tensor], old: Sequence[Tensor]) -> None:
        """The weights as they are now into `old`, where nothing is measured in the same pass."""
        nothing: list[Tensor | None] = [None] * self.num_tensors
        if self.is_compiled or self._kernels:
            self.of(nothing, (weights, old))
        else:
            torch._foreach_copy_(list(old), [dense(w) for w in weights])

    def differ(self, weights: Sequence[Tensor], old: Sequence[Tensor], first: int = 0, every: int = 1) -> bool:
        """Whether a bit of the weights is another one than in `old`, as far as one looks. Only where `is_compiled`.

        Tensors of at most SMALL entries are looked at whole, of the others every `every`th strip of 256 entries (16 would cost
        as much, by the pages that are touched), from strip `first` (less than `every`) of them all.
        """
        x, y = self._weights_at(weights), self._old_at(old)
        return bool(_library().cifarlab_differ(x, y, self._numels_at, self.num_tensors, SMALL, first, every))

    def exponents(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """How many entries of each tensor have each of the 512 pairs of sign and exponent: int64 (tensors, 512).

        The index is the nine leading bits of the entry as float32: 0 and 256 are zeros (and denormals), 255 and 511 Inf or NaN,
        1 … 254 the positive ones by exponent + 127. There is no pass for a minimum and a maximum.
        """
        if self.is_compiled:
            kept = self._laid(tensors)
            out = np.empty((self.num_tensors, NUM_BINS), np.int64)
            _library().cifarlab_exponents(_pointers(kept), self._numels_at, self.num_tensors, _address(out))
            return torch.from_numpy(out)
        if self._kernels:
            laid = self._laid(tensors)
            if (found := self._try(lambda passes: passes.exponents(laid))) is not None:
                return found
        counts = torch.zeros(self.num_tensors, NUM_BINS, dtype=torch.int64, device=self.device)
        for k, tensor in enumerate(self._known(tensors)):
            if tensor is not None:
                counts[k] = count_exponents(tensor)
        return counts

    def _known(self, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        """With None in place of what is not of its weight's size, or does not lie in memory."""
        by_address, device = self._by_address, self.device
        return [
            t if t is not None and t.numel() == size and (not by_address or (t.device == device and type(t) in PLAIN)) else None
            for t, size in zip(tensors, self._sizes, strict=True)
        ]

    def _laid(self, tensors: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """As the compiled passes can read them, with None where that cannot be.

        Nearly all gradients are of their weights' form and lie as they do, which is told at once; then it is the same sequence.
        """
        with suppress(AttributeError, TypeError, RuntimeError):  # of None, of sparse ones
            if list(map(_FORM, tensors)) == self._gradient_forms and list(map(Tensor.stride, tensors)) == self._strides:  # type: ignore[arg-type]
                return tensors
        return [None if t is None else _plain(t) for t in self._known(tensors)]

    def _laid_out(self, weights: Sequence[Tensor]) -> Sequence[Tensor]:
        """The weights, with a copy in place of what does not fill its memory. What is given is the same object, if they are."""
        place = list(map(Tensor.data_ptr, weights)), list(map(Tensor.stride, weights))
        if place != self._place:
            self._laid_weights = [_plain(w) for w in weights]
            self._place = place if all(map(is_, self._laid_weights, weights)) else None  # copies are for one call
        return self._laid_weights

    def _weights_at(self, weights: Sequence[Tensor]) -> Any:
        laid = self._laid_out(weights)
        if laid is not self._weights[0]:
            self._weights = laid, _pointers(laid)
        return self._weights[1]

    def _old_at(self, old: Sequence[Tensor]) -> Any:
        if old is not self._old[0]:
            self._old = old, _pointers(old)
        return self._old[1]

    @property
    def _plan(self) -> tuple[Any, int, int, int]:
        """How many threads go over which blocks: what the compiled passes begin with."""
        launch = _launcher() if self._is_large else None
        return launch, torch.get_num_threads() if launch else 1, self._blocks_at, len(self._blocks)

    def _try(self, measure: "Callable[[Passes], T]") -> T | None:
        """What the passes for a GPU measure; None, and from then on, where they fail and torch's operations must."""
        assert self._kernels
        try:
            self._passes = self._passes or self._kernels(self.numels, self.device)
            return measure(self._passes)
        except Exception as error:
            self._kernels = self._passes = None
            why = f"{type(error).__name__}: {error}"
            print(f"cifarlab: probes measure by torch's operations from here on ({why})", file=sys.stderr)
            return None

    @property
    def _in_rows(self) -> Rows:
        if self._rows is None:
            self._rows = Rows(self.numels, self.device, self._dtype)
        return self._rows


def mean_and_std(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Of all entries, 0-d each, the second without Bessel's correction. On a CPU by the compiled pass, 1/25 of torch's time."""
    meter = Moments([tensor]) if tensor.device.type == "cpu" else None
    if meter is None or not meter.is_compiled:
        std, mean = torch.std_mean(tensor, correction=0)
        return mean, std
    sums = meter.of([tensor])[0] / tensor.numel()
    return sums[SUM].float(), (sums[SQUARE_SUM] - sums[SUM] ** 2).clamp(min=0).sqrt().float()


def _plain(tensor: Tensor) -> Tensor:
    tensor = dense(tensor)
    return tensor if tensor.dtype == torch.float32 else tensor.float()


def _pointers(tensors: Sequence[Tensor | None]) -> Any:
    """Their addresses as C takes them; the tensors must live until they are read."""
    return (ctypes.c_void_p * len(tensors))(*[None if t is None else t.data_ptr() for t in tensors])


def _address(array: NDArray[Any]) -> int:
    return int(array.ctypes.data)


@cache
def _library() -> Any:
    """The compiled moments.c, or None where it was not built: no compiler when cifarlab was installed."""
    found = importlib.util.find_spec("cifarlab.probes._moments")
    if found is None or not found.origin:
        return None
    address, count = ctypes.c_void_p, ctypes.c_int64
    plan = [address, count, address, count]
    try:
        library = ctypes.CDLL(found.origin)
        for name, types in {  # a new name for what takes other arguments, so that an older build is not called with them
            "gradient_moments": [*plan, count, address, address, address, address, address],
            "weight_moments": [*plan, count, address, address, count, address, address],
            "exponents": [address, address, count, address],
            "differ": [address, address, address, count, count, count, count],
        }.items():
            function = getattr(library, f"cifarlab_{name}")
            function.argtypes, function.restype = types, None
        library.cifarlab_differ.restype = library.cifarlab_gradient_moments.restype = count
    except (OSError, AttributeError):  # built for another machine, or from another version of moments.c
        return None
    return library


@cache
def _launcher() -> Any:
    """Address of the GOMP_parallel of torch's own OpenMP, or None: of a torch that is built with another kind of threads."""
    with suppress(OSError, AttributeError):
        return ctypes.cast(ctypes.CDLL(torch._C.__file__).GOMP_parallel, ctypes.c_void_p)
    return None
