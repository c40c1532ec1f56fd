"""The diagonal of a matrix as a preconditioner, estimated with random signs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from nestor.solvers.diagonal import PreparedDiagonal
from nestor.solvers.linear_operator import LinearOperator
from nestor.solvers.preconditioner import Preconditioner, PreparedPreconditioner
from nestor.solvers.random_vector import random_like
from nestor.vectors.algebra import Params


@dataclass(frozen=True, kw_only=True)
class HutchinsonDiagonal(Preconditioner):
    r"""Divide by the diagonal of the matrix, estimated with random signs.

    .. math:: \text{diag}(A) \approx \frac1n \sum_i z_i \odot A z_i, \qquad z_i \in \{-1, 1\}^d

    For systems whose variables have different scales (a layer and its bias, an embedding that few samples touch).

    Args:
        samples: Products taken.
        seed: Of the signs.
        floor: Smallest entry, relative to the largest, so that the preconditioner is positive definite.

    Raises:
        ValueError: If a number is not positive.

    Reference: Bekas, Kokiopoulou, Saad, An estimator for the diagonal of a matrix, Appl. Numer. Math. 57, 2007.
    """

    samples: int = 8
    seed: int = 0
    floor: float = 1e-4

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"HutchinsonDiagonal(samples={self.samples}) must be at least 1.")
        if not (self.floor > 0 and math.isfinite(self.floor)):
            raise ValueError(f"HutchinsonDiagonal(floor={self.floor}) must be positive and finite.")

    def prepare(self, matrix: LinearOperator, like: Params) -> PreparedPreconditioner:
        """Estimate the diagonal."""
        total = [torch.zeros_like(t) for t in like]
        for sample in range(self.samples):
            signs = random_like(matrix.space, like, self.seed + sample, signs=True)
            product = matrix.apply(signs)
            total = [t + s * p / self.samples for t, s, p in zip(total, signs, product, strict=True)]
        top = torch.stack([torch.linalg.vector_norm(t, math.inf) for t in total if t.numel()]).max()
        least = torch.where(top == 0, 1.0, self.floor * top)
        return PreparedDiagonal([1 / torch.maximum(t.abs(), least) for t in total])

    def max_products(self, dimension: int) -> int:
        """``samples``."""
        return self.samples
