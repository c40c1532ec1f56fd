"""Dense matrices on vectors of several tensors, a scalar among them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nestor.solvers import LinearOperator

SHAPES = [(3, 2), (), (5,)]
SIZE = 12


class Matrix(LinearOperator):
    """A dense matrix that counts its products, and may know secants."""

    def __init__(self, dense: Tensor, known: list[tuple[list[Tensor], list[Tensor]]] | None = None) -> None:
        self.dense = dense
        self.symmetric = torch.equal(dense, dense.T)
        self.products = 0
        self.known = known or []

    @property
    def like(self) -> list[Tensor]:
        return split(torch.zeros(SIZE, dtype=self.dense.dtype))

    def apply(self, vector: list[Tensor]) -> list[Tensor]:
        self.products += 1
        return split(self.dense @ flat(vector))

    def apply_transposed(self, vector: list[Tensor]) -> list[Tensor]:
        self.products += 1
        return split(self.dense.T @ flat(vector))

    def secants(self) -> list[tuple[list[Tensor], list[Tensor]]]:
        return self.known


def flat(parts: list[Tensor]) -> Tensor:
    return torch.cat([part.reshape(-1) for part in parts])


def split(values: Tensor) -> list[Tensor]:
    pieces = torch.split(values, [torch.Size(shape).numel() for shape in SHAPES])
    return [piece.view(shape) for piece, shape in zip(pieces, SHAPES, strict=True)]


def random(seed: int = 0) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64)
    return dense, split(torch.randn(SIZE, generator=generator, dtype=torch.float64))


def definite(dense: Tensor) -> Tensor:
    return dense @ dense.T + torch.eye(SIZE, dtype=dense.dtype)


@pytest.fixture
def system() -> tuple[Tensor, list[Tensor]]:
    """A positive definite matrix and a right-hand side."""
    dense, rhs = random()
    return definite(dense), rhs
