"""The inverse of a low-rank approximation."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nestor.errors import SolverError
from nestor.solvers.columns import column_approximation
from nestor.solvers.finite import finite_norm
from nestor.solvers.linear_operator import LinearOperator
from nestor.solvers.linear_solver import LinearSolver, Solution
from nestor.vectors.algebra import Params


@dataclass(frozen=True, kw_only=True)
class Nystrom(LinearSolver):
    r"""Invert Nyström's approximation of ``A`` from ``k`` of its columns, by Woodbury's identity.

    .. math:: A \approx C W^{+} C^T =: U S U^T, \quad C = A_{:,K},\; W = A_{K,K}, \qquad
        (U S U^T + \rho I)^{-1} b = U (S + \rho)^{-1} U^T b + \tfrac1\rho (b - U U^T b)

    ``k`` products, all at once, and no iteration; the columns can serve several solves. For a matrix with few large
    eigenvalues; with ``k`` equal to the dimension and a small ``rho`` it is the exact inverse. Needs ``k + 1`` vectors
    of memory.

    Args:
        rank: ``k``.
        rho: Regularizes the inverse, in units of the eigenvalues; directions that the columns do not see are divided
            by it.
        refresh: Solves that share one set of columns (an engine keeps it between upper steps).
        seed: Of the choice of the columns; each refresh chooses anew.

    Raises:
        ValueError: If a number is out of range.

    Reference: Hataya and Yamada, Nyström method for accurate and scalable implicit differentiation, AISTATS 2023.
    """

    rank: int = 10
    rho: float = 1e-2
    refresh: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rank < 1 or self.refresh < 1:
            raise ValueError(f"Nystrom(rank={self.rank}, refresh={self.refresh}) must be at least 1.")
        if not (self.rho > 0 and math.isfinite(self.rho)):
            raise ValueError(f"Nystrom(rho={self.rho}) must be positive and finite.")

    def solve(
        self, matrix: LinearOperator, rhs: Params, *, reference: Tensor | None = None, memory: Params = ()
    ) -> Solution:
        """Solve ``matrix @ x = rhs`` for a symmetric matrix; its negative eigenvalues are taken as zero.

        Raises:
            SolverError: If the matrix is not symmetric, a number is not finite, or the memory is not this solver's.
        """
        if not matrix.symmetric:
            raise SolverError("Nystrom needs a symmetric matrix, and the condition's is not. Use GMRES().")
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
        # Projected twice: what rounding leaves of the subspace would be divided by a small number.
        outside = outside - vectors @ (vectors.T @ outside)
        x = vectors @ (inside / (values + self.rho)) + outside / self.rho
        counters = [torch.tensor(uses + 1), torch.tensor(draws)]
        return Solution(space.parts(x, rhs), {"iterations": torch.tensor(products)}, [vectors, values, *counters])

    def _checked(self, memory: Params, shape: tuple[int, int]) -> tuple[Tensor, Tensor, int, int]:
        """Take the memory apart: eigenvectors, eigenvalues, solves that they served, draws so far."""
        if len(memory) != 4 or memory[0].shape != shape or memory[1].shape != shape[1:]:
            raise SolverError(
                f"Nystrom(rank={self.rank}) was given a memory that is not made of eigenvectors of shape {shape}: "
                "another solver, another rank or another level left it. Pass memory=(), or start the run without the "
                "state of the old one."
            )
        return memory[0], memory[1], int(memory[2].item()), int(memory[3].item())

    def max_products(self, dimension: int) -> int:
        """``rank``; none where the columns of the last solve serve."""
        return min(self.rank, dimension)
