"""The interface of an optimality condition, and conditions that a user wrote."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from nestor.autodiff.grad import vjp
from nestor.autodiff.scope import enclosed
from nestor.errors import SolverError
from nestor.optim.history_spec import HistorySpec
from nestor.responses.implicit.conditions.linearization import Linearization
from nestor.responses.implicit.cross import CrossDerivative
from nestor.responses.unrolling.trajectory import LowerLevel
from nestor.vectors import Params, split


class Condition(ABC):
    r"""A residual ``r(theta, inputs)`` that vanishes at the best response.

    The implicit function theorem then gives :math:`d\theta^*/d\lambda = -(\partial r/\partial\theta)^{-1}
    \partial r/\partial\lambda`.

    Example:
        >>> class NonNegative(nestor.Condition):  # the fixed point of a projected gradient step
        ...     symmetric = False
        ...     def residual(self, lower, theta, inputs):
        ...         gradient = lower.objective.gradient(theta, inputs, theta, create_graph=True)
        ...         return [t - (t - 0.5 * g).relu() for t, g in zip(theta, gradient)]
        >>> weight = torch.tensor([-1.0, 2.0], requires_grad=True)
        >>> response = nestor.Implicit(solver=nestor.DenseSolve(), condition=NonNegative())
        >>> loss = lambda t, w: ((t - w) ** 2).sum()
        >>> theta = nestor.best_response(loss, weight.detach().relu(), weight, response)
        >>> torch.autograd.grad(theta.sum(), weight)  # the first variable stays at 0
        (tensor([-0., 1.]),)
    """

    symmetric: ClassVar[bool]
    """Whether :math:`A = \\partial r/\\partial\\theta` is a symmetric matrix."""

    differentiates_steps: ClassVar[bool] = False
    """Whether the residual contains a step of the level's optimizer."""

    @property
    def differentiates_twice(self) -> bool:
        """Whether products with the matrices need second derivatives of the level's loss."""
        return True

    @property
    def history_spec(self) -> HistorySpec | None:
        """The part of the level's history that the condition needs; None if none."""
        return None

    @property
    def mixed_history_spec(self) -> HistorySpec | None:
        """The part of the level's history that :meth:`mixed_product` with a cross derivative needs."""
        return self.history_spec

    def linearize(self, lower: LowerLevel, theta: Params, inputs: Params, damping: float) -> Linearization:
        """Return the matrices of the condition at a point, with ``damping`` added to the diagonal of ``A``."""
        return Linearization(partial(self.residual, lower), lower, theta, inputs, damping, symmetric=self.symmetric)

    @abstractmethod
    def residual(self, lower: LowerLevel, theta: Params, inputs: Params) -> list[Tensor]:
        """Evaluate ``r(theta, inputs)`` with a graph to both arguments; shapes of ``theta``."""

    def mixed_product(
        self, lower: LowerLevel, theta: Params, inputs: Params, vector: Params, cross: CrossDerivative | None
    ) -> list[Tensor | None]:
        r"""Multiply :math:`(\partial r/\partial\lambda)^T` onto ``vector``, differentiably if gradients are enabled.

        The default is one reverse pass through the residual.

        Args:
            lower: The level.
            theta: Its variables.
            inputs: The tensors of the levels above.
            vector: A vector like ``theta``.
            cross: Computes the mixed derivative of an objective. Only a residual that is a gradient has an objective.

        Raises:
            SolverError: If ``cross`` is given to a condition without a mixed derivative.
        """
        if cross is not None:
            raise SolverError(
                f"{type(self).__name__} differentiates a residual, so {type(cross).__name__}, which differentiates an "
                "objective, cannot be used: leave out cross=..."
            )
        create_graph = torch.is_grad_enabled()

        def product(tensors: list[Tensor]) -> list[Tensor | None]:
            # At leaves: the derivative is partial, although theta may be a function of the inputs.
            point, given, cotangent = split(tensors, [len(theta), len(inputs), len(vector)])
            return vjp(self.residual(lower, point, given), given, cotangent, create_graph=create_graph)

        return enclosed(product, [*theta, *inputs, *vector])


@dataclass(frozen=True, kw_only=True)
class Residual(Condition):
    r"""The condition :math:`r(\theta, \lambda) = 0` for any function with as many outputs as variables.

    Args:
        function: ``function(theta, inputs)`` on flat lists, returning a vector like ``theta``.
    """

    symmetric: ClassVar[bool] = False
    function: Callable[[Params, Params], Sequence[Tensor]]

    def residual(self, lower: LowerLevel, theta: Params, inputs: Params) -> list[Tensor]:
        """Evaluate the function; the level's objective is not evaluated."""
        return list(self.function(theta, inputs))
