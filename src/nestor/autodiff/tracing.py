"""Flag: the current code is being traced into a graph of operations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

# For every open trace, innermost last: the conditions that its code requires, and the placeholder of read values.
_active: list[tuple[list[Tensor], float | None]] = []


def is_tracing() -> bool:
    """Return whether code is being traced; tensor values are placeholders then and must not be read."""
    return bool(_active)


def placeholder_value() -> float | None:
    """Return the number that replaces every value read from a tensor; None if scalars stay tensors."""
    return _active[-1][1]


def is_compiling() -> bool:
    """Return whether the trace is for the compiler, where in-place operations are not allowed."""
    return bool(_active) and _active[-1][1] is None


@contextmanager
def trace(*, placeholder: float | None = None) -> Iterator[list[Tensor]]:
    """Set the flag inside; yields the list of conditions that :func:`require_true` fills.

    Args:
        placeholder: The number that replaces every value read from a tensor, where only shapes matter. None is for the
            compiler: scalars stay tensors.
    """
    conditions: list[Tensor] = []
    _active.append((conditions, placeholder))
    try:
        yield conditions
    finally:
        _active.pop()


def require_true(condition: Tensor) -> None:
    """Make a condition an output of the traced graph; the caller discards the graph's results where it is false."""
    _active[-1][0].append(condition)
