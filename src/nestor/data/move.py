"""Moves batches to a device."""

from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from nestor.data.containers import rebuilt


@runtime_checkable
class _Movable(Protocol):
    def to(self, device: torch.device) -> Any: ...


def move(batch: Any, device: torch.device) -> Any:
    """Return the batch with its tensors on ``device``.

    An object with a method ``to(device)`` is moved by that method: Hugging Face's ``BatchEncoding``, the graphs of
    PyTorch Geometric, ``PackedSequence``. Mappings, sequences, (named) tuples and dataclasses keep their type, and
    their parts are moved. Any other value is returned unchanged.
    """
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, _Movable) and not isinstance(batch, type):
        moved = batch.to(device)
        return batch if moved is None else moved  # some methods move the object itself
    return rebuilt(batch, partial(move, device=device))
