"""Reformulations: first-order methods that replace the nested problem instead of differentiating through it."""

from nestor.reformulations.bome import BOME
from nestor.reformulations.penalty import F2SA, PBGD, ValuePenalty
from nestor.reformulations.reformulation import Reformulation, reformulate

__all__ = ["BOME", "F2SA", "PBGD", "Reformulation", "ValuePenalty", "reformulate"]
