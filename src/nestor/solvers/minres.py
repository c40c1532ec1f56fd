"""Minimal residuals, for symmetric systems that may be indefinite."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nestor.solvers.checks import check_finite
from nestor.solvers.krylov import Iterate, KrylovSolver
from nestor.solvers.linear_operator import LinearOperator
from nestor.vectors import Params, algebra


@dataclass(frozen=True, kw_only=True)
class MINRES(KrylovSolver):
    r"""Minimise :math:`\lVert b - A x \rVert` over Krylov spaces for a symmetric, possibly indefinite matrix.

    One product in each iteration and six vectors of memory; the norm of the residual never increases. MINRES solves the
    system also at a saddle point or far from a minimum, where :class:`ConjugateGradient` meets negative curvature.

    Args:
        max_steps: Largest number of iterations.
        rtol: Stop when :math:`\lVert b - A x \rVert \le \text{rtol} \cdot \lVert b \rVert`.

    Raises:
        ValueError: If an option is out of range.

    Reference: Paige and Saunders, Solution of sparse indefinite systems of linear equations, SIAM J. Numer. Anal.
    12(4), 1975.
    """

    needs_symmetric: ClassVar[bool] = True

    def iterate(self, matrix: LinearOperator, rhs: Params, length: Tensor, goal: Tensor) -> Iterate:
        space = matrix.space
        zeros = [torch.zeros_like(b) for b in rhs]
        x, before, older, newer = zeros, zeros, zeros, zeros
        vector = algebra.scale(1 / torch.where(length == 0, 1.0, length), rhs)
        zero, one = torch.zeros_like(goal), torch.ones_like(goal)
        beta, rest = zero, length
        (c, s), (c_old, s_old) = (one, zero), (one, zero)
        step = 0
        while step < self.max_steps and bool(rest.abs() > goal):
            step += 1
            # Lanczos: the next vector of the basis.
            product = algebra.axpy(-beta, before, matrix.apply(vector))
            alpha = space.dot(vector, product)
            product = algebra.axpy(-alpha, vector, product)
            following = space.norm(product)
            # Givens rotations: the last column of R.
            epsilon = s_old * beta
            delta_bar = c_old * beta
            delta = c * delta_bar + s * alpha
            gamma_bar = c * alpha - s * delta_bar
            gamma = torch.hypot(gamma_bar, following)
            safe = torch.where(gamma == 0, 1.0, gamma)
            c_old, s_old, (c, s) = c, s, (gamma_bar / safe, following / safe)
            search = algebra.axpy(-epsilon, older, algebra.axpy(-delta, newer, vector))
            older, newer = newer, algebra.scale(1 / safe, search)
            x = algebra.axpy(c * rest, newer, x)
            rest = -s * rest
            before, beta = vector, following
            vector = algebra.scale(1 / torch.where(following == 0, 1.0, following), product)
        check_finite(rest, "MINRES")
        return x, rest.abs(), step
