"""The checks of conjugate gradients: finite numbers, the best iterate, and the true residual at the end."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nestor.autodiff.instruments import is_tracing, require_true
from nestor.autodiff.scalar import Flag, Scalar, least, tensor
from nestor.solvers.checks import bad_product, singular
from nestor.solvers.curvatures import Curvatures
from nestor.solvers.krylov import GROWTH
from nestor.solvers.linear_solver import Solution, flag, measured
from nestor.vectors import Params, algebra


@dataclass
class ResidualCheck:
    """Checks the residuals of one solve, with one transfer from the device at each check.

    Attributes:
        curvatures: The curvatures of the solve.
        rhs: The right-hand side.
        x: The first iterate, zero.
        initial: The square of its norm.
        start: The same square in the norm of the preconditioner.
        best: The iterate of the smallest residual at a check, with the squares of its norms.
        seen: The scalars at the last check.
    """

    curvatures: Curvatures
    rhs: Params
    x: Params
    initial: Scalar
    start: Scalar
    best: tuple[Params, float, float] = field(init=False)
    seen: list[float] = field(init=False)

    def __post_init__(self) -> None:
        self._is_traced = is_tracing()
        self._smallest = self.start  # of the squares at the checks of a trace
        if not self._is_traced:
            self.best = self.x, float(self.initial), float(self.start)
            self.seen = [float(self.initial), float(self.start), 0.0, math.inf, 0.0, 0.0, 0.0, 1.0]

    def __call__(self, x: Params, square: Scalar, inner: Scalar, done: Flag) -> bool:
        """Check the scalars of an iteration; return whether the solve is done.

        Raises:
            NonFiniteSolveError: If one is not finite.
        """
        if self._is_traced:
            self._smallest = least(self._smallest, inner)
            return False
        if isinstance(square, Tensor):
            values = [square, inner, *self.curvatures.scalars, done]
            found = [torch.as_tensor(value, device=square.device).double() for value in values]
            self.seen = torch.stack(found).tolist()
            square, inner, done = self.seen[0], self.seen[1], bool(self.seen[-1])
        if not math.isfinite(square):
            raise bad_product("ConjugateGradient")
        if inner < self.best[2]:
            self.best = x, float(square), float(inner)
        return bool(done)

    def end(self, x: Params, square: Scalar, inner: Scalar, threshold: Scalar, steps: int) -> Solution:
        """Return the solution, with its true residual: where the recurrence leaves a doubt, a product measures it.

        Raises:
            SingularError: If the matrix is singular, and the right-hand side is not in its range.
        """
        if self._is_traced:
            return self._traced(x, square, inner, steps)
        curvatures, space, eps = self.curvatures, self.curvatures.matrix.space, self.curvatures.eps
        if not isinstance(square, Tensor):
            self.seen = [float(value) for value in (square, inner, *curvatures.scalars, 1.0)]
        last, last_inner, top, low, negative, null, first, _ = self.seen
        is_singular = bool(null) or low <= 4 * eps * top
        is_wild = last_inner > GROWTH**2 * self.best[2] and not first
        if is_wild:  # a step along a direction that is nearly flat
            x, last, _ = self.best
            if x is self.x and not is_singular:
                # An indefinite or badly conditioned matrix, and no iterate is better than none: as at a first direction
                # of negative curvature.
                along = self.rhs if curvatures.prepared is None else curvatures.prepared(self.rhs)
                x = algebra.scale(curvatures.first_length, along)
                last = float(space.norm(algebra.subtract(self.rhs, curvatures.matrix.apply(x)))) ** 2
        length, rest, size = float(self.initial) ** 0.5, last**0.5, float(space.norm(x))
        unit = eps * (length + (top * size if curvatures.prepared is None else 0.0))
        noise = 16 * unit
        # The recurrence departs from the residual by some rounding units, more in a long solve.
        doubt = max(2.0, 0.2 * steps) * unit if curvatures.prepared is None else eps**0.5 * length
        if steps and (is_singular or rest <= doubt):
            rest = float(space.norm(algebra.subtract(self.rhs, curvatures.matrix.apply(x))))
        is_short = (bool(negative) or is_wild or is_singular) and rest > max(float(threshold) ** 0.5, noise)
        if is_short and (is_singular or size == 0) and rest > eps**0.5 * length:
            raise singular("ConjugateGradient", rest / length, curvatures.matrix)
        residual = tensor(rest / length if length else 0.0, self.rhs[0])
        return Solution(x, {"residual": residual, "iterations": torch.tensor(steps), "truncated": flag(is_short)})

    def _traced(self, x: Params, square: Scalar, inner: Scalar, steps: int) -> Solution:
        """Return the solution of a trace, in which no value can be read.

        Singular matrices, and an iterate that is worse than an earlier one, are left to the eager step.
        """
        like, curvatures = self.rhs[0], self.curvatures
        square, inner, initial, smallest, top, low = (
            torch.as_tensor(value, dtype=like.dtype, device=like.device)
            for value in (square, inner, self.initial, self._smallest, curvatures.top, curvatures.low)
        )
        norm = torch.sqrt(initial)
        rest = torch.sqrt(square)
        if curvatures.prepared is None:
            # Less than rounding errors allow is not claimed.
            rest = torch.maximum(rest, curvatures.eps * (norm + top * curvatures.matrix.space.norm(x)))
        null, negative, first = (
            torch.as_tensor(flag) for flag in (curvatures.null, curvatures.negative, curvatures.first)
        )
        is_singular = (null | (low <= 4 * curvatures.eps * top)) & (rest > curvatures.eps**0.5 * norm)
        require_true(torch.isfinite(square) & ~is_singular & ((inner <= GROWTH**2 * smallest) | first))
        stats = measured(torch.where(initial == 0, 0.0, rest), norm, steps)
        return Solution(x, {**stats, "truncated": negative})
