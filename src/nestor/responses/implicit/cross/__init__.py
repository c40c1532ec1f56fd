"""Cross derivatives: the mixed second derivative of a lower objective times a vector."""

from nestor.responses.implicit.cross.central_difference import CentralDifference
from nestor.responses.implicit.cross.cross_derivative import CrossDerivative
from nestor.responses.implicit.cross.forward_mode import ForwardMode
from nestor.responses.implicit.cross.reused_difference import ReusedDifference
from nestor.responses.implicit.cross.reverse_mode import ReverseMode
from nestor.responses.implicit.cross.select import cheapest_exact

__all__ = ["CentralDifference", "CrossDerivative", "ForwardMode", "ReusedDifference", "ReverseMode", "cheapest_exact"]
