"""The curvatures that conjugate gradients meet, relative to the norm of the matrix: negative ones, and flat ones."""

import math
from dataclasses import dataclass

from torch import Tensor

from nestor.autodiff.scalar import Flag, Scalar, divide, largest, least, magnitude, read_or_keep, where
from nestor.solvers.krylov import GROWTH
from nestor.solvers.linear_operator import LinearOperator
from nestor.solvers.preconditioners import ApproximateInverse
from nestor.vectors import Params


@dataclass
class Curvatures:
    r"""The curvatures along the directions of one solve.

    The quotient of a direction is :math:`p^T A p / p^T M p`, with the preconditioner :math:`M`. The directions are
    conjugate, so :math:`p^T M p` follows from scalars that are known. A quotient within rounding of zero, relative to
    the largest one, is flat: either the matrix is singular, or it has eigenvalues of both signs.

    Attributes:
        matrix: The matrix.
        prepared: The preconditioner.
        eps: The rounding unit.
        along: :math:`p^T M p` of the direction.
        top: The largest quotient: an estimate of :math:`\lVert A \rVert` from below.
        low: The smallest quotient of a step that was taken.
        negative: Whether a direction of negative curvature was met.
        null: Whether a direction was met that the matrix maps to zero.
        first: Whether the first direction is of negative curvature.
        first_length: The length of the step along such a direction.
    """

    matrix: LinearOperator
    prepared: ApproximateInverse | None
    eps: float
    along: Scalar
    top: Scalar = 0.0
    low: Scalar = math.inf
    negative: Flag = False
    null: Flag = False
    first: Flag = False
    first_length: Scalar = 1.0

    @property
    def scalars(self) -> list[Scalar]:
        """What the end of the solve depends on."""
        return [self.top, self.low, self.negative, self.null, self.first]

    @property
    def flat(self) -> Scalar:
        """A quotient below this is zero, up to rounding."""
        return 4 * self.eps * self.top

    def stops(self, step: int, square: Scalar, product: Params, curvature: Scalar, done: Flag) -> Flag:
        """Note the curvature along a direction; return whether the iteration stops before it.

        Args:
            step: The number of steps before.
            square: The squared norm of the right-hand side.
            product: The matrix times the direction.
            curvature: The direction times the product.
            done: Whether the iteration has ended before.
        """
        top, along = self.top, self.along
        if step and not isinstance(curvature, Tensor) and not done and curvature > 4 * self.eps * top * along:
            # The usual case on the CPU: the curvature is positive, and not flat.
            quotient = curvature / along
            if quotient > top:
                self.top = quotient
            if quotient < self.low:
                self.low = quotient
            return False
        space = self.matrix.space
        quotient = divide(curvature, self.along, unless=done)
        size = bare = magnitude(quotient)
        if step == 0:
            image = read_or_keep(space.dot(product, product))
            # A step along negative curvature has the length 1, or less if its residual would be no better than none.
            self.first_length = least(1.0, (GROWTH - 1) * divide(square, image, unless=image == 0) ** 0.5)
            if self.prepared is None:
                size = largest(divide(image, self.along, unless=done) ** 0.5, size)
        self.top = largest(size, self.top)
        flat = (bare <= self.flat) & (done ^ True)
        null = flat
        if isinstance(flat, Tensor) or flat:
            # If A is semidefinite, |A p|^2 <= |A| p^T A p. If A p is larger, A has eigenvalues of both signs.
            scaled = product if self.prepared is None else self.prepared(product)
            image = read_or_keep(space.dot(product, scaled))
            null = flat & (image <= 64 * self.eps * self.top**2 * self.along)
        negative = ((quotient < 0) | flat) & (null ^ True) & (done ^ True)
        stop = negative | null
        self.negative, self.null = self.negative | negative, self.null | null
        self.low = where(stop | done, self.low, least(self.low, quotient))
        if step == 0:
            self.first = negative
        return stop

    def turns(self, inner: Scalar, ratio: Scalar) -> None:
        """Note the next direction: the residual, preconditioned, plus ``ratio`` times the last direction."""
        self.along = inner + ratio**2 * self.along
