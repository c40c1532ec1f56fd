"""Optimality conditions: what a best response satisfies, and what implicit differentiation therefore differentiates."""

from nestor.conditions.condition import Condition
from nestor.conditions.fixed_point import FixedPoint
from nestor.conditions.linearization import Linearization
from nestor.conditions.residual import Residual
from nestor.conditions.stationarity import Stationarity

__all__ = ["Condition", "FixedPoint", "Linearization", "Residual", "Stationarity"]
