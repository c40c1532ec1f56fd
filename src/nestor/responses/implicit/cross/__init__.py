"""Cross derivatives: the mixed second derivative of a lower objective times a vector."""

from nestor.responses.implicit.cross.cheapest import CheapestExact
from nestor.responses.implicit.cross.cross_derivative import CrossDerivative
from nestor.responses.implicit.cross.differences import CentralDifference, ReusedDifference
from nestor.responses.implicit.cross.forward_mode import ForwardMode
from nestor.responses.implicit.cross.reverse_mode import ReverseMode
from nestor.responses.implicit.cross.step_graph import ReusedGraph

__all__ = [
    "CentralDifference",
    "CheapestExact",
    "CrossDerivative",
    "ForwardMode",
    "ReusedDifference",
    "ReusedGraph",
    "ReverseMode",
]
