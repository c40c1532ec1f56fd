"""Diagnostics: measurements of a program that do not change it."""

from nestor.autodiff.instruments import Evaluations
from nestor.diagnostics.check_hypergradient import Comparison, Trial, check_hypergradient
from nestor.diagnostics.check_loss import check_loss
from nestor.diagnostics.count_evaluations import count_evaluations

__all__ = ["Comparison", "Evaluations", "Trial", "check_hypergradient", "check_loss", "count_evaluations"]
