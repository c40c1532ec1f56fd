"""A quasi-Newton inverse from steps that were taken anyway."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nestor.errors import SolverError
from nestor.solvers.finite import check_finite, finite_norm
from nestor.solvers.linear_operator import LinearOperator
from nestor.solvers.linear_solver import LinearSolver, Solution
from nestor.vectors import algebra
from nestor.vectors.algebra import Params, VectorSpace, split


@dataclass(frozen=True, kw_only=True)
class LBFGSInverse(LinearSolver):
    r"""Apply the L-BFGS inverse made of the lower level's own last steps: no product at all.

    .. math:: s_t = \theta_{t+1} - \theta_t, \quad y_t = g_{t+1} - g_t \approx H s_t, \qquad
        B_{t+1} = (I - \rho s y^T) B_t (I - \rho y s^T) + \rho s s^T, \quad \rho = 1 / s^T y

    The pairs are differences of the gradients that the run has computed, so they are secants of one function only if
    every step sees the same batch. Pairs of small or negative curvature are skipped. ``max_steps`` adds pairs that are
    aimed at the right-hand side, each by one product: exact on a quadratic with enough of them, and needed where no
    steps are known.

    Args:
        pairs: Most pairs of the run to use.
        max_steps: Aimed pairs to add. At negative curvature no more are added, and ``stats["truncated"]`` says so.
        keep: Aimed pairs to remember for the next solve (an engine keeps them between upper steps). They only choose
            directions, so an old pair costs accuracy nothing where ``max_steps`` goes on to ``rtol``.
        rtol: Stop adding when :math:`\lVert b - A x \rVert \le \text{rtol} \cdot \lVert b \rVert`.

    Raises:
        ValueError: If a number is out of range.

    Reference: Ramzi et al., SHINE: Sharing the inverse estimate from the forward pass for bi-level optimization and
    implicit models, ICLR 2022, with its outer-problem awareness by aimed pairs.
    """

    needs_definite: ClassVar[bool] = True
    pairs: int = 10
    max_steps: int = 0
    keep: int = 0
    rtol: float = 1e-6

    def __post_init__(self) -> None:
        if self.pairs < 0 or self.max_steps < 0 or self.pairs + self.max_steps < 1:
            raise ValueError(f"LBFGSInverse(pairs={self.pairs}, max_steps={self.max_steps}) has nothing to work with.")
        if self.keep < 0 or (self.keep and not self.max_steps):
            raise ValueError(
                f"LBFGSInverse(keep={self.keep}, max_steps={self.max_steps}) remembers aimed pairs, and max_steps "
                "makes them: both must be positive."
            )
        if not (self.rtol >= 0 and math.isfinite(self.rtol)):
            raise ValueError(f"LBFGSInverse(rtol={self.rtol}) must be a finite number >= 0.")

    @property
    def num_secants(self) -> int:
        """One secant pair of the run for each of ``pairs``."""
        return self.pairs

    def solve(
        self, matrix: LinearOperator, rhs: Params, *, reference: Tensor | None = None, memory: Params = ()
    ) -> Solution:
        """Apply the inverse to ``rhs``, for a symmetric positive definite matrix.

        Raises:
            SolverError: If the matrix is not symmetric, no pair is usable, or a number is not finite.
        """
        if not matrix.symmetric:
            raise SolverError("LBFGSInverse needs a symmetric matrix, and the condition's is not. Use GMRES().")
        space = matrix.space
        length = finite_norm(space, rhs, "LBFGSInverse")
        scale = length if reference is None else reference
        kept = self._remembered(memory, rhs)
        recorded = matrix.secants()[-self.pairs :] if self.pairs else []
        known = [pair for pair in [*kept, *recorded] if _usable(space, *pair)]
        if not known and not self.max_steps:
            raise SolverError(
                "LBFGSInverse knows no secant pair of positive curvature: outside an engine, after a single step, or "
                "with other batches every step there is none. Add aimed pairs, LBFGSInverse(max_steps=10)."
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
                if not known:
                    raise SolverError(
                        "LBFGSInverse met a direction whose curvature is not positive: the lower objective is not "
                        "strictly convex here. Add damping, or take a response without a solve, such as T1T2()."
                    )
                if step == 1:
                    # What the known pairs alone would have given; its residual is known as well.
                    x, rest = direction, space.norm(algebra.subtract(rhs, image))
                break
            # The exact step along the direction; then it is a pair for the directions to come.
            along = space.dot(direction, residual) / space.dot(direction, image)
            x = algebra.axpy(along, direction, x)
            residual = algebra.axpy(-along, image, residual)
            rest = space.norm(residual)
            known.append((direction, image))
            aimed.append((direction, image))
        relative = rest / torch.where(length == 0, 1.0, length)
        stats = {"residual": relative, "iterations": torch.tensor(step), "truncated": torch.tensor(negative)}
        latest = aimed[-self.keep :] if self.keep else []
        return Solution(x, stats, [part for pair in latest for vector in pair for part in vector])

    def _remembered(self, memory: Params, rhs: Params) -> list[tuple[Params, Params]]:
        """Cut the memory into pairs of vectors like ``rhs``."""
        count = len(memory) // (2 * len(rhs))
        if [part.shape for part in memory] != 2 * count * [part.shape for part in rhs]:
            raise SolverError(
                "LBFGSInverse was given a memory that is not made of vectors like the right-hand side: another solver "
                "or another level left it. Pass memory=(), or start the run without the state of the old one."
            )
        vectors = split(memory, 2 * count * [len(rhs)])
        return list(zip(vectors[::2], vectors[1::2], strict=True))

    def max_products(self, dimension: int) -> int:
        """One for each aimed pair."""
        return self.max_steps


def _usable(space: VectorSpace, s: Params, y: Params) -> bool:
    """Whether the pair has a curvature that is clearly positive."""
    product = space.dot(s, y)
    # Below rounding, the sign of the product is not known.
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
