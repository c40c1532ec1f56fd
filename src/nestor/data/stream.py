"""Batches: drawn from any iterable, on the device of the level that reads them."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from nestor.errors import NestorError


class Stream:
    """An endless stream of batches: the iterable is started again when it ends.

    Args:
        data: Iterable of batches.
        level: Name of the level that reads it, for errors.

    Attributes:
        epoch: How often the iterable was started, less one.
        drawn: Batches drawn.
        constant: Whether drawing needs no random numbers.
        begun: Batches drawn when the iterable was last started.
    """

    def __init__(self, data: Iterable[Any], level: str) -> None:
        self.data = data
        self.level = level
        self.epoch = -1
        self.drawn = 0
        self.begun = 0
        # A list of batches draws no random numbers.
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
                "The data has ended and cannot be started again: it is an iterator (a generator?). Hand over an "
                "iterable such as a DataLoader or a list.",
                level=self.level,
            )
        raise NestorError(
            "The data is empty: it yields no batch. Is the dataset empty, or the batch size larger than the dataset "
            "with drop_last=True?",
            level=self.level,
        )

    def state_dict(self) -> dict[str, Any]:
        """Say where the stream stands."""
        own = self.data.state_dict() if isinstance(self.data, Stateful) and self._iterator is not None else None
        return {"epoch": self.epoch, "drawn": self.drawn, "begun": self.begun, "data": own}

    def load_state_dict(self, state: Mapping[str, Any], prepare: Callable[[int], None]) -> None:
        """Go to where a stream stood.

        Data that keeps a state of its own (torchdata's ``StatefulDataLoader``) is set to it. Any other is started again
        and drawn from, with the same random numbers, up to the batch.

        Args:
            state: What :meth:`state_dict` returned.
            prepare: Called with the number of a batch before it is drawn; seeds the generators.
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
                f"Level {self.level!r}: its data keeps no state, so {skipped} batches are drawn again to come to where "
                "the run stood. Take torchdata's StatefulDataLoader to jump there.",
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
    """Data that can say where it stands, and go there."""

    def state_dict(self) -> dict[str, Any]:
        """Say where it stands."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go there."""


def move(batch: Any, device: torch.device) -> Any:
    """Return the batch with its tensors on ``device``; the same object if nothing has to move.

    Looks into mappings, sequences, (named) tuples and dataclasses; objects that bring their own ``to(device)``, as
    Hugging Face's ``BatchEncoding`` does, use it. Anything else stays as it is.
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
