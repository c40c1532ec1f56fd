"""Cross derivatives: the mixed second derivative of a lower objective times a vector."""

from nestor.responses.implicit.cross.differences import CentralDifference, ReusedDifference
from nestor.responses.implicit.cross.exact import CrossDerivative, ForwardMode, ReverseMode, cheapest_exact

__all__ = ["CentralDifference", "CrossDerivative", "ForwardMode", "ReusedDifference", "ReverseMode", "cheapest_exact"]
