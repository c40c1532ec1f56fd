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
        gradient: Whether the last step's gradient is kept.
    """

    window: int | None = None
    spacing: int | None = None
    place: Place = None
    gradient: bool = False
