"""Responses: the ways to differentiate through a best response."""

from nestor.responses.evolution_strategies import EvolutionStrategies
from nestor.responses.finite_difference import FiniteDifference
from nestor.responses.first_order import FirstOrder
from nestor.responses.forward_unrolled import ForwardUnrolled
from nestor.responses.implicit import Implicit
from nestor.responses.node import attach, respond_back
from nestor.responses.response import Response
from nestor.responses.sama import SAMA
from nestor.responses.t1t2 import T1T2
from nestor.responses.unrolled import Unrolled

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
]
