"""Embeddings while something is measured: their gradients dense, as no sparse one can be differentiated again or summed."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def gradients_dense(net: nn.Module) -> Iterator[None]:
    """While this is open, every nn.Embedding and nn.EmbeddingBag gives dense gradients: the same numbers, zeros and all."""
    sparse = [m for m in net.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag) and m.sparse]
    try:
        for module in sparse:
            module.sparse = False
        yield
    finally:
        for module in sparse:
            module.sparse = True
