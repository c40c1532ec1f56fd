"""Minimal residuals, for symmetric systems that may be indefinite."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from nestor.solvers.checks import bad_product
from nestor.solvers.krylov import Iterate, KrylovSolver, rated
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

    Example:
        >>> weight = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> saddle = lambda t, w: (t[0] - w[0]) * (t[1] - w[1])  # eigenvalues 1 and -1
        >>> response = nestor.Implicit(solver=nestor.MINRES())
        >>> theta = nestor.best_response(saddle, weight.detach(), weight, response)
        >>> torch.autograd.grad(theta.sum(), weight)
        (tensor([1., 1.]),)
    """

    needs_symmetric: ClassVar[bool] = True

    def iterate(
        self, matrix: LinearOperator, rhs: Params, length: float, goal: float, budget: int, scale: float
    ) -> Iterate:
        space = matrix.space
        zeros = [torch.zeros_like(b) for b in rhs]
        x, before, older, newer = zeros, zeros, zeros, zeros
        vector = algebra.scale(1 / length, rhs)
        eps = torch.finfo(rhs[0].dtype).eps
        beta, rest = 0.0, length
        (c, s), (c_old, s_old) = (1.0, 0.0), (1.0, 0.0)
        least, most, step, singular = math.inf, 0.0, 0, False
        best, merit = x, math.inf
        while step < budget and abs(rest) > goal:
            step += 1
            # Lanczos: the next vector of the basis.
            product = algebra.axpy(-beta, before, matrix.apply(vector))
            overlap = space.dot(vector, product)
            product = algebra.axpy(-overlap, vector, product)
            # The comparisons wait for the device, once in each iteration.
            alpha, following, size = torch.stack([overlap, space.norm(product), space.norm(x)]).tolist()
            if not math.isfinite(alpha + following):
                raise bad_product("MINRES")
            scale = max(scale, math.hypot(beta, alpha, following))
            if (rate := rated(abs(rest), scale * size / length)) < merit:
                best, merit = x, rate
            # Below rounding, the basis spans an invariant space.
            following = following if following > 4 * eps * scale else 0.0
            # Givens rotations: the last column of R.
            epsilon = s_old * beta
            delta_bar = c_old * beta
            delta = c * delta_bar + s * alpha
            gamma_bar = c * alpha - s * delta_bar
            gamma = math.hypot(gamma_bar, following)
            # |A r| / |r|: the residual is in the null space if this is rounding, or small without any gain.
            shrinks = abs(gamma_bar) > 2 * eps**0.5 * gamma
            if math.hypot(gamma_bar, c * following) <= (32 * eps if shrinks else eps**0.5) * scale:
                singular = True
                break
            least, most = min(least, gamma), max(most, gamma)
            c_old, s_old, (c, s) = c, s, (gamma_bar / gamma, following / gamma)
            search = algebra.axpy(-epsilon, older, algebra.axpy(-delta, newer, vector))
            older, newer = newer, algebra.scale(1 / gamma, search)
            x = algebra.axpy(c * rest, newer, x)
            rest = -s * rest
            before, beta = vector, following
            if following > 0:
                vector = algebra.scale(1 / following, product)
        is_wild = abs(rest) > goal and rated(abs(rest), scale * float(space.norm(x)) / length) > merit
        return Iterate(
            best if is_wild else x,
            abs(rest),
            step,
            scale,
            drift=(most / least) ** 2,  # that of its short recurrences grows with the condition number
            broke=singular or is_wild,
            singular=singular,
            fallback=best,
        )
