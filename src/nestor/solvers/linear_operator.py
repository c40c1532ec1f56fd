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
