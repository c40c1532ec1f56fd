"""A direct solve with the assembled matrix."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nestor.errors import SolverError, check_options
from nestor.solvers.checks import finite_norm
from nestor.solvers.linear_operator import LinearOperator
from nestor.solvers.linear_solver import LinearSolver, Solution, measured
from nestor.solvers.probes import columns
from nestor.vectors import Params


@dataclass(frozen=True, kw_only=True)
class DenseSolve(LinearSolver):
    r"""Assemble ``A`` column by column (``n`` products) and solve by LU, for any invertible matrix.

    For small problems, and as a reference in tests. Memory :math:`n^2`; time :math:`n` products and :math:`n^3/3`
    operations.

    Args:
        max_dimension: Largest dimension of a system; a larger one is an error.

    Raises:
        ValueError: If ``max_dimension`` is not positive.
    """

    max_dimension: int = 5_000

    def __post_init__(self) -> None:
        check_options(self, counts=["max_dimension"])

    def solve(
        self, matrix: LinearOperator, rhs: Params, *, reference: Tensor | None = None, memory: Params = ()
    ) -> Solution:
        """Solve ``matrix @ x = rhs``.

        Raises:
            SolverError: If the system is larger than ``max_dimension``, or singular to working precision.
        """
        space = matrix.space
        b = space.flat(rhs)
        if b.numel() > self.max_dimension:
            raise SolverError(
                f"DenseSolve would need a matrix of {b.numel()} x {b.numel()}; its limit is "
                f"max_dimension={self.max_dimension}. Use ConjugateGradient() or Neumann() for a level of this size."
            )
        length = finite_norm(space, rhs, "DenseSolve")
        dense = columns(matrix, rhs, torch.arange(b.numel()))
        factors, pivots, info = torch.linalg.lu_factor_ex(dense)
        x = torch.linalg.lu_solve(factors, pivots, b[:, None])[:, 0]
        if not bool((info == 0) & torch.isfinite(x).all()):
            raise SolverError(
                "DenseSolve met a singular matrix, or a matrix with numbers that are not finite: the best response is "
                "not unique here. Add damping, Implicit(solver=DenseSolve(), damping=1e-6), or regularize the lower "
                "loss."
            )
        return Solution(space.parts(x, rhs), measured(torch.linalg.vector_norm(b - dense @ x), length, b.numel()))

    def max_products(self, dimension: int) -> int:
        """Return the dimension: one product for every column."""
        return dimension
