"""Cross derivatives: the mixed second derivative of a lower objective times a vector."""

from nestor.cross.central_difference import CentralDifference
from nestor.cross.cross_derivative import CrossDerivative
from nestor.cross.forward_mode import ForwardMode
from nestor.cross.reused_difference import ReusedDifference
from nestor.cross.reverse_mode import ReverseMode
from nestor.cross.select import cheapest_exact

__all__ = ["CentralDifference", "CrossDerivative", "ForwardMode", "ReusedDifference", "ReverseMode", "cheapest_exact"]
