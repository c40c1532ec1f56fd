"""Stabilized biconjugate gradients, for any square matrix, in little memory."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nestor.errors import SolverError
from nestor.solvers.finite import check_finite, finite_norm
from nestor.solvers.linear_operator import LinearOperator
from nestor.solvers.linear_solver import LinearSolver, Solution
from nestor.vectors import algebra
from nestor.vectors.algebra import Params


@dataclass(frozen=True, kw_only=True)
class BiCGSTAB(LinearSolver):
    r"""Solve a non-symmetric system with two products an iteration and seven vectors of memory.

    Args:
        max_steps: Most iterations.
        rtol: Stop when :math:`\lVert b - A x \rVert \le \text{rtol} \cdot \lVert b \rVert`.

    Raises:
        ValueError: If an option is out of range.

    Reference: van der Vorst, Bi-CGSTAB, SIAM J. Sci. Stat. Comput. 13(2), 1992.
    """

    max_steps: int = 50
    rtol: float = 1e-6

    def __post_init__(self) -> None:
        if self.max_steps < 1:
            raise ValueError(f"BiCGSTAB(max_steps={self.max_steps}) must be at least 1.")
        if not (self.rtol >= 0 and math.isfinite(self.rtol)):
            raise ValueError(f"BiCGSTAB(rtol={self.rtol}) must be a finite number >= 0.")

    def solve(
        self, matrix: LinearOperator, rhs: Params, *, reference: Tensor | None = None, memory: Params = ()
    ) -> Solution:
        """Solve ``matrix @ x = rhs``.

        Raises:
            SolverError: If the recursion breaks down before it has converged.
        """
        space = matrix.space
        x = [torch.zeros_like(b) for b in rhs]
        residual = shadow = direction = list(rhs)
        length = initial = finite_norm(space, rhs, "BiCGSTAB")
        scale = length if reference is None else reference
        rho, step = space.dot(shadow, residual), 0
        while step < self.max_steps and bool(length > self.rtol * scale):
            step += 1
            product = matrix.apply(direction)
            alpha = rho / space.dot(shadow, product)
            half = algebra.axpy(-alpha, product, residual)
            x = algebra.axpy(alpha, direction, x)
            if bool(space.norm(half) <= self.rtol * scale):
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
                # Blame the matrix only where it was given finite vectors.
                given = torch.isfinite(space.norm(half))
                check_finite(space.norm(product) + torch.where(given, space.norm(image), 0.0), "BiCGSTAB")
                raise SolverError(
                    f"BiCGSTAB broke down after {step} iterations (a division by zero in its recursion). Use GMRES(), "
                    "which cannot, or add damping."
                )
        relative = length / torch.where(initial == 0, 1.0, initial)
        return Solution(x, {"residual": relative, "iterations": torch.tensor(step)})

    def max_products(self, dimension: int) -> int:
        """Two an iteration."""
        return 2 * self.max_steps
