"""Stationarity: the gradient of the lower objective vanishes."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

from torch import Tensor

from nestor.responses.implicit.conditions.condition import Condition
from nestor.responses.implicit.conditions.linearization import Linearization, ResidualFunction
from nestor.responses.implicit.cross import CrossDerivative, cheapest_exact
from nestor.responses.unrolling.trajectory import LowerLevel
from nestor.vectors import Params, algebra


class Curvature(ABC):
    """Multiplies the curvature of a lower objective onto vectors. Subclasses are frozen dataclasses without state."""

    @abstractmethod
    def linearize(
        self, residual: ResidualFunction, lower: LowerLevel, theta: Params, inputs: Params, damping: float
    ) -> Linearization:
        """Return the operator at a point, with ``damping`` added to its diagonal."""


@dataclass(frozen=True, kw_only=True)
class Hessian(Curvature):
    """The Hessian itself, by double backward: one graph of the gradient serves all products."""

    def linearize(
        self, residual: ResidualFunction, lower: LowerLevel, theta: Params, inputs: Params, damping: float
    ) -> Linearization:
        return Linearization(residual, lower, theta, inputs, damping, symmetric=True)


@dataclass(frozen=True, kw_only=True)
class Stationarity(Condition):
    r"""The condition :math:`r(\theta, \lambda) = \nabla_\theta G(\theta, \lambda) = 0`; its matrix is the Hessian.

    Args:
        curvature: The matrix of the solve: ``Hessian()``, ``GaussNewton()`` or
            ``FiniteDifferenceHessian()``. A derivative of the response uses the Hessian.

    Reference: Pedregosa, Hyperparameter optimization with approximate gradient, ICML 2016.
    """

    symmetric: ClassVar[bool] = True
    curvature: Curvature = field(default_factory=Hessian)

    def linearize(self, lower: LowerLevel, theta: Params, inputs: Params, damping: float) -> Linearization:
        """Return the curvature and the mixed derivative of the objective."""
        return self.curvature.linearize(partial(self.residual, lower), lower, theta, inputs, damping)

    def residual(self, lower: LowerLevel, theta: Params, inputs: Params) -> list[Tensor]:
        """Evaluate the gradient of the lower objective with a graph."""
        return algebra.zeros_for_none(lower.objective.gradient(theta, inputs, theta, create_graph=True), theta)

    def mixed_product(
        self, lower: LowerLevel, theta: Params, inputs: Params, vector: Params, cross: CrossDerivative | None
    ) -> list[Tensor | None]:
        """Multiply the mixed second derivative of the objective, by ``cross`` or the cheapest exact method."""
        return (cross or cheapest_exact(lower, theta)).product(lower, theta, inputs, vector)
