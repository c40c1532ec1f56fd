"""Conjugate gradients on the normal equations, for any square matrix."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from nestor.solvers.checks import bad_product
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

    Example:
        >>> matrix, b = torch.tensor([[2.0, 1.0], [0.0, 1.0]]), torch.ones(2, requires_grad=True)
        >>> x = torch.linalg.solve(matrix, b.detach())
        >>> x = nestor.root(lambda x, b: matrix @ x - b, x, b, nestor.NormalConjugateGradient())
        >>> torch.autograd.grad(x.sum(), b)  # the sums of the columns of the inverse
        (tensor([0.5000, 0.5000]),)
    """

    least_squares: ClassVar[bool] = True
    seeks_solution: ClassVar[bool] = False  # of least squares, whose residual may be large

    def iterate(
        self, matrix: LinearOperator, rhs: Params, length: float, goal: float, budget: int, scale: float
    ) -> Iterate:
        space = matrix.space
        eps = torch.finfo(rhs[0].dtype).eps
        x = [torch.zeros_like(b) for b in rhs]
        residual = list(rhs)
        direction = gradient = matrix.apply_transposed(residual)
        slope, rest, step, singular = space.norm(gradient), length, 0, False
        size = along = float(slope)
        if not math.isfinite(size):
            raise bad_product("NormalConjugateGradient")
        while step < budget and rest > goal:
            # |A^T r| is rounding: x is the least-squares solution.
            singular = size <= 16 * eps * scale * length
            if singular:
                break
            step += 1
            image = matrix.apply(direction)
            curved = space.norm(image)
            alpha = (slope / curved) ** 2
            before, x = x, algebra.axpy(alpha, direction, x)
            residual = algebra.axpy(-alpha, image, residual)
            gradient = matrix.apply_transposed(residual)
            previous, slope = slope, space.norm(gradient)
            # The comparisons wait for the device, once in each iteration.
            size, remaining, width = torch.stack([slope, space.norm(residual), curved]).tolist()
            scale = max(scale, width / along)
            singular = width <= 4 * eps * scale * along
            if singular:  # the direction is in the null space
                x = before
                break
            rest = remaining
            if not math.isfinite(size + rest):
                raise bad_product("NormalConjugateGradient")
            ratio = (slope / previous) ** 2
            along = math.hypot(size, float(ratio) * along)
            direction = algebra.axpy(ratio, direction, gradient)
        return Iterate(x, rest, step, scale, broke=singular, singular=singular)

    def max_products(self, dimension: int) -> int:
        """Return two products for each iteration, and one for the first gradient. One may measure the residual."""
        return 2 * self.max_steps + 1
