"""Counters of the work a program does: loss evaluations, gradients, products with the Hessian, responses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(frozen=True, eq=False)
class Evaluations:
    """How often each level was evaluated, by level name.

    Attributes:
        levels: The levels that are counted; None counts all.
        forwards: Evaluations of the level's loss.
        gradients: First derivatives of the level's loss, by one reverse pass each.
        hvps: Products of the level's Hessian with a vector (the mixed product at the end of a response is not one).
        responses: Pullbacks through the level's best response.
    """

    levels: frozenset[str] | None = None
    forwards: Counter[str] = field(default_factory=Counter)
    gradients: Counter[str] = field(default_factory=Counter)
    hvps: Counter[str] = field(default_factory=Counter)
    responses: Counter[str] = field(default_factory=Counter)


# The counters in use, innermost last. Empty, and then free of cost, but inside ``counting``.
_active: list[Evaluations] = []


@contextmanager
def counting(levels: frozenset[str] | None = None) -> Iterator[Evaluations]:
    """Count the evaluations made inside, of the given levels."""
    counts = Evaluations(levels)
    _active.append(counts)
    try:
        yield counts
    finally:
        _active.remove(counts)


def add_to_active(counts: Evaluations, times: int) -> None:
    """Record ``counts`` as if they had been made ``times`` more times."""
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
