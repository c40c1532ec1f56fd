"""Several loaders of one level, drawn from in parallel: each restarts when it ends."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from nestor.data.draws import Stream
from nestor.data.random_numbers import Seeded, Watch
from nestor.data.seeds import mix
from nestor.data.source import Source

Share = Callable[[Any], Any]
"""Returns this process's share of a batch."""


def loaders_of(data: Any) -> tuple[Iterable[Any], ...] | None:
    """Return the loaders if ``data`` is a tuple of loaders; None if it is one iterable of batches.

    An entry of a tuple is a loader if it is an iterable and no batch: no tensor or array, tuple, mapping or string. A
    list is a loader beside a loader. Lists alone are loaders too, unless they hold equally many tensors: each may then
    be a batch.

    Raises:
        TypeError: If one entry is a loader and another is a batch.
        ValueError: If the entries may be loaders, or batches.
    """
    if type(data) is not tuple or not data:
        return None
    batches = [_is_batch(entry) for entry in data]
    lists = [entry for entry in data if isinstance(entry, list)]
    if any(batches):
        if len(lists) + sum(batches) == len(data):
            return None
        raise TypeError(
            f"Problem(data=({', '.join(type(entry).__name__ for entry in data)})): entry {batches.index(True)} is a "
            "batch, and another entry is a loader. A tuple of loaders is drawn from in parallel; put batches into a "
            "list: data=[batch, ...]."
        )
    tensors = all(entry and all(isinstance(value, Tensor) for value in entry) for entry in lists)
    if len(lists) == len(data) and tensors and len({len(entry) for entry in lists}) == 1:
        raise ValueError(
            "Problem(data=...) is a tuple of lists of tensors: each list may be a batch or a loader. For a data set of "
            "batches write a list, data=[[x, y], ...]; for loaders drawn from in parallel pass DataLoaders, or "
            "lists of tuples: data=([(x,), ...], [(z,), ...])."
        )
    return data


def _is_batch(entry: Any) -> bool:
    if isinstance(entry, Tensor | tuple | Mapping | str) or not isinstance(entry, Iterable):
        return True
    try:
        memoryview(entry)  # type: ignore[arg-type]
    except TypeError:
        return False
    return True  # an array


def stream_of(data: Iterable[Any], level: str) -> Source:
    """Return the stream of one iterable, or of several loaders."""
    loaders = loaders_of(data)
    return Stream(data, level) if loaders is None else Zipped([(Stream(loader, level), None) for loader in loaders])


class Zipped:
    """An endless stream of tuples, with one batch of each loader. A loader that ends restarts; the others go on.

    Args:
        parts: The stream of each loader, and what cuts its batches; None leaves them whole.

    Attributes:
        constant: True if drawing uses no random numbers.
    """

    def __init__(self, parts: Sequence[tuple[Stream, Share | None]]) -> None:
        self._parts = parts
        self._watch = Watch(used=True)  # numbers that are not drawn need no seed, but it does no harm
        self.constant = all(stream.constant for stream, _ in parts)

    @property
    def epoch(self) -> int:
        """Number of restarts of the first loader; -1 before the first batch."""
        return self._parts[0][0].epoch

    def draw(self) -> tuple[Any, ...]:
        """Return the next batch of each loader."""
        seed = torch.initial_seed()
        batches = []
        for index, (stream, share) in enumerate(self._parts):
            self._seed(seed, index)
            batch = stream.draw()
            batches.append(batch if share is None else share(batch))
        return tuple(batches)

    def _seed(self, seed: int, index: int) -> None:
        # The random numbers of a loader do not depend on those that the loaders before it have drawn, so that each
        # can be restored alone.
        if index and not self.constant:
            Seeded(mix(seed, index)).replay(self._watch)

    def iterables(self) -> list[Any]:
        """List the loaders."""
        return [loader for stream, _ in self._parts for loader in stream.iterables()]

    def state_dict(self) -> dict[str, Any]:
        """Return the position of every loader."""
        return {"parts": [stream.state_dict() for stream, _ in self._parts]}

    def check(self, state: Mapping[str, Any]) -> None:
        """Check that every loader can go to its position; see :meth:`Stream.check`."""
        for (stream, _), saved in zip(self._parts, state["parts"], strict=True):
            stream.check(saved)

    def load_state_dict(self, state: Mapping[str, Any], prepare: Callable[[int], AbstractContextManager[None]]) -> None:
        """Restore the positions; see :meth:`Stream.load_state_dict`."""
        for index, ((stream, _), saved) in enumerate(zip(self._parts, state["parts"], strict=True)):

            def prepare_part(number: int, index: int = index) -> AbstractContextManager[None]:
                seeded = prepare(number)
                self._seed(torch.initial_seed(), index)
                return seeded

            stream.load_state_dict(saved, prepare_part)
