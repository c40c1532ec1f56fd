"""Stationarity: the gradient of the lower objective vanishes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from nestor import tree
from nestor.conditions.condition import Condition
from nestor.cross import CrossDerivative, cheapest_exact
from nestor.lower_level import LowerLevel
from nestor.tree import Params


@dataclass(frozen=True, kw_only=True)
class Stationarity(Condition):
    r"""The condition :math:`r(\theta, \lambda) = \nabla_\theta G(\theta, \lambda) = 0`; its matrix is the Hessian.

    Reference: Pedregosa, Hyperparameter optimization with approximate gradient, ICML 2016.
    """

    symmetric: ClassVar[bool] = True

    def residual(self, lower: LowerLevel, theta: Params, inputs: Params) -> list[Tensor]:
        """Evaluate the gradient of the lower objective with a graph."""
        return tree.zeros_for_none(lower.gradient(theta, inputs, theta, create_graph=True), theta)

    def mixed_product(
        self, lower: LowerLevel, theta: Params, inputs: Params, vector: Params, cross: CrossDerivative | None
    ) -> list[Tensor | None]:
        """Multiply the mixed second derivative of the objective, by ``cross`` or the cheapest exact way."""
        return (cross or cheapest_exact(lower, theta)).product(lower, theta, inputs, vector)
