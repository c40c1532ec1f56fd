"""A direct solve with the assembled matrix."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nestor.errors import SolverError
from nestor.errors.options import check_options
from nestor.solvers.checks import bad_product, singular
from nestor.solvers.linear_operator import LinearOperator
from nestor.solvers.linear_solver import LinearSolver, Solution
from nestor.solvers.probes import columns
from nestor.solvers.scaling import range_factors, solve_scaled
from nestor.vectors import Params


@dataclass(frozen=True, kw_only=True)
class DenseSolve(LinearSolver):
    r"""Assemble ``A`` column by column (``n`` products) and solve by LU, for any square matrix.

    If the matrix is singular to working precision and the right-hand side is in its range, the result is the solution
    of minimum norm, from a singular value decomposition. For small problems, and as a reference in tests. Memory
    :math:`n^2`; time :math:`n` products and :math:`n^3/3` operations.

    Args:
        max_dimension: Largest dimension of a system; a larger one is an error.

    Raises:
        ValueError: If ``max_dimension`` is not positive.

    Example:
        >>> weight = torch.tensor(2.0, requires_grad=True)
        >>> exact = nestor.Implicit(solver=nestor.DenseSolve(max_dimension=100))
        >>> theta = nestor.best_response(lambda t, w: (t - w) ** 2, weight.detach(), weight, exact)
        >>> torch.autograd.grad(theta**3, weight)  # 3 weight^2
        (tensor(12.),)
    """

    max_dimension: int = 5_000

    def __post_init__(self) -> None:
        check_options(self, counts=["max_dimension"])

    def solve(
        self, matrix: LinearOperator, rhs: Params, *, reference: Tensor | None = None, memory: Params = ()
    ) -> Solution:
        """Solve ``matrix @ x = rhs``.

        Raises:
            SolverError: If the system is larger than ``max_dimension``, or a number is not finite.
            SingularError: If the matrix is singular to working precision and ``rhs`` is not in its range.
        """
        space = matrix.space
        b = space.flat(rhs)
        if b.numel() > self.max_dimension:
            raise SolverError(
                f"DenseSolve would need a matrix of {b.numel()} x {b.numel()}; its limit is "
                f"max_dimension={self.max_dimension}. Use ConjugateGradient() or Neumann() for a level of this size."
            )
        norm = space.norm(rhs)
        factors = range_factors(space, rhs, float(norm), "DenseSolve")
        if factors:
            return solve_scaled(self, factors, matrix, rhs, reference, memory)
        dense = columns(matrix, rhs, torch.arange(b.numel()))
        if not bool(torch.isfinite(dense).all()):
            raise bad_product("DenseSolve")
        x, is_deficient = _solved(dense, b)
        residual = torch.linalg.vector_norm(b - dense @ x) / torch.where(norm == 0, 1.0, norm)
        if is_deficient and bool(residual > torch.finfo(b.dtype).eps ** 0.5):
            raise singular("DenseSolve", float(residual), matrix)
        return Solution(space.parts(x, rhs), {"residual": residual, "iterations": torch.tensor(b.numel())})

    def max_products(self, dimension: int) -> int:
        """Return the dimension: one product for every column."""
        return dimension


def _solved(dense: Tensor, b: Tensor) -> tuple[Tensor, bool]:
    """Solve by LU; by the singular values if the matrix may be singular: the least-squares solution of minimum norm.

    Returns:
        The solution, and whether the matrix is singular to working precision.
    """
    cut = len(b) * torch.finfo(dense.dtype).eps
    factors, pivots, info = torch.linalg.lu_factor_ex(dense)
    x = torch.linalg.lu_solve(factors, pivots, b[:, None])[:, 0]
    pivot = factors.diagonal().abs()
    # Two bounds of the condition number from below: the ratio of the pivots, and |A| |x| / |b|.
    scale = torch.linalg.vector_norm(dense)
    growth = torch.linalg.vector_norm(b) >= cut * scale * torch.linalg.vector_norm(x)
    if bool((info == 0) & (pivot.min() > cut * pivot.max()) & growth):
        return x, False
    left, values, right = torch.linalg.svd(dense)
    kept = values > cut * values[0]
    return right.mH @ (torch.where(kept, 1 / values, 0.0) * (left.mH @ b)), not bool(kept.all())
