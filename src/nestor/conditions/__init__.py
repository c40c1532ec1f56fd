"""Optimality conditions: what a best response satisfies, and what implicit differentiation therefore differentiates."""

from nestor.conditions.condition import Condition
from nestor.conditions.linearization import Linearization
from nestor.conditions.residual import Residual
from nestor.conditions.stationarity import Stationarity

__all__ = ["Condition", "Linearization", "Residual", "Stationarity"]
