"""What a response needs to be noted while a level runs."""

from __future__ import annotations

from dataclasses import dataclass

from nestor.optim.state import Place


@dataclass(frozen=True)
class Recording:
    """How much of a level's past is kept.

    Attributes:
        window: How many of the last steps; None goes back to the last step of a level above.
        spacing: States are kept before every so many steps; None keeps the first one's only.
        place: Where states are kept.
        gradient: Whether the gradients of the steps are kept.
        inputs: Whether the last step's gradient in the variables of levels above is computed and kept.
        graph: Whether the graphs of the steps' gradients are kept.
        slots: Whether what the optimizer keeps (momentum) belongs to the states.
        after: Whether what the optimizer keeps after the last step will do in the place of the state before it, for a
            rule whose slope follows from it.
    """

    window: int | None = None
    spacing: int | None = None
    place: Place = None
    gradient: bool = False
    inputs: bool = False
    graph: bool = False
    slots: bool = True
    after: bool = False


def merged(one: Recording | None, other: Recording | None) -> Recording | None:
    """Return what serves both."""
    if one is None or other is None:
        return one or other
    window = None if one.window is None or other.window is None else max(one.window, other.window)
    spacings = [s for s in (one.spacing, other.spacing) if s is not None]
    return Recording(
        window,
        min(spacings, default=None),
        one.place or other.place,
        one.gradient or other.gradient,
        one.inputs or other.inputs,
        one.graph or other.graph,
        one.slots or other.slots,
        one.after and other.after,
    )
