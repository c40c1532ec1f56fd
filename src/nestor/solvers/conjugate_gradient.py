"""Conjugate gradients, for symmetric positive definite systems."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nestor.autodiff.instruments import is_tracing
from nestor.autodiff.scalar import Flag, divide, largest, read_or_keep, tensor, where
from nestor.errors.options import check_options
from nestor.solvers.checks import check_symmetric
from nestor.solvers.curvatures import Curvatures
from nestor.solvers.linear_operator import LinearOperator
from nestor.solvers.linear_solver import LinearSolver, Solution
from nestor.solvers.preconditioners import Preconditioner
from nestor.solvers.residual_check import ResidualCheck
from nestor.solvers.scaling import range_factors, require_in_range, solve_scaled
from nestor.vectors import Params, algebra


@dataclass(frozen=True, kw_only=True)
class ConjugateGradient(LinearSolver):
    r"""Minimise :math:`\tfrac12 x^T A x - b^T x` over Krylov spaces, from :math:`x_0 = 0`.

    One product in each iteration; exact after as many iterations as ``A`` has distinct eigenvalues. The solution of a
    singular system is the one of minimum norm.

    At a direction of negative curvature the solve is truncated: it returns the iterate before, as in truncated Newton
    methods, and ``stats["truncated"]`` is True. If the first direction is such a direction, it returns that direction:
    the right-hand side, preconditioned, and shortened if the matrix lengthens it more than 29 times. A curvature is
    zero if it is within rounding of zero, relative to the largest one; a system without a solution is an error. If the
    residual has grown to 30 times the smallest one, the solve is truncated at the smallest one; if that is the first
    one and a direction of negative curvature was met, it returns the first direction, shortened in the same way.

    Args:
        max_steps: Largest number of iterations.
        rtol: Stop when :math:`|b - A x| \le \text{rtol} \cdot |b|`. 0 runs all ``max_steps``, or until the residual
            is that of rounding.
        check_every: Number of iterations between two checks of the residual. A check waits for the device, so on an
            accelerator a larger number is faster. Iterations after convergence do not change the solution.
        preconditioner: An approximate inverse that is applied to the residuals: ``HutchinsonDiagonal()`` for variables
            of different scales, ``NystromPreconditioner()`` for few large eigenvalues, ``Diagonal(values)`` for a known
            diagonal.

    Raises:
        ValueError: If ``max_steps`` or ``check_every`` is not positive, or ``rtol`` negative.

    References:
        Hestenes and Stiefel, Methods of conjugate gradients for solving linear systems, 1952. Truncation: Steihaug, The
        conjugate gradient method and trust regions in large scale optimization, SIAM J. Numer. Anal. 20(3), 1983.

    Example:
        >>> weight, scales = torch.tensor([3.0, 4.0], requires_grad=True), torch.tensor([1.0, 10.0])
        >>> exact = nestor.Implicit(solver=nestor.ConjugateGradient(max_steps=10, rtol=1e-8))
        >>> loss = lambda t, w: (scales * (t - w) ** 2).sum()
        >>> theta = nestor.best_response(loss, weight.detach(), weight, exact)
        >>> torch.autograd.grad(theta.sum(), weight)
        (tensor([1.0000, 1.0000]),)
    """

    truncation: ClassVar[str] = (
        "met a direction of negative or vanishing curvature, where the lower objective is not strictly convex, and "
        "returned the iterate before"
    )
    alternative: ClassVar[str] = "use MINRES(), or the curvature GaussNewton()"
    needs_definite: ClassVar[bool] = True
    max_steps: int = 20
    rtol: float = 1e-6
    check_every: int = 1
    preconditioner: Preconditioner | None = None

    def __post_init__(self) -> None:
        check_options(self, counts=["max_steps", "check_every"], tolerances=["rtol"])

    def solve(
        self, matrix: LinearOperator, rhs: Params, *, reference: Tensor | None = None, memory: Params = ()
    ) -> Solution:
        """Solve ``matrix @ x = rhs`` for a symmetric positive definite matrix, or a singular one if a solution exists.

        Raises:
            SolverError: If the matrix is not symmetric, or a number is not finite.
            SingularError: If the matrix is singular and the right-hand side is not in its range.
        """
        check_symmetric(matrix, "ConjugateGradient")
        space = matrix.space
        square = initial = read_or_keep(space.dot(rhs, rhs))
        if is_tracing():
            require_in_range(space, rhs, tensor(initial, rhs[0]))
        elif factors := range_factors(space, rhs, float(initial) ** 0.5, "ConjugateGradient"):
            return solve_scaled(self, factors, matrix, rhs, reference, memory)
        prepared = None if self.preconditioner is None else self.preconditioner.prepare(matrix, rhs)
        x = [torch.zeros_like(b) for b in rhs]
        residual = list(rhs)
        goal = square if reference is None else read_or_keep(reference) ** 2
        # Below the rounding unit, the recurrence reduces rounding errors only.
        numbers = torch.finfo(rhs[0].dtype)
        threshold = largest(max(self.rtol, numbers.eps) ** 2 * goal, numbers.tiny)
        direction = residual if prepared is None else prepared(residual)
        inner = square if prepared is None else read_or_keep(space.dot(residual, direction))
        curvatures = Curvatures(matrix, prepared, numbers.eps, inner)
        check = ResidualCheck(curvatures, rhs, x, initial, inner)
        done: Flag = square <= threshold
        # Known without another transfer from the device, except for a warm start.
        is_zero = not is_tracing() and (float(initial) == 0 or reference is not None)
        finished, step = is_zero and bool(done), 0
        while step < self.max_steps and not finished:
            product = matrix.apply(direction)
            curvature = read_or_keep(space.dot(direction, product))
            stop = done | curvatures.stops(step, initial, product, curvature, done)
            # After the end the step length is zero, so that the iterate stays.
            length = divide(inner, curvature, unless=stop)
            if step == 0:
                length = where(curvatures.first, curvatures.first_length, length)
            x = algebra.axpy(length, direction, x)
            residual = algebra.axpy(-length, product, residual)
            square = read_or_keep(space.dot(residual, residual))
            scaled = residual if prepared is None else prepared(residual)
            previous, inner = inner, square if prepared is None else read_or_keep(space.dot(residual, scaled))
            ratio = divide(inner, previous, unless=stop)
            curvatures.turns(inner, ratio)
            direction = algebra.axpy(ratio, direction, scaled)
            done = stop | (square <= threshold)
            step += 1
            if step % self.check_every == 0 or step == self.max_steps:
                finished = check(x, square, inner, done)
        return check.end(x, square, inner, threshold, step)

    def max_products(self, dimension: int) -> int:
        """Return ``max_steps``, plus the products of the preconditioner; one may measure the residual."""
        return self.max_steps + (self.preconditioner.max_products(dimension) if self.preconditioner is not None else 0)
