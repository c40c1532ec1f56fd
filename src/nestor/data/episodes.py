"""Episodes: two levels that see the same tasks."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

from nestor.data.stream import Stream
from nestor.errors import NestorError


class Episodes:
    """Deals episodes ``(support, query)`` out to a level that adapts and a level above that judges.

    Meta-learning judges on the tasks that were adapted to, while every level of a program draws batches of its own.
    ``Problem(..., data=episodes.support)`` below and ``data=episodes.query`` above keep them together: each episode's
    support batch is drawn ``steps`` times, then its query batch once.

    Args:
        data: Iterable of ``(support, query)`` pairs, started again when it ends.
        steps: How often the lower level draws between two steps of the upper one: its ``unroll_steps`` (times
            ``accumulate``).

    Attributes:
        support: Data of the lower level.
        query: Data of the upper level.

    Raises:
        ValueError: If ``steps`` is not positive.
    """

    def __init__(self, data: Iterable[tuple[Any, Any]], steps: int = 1) -> None:
        if steps < 1:
            raise ValueError(f"Episodes(steps={steps}) must be at least 1.")
        self.steps = steps
        self._stream = Stream(data, "episodes")
        self._waiting: deque[Any] = deque()
        self.support: Iterable[Any] = _Dealer(self._deal_support)
        self.query: Iterable[Any] = _Dealer(self._deal_query)

    def _deal_support(self) -> Iterator[Any]:
        while True:
            support, query = self._stream.draw()
            self._waiting.append(query)
            for _ in range(self.steps):
                yield support

    def _deal_query(self) -> Iterator[Any]:
        while True:
            if not self._waiting:
                raise NestorError(
                    "A query batch was drawn before its episode's support batch. The level that adapts takes "
                    "episodes.support and is listed below the one that takes episodes.query."
                )
            yield self._waiting.popleft()


class _Dealer:
    """One side of the episodes, as an iterable."""

    def __init__(self, deal: Any) -> None:
        self._deal = deal

    def __iter__(self) -> Iterator[Any]:
        return iter(self._deal())
