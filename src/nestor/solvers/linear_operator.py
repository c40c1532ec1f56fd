"""A matrix that is known by its products."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from nestor.vectors.algebra import LOCAL, Params, VectorSpace


class LinearOperator(ABC):
    """A square matrix on vectors that are lists of tensors."""

    symmetric: bool
    """Whether the matrix equals its transpose."""

    space: VectorSpace = LOCAL
    """The space of its vectors: solvers and preconditioners take inner products and norms there."""

    @property
    @abstractmethod
    def like(self) -> Params:
        """A vector of the space: shapes, dtypes and devices."""

    @abstractmethod
    def apply(self, vector: Params) -> list[Tensor]:
        """Multiply the matrix onto ``vector``."""

    def apply_many(self, vectors: Params) -> list[Tensor]:
        """Multiply the matrix onto several vectors, stacked along a leading dimension."""
        return self._one_by_one(vectors)

    def _one_by_one(self, vectors: Params) -> list[Tensor]:
        columns = [self.apply([v[index] for v in vectors]) for index in range(len(vectors[0]))]
        return [torch.stack(parts) for parts in zip(*columns, strict=True)]

    def secants(self) -> list[tuple[Params, Params]]:
        """List pairs ``(s, y)`` with ``y`` close to ``A s`` that are known without a product, oldest first."""
        return []

    @abstractmethod
    def apply_transposed(self, vector: Params) -> list[Tensor]:
        """Multiply the transposed matrix onto ``vector``."""


class Transposed(LinearOperator):
    """The transpose of an operator."""

    def __init__(self, operator: LinearOperator) -> None:
        self.operator = operator
        self.symmetric = operator.symmetric
        self.space = operator.space

    @property
    def like(self) -> Params:
        """The operator's own space."""
        return self.operator.like

    def apply(self, vector: Params) -> list[Tensor]:
        """Multiply the operator's transpose."""
        return self.operator.apply_transposed(vector)

    def apply_many(self, vectors: Params) -> list[Tensor]:
        """Multiply the operator's transpose onto stacked vectors: all at once if it is the operator itself."""
        return self.operator.apply_many(vectors) if self.symmetric else self._one_by_one(vectors)

    def secants(self) -> list[tuple[Params, Params]]:
        """List the operator's own pairs if it is symmetric; otherwise they say nothing of the transpose."""
        return self.operator.secants() if self.symmetric else []

    def apply_transposed(self, vector: Params) -> list[Tensor]:
        """Multiply the operator."""
        return self.operator.apply(vector)
