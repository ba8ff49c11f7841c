"""Moments of many tensors at once, without a pass per statistic, a kernel per tensor or a wait for the device.

Two ways to the same numbers:

- float32 on a CPU: `moments.c`, one pass over memory for all six, on torch's own threads.
- everything else: the tensors side by side in one buffer, in rows of 1,024, and each moment one reduction over its rows. The
  number of kernels does not depend on the number of tensors, and the result stays on the device.
"""

import ctypes
import importlib.util
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

COLUMNS = ("sum", "abs_sum", "square_sum", "abs_max", "zeros", "non_finite")
SUM, ABS_SUM, SQUARE_SUM, ABS_MAX, ZEROS, NON_FINITE = range(6)
ROW = 1024  # entries to a row of the buffer: long enough for a reduction to be fast, short enough to waste little
NUM_BINS = 512  # float32's sign and exponent
BLOCK = 2**16  # entries that a thread takes at a time; the sums of the blocks are added in their order, whoever made them
SMALL = 1024  # entries of a tensor that is looked at whole: all biases and norms of a network are a few kB
FOR_THREADS = 2**18  # entries in all, below which one thread is done before another is awake
_PLAIN = frozenset({Tensor, nn.Parameter})
_FORM = attrgetter("shape", "dtype", "device")


class Moments:
    """Measures tensors like the ones given: the same number, shapes, device and types each time; `fits` tells whether they are.

    The compiled pass is handed bare addresses. So of each gradient is seen, in each call, that it has as many entries as its
    weight and lies in memory, else it is taken for none (one that is older than a weight which was replaced): 25 µs for 62
    tensors; and of the weights whoever calls sees to it, by `fits`: 20 µs.
    Results are (tensors, 6) of float64 (float32 where the device has no other): COLUMNS. They lie on the tensors' device; on a
    CPU they are ready when a method returns.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.num_tensors = len(tensors)
        self._sizes = [t.numel() for t in tensors]
        self.numels = np.array(self._sizes, np.int64)
        self._forms = list(map(_FORM, tensors))
        self._strides = [t.stride() if dense(t) is t else None for t in tensors]
        self.device = tensors[0].device if tensors else torch.device("cpu")
        self._dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
        # Of a subclass, such as a shard of a larger tensor, nobody knows what lies at its address.
        is_plain = all(t.device.type == "cpu" and t.dtype == torch.float32 and type(t) in _PLAIN for t in tensors)
        self.is_compiled = is_plain and _library() is not None
        blocks = [(k, start, min(BLOCK, size - start)) for k, size in enumerate(self._sizes) for start in range(0, size, BLOCK)]
        self._blocks = np.array(blocks, np.int64).reshape(-1, 3)
        self._is_large = sum(self._sizes) >= FOR_THREADS
        self._room = np.empty((2, len(blocks), 6))
        self._rows: _Rows | None = None

    def fits(self, tensors: Sequence[Tensor]) -> bool:
        """Whether weights still have the shapes, types and devices of those given: `model.to(…)` and pruning change them."""
        return list(map(_FORM, tensors)) == self._forms

    def has_sizes(self, tensors: Sequence[Tensor]) -> bool:
        """Whether they have as many entries: what a quick look tells, 5 µs for 62 tensors."""
        return list(map(Tensor.numel, tensors)) == self._sizes

    def of(self, tensors: Sequence[Tensor | None], copying: tuple[Sequence[Tensor], Sequence[Tensor]] | None = None) -> Tensor:
        """Each tensor's moments; of None (a parameter without a gradient) NaN.

        copying: (weights, old), of which the same holds as in `of_weights`; in the same pass `old` becomes the weights.
        """
        tensors = self._known(tensors)
        if not self.is_compiled:
            result = self._in_rows.moments([None if t is None else dense(t) for t in tensors])
            if copying:
                self.copy(*copying)
        else:
            out = np.empty((self.num_tensors, 6))
            kept = self._laid(tensors), self._laid(copying[0]) if copying else (), copying[1] if copying else ()
            x, weights, old = map(_pointers, kept)  # of tensors that must live until they are read
            copied = (weights, old) if copying else (None, None)
            _library().cifarlab_moments_and_copy(*self._plan, self.num_tensors, x, *copied, _address(self._room), _address(out))
            result = torch.from_numpy(out)
        missing = [k for k, t in enumerate(tensors) if t is None]
        if missing:
            result[missing] = torch.nan
        return result

    def of_weights(self, weights: Sequence[Tensor], old: Sequence[Tensor], *, keeps: bool) -> tuple[Tensor, Tensor]:
        """The moments of the weights, and those of weights − old.

        keeps: afterwards `old` holds the weights; else it is left alone. weights: such as `fits`, since the caller looked last;
        old: made by `copies`. The counts (zeros, non_finite) are those of the compiled pass: left 0.
        """
        if not self.is_compiled:
            return self._in_rows.weight_moments([dense(w) for w in weights], old, keeps=keeps)
        out = np.empty((2, self.num_tensors, 6))
        kept = self._laid(weights)
        _library().cifarlab_block_update_moments(*self._plan, self.num_tensors, _pointers(kept), _pointers(old), keeps,
                                                 _address(self._room), _address(out[0]), _address(out[1]))  # fmt: skip
        return torch.from_numpy(out[0]), torch.from_numpy(out[1])

    def copies(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """Room for the weights as they were, in the memory order that `of_weights` walks, and the weights in it."""
        return [dense(w.detach()).clone() for w in weights]

    def copy(self, weights: Sequence[Tensor], old: Sequence[Tensor]) -> None:
        """The weights as they are now into `old`, where nothing is measured in the same pass."""
        if self.is_compiled:
            self.of([None] * self.num_tensors, (weights, old))
        else:
            torch._foreach_copy_(list(old), [dense(w) for w in weights])

    def differ(self, weights: Sequence[Tensor], old: Sequence[Tensor], first: int = 0, every: int = 1) -> bool:
        """Whether a bit of the weights is another one than in `old`, as far as one looks. Only where `is_compiled`.

        Tensors of at most SMALL entries are looked at whole, of the others every `every`th strip of 256 entries (16 would cost
        as much, by the pages that are touched), from strip `first` (less than `every`) of them all.
        """
        kept = self._laid(weights)  # of tensors that must live until they are read
        x, y, sizes = _pointers(kept), _pointers(old), _address(self.numels)
        return bool(_library().cifarlab_differ(x, y, sizes, self.num_tensors, SMALL, first, every))

    def exponents(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """How many entries of each tensor have each of the 512 pairs of sign and exponent: int64 (tensors, 512).

        The index is the nine leading bits of the entry as float32: 0 and 256 are zeros (and denormals), 255 and 511 Inf or NaN,
        1 … 254 the positive ones by exponent + 127. There is no pass for a minimum and a maximum.
        """
        tensors = self._known(tensors)
        if self.is_compiled:
            kept = [None if t is None else _plain(t) for t in tensors]
            out = np.empty((self.num_tensors, NUM_BINS), np.int64)
            _library().cifarlab_exponents(_pointers(kept), _address(self.numels), self.num_tensors, _address(out))
            return torch.from_numpy(out)
        counts = torch.zeros(self.num_tensors, NUM_BINS, dtype=torch.int64, device=self.device)
        for k, tensor in enumerate(tensors):
            if tensor is not None:
                leading = (dense(tensor).float().reshape(-1).view(torch.int32) >> 23) & (NUM_BINS - 1)
                counts[k] = torch.bincount(leading, minlength=NUM_BINS)
        return counts

    def _known(self, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        with suppress(AttributeError):  # of None
            if list(map(_FORM, tensors)) == self._forms and (not self.is_compiled or _PLAIN.issuperset(map(type, tensors))):
                return list(tensors)
        if not self.is_compiled:
            return [t if t is None or t.numel() == size else None for t, size in zip(tensors, self._sizes, strict=True)]
        return [t if t is None or (t.numel() == size and t.is_cpu and type(t) in _PLAIN) else None
                for t, size in zip(tensors, self._sizes, strict=True)]  # fmt: skip

    def _laid(self, tensors: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """As the compiled passes can read them. Nearly always they lie as the weights did, which is told at once."""
        with suppress(TypeError, AttributeError, RuntimeError):  # of None, of sparse ones
            if list(map(Tensor.stride, tensors)) == self._strides and list(map(_FORM, tensors)) == self._forms:  # type: ignore[arg-type]
                return tensors
        return [None if t is None else _plain(t) for t in tensors]

    @property
    def _plan(self) -> tuple[Any, int, ctypes.c_void_p, int]:
        """How many threads go over which blocks: what the compiled passes begin with."""
        launch = _launcher() if self._is_large else None
        return launch, torch.get_num_threads() if launch else 1, _address(self._blocks), len(self._blocks)

    @property
    def _in_rows(self) -> "_Rows":
        if self._rows is None:
            self._rows = _Rows(self.numels, self.device, self._dtype)
        return self._rows


class _Rows:
    """The way in torch operations: one buffer, float32 (float64 if a tensor is), each tensor padded with zeros to whole rows."""

    def __init__(self, numels: NDArray[np.int64], device: torch.device, dtype: torch.dtype) -> None:
        rows = -(-numels // ROW)
        self._buffer = torch.zeros(int(rows.sum()), ROW, device=device, dtype=dtype)
        starts = np.concatenate([[0], np.cumsum(rows)[:-1]]) * ROW
        flat = self._buffer.view(-1)
        self._parts = [flat[start : start + n] for start, n in zip(starts.tolist(), numels.tolist(), strict=True)]
        self._lengths = torch.from_numpy(rows).to(device)
        self._accumulate = torch.float32 if device.type == "mps" else torch.float64
        self._padding = torch.from_numpy((rows * ROW - numels).astype(np.float64)).to(device, self._accumulate)

    @torch.no_grad()
    def moments(self, tensors: Sequence[Tensor | None]) -> Tensor:
        parts = [part.as_strided(t.shape, t.stride(), part.storage_offset()) for part, t in self._there(tensors)]
        torch._foreach_copy_(parts, [t for t in tensors if t is not None])
        return self._reduce()

    @torch.no_grad()
    def weight_moments(self, weights: Sequence[Tensor], old: Sequence[Tensor], *, keeps: bool) -> tuple[Tensor, Tensor]:
        parts = [part.as_strided(t.shape, t.stride(), part.storage_offset()) for part, t in self._there(weights)]
        torch._foreach_copy_(parts, list(weights))
        of_weights = self._reduce()
        torch._foreach_sub_(parts, [o.to(self._buffer) for o in old])
        of_updates = self._reduce()
        if keeps:
            torch._foreach_copy_(list(old), list(weights))
        of_weights[:, [ZEROS, NON_FINITE]] = of_updates[:, [ZEROS, NON_FINITE]] = 0
        return of_weights, of_updates

    def _there(self, tensors: Sequence[Tensor | None]) -> list[tuple[Tensor, Tensor]]:
        return [(part, t) for part, t in zip(self._parts, tensors, strict=True) if t is not None]

    def _reduce(self) -> Tensor:
        x, kind = self._buffer, self._accumulate
        columns = [
            x.sum(1, dtype=kind), torch.linalg.vector_norm(x, 1, dim=1, dtype=kind),
            torch.linalg.vector_norm(x, 2, dim=1, dtype=kind).square(), (ROW - torch.count_nonzero(x, dim=1)).to(kind),
            (~torch.isfinite(x)).sum(1).to(kind),
        ]  # fmt: skip
        sums = torch.segment_reduce(torch.stack(columns, 1), "sum", lengths=self._lengths, axis=0, unsafe=True)
        top = torch.segment_reduce(torch.linalg.vector_norm(x, torch.inf, dim=1).to(kind), "max", lengths=self._lengths,
                                   axis=0, unsafe=True)  # fmt: skip
        return torch.stack([sums[:, 0], sums[:, 1], sums[:, 2], top, sums[:, 3] - self._padding, sums[:, 4]], 1)


def dense(tensor: Tensor) -> Tensor:
    """The tensor itself where its entries fill its memory without gaps, else a copy that does; a sparse one made dense."""
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    if tensor.is_contiguous() or (tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)):
        return tensor
    return tensor.contiguous()


def _plain(tensor: Tensor) -> Tensor:
    tensor = dense(tensor)
    return tensor if tensor.dtype == torch.float32 else tensor.float()


def _pointers(tensors: Sequence[Tensor | None]) -> Any:
    return (ctypes.c_void_p * len(tensors))(*[None if t is None else t.data_ptr() for t in tensors])


def _address(array: NDArray[Any]) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


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
            "moments_and_copy": [*plan, count, address, address, address, address, address],
            "block_update_moments": [*plan, count, address, address, count, address, address, address],
            "exponents": [address, address, count, address],
            "differ": [address, address, address, count, count, count, count],
        }.items():
            function = getattr(library, f"cifarlab_{name}")
            function.argtypes, function.restype = types, None
        library.cifarlab_differ.restype = count
    except (OSError, AttributeError):  # built for another machine, or from another version of moments.c
        return None
    return library


@cache
def _launcher() -> Any:
    """Address of the GOMP_parallel of torch's own OpenMP, or None: of a torch that is built with another kind of threads."""
    with suppress(OSError, AttributeError):
        return ctypes.cast(ctypes.CDLL(torch._C.__file__).GOMP_parallel, ctypes.c_void_p)
    return None
