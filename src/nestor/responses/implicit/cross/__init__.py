"""Cross derivatives: the mixed second derivative of a lower objective times a vector."""

from nestor.responses.implicit.cross.differences import CentralDifference, ReusedDifference
from nestor.responses.implicit.cross.exact import CrossDerivative, ForwardMode, ReverseMode, cheapest_exact
from nestor.responses.implicit.cross.step_graph import ReusedGraph

__all__ = [
    "CentralDifference",
    "CrossDerivative",
    "ForwardMode",
    "ReusedDifference",
    "ReusedGraph",
    "ReverseMode",
    "cheapest_exact",
]
