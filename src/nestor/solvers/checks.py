"""Checks that solvers and preconditioners share: a symmetric matrix, finite numbers."""

import torch
from torch import Tensor

from nestor.errors import NonFiniteSolveError, SingularError, SolverError
from nestor.solvers.linear_operator import LinearOperator
from nestor.vectors import Params, VectorSpace


def check_symmetric(matrix: LinearOperator, method: str) -> None:
    """Check that the matrix is symmetric.

    Raises:
        SolverError: If it is not.
    """
    if not matrix.symmetric:
        raise SolverError(
            f"{method} needs a symmetric matrix, and the matrix of the condition is not symmetric. Use a solver for "
            "general matrices, such as GMRES(), or DenseSolve() for a small level."
        )


def finite_norm(space: VectorSpace, rhs: Params, solver: str) -> Tensor:
    """Return the norm of a right-hand side. The check waits for the device once in every solve.

    Raises:
        NonFiniteSolveError: If the norm is not finite.
    """
    length = space.norm(rhs)
    if not bool(torch.isfinite(length)):
        raise bad_cotangent(solver, "norm", length.item())
    return length


def check_finite(residual: Tensor, solver: str) -> None:
    """Check the norm of a residual, which is not finite if a product with the matrix was not finite.

    Raises:
        NonFiniteSolveError: If the norm is not finite.
    """
    if not bool(torch.isfinite(residual)):
        raise bad_product(solver)


def bad_cotangent(solver: str, measure: str, value: float) -> NonFiniteSolveError:
    """Write the error of a right-hand side that is not finite; ``measure`` names what ``value`` is."""
    return NonFiniteSolveError(
        f"{solver} was given a cotangent whose {measure} is {value:.3g}: the upper loss has no finite gradient here. "
        "Check the loss that reads this level."
    )


def bad_product(solver: str) -> NonFiniteSolveError:
    """Write the error of a product with the matrix that is not finite."""
    return NonFiniteSolveError(
        f"{solver} met a product with the matrix that is not finite: the lower loss has no finite second "
        "derivative here. Check it for a square root, a logarithm or a norm at zero, and for half precision."
    )


def singular(solver: str, residual: float, matrix: LinearOperator) -> SingularError:
    """Write the error of an inconsistent system; ``residual`` is ``|b - A x| / |b|``."""
    return SingularError(
        f"{solver} met a matrix that is singular, or nearly so, and the right-hand side is not in its range: |b - A x| "
        f"stays at {residual:.3g} |b|. The lower objective has no curvature in a direction that the loss above reads: "
        f"its best response is not unique there. {remedy(matrix.damping)}, regularize the lower loss, or use "
        "NormalConjugateGradient(), which returns the least-squares solution of minimum norm."
    )


def remedy(damping: float) -> str:
    """Say how to change the damping that is set."""
    return f"Raise damping above {damping:g}" if damping else "Set damping, Implicit(..., damping=1e-2)"
