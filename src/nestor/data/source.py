"""The interface of what a level draws its batches from."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol


class Source(Protocol):
    """An endless source of batches: a :class:`Stream`, or several in parallel."""

    constant: bool

    @property
    def epoch(self) -> int:
        """Number of restarts; -1 before the first batch."""

    def draw(self) -> Any:
        """Return the next batch."""

    def iterables(self) -> list[Any]:
        """List the iterables that batches are drawn from."""

    def state_dict(self) -> dict[str, Any]:
        """Return the position."""

    def check(self, state: Mapping[str, Any]) -> None:
        """Raise :class:`CheckpointError` if the source cannot go to a saved position; nothing changes."""

    def load_state_dict(self, state: Mapping[str, Any], prepare: Callable[[int], AbstractContextManager[None]]) -> None:
        """Restore a position; a batch is drawn within ``prepare``, which seeds the generators."""
