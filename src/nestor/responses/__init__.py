"""Responses: the ways to differentiate through a best response."""

from nestor.responses.first_order import FirstOrder
from nestor.responses.implicit.implicit import Implicit
from nestor.responses.implicit.named import SAMA, T1T2, FiniteDifference
from nestor.responses.response import Response, attach, respond_back, take_planned
from nestor.responses.unrolling.evolution_strategies import EvolutionStrategies
from nestor.responses.unrolling.forward_unrolled import ForwardUnrolled
from nestor.responses.unrolling.unrolled import Unrolled

__all__ = [
    "SAMA",
    "T1T2",
    "EvolutionStrategies",
    "FiniteDifference",
    "FirstOrder",
    "ForwardUnrolled",
    "Implicit",
    "Response",
    "Unrolled",
    "attach",
    "respond_back",
    "take_planned",
]
