"""Containers of batches: their parts, and containers of the same type with other parts."""

import copy
import dataclasses
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class _NamedTuple(Protocol):
    @classmethod
    def _make(cls, iterable: Any) -> Any: ...


def parts(batch: Any) -> list[Any]:
    """List the direct parts of a mapping, a tuple, another sequence or a dataclass; none of any other value."""
    if isinstance(batch, Mapping):
        return list(batch.values())
    if isinstance(batch, Sequence) and not isinstance(batch, str | bytes):
        return list(batch)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return [getattr(batch, field.name) for field in dataclasses.fields(batch)]
    return []


def tensors(batch: Any) -> list[Tensor]:
    """List the tensors of a batch, whatever its containers."""
    if isinstance(batch, Tensor):
        return [batch]
    return [tensor for part in parts(batch) for tensor in tensors(part)]


def fresh(batch: Any) -> Any:
    """Copy the containers of a batch, and not its tensors: a loss may take an entry out, ``batch.pop("labels")``."""
    if isinstance(batch, Tensor) or (type(batch) is tuple and all(isinstance(part, Tensor) for part in batch)):
        return batch
    return rebuilt(batch, fresh)


def is_changed(batch: Any, kept: Any) -> bool:
    """Return whether the containers of a batch have other entries than a copy of :func:`fresh`."""
    if batch is kept:
        return False
    ours, theirs = parts(batch), parts(kept)
    if len(ours) != len(theirs) or (isinstance(batch, Mapping) and list(batch) != list(kept)):
        return True
    return not theirs or any(is_changed(a, b) for a, b in zip(ours, theirs, strict=True))


def put_back(batch: Any, kept: Any) -> None:
    """Give a mapping or a list the entries of a copy of :func:`fresh`."""
    if isinstance(batch, MutableMapping):
        batch.clear()
        batch.update(kept)
    elif isinstance(batch, list):
        batch[:] = kept


def rebuilt(batch: Any, change: Callable[[Any], Any]) -> Any:
    """Apply a function to the direct parts of a batch, and return a batch of the same type.

    Subclasses keep their type and their attributes: ``OrderedDict``, ``UserDict``, Hugging Face's ``BatchEncoding``,
    named tuples. A mapping that cannot be changed becomes a dict, any other sequence a list, if a part changes. A value
    without parts is returned unchanged.
    """
    if type(batch) is dict:
        return {key: change(value) for key, value in batch.items()}
    if isinstance(batch, MutableMapping):
        new = copy.copy(batch)
        for key, value in batch.items():
            new[key] = change(value)
        return new
    if isinstance(batch, Mapping):
        return {key: change(value) for key, value in batch.items()}
    if isinstance(batch, Sequence) and not isinstance(batch, str | bytes):
        changed = [change(part) for part in batch]
        if type(batch) is list:
            return changed
        if isinstance(batch, _NamedTuple):
            return batch._make(changed)
        if isinstance(batch, tuple | list):
            return type(batch)(changed)
        return batch if all(a is b for a, b in zip(batch, changed, strict=True)) else changed
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        same: Any = copy.copy(batch)
        for field in dataclasses.fields(batch):
            # A frozen dataclass has no other way, and fields without init cannot be arguments.
            object.__setattr__(same, field.name, change(getattr(batch, field.name)))
        return same
    return batch
