"""The truncated Neumann series."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nestor.autodiff.instruments import is_tracing, require_true
from nestor.autodiff.scalar import divide, read_or_keep, tensor
from nestor.errors import SolverError
from nestor.errors.options import check_options
from nestor.solvers.checks import bad_product, remedy
from nestor.solvers.krylov import GROWTH
from nestor.solvers.linear_operator import LinearOperator
from nestor.solvers.linear_solver import LinearSolver, Solution, flag
from nestor.solvers.probes import random_like
from nestor.solvers.scaling import is_in_range, range_factors, solve_scaled
from nestor.vectors import Params, VectorSpace, algebra

# A series whose last term is at most so many times its first is taken as it is.
_CONVERGES = 1 + 1e-3


@dataclass(frozen=True, kw_only=True)
class Neumann(LinearSolver):
    r"""Approximate :math:`A^{-1} b \approx \alpha \sum_{k=0}^{K-1} (I - \alpha A)^k b` with ``K = num_terms``.

    The series converges if every eigenvalue of ``A`` lies between 0 and :math:`2/\alpha`. It takes ``K - 1`` products.
    A series whose last term is larger than its first, up to 30 times, is summed again up to its smallest term, and
    ``stats["truncated"]`` is True.
    At a fixed point, its result equals the gradient through the last ``K`` steps of gradient descent with learning rate
    :math:`\alpha`.

    Args:
        num_terms: Number of terms ``K``.
        step_size: :math:`\alpha`, in units of one over the eigenvalues of the lower Hessian. None means one over the
            largest eigenvalue, estimated by a power iteration in every solve. A matrix that is not symmetric may need
            a smaller step size, such that :math:`|\lambda - 1/\alpha| < 1/\alpha` for all its eigenvalues.
        power_steps: Number of products of the power iteration.

    Raises:
        ValueError: If an option is not positive.

    Reference: Lorraine, Vicol, Duvenaud, Optimizing millions of hyperparameters by implicit differentiation,
    AISTATS 2020, algorithm 3.

    Example:
        >>> weight = torch.tensor(2.0, requires_grad=True)
        >>> series = nestor.Implicit(solver=nestor.Neumann(num_terms=3, step_size=0.25))
        >>> theta = nestor.best_response(lambda t, w: (t - w) ** 2, weight.detach(), weight, series)
        >>> torch.autograd.grad(theta, weight)  # 1 - (1 - 0.25 * 2)^3
        (tensor(0.8750),)
    """

    truncation: ClassVar[str] = (
        "diverged and was truncated at its smallest term: the matrix has an eigenvalue above 2 / step_size, or below 0"
    )
    alternative: ClassVar[str] = "use a smaller step_size (below 2 / the largest eigenvalue), or step_size=None"
    seeks_solution: ClassVar[bool] = False
    needs_definite: ClassVar[bool] = True
    num_terms: int = 10
    step_size: float | None = 0.1
    power_steps: int = 8

    def __post_init__(self) -> None:
        check_options(self, counts=["num_terms", "power_steps"], positive=["step_size"])

    def solve(
        self, matrix: LinearOperator, rhs: Params, *, reference: Tensor | None = None, memory: Params = ()
    ) -> Solution:
        """Sum the series.

        Raises:
            SolverError: If the last term is more than 30 times the first, or a number is not finite.
        """
        space = matrix.space
        step_size: float | Tensor = self._largest_step(matrix, rhs) if self.step_size is None else self.step_size
        term, total = list(rhs), list(rhs)
        for _ in range(self.num_terms - 1):
            term = algebra.axpy(-step_size, matrix.apply(term), term)
            total = algebra.add(total, term)
        # The last term approximates the residual: |b - A x| = |(I - alpha A)^K b|, one more product than in the term.
        first, last = space.norm(rhs), space.norm(term)
        length = read_or_keep(first)
        growth = divide(read_or_keep(last), length, unless=length == 0)
        relative = tensor(growth, last)
        if is_tracing():
            require_true(relative <= _CONVERGES)
            stats = {"residual": relative, "iterations": torch.tensor(self.num_terms - 1)}
            return Solution(algebra.scale(step_size, total), {**stats, "truncated": torch.tensor(False)})
        converges = growth <= _CONVERGES
        # One comparison after the whole sum: on an accelerator it waits for the device once in every solve.
        if not bool(converges & is_in_range(length, rhs[0].dtype)):
            if factors := range_factors(space, rhs, float(length), "Neumann"):
                return solve_scaled(self, factors, matrix, rhs, reference, memory)
            if not bool(converges):
                total, relative = self._truncated(matrix, rhs, step_size)
                if not growth <= GROWTH:
                    raise SolverError(
                        f"Neumann(num_terms={self.num_terms}, step_size={float(step_size):.3g}) diverges: its last "
                        f"term is {float(growth):.3g} times the first. The matrix has an eigenvalue above "
                        f"2 / step_size, or below 0. {remedy(matrix.damping)}, or {self.alternative}."
                    )
        stats = {"residual": relative, "iterations": torch.tensor(self.num_terms - 1)}
        truncated = ~converges if isinstance(converges, Tensor) else flag(not converges)
        return Solution(algebra.scale(step_size, total), {**stats, "truncated": truncated})

    def _truncated(self, matrix: LinearOperator, rhs: Params, step_size: float | Tensor) -> tuple[list[Tensor], Tensor]:
        """Sum a series that diverges up to its smallest term; return the sum, and the next term relative to the first.

        The next term is the residual. The sum contains at least the first term.
        """
        space = matrix.space
        term, total, best = list(rhs), list(rhs), list(rhs)
        first = length = space.norm(rhs)
        least = torch.full_like(first, math.inf)
        for _ in range(self.num_terms - 1):
            previous, term = length, algebra.axpy(-step_size, matrix.apply(term), term)
            length = space.norm(term)
            if not bool(torch.isfinite(length)):
                if is_in_range(float(previous), first.dtype):  # else the series itself has overflowed
                    raise bad_product("Neumann")
                break
            if bool(length < least):
                best, least = total, length
            total = algebra.add(total, term)
        return best, least / first

    def _largest_step(self, matrix: LinearOperator, rhs: Params) -> Tensor:
        r"""Return one over the largest eigenvalue, estimated by a power iteration that starts from a fixed vector.

        After a few steps, :math:`|A v|` underestimates the eigenvalue. A symmetric matrix has an eigenvalue within
        :math:`|A v - \theta v|` of the Rayleigh quotient :math:`\theta = v^T A v`. The sum of the two takes no further
        product, exceeds :math:`|A v|` by at most a factor :math:`\sqrt 2`, and converges to the eigenvalue.
        """
        space = matrix.space
        vector = _normalized(space, random_like(space, rhs, seed=0))
        product = matrix.apply(vector)
        largest = space.norm(product)
        for _ in range(self.power_steps - 1):
            vector = _normalized(space, product)
            product = matrix.apply(vector)
            largest = torch.maximum(largest, space.norm(product))
        quotient = space.dot(vector, product)
        bound = quotient.abs() + space.norm(algebra.axpy(-quotient, vector, product))
        largest = torch.maximum(largest, bound)
        return 1 / torch.where(largest == 0, 1.0, largest)

    def max_products(self, dimension: int) -> int:
        """Return ``num_terms - 1``, plus ``power_steps`` if the step size is estimated."""
        return self.num_terms - 1 + (self.power_steps if self.step_size is None else 0)


def _normalized(space: VectorSpace, vector: Params) -> list[Tensor]:
    """Scale a vector to length one; zero stays zero."""
    length = space.norm(vector)
    return algebra.scale(1 / torch.where(length == 0, 1.0, length), vector)
