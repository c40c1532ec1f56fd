"""The base class of solvers that iterate until the residual is small, and measure it where rounding leaves doubt."""

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nestor.errors import SolverError
from nestor.errors.options import check_options
from nestor.solvers.checks import bad_cotangent, bad_product, check_symmetric, remedy, singular
from nestor.solvers.linear_operator import LinearOperator
from nestor.solvers.linear_solver import LinearSolver, Solution, measured
from nestor.solvers.scaling import range_factors, solve_scaled
from nestor.vectors import Params, algebra

# A residual that is this many times that of zero is the residual of no solution.
GROWTH = 30.0


@dataclass(frozen=True)
class Iterate:
    """The end of an iteration from zero.

    Attributes:
        value: The solution.
        rest: The norm of its residual, as the recurrence gives it.
        steps: Number of iterations.
        scale: The largest ``|A v| / |v|`` of the products: an estimate of ``|A|`` from below.
        drift: How much rounding errors of size ``eps |A| |x|`` may have grown in ``rest``.
        broke: Whether the recurrence ended before it reached its goal or its budget.
        singular: Whether it ended because the residual is in the null space of ``A``, or of its transpose.
        fallback: Another solution, for the case that the residual of ``value`` turns out to be large.
    """

    value: Params
    rest: float
    steps: int
    scale: float
    drift: float = 1.0
    broke: bool = False
    singular: bool = False
    fallback: Params | None = None


def rated(rest: float, size: float) -> float:
    """Rate an iterate by its residual, and by its size ``|A| |x| / |b|`` if that is more than 1,000.

    Along a direction that is nearly flat, the size grows by orders of magnitude and the residual hardly falls.
    """
    return rest * math.sqrt(math.sqrt(max(1.0, size / 1e3)))


@dataclass(frozen=True, kw_only=True)
class KrylovSolver(LinearSolver):
    r"""Iterate in a Krylov space; all comparisons of residuals wait for the device, once in each iteration.

    The residual of the solution is measured by one more product where the recurrence breaks down, ends a restart, or
    claims less than rounding errors allow.

    Args:
        max_steps: Largest number of iterations.
        rtol: Stop when :math:`\lVert b - A x \rVert \le \text{rtol} \cdot \lVert b \rVert`.

    Raises:
        ValueError: If an option is out of range.
    """

    truncation: ClassVar[str] = "broke down or stagnated above its tolerance: the matrix is nearly singular"
    alternative: ClassVar[str] = "use GMRES(), with restart=max_steps, or DenseSolve() for a small level"
    needs_symmetric: ClassVar[bool] = False
    least_squares: ClassVar[bool] = False
    """Whether the method returns the least-squares solution of an inconsistent system, which is then no error."""
    max_steps: int = 50
    rtol: float = 1e-6

    def __post_init__(self) -> None:
        check_options(self, counts=["max_steps"], tolerances=["rtol"])

    def solve(
        self, matrix: LinearOperator, rhs: Params, *, reference: Tensor | None = None, memory: Params = ()
    ) -> Solution:
        """Solve ``matrix @ x = rhs``; for a singular matrix, if the right-hand side is in its range.

        Raises:
            SolverError: If the method needs a symmetric matrix and this one is not, if a number is not finite, or if
                the iteration breaks down before it has reduced the residual.
            SingularError: If the matrix is singular and the right-hand side is not in its range.
        """
        name, space = type(self).__name__, matrix.space
        if self.needs_symmetric:
            check_symmetric(matrix, name)
        norm = space.norm(rhs)
        length = float(norm)
        factors = range_factors(space, rhs, length, name)
        if factors:
            return solve_scaled(self, factors, matrix, rhs, reference, memory)
        if not math.isfinite(length):
            raise bad_cotangent(name, "norm", length)
        eps = torch.finfo(norm.dtype).eps
        # Below the rounding unit, a recurrence reduces rounding errors only.
        goal = max(self.rtol, eps) * (length if reference is None else float(reference))
        x: Params = [torch.zeros_like(b) for b in rhs]
        residual, rest, steps, scale = list(rhs), length, 0, 0.0
        found, noise, is_short, merit = None, 0.0, False, math.inf
        while steps < self.max_steps and rest > goal and not is_short:
            found = self.iterate(matrix, residual, rest, goal, self.max_steps - steps, scale)
            before, previous, steps, scale = x, rest, steps + found.steps, found.scale
            x, rest = algebra.add(x, found.value) if previous < length else found.value, found.rest
            size = scale * float(space.norm(x))
            noise = 16 * eps * (size + length)
            last, merit = merit, rated(rest, size / length)
            is_wild = rest > goal and merit > last
            if not (found.broke or is_wild or (rest > goal and steps < self.max_steps) or rest <= noise * found.drift):
                break
            residual, rest = self._measured(matrix, rhs, x)
            if rest > 0.9 * previous and found.fallback is not None:
                x = algebra.add(before, found.fallback) if previous < length else found.fallback
                size = scale * float(space.norm(x))
                residual, rest = self._measured(matrix, rhs, x)
            steps = min(steps + 1, self.max_steps)
            merit = rated(rest, size / length)
            is_short = found.broke or rest > 0.9999 * previous or merit > last
            if rest > previous or merit > last:  # the restart has only moved along directions that are nearly flat
                x, rest = before, previous
        is_short = is_short and rest > max(goal, min(noise, eps**0.5 * length))
        if is_short and found is not None and not (self.least_squares and found.singular):
            self._check_gain(matrix, rest / length, found)
        truncated = is_short and not self.least_squares
        return Solution(x, measured(norm.new_tensor(rest), norm, steps, truncated=truncated))

    def _measured(self, matrix: LinearOperator, rhs: Params, x: Params) -> tuple[list[Tensor], float]:
        """Return the residual and its norm, by a product."""
        residual = algebra.subtract(rhs, matrix.apply(x))
        rest = float(matrix.space.norm(residual))
        if not math.isfinite(rest):
            raise bad_product(type(self).__name__)
        return residual, rest

    def _check_gain(self, matrix: LinearOperator, residual: float, found: Iterate) -> None:
        """Raise an error if the system has no solution, or if the iteration gained nothing."""
        name = type(self).__name__
        if found.singular and residual > torch.finfo(found.value[0].dtype).eps ** 0.5:
            raise singular(name, residual, matrix)
        if residual > 0.9:
            raise SolverError(
                f"{name} broke down: |b - A x| is still {residual:.3g} |b|, and its recursion cannot continue. "
                f"The matrix is singular or nearly so, or not one for this method. {remedy(matrix.damping)}, or "
                f"{self.alternative}."
            )

    @abstractmethod
    def iterate(
        self, matrix: LinearOperator, rhs: Params, length: float, goal: float, budget: int, scale: float
    ) -> Iterate:
        """Iterate from zero until the norm of the residual is at most ``goal``.

        Args:
            matrix: The matrix.
            rhs: The right-hand side, in which no square underflows.
            length: Its norm.
            goal: The norm of the residual at which the iteration ends.
            budget: Largest number of iterations.
            scale: The largest ``|A v| / |v|`` of earlier products.
        """

    def max_products(self, dimension: int) -> int:
        """Return ``max_steps``: one product for each iteration. A product that measures a residual may come on top."""
        return self.max_steps
