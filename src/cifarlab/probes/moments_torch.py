"""Moments of many tensors in torch operations: on any device and of any type of numbers; other ways are held against them."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

COLUMNS = ("sum", "abs_sum", "square_sum", "abs_max", "zeros", "non_finite")
SUM, ABS_SUM, SQUARE_SUM, ABS_MAX, ZEROS, NON_FINITE = range(6)
ROW = 1024  # entries to a row of the buffer: long enough for a reduction to be fast, short enough to waste little
NUM_BINS = 512  # float32's sign and exponent


class Rows:
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
        if parts:
            torch._foreach_copy_(parts, [t for t in tensors if t is not None])
        return self._reduce(counts=True)

    @torch.no_grad()
    def weight_moments(self, weights: Sequence[Tensor], old: Sequence[Tensor], *, keeps: bool) -> tuple[Tensor, Tensor]:
        parts = [part.as_strided(t.shape, t.stride(), part.storage_offset()) for part, t in self._there(weights)]
        torch._foreach_copy_(parts, list(weights))
        of_weights = self._reduce(counts=False)
        torch._foreach_sub_(parts, [o.to(self._buffer) for o in old])
        of_updates = self._reduce(counts=False)
        if keeps:
            torch._foreach_copy_(list(old), list(weights))
        return of_weights, of_updates

    def _there(self, tensors: Sequence[Tensor | None]) -> list[tuple[Tensor, Tensor]]:
        return [(part, t) for part, t in zip(self._parts, tensors, strict=True) if t is not None]

    def _reduce(self, *, counts: bool) -> Tensor:
        """counts: of zeros and of what is not finite too, a third of the work; else both are 0."""
        x, kind = self._buffer, self._accumulate
        columns = [
            x.sum(1, dtype=kind), torch.linalg.vector_norm(x, 1, dim=1, dtype=kind),
            torch.linalg.vector_norm(x, 2, dim=1, dtype=kind).square(),
        ]  # fmt: skip
        if counts:
            columns += [(ROW - torch.count_nonzero(x, dim=1)).to(kind), (~torch.isfinite(x)).sum(1).to(kind)]
        sums = torch.segment_reduce(torch.stack(columns, 1), "sum", lengths=self._lengths, axis=0, unsafe=True)
        top = torch.segment_reduce(torch.linalg.vector_norm(x, torch.inf, dim=1).to(kind), "max", lengths=self._lengths,
                                   axis=0, unsafe=True)  # fmt: skip
        zeros, bad = (sums[:, 3] - self._padding, sums[:, 4]) if counts else torch.zeros_like(sums[:, :2]).unbind(1)
        return torch.stack([sums[:, 0], sums[:, 1], sums[:, 2], top, zeros, bad], 1)


def dense(tensor: Tensor) -> Tensor:
    """The tensor itself where its entries fill its memory without gaps, else a copy that does; a sparse one made dense."""
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    if tensor.is_contiguous() or (tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)):
        return tensor
    return tensor.contiguous()


def count_exponents(tensor: Tensor) -> Tensor:
    """How many entries have each of the 512 leading nine bits: int64 (512,). A GPU is waited for."""
    leading = (dense(tensor).float().reshape(-1).view(torch.int32) >> 23) & (NUM_BINS - 1)
    return torch.bincount(leading, minlength=NUM_BINS)
