"""Counters of a program's work: loss evaluations, gradients, Hessian-vector products, responses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(frozen=True, eq=False)
class Evaluations:
    """How often each level was evaluated, by level name.

    Attributes:
        levels: The names of the levels to count; None counts all.
        forwards: Evaluations of the level's loss.
        gradients: Reverse passes through the level's loss.
        hvps: Products of the level's Hessian with a vector. The mixed product at the end of a response does not count.
        responses: Pullbacks through the level's best response.
    """

    levels: frozenset[str] | None = None
    forwards: Counter[str] = field(default_factory=Counter)
    gradients: Counter[str] = field(default_factory=Counter)
    hvps: Counter[str] = field(default_factory=Counter)
    responses: Counter[str] = field(default_factory=Counter)


# The counters of the open ``counting`` contexts, innermost last.
_active: list[Evaluations] = []


@contextmanager
def counting(levels: frozenset[str] | None = None) -> Iterator[Evaluations]:
    """Count the evaluations of the given levels inside the context."""
    counts = Evaluations(levels)
    _active.append(counts)
    try:
        yield counts
    finally:
        _active.remove(counts)


def add_to_active(counts: Evaluations, times: int) -> None:
    """Add ``counts``, multiplied by ``times``, to every open counter."""
    if not _active:
        return
    for kind in ("forwards", "gradients", "hvps", "responses"):
        for level, number in getattr(counts, kind).items():
            _count(kind, level, times * number)


def count_forward(level: str) -> None:
    """Record an evaluation of the loss of ``level``."""
    if _active:
        _count("forwards", level)


def count_gradient(level: str) -> None:
    """Record a gradient of the loss of ``level``."""
    if _active:
        _count("gradients", level)


def count_hvp(level: str) -> None:
    """Record a Hessian-vector product of ``level``."""
    if _active:
        _count("hvps", level)


def count_response(level: str) -> None:
    """Record a pullback through the best response of ``level``."""
    if _active:
        _count("responses", level)


def _count(kind: str, level: str, times: int = 1) -> None:
    for counts in _active:
        if counts.levels is None or level in counts.levels:
            getattr(counts, kind)[level] += times
