"""Stabilized biconjugate gradients, for any square matrix."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nestor.errors import SolverError
from nestor.solvers.checks import check_finite
from nestor.solvers.krylov import Iterate, KrylovSolver
from nestor.solvers.linear_operator import LinearOperator
from nestor.vectors import Params, algebra


@dataclass(frozen=True, kw_only=True)
class BiCGSTAB(KrylovSolver):
    r"""Solve a non-symmetric system with two products in each iteration and seven vectors of memory.

    Args:
        max_steps: Largest number of iterations.
        rtol: Stop when :math:`\lVert b - A x \rVert \le \text{rtol} \cdot \lVert b \rVert`.

    Raises:
        ValueError: If an option is out of range.

    Reference: van der Vorst, Bi-CGSTAB, SIAM J. Sci. Stat. Comput. 13(2), 1992.
    """

    def iterate(self, matrix: LinearOperator, rhs: Params, length: Tensor, goal: Tensor) -> Iterate:
        space = matrix.space
        x = [torch.zeros_like(b) for b in rhs]
        residual = shadow = direction = list(rhs)
        rho, step = space.dot(shadow, residual), 0
        while step < self.max_steps and bool(length > goal):
            step += 1
            product = matrix.apply(direction)
            alpha = rho / space.dot(shadow, product)
            half = algebra.axpy(-alpha, product, residual)
            x = algebra.axpy(alpha, direction, x)
            if bool(space.norm(half) <= goal):
                length = space.norm(half)
                break
            image = matrix.apply(half)
            omega = space.dot(image, half) / space.dot(image, image)
            x = algebra.axpy(omega, half, x)
            residual = algebra.axpy(-omega, image, half)
            previous, rho = rho, space.dot(shadow, residual)
            beta = (rho / previous) * (alpha / omega)
            direction = algebra.axpy(beta, algebra.axpy(-omega, product, direction), residual)
            length = space.norm(residual)
            if not bool(torch.isfinite(length) & torch.isfinite(beta)):
                # The error names the matrix only if the vector that it multiplied was finite.
                half_is_finite = torch.isfinite(space.norm(half))
                check_finite(space.norm(product) + torch.where(half_is_finite, space.norm(image), 0.0), "BiCGSTAB")
                raise SolverError(
                    f"BiCGSTAB broke down after {step} iterations (a division by zero in its recursion). Use GMRES(), "
                    "which does not break down, or add damping."
                )
        return x, length, step

    def max_products(self, dimension: int) -> int:
        """Return two products for each iteration."""
        return 2 * self.max_steps
