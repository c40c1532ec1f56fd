"""Whether what runs is being written down as a graph, to be compiled."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

# The conditions of the graphs that are being written, and the number that stands for those that are read, if any.
_active: list[tuple[list[Tensor], float | None]] = []


def tracing() -> bool:
    """Whether no number may be read: the tensors are those of an example."""
    return bool(_active)


def stand_in() -> float | None:
    """Return the number that stands for every one that is read; None if they stay tensors."""
    return _active[-1][1]


def writing() -> bool:
    """Whether a graph is written to be compiled, in which nothing changes in place."""
    return bool(_active) and _active[-1][1] is None


@contextmanager
def traced(*, number: float | None = None) -> Iterator[list[Tensor]]:
    """Write a graph inside; yields the conditions that :func:`require` collects for it.

    Args:
        number: Stands for the numbers that algorithms read, where only shapes matter; None leaves them tensors.
    """
    conditions: list[Tensor] = []
    _active.append((conditions, number))
    try:
        yield conditions
    finally:
        _active.pop()


def require(condition: Tensor) -> None:
    """Let the graph say whether a condition held: where it did not, its results are thrown away."""
    _active[-1][0].append(condition)
