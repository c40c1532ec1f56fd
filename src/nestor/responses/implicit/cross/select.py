"""The choice of the cross derivative that is exact and cheapest."""

from __future__ import annotations

from nestor.responses.implicit.cross.cross_derivative import CrossDerivative
from nestor.responses.implicit.cross.forward_mode import ForwardMode
from nestor.responses.implicit.cross.reverse_mode import ReverseMode
from nestor.responses.lower_level import LowerLevel
from nestor.vectors import algebra
from nestor.vectors.algebra import Params

# Forward mode has a fixed cost of half a millisecond (torch derives some of its rules in Python, cross-entropy's among
# them) and saves a part of the second reverse pass, and the memory of the graph. Measured on one thread, batch 100:
# multilayer perceptrons of 9 k, 51 k, 177 k, 301 k, 1.1 M variables 2.0, 1.6, 1.2, 1.0, 0.74 x the time of reverse
# mode, small CNNs of 52 k and 207 k 0.5 and 0.7 x.
FORWARD_MODE_FROM = 100_000


def cheapest_exact(lower: LowerLevel, theta: Params) -> CrossDerivative:
    """Choose forward mode for a large level and reverse mode for a small or nested one."""
    return ForwardMode() if algebra.size(theta) >= FORWARD_MODE_FROM and not lower.objective.nested else ReverseMode()
