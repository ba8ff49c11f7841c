"""The passes of moments.c for GPUs, in Triton, which torch for CUDA brings along on Linux: few launches, one pass over memory.

Tensors are cut into blocks; a program sums one, and a second kernel adds up the blocks of a tensor in their order, so that the
result is the same each time. Addresses come in a table, hence the number of launches does not depend on that of the tensors.
Imported only where it is used. With TRITON_INTERPRET=1, set before triton is imported, all of it runs on a CPU, for tests.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from cifarlab.probes.gpu_passes import made_current
from cifarlab.probes.moments_torch import NUM_BINS

BLOCK = 4096  # entries to a program
WARPS = 8  # of a program: with four the pass over weights would take all registers that there are
TABLES = 8  # of addresses that are kept: those of weights, of their copies, and of some gradients

# What the kernels compare with are literals, as they may not read a module's variables: bits of 2**-50 and 2**50, of infinity.


@triton.jit
def _sum(x, live, has_counts: tl.constexpr):
    """Sum, sum of sizes and of squares in float64, the bits of the largest size, how many are 0 and not finite.

    In float32 where that is exact enough, by the same measure as in moments.c.
    """
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    sizes = bits.to(tl.float32, bitcast=True)
    top = tl.max(bits, 0)
    total, absolute, squares = tl.sum(x, 0), tl.sum(sizes, 0), tl.sum(x * x, 0)
    entries = tl.sum(live.to(tl.float32), 0)
    total64, absolute64, squares64 = total.to(tl.float64), absolute.to(tl.float64), squares.to(tl.float64)
    is_out = (top < 0x26800000) | (top > 0x58800000)
    is_alike = total * total > 0.75 * entries * squares
    if (top != 0) & (is_out | is_alike):
        exact = x.to(tl.float64)
        total64 = tl.sum(exact, 0)
        absolute64 = tl.sum(sizes.to(tl.float64), 0)
        squares64 = tl.sum(exact * exact, 0)
    zeros = tl.full((), 0, tl.int32)
    bad = tl.full((), 0, tl.int32)
    if has_counts:
        zeros = tl.sum(((bits == 0) & live).to(tl.int32), 0)
        bad = tl.sum((bits >= 0x7F800000).to(tl.int32), 0)
    return total64, absolute64, squares64, top, zeros, bad


@triton.jit
def _store(to, total, absolute, squares, top, zeros, bad):
    tl.store(to, total)
    tl.store(to + 1, absolute)
    tl.store(to + 2, squares)
    tl.store(to + 3, top.to(tl.float64))  # its bits, by which a NaN is the largest
    tl.store(to + 4, zeros.to(tl.float64))
    tl.store(to + 5, bad.to(tl.float64))


@triton.jit
def _block(blocks, sizes, block: tl.constexpr):
    """(tensor, places in it, which of them there are) of this program's block."""
    at = tl.program_id(0)
    tensor = tl.load(blocks + 2 * at)
    places = tl.load(blocks + 2 * at + 1) + tl.arange(0, block)
    return tensor, places, places < tl.load(sizes + tensor)


@triton.jit
def _copy(weights, old, tensor, places, live):
    w = tl.load(tl.load(weights + tensor).to(tl.pointer_type(tl.float32)) + places, mask=live)
    tl.store(tl.load(old + tensor).to(tl.pointer_type(tl.float32)) + places, w, mask=live)


@triton.jit
def measure_gradients(blocks, sizes, gradients, weights, old, out,
                      copies: tl.constexpr, block: tl.constexpr):  # fmt: skip
    """out: blocks × 6. A gradient at address 0 is none. copies: `old` becomes the weights in the same pass."""
    tensor, places, live = _block(blocks, sizes, block)
    address = tl.load(gradients + tensor)
    if address != 0:
        x = tl.load(address.to(tl.pointer_type(tl.float32)) + places, mask=live, other=0.0)
        total, absolute, squares, top, zeros, bad = _sum(x, live, True)
        _store(out + 6 * tl.program_id(0), total, absolute, squares, top, zeros, bad)
    if copies:
        _copy(weights, old, tensor, places, live)


@triton.jit(do_not_specialize=["num_blocks"])  # else there would be several versions, compiled when a model needs them
def measure_weights(blocks, sizes, weights, old, out, num_blocks,
                    keeps: tl.constexpr, block: tl.constexpr):  # fmt: skip
    """out: 2 × blocks × 6, of the weights and of weights − old; the counts are 0. keeps: afterwards `old` holds the weights."""
    tensor, places, live = _block(blocks, sizes, block)
    to = tl.load(old + tensor).to(tl.pointer_type(tl.float32)) + places
    w = tl.load(tl.load(weights + tensor).to(tl.pointer_type(tl.float32)) + places, mask=live, other=0.0)
    change = w - tl.load(to, mask=live, other=0.0)
    total, absolute, squares, top, zeros, bad = _sum(w, live, False)
    _store(out + 6 * tl.program_id(0), total, absolute, squares, top, zeros, bad)
    total, absolute, squares, top, zeros, bad = _sum(change, live, False)
    _store(out + 6 * (num_blocks + tl.program_id(0)), total, absolute, squares, top, zeros, bad)
    if keeps:
        tl.store(to, w, mask=live)


@triton.jit(do_not_specialize=["num_blocks"])
def add_blocks(sums, first_blocks, addresses, out, num_blocks, rows: tl.constexpr):
    """sums: tables × num_blocks × 6; out: tables × tensors × 6. Of a tensor at address 0 all are NaN."""
    tensor, table = tl.program_id(0), tl.program_id(1)
    first, last = tl.load(first_blocks + tensor), tl.load(first_blocks + tensor + 1)
    total = tl.zeros((rows,), tl.float64)
    absolute = tl.zeros((rows,), tl.float64)
    squares = tl.zeros((rows,), tl.float64)
    top = tl.zeros((rows,), tl.float64)
    zeros = tl.zeros((rows,), tl.float64)
    bad = tl.zeros((rows,), tl.float64)
    to = out + 6 * (table * tl.num_programs(0) + tensor)
    if tl.load(addresses + tensor) != 0:
        while first < last:
            row = first + tl.arange(0, rows)
            live, at = row < last, sums + 6 * (table * num_blocks + row)
            total += tl.load(at, mask=live, other=0.0)
            absolute += tl.load(at + 1, mask=live, other=0.0)
            squares += tl.load(at + 2, mask=live, other=0.0)
            top = tl.maximum(top, tl.load(at + 3, mask=live, other=0.0))
            zeros += tl.load(at + 4, mask=live, other=0.0)
            bad += tl.load(at + 5, mask=live, other=0.0)
            first += rows
        largest = tl.max(top, 0).to(tl.int32).to(tl.float32, bitcast=True)
        tl.store(to, tl.sum(total, 0))
        tl.store(to + 1, tl.sum(absolute, 0))
        tl.store(to + 2, tl.sum(squares, 0))
        tl.store(to + 3, largest.to(tl.float64))
        tl.store(to + 4, tl.sum(zeros, 0))
        tl.store(to + 5, tl.sum(bad, 0))
    else:
        for column in tl.static_range(6):
            tl.store(to + column, float("nan"))


@triton.jit
def copy_unless(blocks, sizes, weights, old, is_over, block: tl.constexpr):
    """`old` becomes the weights, unless the byte at `is_over` is not 0."""
    if tl.load(is_over) == 0:
        tensor, places, live = _block(blocks, sizes, block)
        _copy(weights, old, tensor, places, live)


@triton.jit
def count_exponents(blocks, sizes, tensors, out, block: tl.constexpr, bins: tl.constexpr):
    """out: tensors × 512, to which the block's counts are added. A tensor at address 0 is none."""
    tensor, places, live = _block(blocks, sizes, block)
    address = tl.load(tensors + tensor)
    if address != 0:
        x = tl.load(address.to(tl.pointer_type(tl.float32)) + places, mask=live, other=0.0)
        counts = tl.histogram((x.to(tl.int32, bitcast=True) >> 23) & (bins - 1), bins)
        bin_ = tl.arange(0, bins)
        counts -= tl.where(bin_ == 0, block - tl.sum(live.to(tl.int32), 0), 0)  # what stands for entries that are not there
        tl.atomic_add(out + tensor * bins + bin_, counts.to(tl.int64), sem="relaxed")


class Passes:
    """The passes over tensors of these numbers of entries. Tensors are float32, dense, all on the same device; None is none.

    A table of addresses goes to the device only when it is a new one. rows: blocks whose sums are added at a time.
    """

    rows = 256

    def __init__(self, numels: NDArray[np.int64], device: torch.device) -> None:
        self._device, self._num_tensors = device, len(numels)
        counts = -(-numels // BLOCK)
        tensor = np.repeat(np.arange(len(numels)), counts)
        first = np.concatenate([[0], np.cumsum(counts)])
        start = (np.arange(len(tensor)) - first[tensor]) * BLOCK
        self._num_blocks = len(tensor)
        self._blocks, self._sizes, self._first = map(self._send, (np.stack([tensor, start], 1), numels, first))
        self._sums = torch.empty(2, self._num_blocks, 6, dtype=torch.float64, device=device)
        self._tables: dict[tuple[int, ...], Tensor] = {}  # the newest
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()  # a step may be on another stream

    def gradient_moments(self, tensors: Sequence[Tensor | None],
                         copying: tuple[Sequence[Tensor], Sequence[Tensor]] | None = None) -> Tensor:  # fmt: skip
        gradients, out = self._table(tensors), self._room(1)
        weights, old = map(self._table, copying) if copying else (gradients, gradients)  # not read
        self._over_blocks(measure_gradients, gradients, weights, old, self._sums, copies=copying is not None)
        return self._add(gradients, out)[0]

    def weight_moments(self, weights: Sequence[Tensor], old: Sequence[Tensor], *, keeps: bool) -> tuple[Tensor, Tensor]:
        table, out = self._table(weights), self._room(2)  # before anything is written
        self._over_blocks(measure_weights, table, self._table(old), self._sums, self._num_blocks, keeps=keeps)
        of_weights, of_updates = self._add(table, out).unbind()
        return of_weights, of_updates

    def copy_unless(self, is_over: Tensor, weights: Sequence[Tensor], old: Sequence[Tensor]) -> None:
        """is_over: 0-d bool on the device."""
        self._over_blocks(copy_unless, self._table(weights), self._table(old), is_over.view(torch.int8))

    def exponents(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """int64 (tensors, 512)"""
        counts = torch.zeros(self._num_tensors, NUM_BINS, dtype=torch.int64, device=self._device)
        self._over_blocks(count_exponents, self._table(tensors), counts, bins=NUM_BINS)
        return counts

    def _over_blocks(self, kernel: Any, *arguments: Any, **constants: Any) -> None:
        constants |= {"block": BLOCK, "num_warps": WARPS}
        self._launch(kernel, (self._num_blocks,), self._blocks, self._sizes, *arguments, **constants)

    def _room(self, num_tables: int) -> Tensor:
        return torch.empty(num_tables, self._num_tensors, 6, dtype=torch.float64, device=self._device)

    def _add(self, addresses: Tensor, out: Tensor) -> Tensor:
        grid = self._num_tensors, len(out)
        self._launch(add_blocks, grid, self._sums, self._first, addresses, out, self._num_blocks, rows=self.rows)
        return out

    def _launch(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        """On the tensors' device, and the current stream of it."""
        with made_current(self._device):
            kernel[grid](*arguments, **constants)

    def _table(self, tensors: Sequence[Tensor | None]) -> Tensor:
        try:
            addresses = tuple(map(Tensor.data_ptr, tensors))  # type: ignore[arg-type]
        except TypeError:  # of None
            addresses = tuple(0 if t is None else t.data_ptr() for t in tensors)
        known = self._tables.get(addresses)
        if known is None:
            if len(self._tables) >= TABLES:
                del self._tables[next(iter(self._tables))]
            known = self._tables[addresses] = self._send(np.array(addresses, np.int64))
        return known

    def _send(self, array: NDArray[Any]) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array, np.int64))
        return tensor if self._device.type == "cpu" else tensor.pin_memory().to(self._device, non_blocking=True)
