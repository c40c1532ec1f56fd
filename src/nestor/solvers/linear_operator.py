"""A matrix that is known by its products."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from nestor.tree import Params


class LinearOperator(ABC):
    """A square matrix on vectors that are lists of tensors."""

    symmetric: bool
    """Whether the matrix equals its transpose."""

    @property
    @abstractmethod
    def like(self) -> Params:
        """A vector of the space: shapes, dtypes and devices."""

    @abstractmethod
    def apply(self, vector: Params) -> list[Tensor]:
        """Multiply the matrix onto ``vector``."""

    @abstractmethod
    def apply_transposed(self, vector: Params) -> list[Tensor]:
        """Multiply the transposed matrix onto ``vector``."""


class Transposed(LinearOperator):
    """The transpose of an operator."""

    def __init__(self, operator: LinearOperator) -> None:
        self.operator = operator
        self.symmetric = operator.symmetric

    @property
    def like(self) -> Params:
        """The operator's own space."""
        return self.operator.like

    def apply(self, vector: Params) -> list[Tensor]:
        """Multiply the operator's transpose."""
        return self.operator.apply_transposed(vector)

    def apply_transposed(self, vector: Params) -> list[Tensor]:
        """Multiply the operator."""
        return self.operator.apply(vector)
