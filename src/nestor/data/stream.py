"""Endless batches from any iterable, and their move to a device."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from nestor.errors import NestorError


class Stream:
    """An endless stream of batches: the iterable is restarted when it ends.

    Args:
        data: Iterable of batches.
        level: Name of the level that draws from the stream, for errors.

    Attributes:
        epoch: Number of restarts of the iterable; -1 before the first batch.
        drawn: Number of batches drawn so far.
        constant: True if drawing uses no random numbers.
        begun: Value of ``drawn`` when the iterable was last started.
    """

    def __init__(self, data: Iterable[Any], level: str) -> None:
        self.data = data
        self.level = level
        self.epoch = -1
        self.drawn = 0
        self.begun = 0
        # Iterating a list or tuple uses no random numbers; a loader may shuffle.
        self.constant = type(data) in (list, tuple)
        self._iterator: Iterator[Any] | None = None

    def draw(self) -> Any:
        """Return the next batch.

        Raises:
            NestorError: If the iterable is empty, or an iterator that has ended.
        """
        if self._iterator is not None:
            for batch in self._iterator:
                self.drawn += 1
                return batch
        self.begun = self.drawn
        self._iterator = iter(self.data)
        self.epoch += 1
        for batch in self._iterator:
            self.drawn += 1
            return batch
        if self.epoch and self._iterator is self.data:
            raise NestorError(
                "The data has ended and cannot be restarted: it is an iterator, such as a generator. Pass an iterable "
                "such as a DataLoader or a list.",
                level=self.level,
            )
        raise NestorError(
            "The data is empty: it yields no batch. Is the dataset empty, or the batch size larger than the dataset "
            "with drop_last=True?",
            level=self.level,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the stream, and the state of data that keep one."""
        own = self.data.state_dict() if isinstance(self.data, Stateful) and self._iterator is not None else None
        return {"epoch": self.epoch, "drawn": self.drawn, "begun": self.begun, "data": own}

    def load_state_dict(self, state: Mapping[str, Any], prepare: Callable[[int], None]) -> None:
        """Restore the position of a stream.

        Data with ``state_dict`` and ``load_state_dict`` (torchdata's ``StatefulDataLoader``) restore their own state.
        Any other data are restarted, and the batches of the epoch are drawn again with the same random numbers.

        Args:
            state: The return value of :meth:`state_dict`.
            prepare: Called with the number of a batch before the batch is drawn; seeds the generators.
        """
        self.epoch, self.drawn, self.begun = state["epoch"], state["drawn"], state["begun"]
        self._iterator = None
        if self.epoch < 0:
            return
        if state["data"] is not None and isinstance(self.data, Stateful):
            self.data.load_state_dict(state["data"])
            prepare(self.drawn)
            self._iterator = iter(self.data)
            return
        skipped = self.drawn - self.begun
        if skipped and not isinstance(self.data, Sequence):
            warnings.warn(
                f"Level {self.level!r}: its data keeps no state, so {skipped} batches are drawn again to restore the "
                "position of the run. Use torchdata's StatefulDataLoader to restore it without drawing.",
                stacklevel=2,
            )
        prepare(self.begun)
        self._iterator = iter(self.data)
        for index in range(self.begun, self.drawn):
            if index > self.begun:
                prepare(index)
            next(self._iterator, None)


@runtime_checkable
class Stateful(Protocol):
    """Data that save and restore their position."""

    def state_dict(self) -> dict[str, Any]:
        """Return the position."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a position."""


def move(batch: Any, device: torch.device) -> Any:
    """Return the batch with its tensors on ``device``.

    Moves the tensors in mappings, sequences, (named) tuples and dataclasses. A mapping with a method ``to(device)``,
    such as Hugging Face's ``BatchEncoding``, is moved by that method. Any other value is returned unchanged.
    """
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        if callable(mover := getattr(batch, "to", None)):
            return mover(device)
        return {key: move(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple):
        parts = [move(part, device) for part in batch]
        return type(batch)(*parts) if type(batch) is not tuple else tuple(parts)
    if isinstance(batch, Sequence) and not isinstance(batch, str | bytes):
        return [move(part, device) for part in batch]
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        fields = {field.name: move(getattr(batch, field.name), device) for field in dataclasses.fields(batch)}
        return dataclasses.replace(batch, **fields)
    return batch
