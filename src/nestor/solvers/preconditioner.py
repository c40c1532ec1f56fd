"""Preconditioners: approximate inverses that a Krylov solver applies to its residuals."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from nestor.solvers.linear_operator import LinearOperator
from nestor.vectors.algebra import Params


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
