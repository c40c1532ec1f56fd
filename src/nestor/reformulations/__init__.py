"""Reformulations: methods that rewrite a nested problem so that first derivatives are enough."""

from nestor.reformulations.bome import BOME
from nestor.reformulations.penalty import F2SA, PBGD, ValuePenalty

__all__ = ["BOME", "F2SA", "PBGD", "ValuePenalty"]
