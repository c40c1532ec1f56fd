"""Instruments of an evaluation: the tracing flag, counters of evaluations, and profiler ranges."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from nestor.autodiff.torch_private import is_profiler_enabled

T = TypeVar("T")

# For every open trace, innermost last: the conditions of require_true, and the placeholder of read values.
_traces: list[tuple[list[Tensor], float | None]] = []


def is_tracing() -> bool:
    """Return whether code is being traced; tensor values are placeholders then and must not be read."""
    return bool(_traces)


def placeholder_value() -> float | None:
    """Return the number that replaces every value read from a tensor; None if scalars stay tensors."""
    return _traces[-1][1]


def is_compiling() -> bool:
    """Return whether the trace is for the compiler, where in-place operations are not allowed."""
    return bool(_traces) and _traces[-1][1] is None


@contextmanager
def trace(*, placeholder: float | None = None) -> Iterator[list[Tensor]]:
    """Mark the code inside as traced; yield the list to which :func:`require_true` appends conditions.

    Args:
        placeholder: The number that replaces every value read from a tensor, if only shapes matter. None is for the
            compiler: scalars stay tensors.
    """
    conditions: list[Tensor] = []
    _traces.append((conditions, placeholder))
    try:
        yield conditions
    finally:
        _traces.pop()


def require_true(condition: Tensor) -> None:
    """Make a condition an output of the traced graph. The caller discards the graph's results if it is false."""
    _traces[-1][0].append(condition)


@dataclass(frozen=True, eq=False)
class Evaluations:
    """Number of evaluations of each level, by level name.

    Attributes:
        levels: The names of the levels to count; None counts all.
        forwards: Evaluations of the level's loss.
        gradients: Reverse passes through the level's loss.
        hvps: Products of the level's Hessian with a vector. The mixed product at the end of a response does not count.
        responses: Pullbacks through the level's best response.
        methods: How the mixed derivatives of the level's loss were computed, such as ``"reverse over forward"``.

    Example:
        >>> low = nestor.Problem(nestor.Variable(torch.ones(())), lambda low, top: (low() - top()) ** 2)
        >>> top = nestor.Problem(nestor.Variable(torch.ones(())), lambda low: low() ** 2)
        >>> program = nestor.Program(low=low, top=top)
        >>> with nestor.diagnostics.count_evaluations(program) as count:
        ...     gradient = program.hypergradient("top")
        >>> count.gradients["low"], count.responses["low"]
        (1, 1)
    """

    levels: frozenset[str] | None = None
    forwards: Counter[str] = field(default_factory=Counter)
    gradients: Counter[str] = field(default_factory=Counter)
    hvps: Counter[str] = field(default_factory=Counter)
    responses: Counter[str] = field(default_factory=Counter)
    methods: dict[str, set[str]] = field(default_factory=dict)


# The counters of the open ``counting`` contexts, innermost last.
_counters: list[Evaluations] = []


@contextmanager
def counting(levels: frozenset[str] | None = None) -> Iterator[Evaluations]:
    """Count the evaluations of the given levels inside the context."""
    counts = Evaluations(levels)
    _counters.append(counts)
    try:
        yield counts
    finally:
        _counters.remove(counts)


@contextmanager
def uncounted() -> Iterator[None]:
    """Leave the evaluations inside the context out of all counters: a check is no part of a step."""
    hidden = _counters[:]
    _counters.clear()
    try:
        yield
    finally:
        _counters[:] = hidden


def add_to_counters(counts: Evaluations, times: int) -> None:
    """Add ``counts``, multiplied by ``times``, to every open counter."""
    if not _counters:
        return
    for kind in ("forwards", "gradients", "hvps", "responses"):
        for level, number in getattr(counts, kind).items():
            _count(kind, level, times * number)


def count_forward(level: str) -> None:
    """Record an evaluation of the loss of ``level``."""
    if _counters:
        _count("forwards", level)


def count_gradient(level: str) -> None:
    """Record a gradient of the loss of ``level``."""
    if _counters:
        _count("gradients", level)


def count_hvp(level: str) -> None:
    """Record a Hessian-vector product of ``level``."""
    if _counters:
        _count("hvps", level)


def note_method(level: str, method: str) -> None:
    """Record how a mixed derivative of the loss of ``level`` is computed."""
    for counts in _counters:
        if counts.levels is None or level in counts.levels:
            counts.methods.setdefault(level, set()).add(method)


def count_response(level: str) -> None:
    """Record a pullback through the best response of ``level``."""
    if _counters:
        _count("responses", level)


def _count(kind: str, level: str, times: int = 1) -> None:
    for counts in _counters:
        if counts.levels is None or level in counts.levels:
            getattr(counts, kind)[level] += times


def in_phase(level: str, name: str, function: Callable[..., T], *arguments: Any) -> T:
    """Call a function; if a profiler runs, record the call as the range ``level/name``."""
    if not is_profiler_enabled():
        return function(*arguments)
    with torch.profiler.record_function(f"{level}/{name}"):
        return function(*arguments)
