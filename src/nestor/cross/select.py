"""The choice of the cross derivative that is exact and cheapest."""

from __future__ import annotations

from nestor import tree
from nestor.cross.cross_derivative import CrossDerivative
from nestor.cross.forward_mode import ForwardMode
from nestor.cross.reverse_mode import ReverseMode
from nestor.lower_level import LowerLevel
from nestor.tree import Params

# Below, the Python overhead of dual numbers costs more than the second reverse pass that they save.
FORWARD_MODE_FROM = 10_000


def cheapest_exact(lower: LowerLevel, theta: Params) -> CrossDerivative:
    """Choose forward mode for a large level and reverse mode for a small or nested one."""
    return ForwardMode() if tree.size(theta) >= FORWARD_MODE_FROM and not lower.nested else ReverseMode()
