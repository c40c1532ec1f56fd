"""Counts of loss evaluations, gradients and Hessian products."""

from collections.abc import Iterator
from contextlib import contextmanager

from nestor.autodiff.instruments import Evaluations, counting
from nestor.errors import typed
from nestor.program import Program


@contextmanager
@typed
def count_evaluations(program: Program) -> Iterator[Evaluations]:
    """Count the loss evaluations, gradients, Hessian products and response pullbacks in the ``with`` block.

    Args:
        program: The program whose levels are counted.

    Example:
        >>> with nestor.diagnostics.count_evaluations(program) as count:
        ...     engine.run(steps=1)
        >>> count.forwards["classifier"], count.hvps["classifier"]
    """
    with counting(frozenset(program.levels)) as counts:
        yield counts
