"""Conjugate gradients on the normal equations, for any square matrix."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nestor.solvers.checks import check_finite
from nestor.solvers.krylov import Iterate, KrylovSolver
from nestor.solvers.linear_operator import LinearOperator
from nestor.vectors import Params, algebra


@dataclass(frozen=True, kw_only=True)
class NormalConjugateGradient(KrylovSolver):
    r"""Minimise :math:`\lVert b - A x \rVert` by conjugate gradients on :math:`A^T A x = A^T b` (CGNR, as in LSQR).

    Two products in each iteration. Works for indefinite and non-symmetric matrices, and for singular ones in the
    least-squares sense, but squares the condition number.

    Args:
        max_steps: Largest number of iterations.
        rtol: Stop when :math:`\lVert b - A x \rVert \le \text{rtol} \cdot \lVert b \rVert`.

    Raises:
        ValueError: If an option is out of range.

    Reference: Hestenes and Stiefel, Methods of conjugate gradients for solving linear systems, 1952, section 10.
    """

    def iterate(self, matrix: LinearOperator, rhs: Params, length: Tensor, goal: Tensor) -> Iterate:
        space = matrix.space
        x = [torch.zeros_like(b) for b in rhs]
        residual = list(rhs)
        gradient = matrix.apply_transposed(residual) if bool(length > 0) else x
        direction, square, step = gradient, space.dot(gradient, gradient), 0
        # The comparison waits for the device once in each iteration.
        while step < self.max_steps and bool((length > goal) & (square > 0)):
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
        return x, length, step

    def max_products(self, dimension: int) -> int:
        """Return two products for each iteration, and one for the first gradient."""
        return 2 * self.max_steps + 1
