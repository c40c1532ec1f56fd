"""Stationarity: the gradient of the lower objective vanishes."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from nestor.errors.options import check_options
from nestor.responses.implicit.conditions.condition import Condition
from nestor.responses.implicit.conditions.linearization import Linearization
from nestor.responses.implicit.cross import CheapestExact, CrossDerivative
from nestor.responses.unrolling.trajectory import LowerLevel
from nestor.vectors import Params, algebra


class Curvature(ABC):
    """Multiplies the curvature of a lower objective onto vectors. Subclasses are frozen dataclasses without state.

    Example:
        >>> for curvature in (nestor.Hessian(), nestor.GaussNewton(), nestor.FiniteDifferenceHessian()):
        ...     assert isinstance(curvature, nestor.Curvature)
        ...     condition = nestor.Stationarity(curvature=curvature)
    """

    differentiates_twice: ClassVar[bool] = True
    """Whether a product needs second derivatives of the loss."""

    @abstractmethod
    def operator(self, hessian: Linearization) -> Linearization:
        """Return the operator at the same point and with the same damping; the Hessian has not been evaluated yet."""


@dataclass(frozen=True, kw_only=True)
class Hessian(Curvature):
    """The Hessian itself, by double backward: one graph of the gradient serves all products.

    Example:
        >>> condition = nestor.Stationarity(curvature=nestor.Hessian())
        >>> condition == nestor.Stationarity()  # it is the default
        True
    """

    def operator(self, hessian: Linearization) -> Linearization:
        return hessian


@dataclass(frozen=True, kw_only=True)
class Stationarity(Condition):
    r"""The condition :math:`r(\theta, \lambda) = \nabla_\theta G(\theta, \lambda) = 0`; its matrix is the Hessian.

    Args:
        curvature: The matrix of the solve: ``Hessian()``, ``GaussNewton()`` or
            ``FiniteDifferenceHessian()``. A derivative of the response uses the Hessian.

    Reference: Pedregosa, Hyperparameter optimization with approximate gradient, ICML 2016.

    Example:
        >>> weight = torch.tensor(2.0, requires_grad=True)
        >>> response = nestor.Implicit(condition=nestor.Stationarity())  # Implicit() is the same
        >>> theta = nestor.best_response(lambda t, w: (t - w) ** 2, weight.detach(), weight, response)
        >>> torch.autograd.grad(theta, weight)
        (tensor(1.),)
    """

    symmetric: ClassVar[bool] = True
    curvature: Curvature = field(default_factory=Hessian)

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def differentiates_twice(self) -> bool:
        """Whether the curvature needs second derivatives of the loss."""
        return self.curvature.differentiates_twice

    def linearize(self, lower: LowerLevel, theta: Params, inputs: Params, damping: float) -> Linearization:
        """Return the curvature and the mixed derivative of the objective."""
        return self.curvature.operator(super().linearize(lower, theta, inputs, damping))

    def residual(self, lower: LowerLevel, theta: Params, inputs: Params) -> list[Tensor]:
        """Evaluate the gradient of the lower objective with a graph."""
        return algebra.zeros_for_none(lower.objective.gradient(theta, inputs, theta, create_graph=True), theta)

    def mixed_product(
        self, lower: LowerLevel, theta: Params, inputs: Params, vector: Params, cross: CrossDerivative | None
    ) -> list[Tensor | None]:
        """Multiply the mixed second derivative of the objective, by ``cross`` or the cheapest exact method."""
        return (cross or CheapestExact()).product(lower, theta, inputs, vector)
