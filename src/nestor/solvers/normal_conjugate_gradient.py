"""Conjugate gradients on the normal equations, for any square matrix."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nestor.solvers.checks import check_finite, check_options, finite_norm
from nestor.solvers.linear_operator import LinearOperator
from nestor.solvers.linear_solver import LinearSolver, Solution, measured
from nestor.vectors import Params, algebra


@dataclass(frozen=True, kw_only=True)
class NormalConjugateGradient(LinearSolver):
    r"""Minimise :math:`\lVert b - A x \rVert` by conjugate gradients on :math:`A^T A x = A^T b` (CGNR, as in LSQR).

    Two products in each iteration. Works for indefinite and non-symmetric matrices, but squares the condition number.

    Args:
        max_steps: Largest number of iterations.
        rtol: Stop when :math:`\lVert b - A x \rVert \le \text{rtol} \cdot \lVert b \rVert`.

    Raises:
        ValueError: If an option is out of range.

    Reference: Hestenes and Stiefel, Methods of conjugate gradients for solving linear systems, 1952, section 10.
    """

    max_steps: int = 50
    rtol: float = 1e-6

    def __post_init__(self) -> None:
        check_options(self, counts=["max_steps"], tolerances=["rtol"])

    def solve(
        self, matrix: LinearOperator, rhs: Params, *, reference: Tensor | None = None, memory: Params = ()
    ) -> Solution:
        """Solve ``matrix @ x = rhs``, in the least-squares sense if the matrix is singular.

        Raises:
            SolverError: If a number is not finite.
        """
        space = matrix.space
        x = [torch.zeros_like(b) for b in rhs]
        residual = list(rhs)
        length = initial = finite_norm(space, rhs, "NormalConjugateGradient")
        scale = length if reference is None else reference
        gradient = matrix.apply_transposed(residual) if bool(length > 0) else x
        direction, square, step = gradient, space.dot(gradient, gradient), 0
        # The comparison waits for the device once in each iteration.
        while step < self.max_steps and bool((length > self.rtol * scale) & (square > 0)):
            step += 1
            image = matrix.apply(direction)
            alpha = square / space.dot(image, image)
            x = algebra.axpy(alpha, direction, x)
            residual = algebra.axpy(-alpha, image, residual)
            gradient = matrix.apply_transposed(residual)
            previous, square = square, space.dot(gradient, gradient)
            direction = algebra.axpy(square / previous, direction, gradient)
            length = space.norm(residual)
        # A gradient that is not finite ends the loop as well.
        check_finite(length + square, "NormalConjugateGradient")
        return Solution(x, measured(length, initial, step))

    def max_products(self, dimension: int) -> int:
        """Return two products for each iteration, and one for the first gradient."""
        return 2 * self.max_steps + 1
