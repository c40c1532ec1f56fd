"""Episodes of meta-learning: a lower level and an upper level that draw batches of the same tasks."""

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

from nestor.data.draws import Stream
from nestor.errors import NestorError
from nestor.errors.options import check_options, typed


class Episodes:
    """Provides the support batches of episodes to a lower level, and their query batches to an upper level.

    In meta-learning, the lower level adapts to tasks, and the upper level evaluates the result on the same tasks. But
    each level of a program draws its own batches. With ``Problem(..., data=episodes.support)`` for the lower level and
    ``data=episodes.query`` for the upper level, the lower level draws the support batch of an episode ``steps`` times.
    The upper level then draws the query batch of that episode once.

    Args:
        data: Iterable of ``(support, query)`` pairs, restarted when it ends.
        steps: Number of batches that the lower level draws between two upper steps: its ``unroll_steps`` times its
            ``accumulate``.

    Attributes:
        support: Data of the lower level.
        query: Data of the upper level.

    Raises:
        ValueError: If ``steps`` is not positive.

    Example:
        >>> pairs = [("support 1", "query 1"), ("support 2", "query 2")]
        >>> episodes = nestor.Episodes(pairs, steps=2)
        >>> support, query = iter(episodes.support), iter(episodes.query)
        >>> next(support), next(support), next(query)
        ('support 1', 'support 1', 'query 1')
        >>> next(support)
        'support 2'
    """

    @typed
    def __init__(self, data: Iterable[tuple[Any, Any]], steps: int = 1) -> None:
        self.steps = steps
        check_options(self, counts=["steps"])
        self._data = data
        self._waiting: deque[Any] = deque()
        self.support: Iterable[Any] = _Dealer(self._deal_support)
        self.query: Iterable[Any] = _Dealer(self._deal_query)

    def _deal_support(self) -> Iterator[Any]:
        # A run that goes back in place iterates from the start again.
        self._stream = Stream(self._data, "episodes")
        self._waiting.clear()
        while True:
            support, query = self._stream.draw()
            self._waiting.append(query)
            for _ in range(self.steps):
                yield support

    def _deal_query(self) -> Iterator[Any]:
        while True:
            if not self._waiting:
                raise NestorError(
                    "A query batch was drawn before the support batch of its episode. List the level with "
                    "data=episodes.support below the level with data=episodes.query, and let that one draw one batch a "
                    "step (accumulate=1). For several tasks a step, stack them: Problem(..., tasks=n)."
                )
            yield self._waiting.popleft()


class _Dealer:
    """An iterable over the support batches, or over the query batches."""

    def __init__(self, deal: Any) -> None:
        self._deal = deal

    def __iter__(self) -> Iterator[Any]:
        return iter(self._deal())
