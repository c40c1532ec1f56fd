"""Measurement of the peak memory of tensors."""

import weakref
from typing import Any, Self

import torch
from torch import Tensor

from nestor.autodiff.torch_private import tree_flatten, watch_operations


class PeakMemory:
    """Counts the bytes of the storages that operations in the ``with`` block create, until the storages are freed.

    It works on every device. It slows every operation down: do not use it for training, nor while measuring time.

    Attributes:
        peak: Largest number of bytes allocated at one time.

    Raises:
        NotImplementedError: If nestor cannot intercept operations of this version of torch.
    """

    def __init__(self) -> None:
        self.peak = 0
        self._now = 0
        self._seen: set[int] = set()
        self._watch = watch_operations(self._observe)

    def __enter__(self) -> Self:
        self._watch.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """Stop counting new storages. Storages counted before may still be freed."""
        self._watch.__exit__(*error)

    def _observe(self, inputs: Any, result: Any) -> None:
        known = set(map(id, _storages(inputs)))
        for storage in _storages(result):
            key, size = id(storage), storage.nbytes()  # tensors that share a storage return the same object
            if key not in known and key not in self._seen:
                self._seen.add(key)
                self._now += size
                self.peak = max(self.peak, self._now)
                weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self._now -= size


def _storages(structure: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_flatten(structure)[0] if isinstance(leaf, Tensor)]
