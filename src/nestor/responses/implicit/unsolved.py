"""The warning of a linear solve that has ended far from a solution."""

import warnings

from nestor.errors import NestorWarning
from nestor.solvers import LinearSolver, Solution

# In units of the right-hand side.
UNSOLVED = 0.1


def warn_if_unsolved(level: str, solver: LinearSolver, solution: Solution) -> None:
    """Warn of a solve outside of any program, where no metric shows its residual.

    Args:
        level: Name of the lower level.
        solver: The solver.
        solution: What it returned.
    """
    residual = solution.stats.get("residual")
    if not solver.seeks_solution or residual is None or not float(residual) > UNSOLVED:
        return
    warnings.warn(
        # The same text each time, so that Python shows it once.
        f"Level {level!r}: {type(solver).__name__} stopped after {int(solution.stats['iterations'])} iterations, and "
        f"|b - A x| is still above {UNSOLVED:g} |b|: the derivative is far from that of the best response. Raise "
        "max_steps, or set damping.",
        NestorWarning,
        stacklevel=2,
    )
