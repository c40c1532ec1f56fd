"""The interface of a linear solver, the result of a solve, and what a level keeps from one solve to the next."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from nestor.autodiff.instruments import is_tracing
from nestor.solvers.linear_operator import LinearOperator
from nestor.vectors import Params, VectorSpace


@dataclass(frozen=True)
class Solution:
    """An approximate solution of ``A x = b``.

    Attributes:
        value: The vector ``x``.
        stats: Measurements of the solver, as tensors; reading one waits for the device. ``residual`` is
            ``|b - A x| / |b|``, whatever norm the tolerance refers to. It is left out if it would cost a product.
            ``iterations`` is the number of iterations, or of products if the solver does not iterate. ``truncated`` is
            True if the solver stopped neither at its tolerance nor at its largest number of steps, but for the reason
            that :attr:`LinearSolver.truncation` names.
        memory: What the next solve of the same level may reuse; the caller keeps it.
    """

    value: Params
    stats: Mapping[str, Tensor] = field(default_factory=dict)
    memory: list[Tensor] = field(default_factory=list)


_FALSE, _TRUE = torch.tensor(False), torch.tensor(True)


def flag(value: bool) -> Tensor:
    """Return a truth value as a tensor, for stats outside of traces; it is shared, so that none is made in a solve."""
    return _TRUE if value else _FALSE


def measured(rest: Tensor, length: Tensor, iterations: int, *, truncated: bool = False) -> dict[str, Tensor]:
    """Return the stats of a solve whose residual has the norm ``rest``, for a right-hand side of norm ``length``."""
    residual = rest / torch.where(length == 0, 1.0, length)
    return {"residual": residual, "iterations": torch.tensor(iterations), "truncated": torch.tensor(truncated)}


@dataclass
class SolveState:
    """What one level keeps of its last solve for one level above it. The engine holds it and saves it in checkpoints.

    Attributes:
        value: The last solution, from which the next solve starts; empty before the first solve.
        memory: ``Solution.memory`` of the last solve.
        stats: ``Solution.stats`` of the last solve.
        truncated: Number of solves that were truncated.
        notice: What a warning says of a truncated solve.
        has_warned: Whether that warning was issued.
    """

    value: Params = field(default_factory=list)
    memory: list[Tensor] = field(default_factory=list)
    stats: Mapping[str, Tensor] = field(default_factory=dict)
    truncated: int | Tensor = 0
    notice: str = ""
    has_warned: bool = False

    def note(self, stats: Mapping[str, Tensor]) -> None:
        """Store the stats of a solve, and count it if it was truncated."""
        self.stats = stats
        flag = stats.get("truncated")
        # On an accelerator, reading the flag would wait for the device.
        if flag is not None and not is_tracing() and (not flag.is_cpu or bool(flag)):
            self.truncated = self.truncated + flag.long()

    def update(self, space: VectorSpace, solution: Solution, *, keep_value: bool) -> None:
        """Store the results of a solve.

        A solution that is not finite is not stored. Of a truncated solution, the memory is stored without the value.

        Args:
            space: The vector space of the solution.
            solution: The new solution.
            keep_value: Whether the next solve starts from the value.
        """
        self.note(solution.stats)
        if not keep_value and not solution.memory:
            return
        finite = torch.isfinite(space.norm(solution.value))
        # A truncated solve does not approximate a solution: corrections of truncated values would grow without bound.
        start = finite & ~solution.stats["truncated"] if "truncated" in solution.stats else finite
        if finite.is_cpu and not is_tracing():
            self.value = solution.value if keep_value and bool(start) else []
            self.memory = solution.memory if bool(finite) else []
        else:
            # Selected on the device, without waiting for it, or in a graph. A value of zero has the effect of no value.
            self.value = [torch.where(start, v, 0.0) for v in solution.value] if keep_value else []
            self.memory = solution.memory


class LinearSolver(ABC):
    """Solve ``A x = b``. A frozen dataclass whose fields are the options; it keeps no state.

    Example:
        >>> from nestor.solvers.linear_solver import Solution
        >>> class Richardson(nestor.LinearSolver):
        ...     def solve(self, matrix, rhs, *, reference=None, memory=()):
        ...         x = rhs
        ...         for _ in range(50):
        ...             x = [v + 0.4 * (b - a) for v, b, a in zip(x, rhs, matrix.apply(x))]
        ...         return Solution(x)
        ...     def max_products(self, dimension):
        ...         return 50
        >>> weight = torch.tensor(2.0, requires_grad=True)
        >>> response = nestor.Implicit(solver=Richardson())
        >>> theta = nestor.best_response(lambda t, w: (t - w) ** 2, weight.detach(), weight, response)
        >>> torch.autograd.grad(theta, weight)
        (tensor(1.),)
    """

    needs_matrix: ClassVar[bool] = True
    """Whether ``solve`` multiplies with the matrix. If False, nothing is linearized, and ``solve`` consists of
    differentiable operations on ``rhs``."""

    truncation: ClassVar[str] = ""
    """Why the solver stops before its tolerance and its largest number of steps, to complete "The solver ..."."""
    alternative: ClassVar[str] = ""
    """What to do then, other than damping, to complete "Set damping, or ..."."""

    seeks_solution: ClassVar[bool] = True
    """Whether the method goes on until the residual is small. If False, it is an approximation by its definition (a
    truncated series, an inverse of low rank)."""

    needs_definite: ClassVar[bool] = False
    """Whether the method is valid for positive definite matrices only."""

    @property
    def num_secants(self) -> int:
        """Number of differences of consecutive gradients that :meth:`LinearOperator.secants` must provide."""
        return 0

    @abstractmethod
    def solve(
        self, matrix: LinearOperator, rhs: Params, *, reference: Tensor | None = None, memory: Params = ()
    ) -> Solution:
        """Solve ``matrix @ x = rhs``.

        Args:
            matrix: The operator.
            rhs: Right-hand side.
            reference: The norm to which a tolerance refers; None is the norm of ``rhs``.
            memory: ``Solution.memory`` of the last solve of the same level, if there was one.

        Returns:
            The solution, its stats, and the memory for the next solve.

        Raises:
            SolverError: If the matrix does not meet the requirements of the method.
        """

    def approximate(self, rhs: Params) -> Params:
        """Return the approximate solution of a solver that needs no matrix, differentiable in ``rhs``."""
        raise TypeError(f"{type(self).__name__} needs a matrix.")

    @abstractmethod
    def max_products(self, dimension: int) -> int:
        """Return the largest number of products with the matrix that one solve takes, for ``explain()``."""
