"""Numbers that are not finite are refused where a solver takes them in and where it hands them out."""

from __future__ import annotations

import torch
from torch import Tensor

from nestor.errors import NonFiniteSolveError
from nestor.vectors.algebra import Params, VectorSpace


def finite_norm(space: VectorSpace, rhs: Params, solver: str) -> Tensor:
    """Return the norm of a right-hand side.

    Raises:
        SolverError: If it is not finite. The check waits for the device, once a solve.
    """
    length = space.norm(rhs)
    if not bool(torch.isfinite(length)):
        raise NonFiniteSolveError(
            f"{solver} was given a cotangent whose norm is {length.item():.3g}: the upper loss has no finite gradient "
            "here. Look at the loss that reads this level."
        )
    return length


def check_finite(residual: Tensor, solver: str) -> None:
    """Refuse the result of a solve whose residual norm says that a product was not finite.

    Raises:
        SolverError: If it was not.
    """
    if not bool(torch.isfinite(residual)):
        raise not_finite(solver)


def not_finite(solver: str) -> NonFiniteSolveError:
    """Say that a product with the matrix was not finite."""
    return NonFiniteSolveError(
        f"{solver} met a product with the matrix that is not finite: the lower loss has no finite second "
        "derivative here. Look for a square root, a logarithm or a norm at zero in it, or for half precision."
    )
