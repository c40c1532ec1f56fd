"""Right-hand sides whose squares would leave the range of their dtype, scaled by powers of two."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from nestor.autodiff.instruments import is_tracing, require_true
from nestor.autodiff.scalar import Flag, Scalar, read_or_keep, where
from nestor.solvers.checks import bad_cotangent
from nestor.solvers.linear_operator import LinearOperator
from nestor.solvers.linear_solver import LinearSolver, Solution
from nestor.vectors import Params, VectorSpace, algebra


def is_in_range(length: Scalar, dtype: torch.dtype) -> Flag:
    """Return whether squares of the norm, and of residuals down to rounding, neither underflow nor overflow."""
    limit = _limit(dtype)
    return (length > limit) & (length < 1 / limit)


@cache
def _limit(dtype: torch.dtype) -> float:
    return math.sqrt(math.sqrt(torch.finfo(dtype).tiny))


def range_factors(space: VectorSpace, rhs: Params, length: float, solver: str) -> list[float]:
    """Return powers of two, to be multiplied one after the other, that scale a right-hand side to a norm of about 1.

    Args:
        space: The vector space.
        rhs: The right-hand side.
        length: Its norm as computed, which is 0 if all squares underflow and infinite if one overflows.
        solver: Name of the solver, for the error.

    Returns:
        The factors; none if the norm is zero or in range.

    Raises:
        NonFiniteSolveError: If the right-hand side is not finite.
    """
    dtype = rhs[0].dtype
    if is_in_range(length, dtype):
        return []
    factors = []
    far = _far(dtype)
    # The norm is not accurate if squares have underflowed or overflowed: scale once to measure it.
    if not length > 1e3 * torch.finfo(dtype).tiny ** 0.5 or math.isinf(length):
        factors = [1 / far if math.isinf(length) else far]
        length = float(space.norm(algebra.scale(factors[0], rhs)))
    if not math.isfinite(length):
        raise bad_cotangent(solver, "norm", length)
    return [*factors, 2.0 ** -math.frexp(length)[1]] if length > 0 else []


def require_in_range(space: VectorSpace, rhs: Params, square: Tensor) -> None:
    """Require of a trace that the squared norm is zero or in range; the eager step scales the others."""
    limit = torch.finfo(rhs[0].dtype).tiny ** 0.5
    far = algebra.scale(_far(rhs[0].dtype), rhs)
    require_true(((square > limit) & (square < 1 / limit)) | (space.dot(far, far) == 0))


@cache
def _far(dtype: torch.dtype) -> float:
    """Return a power of two that brings what underflows into range."""
    return 2.0 ** int(0.78 * math.log2(torch.finfo(dtype).max))


def accurate_norm(space: VectorSpace, vector: Params) -> Scalar:
    """Return a norm that is accurate where the squares underflow: on the CPU, and in a trace."""
    length = read_or_keep(space.norm(vector).detach())
    dtype = vector[0].dtype
    far = _far(dtype)
    if isinstance(length, Tensor):
        if not is_tracing():
            return length
        scaled = space.norm(algebra.scale(far, vector)).detach() / far
        return where(is_in_range(length, dtype), length, scaled)
    is_small = not length > 1e3 * torch.finfo(dtype).tiny ** 0.5
    return float(space.norm(algebra.scale(far, vector)).detach()) / far if is_small else length


def solve_scaled(
    solver: LinearSolver,
    factors: Sequence[float],
    matrix: LinearOperator,
    rhs: Params,
    reference: Tensor | None,
    memory: Params,
) -> Solution:
    """Solve for the right-hand side multiplied by the factors; divide the solution by them."""
    for factor in factors:
        rhs = algebra.scale(factor, rhs)
        reference = None if reference is None else reference * factor
    solution = solver.solve(matrix, rhs, reference=reference, memory=memory)
    value = solution.value
    for factor in reversed(factors):
        value = algebra.scale(1 / factor, value)
    return replace(solution, value=value)
