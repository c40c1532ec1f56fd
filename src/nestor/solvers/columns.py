"""Columns of a matrix that is known by its products, and the low-rank matrix that they span."""

from __future__ import annotations

import torch
from torch import Tensor

from nestor.solvers.finite import check_finite
from nestor.solvers.linear_operator import LinearOperator
from nestor.vectors.algebra import Params

# Columns that are multiplied together: their memory is that of so many evaluations of the level.
_AT_ONCE = 32


def columns(matrix: LinearOperator, like: Params, chosen: Tensor) -> Tensor:  # (k,) -> (n, k)
    """Multiply the matrix onto the unit vectors of the ``chosen`` coordinates."""
    space = matrix.space
    vector = space.flat(like)
    found = []
    for some in torch.split(chosen.to(vector.device), _AT_ONCE):
        units = vector.new_zeros(len(some), len(vector))
        units[torch.arange(len(some), device=units.device), some] = 1.0
        found.append(space.flat_many(matrix.apply_many(space.parts(units, like))))
    return torch.cat(found).T


def column_approximation(
    matrix: LinearOperator, like: Params, rank: int, seed: int, solver: str
) -> tuple[Tensor, Tensor]:  # (n, k), (k,)
    r"""Take ``rank`` columns of a symmetric matrix and return the eigenvectors and eigenvalues of what they span.

    .. math:: A \approx C W^{+} C^T = U S U^T, \qquad C = A_{:,K},\; W = A_{K,K}

    Negative eigenvalues of ``W`` are taken as zero, and eigenvectors of zero are zero.

    Raises:
        SolverError: If a column is not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(sum(matrix.space.lengths(like)), generator=generator)[:rank]
    found = columns(matrix, like, chosen)
    check_finite(torch.linalg.vector_norm(found), solver)
    small = found[chosen.to(found.device)]
    # The factor F with A ~ F F^T, from the positive part of W in double precision.
    eigenvalues, basis = torch.linalg.eigh(0.5 * (small + small.T).double())
    keep = eigenvalues > eigenvalues.abs().max() * rank * torch.finfo(found.dtype).eps
    weights = torch.where(keep, torch.where(keep, eigenvalues, 1.0).rsqrt(), 0.0)
    vectors, singular, _ = torch.linalg.svd(found @ (basis * weights).to(found.dtype), full_matrices=False)
    seen = singular > singular.max() * rank * torch.finfo(found.dtype).eps
    return vectors * seen, singular**2
