"""The inverse of a low-rank approximation."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nestor.errors import SolverError
from nestor.errors.options import check_options
from nestor.solvers.checks import check_symmetric, finite_norm
from nestor.solvers.linear_operator import LinearOperator
from nestor.solvers.linear_solver import LinearSolver, Solution
from nestor.solvers.probes import column_approximation
from nestor.vectors import Params


@dataclass(frozen=True, kw_only=True)
class Nystrom(LinearSolver):
    r"""Invert Nyström's approximation of ``A`` from ``k`` of its columns, by Woodbury's identity.

    .. math:: A \approx C W^{+} C^T =: U S U^T, \quad C = A_{:,K},\; W = A_{K,K}, \qquad
        (U S U^T + \rho I)^{-1} b = U (S + \rho)^{-1} U^T b + \tfrac1\rho (b - U U^T b)

    Computes ``k`` products at once and does not iterate. Several solves can use the same columns. For a matrix with few
    large eigenvalues; with ``k`` equal to the dimension and a small ``rho`` the result is the exact inverse. Needs
    ``k + 1`` vectors of memory.

    Args:
        rank: ``k``.
        rho: Regularization of the inverse, in units of the eigenvalues. Directions outside the span of the columns are
            divided by ``rho``.
        refresh: Number of consecutive solves that use one set of columns; an engine keeps it between upper steps.
        seed: Seed of the choice of the columns; every refresh chooses other columns.

    Raises:
        ValueError: If an option is out of range.

    Reference: Hataya and Yamada, Nyström method for accurate and scalable implicit differentiation, AISTATS 2023.

    Example:
        >>> weight = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> low_rank = nestor.Implicit(solver=nestor.Nystrom(rank=2, rho=1e-3))
        >>> theta = nestor.best_response(lambda t, w: ((t - w) ** 2).sum(), weight.detach(), weight, low_rank)
        >>> torch.autograd.grad(theta.sum(), weight)  # 2 / (2 + rho)
        (tensor([0.9995, 0.9995]),)
    """

    seeks_solution: ClassVar[bool] = False
    rank: int = 10
    rho: float = 1e-2
    refresh: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        check_options(self, counts=["rank", "refresh"], positive=["rho"])

    def solve(
        self, matrix: LinearOperator, rhs: Params, *, reference: Tensor | None = None, memory: Params = ()
    ) -> Solution:
        """Solve ``matrix @ x = rhs`` for a symmetric matrix; its negative eigenvalues are replaced by zero.

        Raises:
            SolverError: If the matrix is not symmetric, a number is not finite, or the memory is of another
                solver, rank or level.
        """
        check_symmetric(matrix, "Nystrom")
        space = matrix.space
        finite_norm(space, rhs, "Nystrom")
        b = space.flat(rhs)
        rank = min(self.rank, b.numel())
        products, uses, draws = 0, self.refresh, 0
        if memory:
            vectors, values, uses, draws = self._checked(memory, (b.numel(), rank))
        if uses >= self.refresh:
            vectors, values = column_approximation(matrix, rhs, rank, self.seed + draws, "Nystrom")
            products, uses, draws = rank, 0, draws + 1
        inside = vectors.T @ b
        outside = b - vectors @ inside
        # Projected twice: the part that rounding leaves in the subspace would be divided by the small rho.
        outside = outside - vectors @ (vectors.T @ outside)
        x = vectors @ (inside / (values + self.rho)) + outside / self.rho
        counters = [torch.tensor(uses + 1), torch.tensor(draws)]
        return Solution(space.parts(x, rhs), {"iterations": torch.tensor(products)}, [vectors, values, *counters])

    def _checked(self, memory: Params, shape: tuple[int, int]) -> tuple[Tensor, Tensor, int, int]:
        """Return the parts of the memory: eigenvectors, eigenvalues, number of solves with them, number of draws."""
        if len(memory) != 4 or memory[0].shape != shape or memory[1].shape != shape[1:]:
            raise SolverError(
                f"Nystrom(rank={self.rank}) was given a memory without eigenvectors of shape {shape}: the memory is of "
                "another solver, another rank or another level. Pass memory=(), or start the run without the state "
                "of the old run."
            )
        return memory[0], memory[1], int(memory[2].item()), int(memory[3].item())

    def max_products(self, dimension: int) -> int:
        """Return ``rank``, or the dimension if it is smaller. A solve with the last columns takes no product."""
        return min(self.rank, dimension)
