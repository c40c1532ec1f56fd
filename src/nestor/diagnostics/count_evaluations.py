"""Counts of loss evaluations, gradients and Hessian products."""

from collections.abc import Iterator
from contextlib import contextmanager

from nestor.autodiff.instruments import Evaluations, counting
from nestor.errors.options import typed
from nestor.program import Program


@contextmanager
@typed
def count_evaluations(program: Program) -> Iterator[Evaluations]:
    """Count the loss evaluations, gradients, Hessian products and response pullbacks in the ``with`` block.

    Args:
        program: The program whose levels are counted.

    Example:
        >>> low = nestor.Problem(nestor.Variable(torch.ones(())), lambda low, top: (low() - top()) ** 2)
        >>> top = nestor.Problem(nestor.Variable(torch.ones(())), lambda low: low() ** 2)
        >>> program = nestor.Program(low=low, top=top)
        >>> with nestor.diagnostics.count_evaluations(program) as count:
        ...     gradient = program.hypergradient("top")
        >>> count.forwards["low"], count.gradients["low"], count.hvps["low"]
        (1, 1, 0)
    """
    with counting(frozenset(program.levels)) as counts:
        yield counts
