"""The interface of a linear solver, and what a solve reports."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from nestor.solvers.linear_operator import LinearOperator
from nestor.tree import Params


@dataclass(frozen=True)
class Solution:
    """An approximate solution of ``A x = b``.

    Attributes:
        value: The vector ``x``.
        stats: What the solver measured, as tensors (reading one waits for the device): ``residual`` is
            ``|b - A x| / |b|``, ``iterations`` the number of products.
    """

    value: list[Tensor]
    stats: Mapping[str, Tensor] = field(default_factory=dict)


class LinearSolver(ABC):
    """Solve ``A x = b``. A frozen dataclass whose fields are the options; it keeps no state."""

    needs_matrix: ClassVar[bool] = True
    """Whether ``solve`` uses products with the matrix. Without, nothing is linearized, and ``solve`` is made of
    differentiable operations on ``rhs``."""

    @abstractmethod
    def solve(self, matrix: LinearOperator, rhs: Params) -> Solution:
        """Solve ``matrix @ x = rhs``.

        Args:
            matrix: The operator.
            rhs: Right-hand side, a vector like ``matrix.like``.

        Raises:
            SolverError: If the matrix is not what the method needs.
        """

    @abstractmethod
    def max_products(self, dimension: int) -> int:
        """Return the most products with the matrix that one solve takes, for ``explain()``."""
