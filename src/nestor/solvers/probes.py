"""Unit vectors and random vectors that a matrix is multiplied onto, and the approximations that they give."""

import torch
from torch import Tensor

from nestor.solvers.checks import check_finite
from nestor.solvers.linear_operator import LinearOperator
from nestor.vectors import Params, VectorSpace

# Number of columns computed by one batched product, which needs the memory of as many evaluations of the level.
_BATCH = 32


def columns(matrix: LinearOperator, like: Params, chosen: Tensor) -> Tensor:  # (k,) -> (n, k)
    """Multiply the matrix onto the unit vectors of the ``chosen`` coordinates."""
    space = matrix.space
    vector = space.flat(like)
    found = []
    for batch in torch.split(chosen.to(vector.device), _BATCH):
        units = vector.new_zeros(len(batch), len(vector))
        units[torch.arange(len(batch), device=units.device), batch] = 1.0
        found.append(space.flat_many(matrix.apply_many(space.parts(units, like))))
    return torch.cat(found).T


def column_approximation(
    matrix: LinearOperator, like: Params, rank: int, seed: int, solver: str
) -> tuple[Tensor, Tensor]:  # (n, k), (k,)
    r"""Approximate a symmetric matrix from ``rank`` of its columns; return eigenvectors and eigenvalues.

    .. math:: A \approx C W^{+} C^T = U S U^T, \qquad C = A_{:,K},\; W = A_{K,K}

    Negative eigenvalues of ``W`` are replaced by zero. The eigenvectors of the eigenvalue zero are zero vectors.

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


def random_like(space: VectorSpace, like: Params, seed: int, *, signs: bool = False) -> list[Tensor]:
    """Draw a normal vector, or one of random signs, that depends on the seed alone.

    It does not depend on the state of any other generator, nor on the number of processes.
    """
    generators: dict[torch.device, torch.Generator] = {}
    whole = []
    for length, t in zip(space.lengths(like), like, strict=True):
        if t.device not in generators:
            generators[t.device] = torch.Generator(device=t.device).manual_seed(seed)
        drawn = torch.randn(length, generator=generators[t.device], device=t.device, dtype=torch.float32).to(t.dtype)
        whole.append(torch.where(drawn > 0, 1.0, -1.0).to(t.dtype) if signs else drawn)
    return [shard.reshape(t.shape) for shard, t in zip(space.shard(whole), like, strict=True)]
