"""The most memory that tensors take at one time."""

from __future__ import annotations

import weakref
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from nestor.autodiff.torch_private import tree_flatten, watch_operations


class PeakMemory:
    """Counts the bytes of the storages that operations inside create, while the storages live.

    It works on every device, and it slows every operation down: do not use it for a run, nor together with a clock.

    Attributes:
        peak: Most bytes alive at a time.

    Raises:
        NotImplementedError: If this version of torch does not show operations.
    """

    def __init__(self) -> None:
        self.peak = 0
        self._now = 0
        self._seen: set[int] = set()
        self._watch = watch_operations(self._observe)

    def __enter__(self) -> PeakMemory:
        """Start to count."""
        self._watch.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop counting new storages; those that are counted may still be freed."""
        self._watch.__exit__(kind, error, trace)

    def _observe(self, inputs: Any, result: Any) -> None:
        known = {id(storage) for storage in _storages(inputs)}
        for storage in _storages(result):
            if id(storage) not in known and id(storage) not in self._seen:
                self._add(storage)

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()  # tensors that share a storage return the same object
        self._seen.add(key)
        self._now += size
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self._now -= size


def _storages(structure: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_flatten(structure)[0] if isinstance(leaf, Tensor)]
