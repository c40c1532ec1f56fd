"""The interface of a linear solver, and what a solve reports."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from nestor.solvers.linear_operator import LinearOperator
from nestor.vectors.algebra import Params


@dataclass(frozen=True)
class Solution:
    """An approximate solution of ``A x = b``.

    Attributes:
        value: The vector ``x``.
        stats: What the solver measured, as tensors (reading one waits for the device): ``residual`` is
            ``|b - A x| / |b|``, whatever a tolerance refers to, and left out where it would cost a product;
            ``iterations`` counts the solver's own, or the products of one that has none; ``truncated`` says whether
            a solver that may stop at negative curvature did.
        memory: What the next solve of the same level may use again; whoever calls the solver keeps it.
    """

    value: Params
    stats: Mapping[str, Tensor] = field(default_factory=dict)
    memory: list[Tensor] = field(default_factory=list)

    @property
    def truncated(self) -> Tensor | None:
        """Whether the solve ended at negative curvature; None of a solver that never does."""
        return self.stats.get("truncated")


class LinearSolver(ABC):
    """Solve ``A x = b``. A frozen dataclass whose fields are the options; it keeps no state."""

    needs_matrix: ClassVar[bool] = True
    """Whether ``solve`` uses products with the matrix. Without, nothing is linearized, and ``solve`` is made of
    differentiable operations on ``rhs``."""

    needs_definite: ClassVar[bool] = False
    """Whether the method is made for positive definite matrices only."""

    @property
    def num_secants(self) -> int:
        """How many differences of consecutive gradients of the run :meth:`LinearOperator.secants` must offer."""
        return 0

    @abstractmethod
    def solve(
        self, matrix: LinearOperator, rhs: Params, *, reference: Tensor | None = None, memory: Params = ()
    ) -> Solution:
        """Solve ``matrix @ x = rhs``.

        Args:
            matrix: The operator.
            rhs: Right-hand side, a vector like ``matrix.like``.
            reference: The norm to which a tolerance refers; None is that of ``rhs``.
            memory: ``Solution.memory`` of the last solve of the same level, if there was one.

        Raises:
            SolverError: If the matrix is not what the method needs.
        """

    def approximate(self, rhs: Params) -> Params:
        """Return the approximate solution of a solver that needs no matrix, differentiable in ``rhs``."""
        raise TypeError(f"{type(self).__name__} needs a matrix.")

    @abstractmethod
    def max_products(self, dimension: int) -> int:
        """Return the most products with the matrix that one solve takes, for ``explain()``."""
