"""Batches: drawn from any iterable, on the device of the level that reads them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

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
    """

    def __init__(self, data: Iterable[Any], level: str) -> None:
        self.data = data
        self.level = level
        self.epoch = -1
        self._iterator: Iterator[Any] | None = None

    def draw(self) -> Any:
        """Return the next batch.

        Raises:
            NestorError: If the iterable is empty, or an iterator that has ended.
        """
        if self._iterator is not None:
            for batch in self._iterator:
                return batch
        self._iterator = iter(self.data)
        self.epoch += 1
        for batch in self._iterator:
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
