"""What is measured within a forward pass: one frame for all probes that listen to it, so that one pass serves them all."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn


class Listener:
    """Rows that a forward pass of the model fills: `items` are their names, in the order of the calls.

    A probe of this kind says its columns, and in `_attach` how it listens.
    """

    columns: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.items: list[str] = []
        self._rows: list[Tensor] = []

    @contextmanager
    def listening(self, model: nn.Module) -> Iterator[None]:
        """While this is open, a forward pass of the model fills the rows; afterwards the model carries no hook."""
        self.items, self._rows = [], []
        with ExitStack() as stack:
            self._attach(model, stack)
            yield

    def result(self) -> Tensor:
        """(items, columns)"""
        return torch.stack(self._rows) if self._rows else torch.empty(0, len(self.columns))

    def _attach(self, model: nn.Module, stack: ExitStack) -> None:
        """Begins to listen; what ends it goes on the stack."""
        raise NotImplementedError

    def _add(self, item: str, row: Tensor) -> None:
        self.items.append(item)
        self._rows.append(row)
