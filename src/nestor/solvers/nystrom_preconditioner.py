"""Nyström's approximation as a preconditioner."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nestor.errors import SolverError
from nestor.solvers.columns import column_approximation
from nestor.solvers.linear_operator import LinearOperator
from nestor.solvers.preconditioner import Preconditioner, PreparedPreconditioner
from nestor.vectors.algebra import Params, VectorSpace


@dataclass(frozen=True, kw_only=True)
class NystromPreconditioner(Preconditioner):
    r"""Shrink the large eigenvalues that ``k`` columns of the matrix show to the size of the smallest of them.

    .. math:: P^{-1} r = U\, s_k S^{-1}\, U^T r + (r - U U^T r), \qquad A \approx C W^{+} C^T = U S U^T

    For few large eigenvalues above a bulk: the iterations then depend on the bulk alone. ``k`` products to prepare, all
    at once, in every solve, and ``k + 1`` vectors of memory.

    Args:
        rank: ``k``.
        seed: Of the choice of the columns.

    Raises:
        ValueError: If ``rank`` is not positive.

    Reference: Frangella, Tropp, Udell, Randomized Nyström preconditioning, SIAM J. Matrix Anal. Appl. 44(2), 2023.
    """

    rank: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"NystromPreconditioner(rank={self.rank}) must be at least 1.")

    def prepare(self, matrix: LinearOperator, like: Params) -> PreparedPreconditioner:
        """Take the columns.

        Raises:
            SolverError: If the matrix is not symmetric, or a column is not finite.
        """
        if not matrix.symmetric:
            raise SolverError("NystromPreconditioner needs a symmetric matrix, and the condition's is not.")
        rank = min(self.rank, sum(matrix.space.lengths(like)))
        vectors, values = column_approximation(matrix, like, rank, self.seed, "NystromPreconditioner")
        seen = vectors.square().sum(dim=0) > 0.5  # eigenvectors of zero are zero
        # Where nothing is seen the vectors are zero, and the level does not matter.
        level = torch.where(seen, values, torch.inf).min()
        return _Prepared(matrix.space, vectors, torch.where(seen, level / torch.where(seen, values, 1.0) - 1, 0.0))

    def max_products(self, dimension: int) -> int:
        """``rank``."""
        return min(self.rank, dimension)


@dataclass(frozen=True, eq=False)
class _Prepared(PreparedPreconditioner):
    space: VectorSpace
    vectors: Tensor  # (n, k)
    shrinkage: Tensor  # (k,), s_k / s_i - 1

    def apply(self, vector: Params) -> list[Tensor]:
        """Multiply the identity with a correction of rank ``k``."""
        r = self.space.flat(vector)
        return self.space.parts(r + self.vectors @ (self.shrinkage * (self.vectors.T @ r)), vector)
