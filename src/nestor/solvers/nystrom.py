"""The inverse of a low-rank approximation."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nestor import tree
from nestor.errors import SolverError
from nestor.solvers.linear_operator import LinearOperator
from nestor.solvers.linear_solver import LinearSolver, Solution
from nestor.tree import Params


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
            SolverError: If the matrix is not symmetric, or a column is not finite.
        """
        if not matrix.symmetric:
            raise SolverError("Nystrom needs a symmetric matrix, and the condition's is not. Use GMRES().")
        b = torch.cat([part.reshape(-1) for part in rhs])
        rank = min(self.rank, b.numel())
        uses, draws = (int(memory[2].item()), int(memory[3].item())) if memory else (self.refresh, 0)
        if uses < self.refresh and memory[0].shape == (b.numel(), rank):
            vectors, values, products = memory[0], memory[1], 0
        else:
            vectors, values = self._decompose(matrix, rhs, rank, draws)
            uses, draws, products = 0, draws + 1, rank
        inside = vectors.T @ b
        outside = b - vectors @ inside
        # Projected twice: what rounding leaves of the subspace would be divided by a small number.
        outside = outside - vectors @ (vectors.T @ outside)
        x = vectors @ (inside / (values + self.rho)) + outside / self.rho
        pieces = torch.split(x, [part.numel() for part in rhs])
        value = [p.view_as(part) for p, part in zip(pieces, rhs, strict=True)]
        counters = [torch.tensor(uses + 1), torch.tensor(draws)]
        return Solution(value, {"iterations": torch.tensor(products)}, [vectors, values, *counters])

    def _decompose(self, matrix: LinearOperator, like: Params, rank: int, draws: int) -> tuple[Tensor, Tensor]:
        """Take columns and return the eigenvectors and eigenvalues of the approximation."""
        dimension = tree.size(like)
        generator = torch.Generator().manual_seed(self.seed + draws)
        chosen = torch.randperm(dimension, generator=generator)[:rank].to(like[0].device)
        units = torch.zeros(rank, dimension, dtype=like[0].dtype, device=like[0].device)
        units[torch.arange(rank, device=units.device), chosen] = 1.0
        parts = torch.split(units, [part.numel() for part in like], dim=1)
        stacked = [p.reshape(rank, *part.shape) for p, part in zip(parts, like, strict=True)]
        columns = torch.cat([c.reshape(rank, -1) for c in matrix.apply_many(stacked)], dim=1).T
        small = columns[chosen]
        if not bool(torch.isfinite(columns).all()):
            raise SolverError("Nystrom met a Hessian column that is not finite. Look at the lower loss.")
        # The factor B with A ~ B B^T, from the positive part of W in double precision.
        eigenvalues, basis = torch.linalg.eigh(0.5 * (small + small.T).double())
        keep = eigenvalues > eigenvalues.abs().max() * rank * torch.finfo(columns.dtype).eps
        weights = torch.where(keep, torch.where(keep, eigenvalues, 1.0).rsqrt(), 0.0)
        factor = columns @ (basis * weights).to(columns.dtype)
        vectors, singular, _ = torch.linalg.svd(factor, full_matrices=False)
        seen = singular > singular.max() * rank * torch.finfo(columns.dtype).eps
        return vectors * seen, singular**2

    def max_products(self, dimension: int) -> int:
        """``rank``; none where the columns of the last solve serve."""
        return min(self.rank, dimension)
