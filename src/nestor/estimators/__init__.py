"""Gradient estimators for losses that sample, and for losses without a derivative."""

from nestor.estimators.score_function import ScoreFunction
from nestor.estimators.smoothed import smoothed

__all__ = ["ScoreFunction", "smoothed"]
