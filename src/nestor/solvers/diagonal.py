"""A diagonal that is known, as a preconditioner."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from nestor.autodiff.torch_private import foreach_mul
from nestor.errors import SolverError
from nestor.solvers.linear_operator import LinearOperator
from nestor.solvers.preconditioner import Preconditioner, PreparedPreconditioner
from nestor.vectors import algebra
from nestor.vectors.algebra import Params, Tree


@dataclass(frozen=True, eq=False)
class Diagonal(Preconditioner):
    """Divide by the entries of a diagonal that is known or guessed: curvatures by layer, a regularizer's weights.

    No product. For one that is not known see :class:`HutchinsonDiagonal`.

    Args:
        values: The diagonal of the matrix, up to a common factor: a tensor for each of the level's variables, nested
            as they are or flat, of their shape or one that broadcasts to it (such as a scalar for each layer). Read at
            every solve, so a tensor that is changed in place is followed.

    Raises:
        ValueError: If there is no tensor, or an entry is not positive and finite.
    """

    values: Tree = field(repr=False)

    def __post_init__(self) -> None:
        entries = algebra.flatten(self.values)
        if not entries or not all(bool((torch.isfinite(t) & (t > 0)).all()) for t in entries):
            raise ValueError(
                "Diagonal(values) needs tensors whose entries are all positive and finite, or it would not be positive "
                "definite. Clamp them, or use HutchinsonDiagonal(), which does."
            )

    def prepare(self, matrix: LinearOperator, like: Params) -> PreparedPreconditioner:
        """Invert the entries.

        Raises:
            SolverError: If they do not fit the level's variables.
        """
        entries = algebra.flatten(self.values)
        fits = len(entries) == len(like) and all(_broadcasts(t, part) for t, part in zip(entries, like, strict=True))
        if not fits:
            raise SolverError(
                f"Diagonal was given tensors of shapes {[tuple(t.shape) for t in entries]}; the level's variables have "
                f"{[tuple(part.shape) for part in like]}. Give one tensor for each variable, in their order."
            )
        return PreparedDiagonal([1 / t.to(part) for t, part in zip(entries, like, strict=True)])

    def max_products(self, dimension: int) -> int:
        """None."""
        return 0


@dataclass(frozen=True, eq=False)
class PreparedDiagonal(PreparedPreconditioner):
    """Multiply every entry by that of the inverted diagonal."""

    inverse: Params

    def apply(self, vector: Params) -> list[Tensor]:
        """Scale every entry."""
        return list(foreach_mul(list(vector), list(self.inverse)))


def _broadcasts(values: Tensor, part: Tensor) -> bool:
    sizes = zip(reversed(values.shape), reversed(part.shape), strict=False)
    return values.dim() <= part.dim() and all(size in (1, other) for size, other in sizes)
