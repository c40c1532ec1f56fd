"""The base class of solvers that iterate until the residual is small."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

from torch import Tensor

from nestor.errors import check_options
from nestor.solvers.checks import check_symmetric, finite_norm
from nestor.solvers.linear_operator import LinearOperator
from nestor.solvers.linear_solver import LinearSolver, Solution, measured
from nestor.vectors import Params

Iterate: TypeAlias = tuple[Params, Tensor, int]
"""A solution, the norm of its residual, and the number of iterations."""


@dataclass(frozen=True, kw_only=True)
class KrylovSolver(LinearSolver):
    r"""Iterate in a Krylov space; all comparisons of residuals wait for the device, once in each iteration.

    Args:
        max_steps: Largest number of iterations.
        rtol: Stop when :math:`\lVert b - A x \rVert \le \text{rtol} \cdot \lVert b \rVert`.

    Raises:
        ValueError: If an option is out of range.
    """

    needs_symmetric: ClassVar[bool] = False
    max_steps: int = 50
    rtol: float = 1e-6

    def __post_init__(self) -> None:
        check_options(self, counts=["max_steps"], tolerances=["rtol"])

    def solve(
        self, matrix: LinearOperator, rhs: Params, *, reference: Tensor | None = None, memory: Params = ()
    ) -> Solution:
        """Solve ``matrix @ x = rhs``.

        Raises:
            SolverError: If the method needs a symmetric matrix and this one is not, if a number is not finite, or if
                the iteration breaks down.
        """
        name = type(self).__name__
        if self.needs_symmetric:
            check_symmetric(matrix, name)
        length = finite_norm(matrix.space, rhs, name)
        x, rest, steps = self.iterate(matrix, rhs, length, self.rtol * (length if reference is None else reference))
        return Solution(x, measured(rest, length, steps))

    @abstractmethod
    def iterate(self, matrix: LinearOperator, rhs: Params, length: Tensor, goal: Tensor) -> Iterate:
        """Iterate from zero until the norm of the residual is at most ``goal``; ``length`` is the norm of ``rhs``."""

    def max_products(self, dimension: int) -> int:
        """Return ``max_steps``: one product for each iteration."""
        return self.max_steps
