"""A quasi-Newton inverse from the steps of the lower level."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nestor.errors import SolverError
from nestor.errors.options import check_options
from nestor.solvers.checks import check_finite, check_symmetric
from nestor.solvers.krylov import GROWTH
from nestor.solvers.linear_operator import LinearOperator
from nestor.solvers.linear_solver import LinearSolver, Solution, measured
from nestor.solvers.scaling import range_factors, solve_scaled
from nestor.vectors import Params, VectorSpace, algebra, split


@dataclass(frozen=True, kw_only=True)
class LBFGSInverse(LinearSolver):
    r"""Apply the L-BFGS inverse from the last steps of the lower level, without any product.

    .. math:: s_t = \theta_{t+1} - \theta_t, \quad y_t = g_{t+1} - g_t \approx H s_t, \qquad
        B_{t+1} = (I - \rho s y^T) B_t (I - \rho y s^T) + \rho s s^T, \quad \rho = 1 / s^T y

    The pairs are differences of the gradients of the run, so they are secants of one function only if every step uses
    the same batch. Pairs of small or negative curvature are skipped. ``max_steps`` adds aimed pairs: each takes one
    product, in the direction that the current inverse gives for the residual. With enough aimed pairs the result is
    exact on a quadratic. They are required if no step is recorded.

    Args:
        pairs: Largest number of pairs of the run.
        max_steps: Largest number of aimed pairs. At negative curvature no more are added, and ``stats["truncated"]`` is
            True. If it is met before any pair is known, the result is the right-hand side, as for
            :class:`ConjugateGradient`.
        keep: Number of aimed pairs in the memory for the next solve; an engine keeps it between upper steps. The pairs
            only determine directions, so an old pair does not reduce the accuracy if ``max_steps`` suffices for
            ``rtol``.
        rtol: Add no more pairs when :math:`\lVert b - A x \rVert \le \text{rtol} \cdot \lVert b \rVert`.

    Raises:
        ValueError: If an option is out of range.

    Reference: Ramzi et al., SHINE: Sharing the inverse estimate from the forward pass for bi-level optimization and
    implicit models, ICLR 2022, with its outer-problem awareness by aimed pairs.

    Example:
        >>> weight, scales = torch.tensor([3.0, 4.0], requires_grad=True), torch.tensor([1.0, 10.0])
        >>> aimed = nestor.Implicit(solver=nestor.LBFGSInverse(max_steps=5))  # no run, so no pairs but the aimed ones
        >>> loss = lambda t, w: (scales * (t - w) ** 2).sum()
        >>> theta = nestor.best_response(loss, weight.detach(), weight, aimed)
        >>> torch.autograd.grad(theta.sum(), weight)
        (tensor([1.0000, 1.0000]),)
    """

    truncation: ClassVar[str] = "met a direction of negative curvature, where the lower objective is not convex"
    alternative: ClassVar[str] = "use MINRES(), or the curvature GaussNewton()"
    seeks_solution: ClassVar[bool] = False
    needs_definite: ClassVar[bool] = True
    pairs: int = 10
    max_steps: int = 0
    keep: int = 0
    rtol: float = 1e-6

    def __post_init__(self) -> None:
        check_options(self, tolerances=["rtol"])
        if self.pairs < 0 or self.max_steps < 0 or self.pairs + self.max_steps < 1:
            raise ValueError(f"LBFGSInverse(pairs={self.pairs}, max_steps={self.max_steps}) has nothing to work with.")
        if self.keep < 0 or (self.keep and not self.max_steps):
            raise ValueError(
                f"LBFGSInverse(keep={self.keep}, max_steps={self.max_steps}) keeps aimed pairs, whose number is at "
                "most max_steps: both must be positive."
            )

    @property
    def num_secants(self) -> int:
        """Return ``pairs``."""
        return self.pairs

    def solve(
        self, matrix: LinearOperator, rhs: Params, *, reference: Tensor | None = None, memory: Params = ()
    ) -> Solution:
        """Apply the inverse to ``rhs``, for a symmetric positive definite matrix.

        Raises:
            SolverError: If the matrix is not symmetric, no pair is usable, a number is not finite, or the memory is of
                another solver or level.
        """
        check_symmetric(matrix, "LBFGSInverse")
        space = matrix.space
        length = space.norm(rhs)
        if factors := range_factors(space, rhs, float(length), "LBFGSInverse"):
            return solve_scaled(self, factors, matrix, rhs, reference, memory)
        scale = length if reference is None else reference
        kept = self._kept_pairs(memory, rhs)
        recorded = matrix.secants()[-self.pairs :] if self.pairs else []
        known = [pair for pair in [*kept, *recorded] if _usable(space, *pair)]
        if not known and not self.max_steps:
            raise SolverError(
                "LBFGSInverse has no secant pair of positive curvature. There is none outside an engine, after a "
                "single step, or if every step uses another batch. Add aimed pairs, LBFGSInverse(max_steps=10)."
            )
        if not self.max_steps:
            return Solution(_apply(space, known, rhs), {"iterations": torch.tensor(0)})
        aimed, negative = list(kept), False
        x, residual, rest, step = [torch.zeros_like(b) for b in rhs], list(rhs), length, 0
        while step < self.max_steps and bool((rest > self.rtol * scale) & (rest > 0)):
            direction = _apply(space, known, residual)
            image = matrix.apply(direction)
            step += 1
            negative = not _usable(space, direction, image)
            if negative:
                check_finite(space.norm(image), "LBFGSInverse")
                if step == 1:
                    # The result of the known pairs alone, or without any the right-hand side, shortened if the matrix
                    # lengthens it too much. Its residual is known from the product.
                    factor = torch.clamp((GROWTH - 1) * length / space.norm(image), max=1.0)
                    x = direction if known else algebra.scale(factor, direction)
                    rest = space.norm(algebra.subtract(rhs, image if known else algebra.scale(factor, image)))
                break
            # The exact step along the direction. The next directions use the new pair.
            along = space.dot(direction, residual) / space.dot(direction, image)
            x = algebra.axpy(along, direction, x)
            residual = algebra.axpy(-along, image, residual)
            rest = space.norm(residual)
            known.append((direction, image))
            aimed.append((direction, image))
        stats = measured(rest, length, step, truncated=negative)
        latest = aimed[-self.keep :] if self.keep else []
        return Solution(x, stats, [part for pair in latest for vector in pair for part in vector])

    def _kept_pairs(self, memory: Params, rhs: Params) -> list[tuple[Params, Params]]:
        """Split the memory into pairs of vectors like ``rhs``."""
        count = len(memory) // (2 * len(rhs))
        if [part.shape for part in memory] != 2 * count * [part.shape for part in rhs]:
            raise SolverError(
                "LBFGSInverse was given a memory whose vectors are not like the right-hand side: the memory is of "
                "another solver or another level. Pass memory=(), or start the run without the state of the old run."
            )
        vectors = split(memory, 2 * count * [len(rhs)])
        return list(zip(vectors[::2], vectors[1::2], strict=True))

    def max_products(self, dimension: int) -> int:
        """Return ``max_steps``: one product for each aimed pair."""
        return self.max_steps


def _usable(space: VectorSpace, s: Params, y: Params) -> bool:
    """Return whether the curvature of the pair is positive beyond rounding."""
    product = space.dot(s, y)
    # Within rounding, the sign of the product carries no information.
    least = max(1e-8, 10 * torch.finfo(product.dtype).eps)
    return bool((product > least * space.norm(s) * space.norm(y)) & torch.isfinite(product))


def _apply(space: VectorSpace, pairs: list[tuple[Params, Params]], vector: Params) -> list[Tensor]:
    """Multiply the inverse onto a vector by the two-loop recursion (Nocedal, 1980)."""
    q = list(vector)
    kept = []
    for s, y in reversed(pairs):
        rho = 1 / space.dot(s, y)
        alpha = rho * space.dot(s, q)
        q = algebra.axpy(-alpha, y, q)
        kept.append((rho, alpha))
    if pairs:
        s, y = pairs[-1]
        q = algebra.scale(space.dot(s, y) / space.dot(y, y), q)
    for (s, y), (rho, alpha) in zip(pairs, reversed(kept), strict=True):
        beta = rho * space.dot(y, q)
        q = algebra.axpy(alpha - beta, s, q)
    return q
