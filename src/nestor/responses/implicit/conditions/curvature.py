"""The matrix of stationarity: the Hessian of the lower objective, or what stands for it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from nestor.responses.implicit.conditions.linearization import Linearization, ResidualFunction
from nestor.responses.lower_level import LowerLevel
from nestor.vectors.algebra import Params


class Curvature(ABC):
    """Multiplies the curvature of a lower objective onto vectors. A frozen dataclass without state."""

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
        """Linearize the gradient."""
        return Linearization(residual, lower, theta, inputs, damping, symmetric=True)
