"""Preconditioners: approximate inverses that a Krylov solver applies to its residuals."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from nestor import tree
from nestor.solvers.linear_operator import LinearOperator
from nestor.tree import Params


class Preconditioner(ABC):
    """A symmetric positive definite approximation of the inverse of a matrix. A frozen dataclass without state."""

    @abstractmethod
    def prepare(self, matrix: LinearOperator, like: Params) -> PreparedPreconditioner:
        """Look at the matrix, once a solve."""

    @abstractmethod
    def max_products(self, dimension: int) -> int:
        """Return the most products that preparing takes, for ``explain()``."""


class PreparedPreconditioner(ABC):
    """A preconditioner of one matrix."""

    @abstractmethod
    def apply(self, vector: Params) -> list[Tensor]:
        """Multiply the approximate inverse onto ``vector``."""


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
            signs = random_like(like, self.seed + sample, signs=True)
            product = matrix.apply(signs)
            total = [t + s * p / self.samples for t, s, p in zip(total, signs, product, strict=True)]
        top = torch.stack([t.abs().max() for t in total]).max()
        least = torch.where(top == 0, 1.0, self.floor * top)
        return _Diagonal([1 / torch.maximum(t.abs(), least) for t in total])

    def max_products(self, dimension: int) -> int:
        """``samples``."""
        return self.samples


@dataclass(frozen=True)
class _Diagonal(PreparedPreconditioner):
    inverse: Params

    def apply(self, vector: Params) -> list[Tensor]:
        """Scale every entry."""
        return list(torch._foreach_mul(list(vector), list(self.inverse)))


def random_like(like: Params, seed: int, *, signs: bool = False) -> list[Tensor]:
    """Draw a vector of random numbers that depends on the seed alone, not on a generator's state."""
    generators: dict[torch.device, torch.Generator] = {}
    values = []
    for t in like:
        if t.device not in generators:
            generators[t.device] = torch.Generator(device=t.device).manual_seed(seed)
        drawn = torch.randn(t.shape, generator=generators[t.device], device=t.device, dtype=torch.float32).to(t.dtype)
        values.append(torch.where(drawn > 0, 1.0, -1.0).to(t.dtype) if signs else drawn)
    return values


def normalized(vector: Params) -> list[Tensor]:
    """Scale a vector to length one; zero stays zero."""
    length = tree.norm(vector)
    return tree.scale(1 / torch.where(length == 0, 1.0, length), vector)
