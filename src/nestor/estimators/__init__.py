"""Estimators: derivatives of losses that sample, or that have no derivative."""

from nestor.estimators.score_function import ScoreFunction
from nestor.estimators.smoothed import smoothed

__all__ = ["ScoreFunction", "smoothed"]
