"""Whether what runs is being written down as a graph, to be compiled."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

# The conditions of the graphs that are being written, innermost last.
_active: list[list[Tensor]] = []


def tracing() -> bool:
    """Whether no number may be read: the tensors are those of an example."""
    return bool(_active)


@contextmanager
def traced() -> Iterator[list[Tensor]]:
    """Write a graph inside; yields the conditions that :func:`require` collects for it."""
    conditions: list[Tensor] = []
    _active.append(conditions)
    try:
        yield conditions
    finally:
        _active.pop()


def require(condition: Tensor) -> None:
    """Let the graph say whether a condition held: where it did not, its results are thrown away."""
    _active[-1].append(condition)
