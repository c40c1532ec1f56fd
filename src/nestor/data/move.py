"""Moves batches to a device."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


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
