"""A matrix that is given by its products with vectors."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from nestor.vectors import LOCAL, Params, VectorSpace


class LinearOperator(ABC):
    """A square matrix on vectors that are lists of tensors."""

    symmetric: bool
    """Whether the matrix equals its transpose."""

    space: VectorSpace = LOCAL
    """The space of the vectors, in which solvers and preconditioners compute inner products and norms."""

    damping: float = 0.0
    """The number that the operator has added to its diagonal, for the remedies in errors."""

    @abstractmethod
    def apply(self, vector: Params) -> list[Tensor]:
        """Multiply the matrix onto ``vector``."""

    def apply_many(self, vectors: Params) -> list[Tensor]:
        """Multiply the matrix onto several vectors, stacked along a leading dimension."""
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
        self.damping = operator.damping

    def apply(self, vector: Params) -> list[Tensor]:
        """Multiply the transpose of the operator onto ``vector``."""
        return self.operator.apply_transposed(vector)

    def apply_many(self, vectors: Params) -> list[Tensor]:
        """Multiply the transpose onto stacked vectors, by the operator's batched product if it is symmetric."""
        return self.operator.apply_many(vectors) if self.symmetric else super().apply_many(vectors)

    def secants(self) -> list[tuple[Params, Params]]:
        """List the pairs of the operator if it is symmetric; otherwise they are no secants of the transpose."""
        return self.operator.secants() if self.symmetric else []

    def apply_transposed(self, vector: Params) -> list[Tensor]:
        """Multiply the operator onto ``vector``."""
        return self.operator.apply(vector)
