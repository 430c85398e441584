"""What is kept of a forward pass so that scoring need not run it again: the states of chosen positions, once."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

from hallucination_guard.model.replay import Trace

__all__ = ["KeptTrace", "Tap", "most_kept"]

_ROWS, _OF_A_ROW = 8, 32 * 2**20


def most_kept(rows: int) -> int:
    """Bytes of products, and as many of logits, that are kept of a batch; of more, scoring computes them again.

    One row may take what eight do together. Who draws more at a time has memory for more: 32 MiB a row.
    """
    return max(_ROWS, rows) * _OF_A_ROW


class Tap:
    """Collects states (B × S × d) from column ``start`` on, over the steps of a generation."""

    def __init__(self, start: int) -> None:
        self._skip = start
        self._parts: list[Tensor] = []

    def __call__(self, states: Tensor) -> None:
        """Take note of one step's states."""
        width = states.shape[1]
        if width > self._skip:
            # A copy: a slice would hold the states of the whole prompt.
            self._parts.append(states[:, self._skip :].clone())
        self._skip = max(0, self._skip - width)

    def row(self, row: int) -> Tensor:
        """Those of one row (S × d), side by side. Another thread may ask while the batch is decoded."""
        return torch.cat([part[row] for part in tuple(self._parts)])


class KeptTrace:
    """Holds a trace until it is taken, once."""

    __slots__ = ("_lock", "_trace")

    def __init__(self, trace: Trace | None) -> None:
        self._trace = trace
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return (KeptTrace, (None,))  # a copy of a generation can be read again; the memory is not copied

    def take(self) -> Trace | None:
        """The trace, which is forgotten here; None if it was taken already."""
        with self._lock:
            trace, self._trace = self._trace, None
            return trace
