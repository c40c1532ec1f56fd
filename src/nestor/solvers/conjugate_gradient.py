"""Conjugate gradients, for symmetric positive definite systems."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nestor.autodiff.instruments import is_tracing, require_true
from nestor.autodiff.scalar import Flag, Scalar, divide, largest, least, read_or_keep, tensor, where
from nestor.errors import SolverError, check_options
from nestor.solvers.checks import bad_cotangent, bad_product, check_symmetric
from nestor.solvers.linear_operator import LinearOperator
from nestor.solvers.linear_solver import LinearSolver, Solution
from nestor.solvers.preconditioners import Preconditioner
from nestor.vectors import Params, algebra


@dataclass(frozen=True, kw_only=True)
class ConjugateGradient(LinearSolver):
    r"""Minimise :math:`\tfrac12 x^T A x - b^T x` over Krylov spaces, from :math:`x_0 = 0`.

    One product in each iteration; exact after as many iterations as ``A`` has distinct eigenvalues.

    Args:
        max_steps: Largest number of iterations.
        rtol: Stop when :math:`|b - A x| \le \text{rtol} \cdot |b|`. 0 runs all ``max_steps``, or until the residual
            is zero.
        check_every: Number of iterations between two checks of the residual. A check waits for the device, so on an
            accelerator a larger number is faster. Iterations after convergence do not change the solution.
        preconditioner: An approximate inverse that is applied to the residuals: ``HutchinsonDiagonal()`` for variables
            of different scales, ``NystromPreconditioner()`` for few large eigenvalues, ``Diagonal(values)`` for a known
            diagonal.
        truncate: At a direction of negative curvature return the current iterate, or that direction if it is the first
            one, instead of an error. This is truncated Newton, for lower losses that are not convex. ``stats`` then has
            ``"truncated"``; a warm start does not continue from a truncated solution.

    Raises:
        ValueError: If ``max_steps`` or ``check_every`` is not positive, or ``rtol`` negative.

    References:
        Hestenes and Stiefel, Methods of conjugate gradients for solving linear systems, 1952. Truncation: Steihaug, The
        conjugate gradient method and trust regions in large scale optimization, SIAM J. Numer. Anal. 20(3), 1983.
    """

    needs_definite: ClassVar[bool] = True
    max_steps: int = 20
    rtol: float = 1e-6
    check_every: int = 1
    preconditioner: Preconditioner | None = None
    truncate: bool = False

    def __post_init__(self) -> None:
        check_options(self, counts=["max_steps", "check_every"], tolerances=["rtol"])

    def solve(
        self, matrix: LinearOperator, rhs: Params, *, reference: Tensor | None = None, memory: Params = ()
    ) -> Solution:
        """Solve ``matrix @ x = rhs`` for a symmetric positive definite matrix.

        Raises:
            SolverError: If the matrix is not symmetric, a direction has negative curvature, or a number is not finite.
        """
        check_symmetric(matrix, "ConjugateGradient")
        space = matrix.space
        prepared = None if self.preconditioner is None else self.preconditioner.prepare(matrix, rhs)
        x = [torch.zeros_like(b) for b in rhs]
        residual = list(rhs)
        square = initial = read_or_keep(space.dot(residual, residual))
        goal = square if reference is None else read_or_keep(reference) ** 2
        # The squared norm underflows before the norm does: a residual below `tiny` counts as converged.
        threshold = largest(self.rtol**2 * goal, torch.finfo(rhs[0].dtype).tiny)
        direction = residual if prepared is None else prepared(residual)
        inner = square if prepared is None else read_or_keep(space.dot(residual, direction))
        done: Flag = square <= threshold
        lowest: Scalar = math.inf
        step = 0
        for step in range(self.max_steps + 1):
            if step % self.check_every == 0 or step == self.max_steps:
                finished = self._check(initial, square, lowest, done)
                if step == self.max_steps or finished:
                    break
            product = matrix.apply(direction)
            curvature = read_or_keep(space.dot(direction, product))
            lowest = least(lowest, where(done, math.inf, curvature))
            stop = done | (curvature <= 0) if self.truncate else done
            # After convergence the step length is zero, so that the iterate stays.
            length = divide(inner, curvature, unless=stop)
            if self.truncate and step == 0:
                # Negative curvature in the first direction: return that direction.
                length = where(stop ^ done, 1.0, length)
            x = algebra.axpy(length, direction, x)
            residual = algebra.axpy(-length, product, residual)
            square = read_or_keep(space.dot(residual, residual))
            scaled = residual if prepared is None else prepared(residual)
            previous, inner = inner, square if prepared is None else read_or_keep(space.dot(residual, scaled))
            ratio = divide(inner, previous, unless=stop)
            direction = algebra.axpy(ratio, direction, scaled)
            done = stop | (square <= threshold)
        relative = tensor(divide(square, initial, unless=initial == 0) ** 0.5, rhs[0])
        stats = {"residual": relative, "iterations": torch.tensor(step)}
        return Solution(x, {**stats, "truncated": torch.as_tensor(lowest <= 0)} if self.truncate else stats)

    def _check(self, initial: Scalar, square: Scalar, lowest: Scalar, done: Flag) -> bool:
        """Check the scalars of the iteration with one transfer from the device; return whether the solve is done."""
        if is_tracing():
            convex = torch.as_tensor(lowest) > (-math.inf if self.truncate else 0.0)
            require_true(torch.isfinite(torch.as_tensor(initial + square)) & convex)
            return False
        if isinstance(done, Tensor):
            found = [initial, square, lowest, done.to(torch.float64)]
            values = torch.stack([torch.as_tensor(value, device=done.device).double() for value in found]).tolist()
            initial, square, lowest, done = values[0], values[1], values[2], bool(values[3])
        if not math.isfinite(initial):
            raise bad_cotangent("ConjugateGradient", "squared norm", float(initial))
        if not math.isfinite(square) or math.isnan(lowest):
            raise bad_product("ConjugateGradient")
        if not self.truncate and not lowest > 0:
            raise SolverError(
                f"ConjugateGradient met a direction of curvature p^T H p = {lowest:.3g}, which is not positive: "
                "the lower objective is not strictly convex here. Add damping, Implicit(solver=ConjugateGradient(), "
                "damping=1e-2), or truncate=True, regularize the lower loss, or use a response without a solve, "
                "such as T1T2()."
            )
        return bool(done)

    def max_products(self, dimension: int) -> int:
        """Return ``max_steps``, plus the products of the preconditioner."""
        return self.max_steps + (self.preconditioner.max_products(dimension) if self.preconditioner is not None else 0)
