"""The part of a level's history that a response needs: which steps, which states, which gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Self

from nestor.optim.state import OffloadTo


@dataclass(frozen=True)
class Pieces:
    """The number of equal pieces into which stored states divide a known number of steps.

    Attributes:
        most: The largest number of pieces; None means the square root of the number of steps.
    """

    most: int | None = None

    def count(self, steps: int) -> int:
        """Return the number of pieces of ``steps`` steps."""
        return math.isqrt(steps - 1) + 1 if self.most is None else min(self.most, steps)

    def length(self, steps: int) -> int:
        """Return the number of steps in a piece."""
        return -(-steps // self.count(steps))


@dataclass(frozen=True)
class HistorySpec:
    """The part of a level's history that a response needs.

    Attributes:
        window: Number of last steps; None means all steps since a level above last stepped.
        spacing: Number of steps between two stored states; None stores only the state before the first step.
        pieces: The pieces between two stored states, instead of a spacing, where the number of steps is known.
        offload_to: Where states are stored.
        gradients: Whether the gradients of the steps are stored.
        input_gradients: Whether the last step's gradient with respect to the variables of levels above is computed and
            stored.
        graphs: Whether the graphs of the steps' gradients are stored; None stores them if they are small, see
            :mod:`nestor.optim.kept_graphs`.
        slots: Whether states include the optimizer's memory.
        slots_after: Whether the optimizer's memory after the last step replaces the state before it, for a rule whose
            Jacobian follows from that memory.
    """

    window: int | None = None
    spacing: int | None = None
    pieces: Pieces | None = None
    offload_to: OffloadTo = None
    gradients: bool = False
    input_gradients: bool = False
    graphs: bool | None = False
    slots: bool = True
    slots_after: bool = False

    def with_graphs(self) -> Self:
        """Return a specification that stores the graphs of the steps, in place of the states between all steps."""
        return replace(self, graphs=True, spacing=None if self.window is None else self.spacing)

    def count(self, steps: int) -> int:
        """Return how many of the last ``steps`` steps are needed."""
        return steps if self.window is None else min(steps, self.window)

    def spacing_of(self, steps: int) -> int | None:
        """Return the number of steps between two stored states of ``steps`` steps."""
        return self.spacing if self.pieces is None else self.pieces.length(steps)


def merged(one: HistorySpec | None, other: HistorySpec | None) -> HistorySpec | None:
    """Return a specification that satisfies both."""
    if one is None or other is None:
        return one or other
    window = None if one.window is None or other.window is None else max(one.window, other.window)
    return HistorySpec(
        window=window,
        spacing=min((s for s in (one.spacing, other.spacing) if s is not None), default=None),
        pieces=one.pieces or other.pieces,
        offload_to=one.offload_to or other.offload_to,
        gradients=one.gradients or other.gradients,
        input_gradients=one.input_gradients or other.input_gradients,
        graphs=one.graphs or other.graphs or (None if None in (one.graphs, other.graphs) else False),
        slots=one.slots or other.slots,
        slots_after=one.slots_after and other.slots_after,
    )
