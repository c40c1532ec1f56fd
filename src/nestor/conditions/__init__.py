"""Optimality conditions: what a best response satisfies, and what implicit differentiation therefore differentiates."""

from nestor.conditions.condition import Condition
from nestor.conditions.curvature import Curvature, Hessian
from nestor.conditions.finite_difference_hessian import FiniteDifferenceHessian
from nestor.conditions.fixed_point import FixedPoint
from nestor.conditions.gauss_newton import GaussNewton, outputs
from nestor.conditions.linearization import Linearization
from nestor.conditions.residual import Residual
from nestor.conditions.stationarity import Stationarity

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
