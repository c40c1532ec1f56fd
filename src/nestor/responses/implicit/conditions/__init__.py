"""Optimality conditions: what a best response satisfies, and what implicit differentiation therefore differentiates."""

from nestor.responses.implicit.conditions.condition import Condition, Residual
from nestor.responses.implicit.conditions.finite_difference_hessian import FiniteDifferenceHessian
from nestor.responses.implicit.conditions.fixed_point import FixedPoint
from nestor.responses.implicit.conditions.gauss_newton import GaussNewton, outputs
from nestor.responses.implicit.conditions.linearization import Linearization
from nestor.responses.implicit.conditions.stationarity import Curvature, Hessian, Stationarity

__all__ = [
    "Condition",
    "Curvature",
    "FiniteDifferenceHessian",
    "FixedPoint",
    "GaussNewton",
    "Hessian",
    "Linearization",
    "Residual",
    "Stationarity",
    "outputs",
]
