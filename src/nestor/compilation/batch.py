"""Batches as arguments of graphs."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any

from torch import Tensor

from nestor.autodiff.torch_private import tree_flatten, tree_unflatten
from nestor.compilation.graph import Unsuitable


class Batches:
    """Lists the tensors of batches; what it has listed last for a place it remembers."""

    def __init__(self) -> None:
        self._known: dict[Hashable, tuple[Any, list[Tensor], Hashable]] = {}

    def flatten(self, place: Hashable, batch: Any) -> tuple[list[Tensor], Hashable]:
        """List the tensors of a batch, and say of what kind it is: structure, shapes, everything that is no tensor.

        Raises:
            Unsuitable: If the batch holds what cannot be told from another one.
        """
        known = self._known.get(place)
        if known is not None and known[0] is batch:
            return known[1], known[2]
        leaves, structure = tree_flatten(batch)
        given = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        tensors = [tensor.contiguous() for tensor in given]
        kind = (str(structure), *map(kind_of, leaves))
        same = all(a is b for a, b in zip(given, tensors, strict=True))
        if type(batch) is tuple and len(tensors) == len(batch) and same:  # cannot change without being another one
            self._known[place] = (batch, tensors, kind)
        return tensors, kind


def filled(batch: Any, tensors: Iterator[Tensor]) -> Any:
    """Return the batch with other tensors."""
    leaves, structure = tree_flatten(batch)
    return tree_unflatten([next(tensors) if isinstance(leaf, Tensor) else leaf for leaf in leaves], structure)


def kind_of(value: Any) -> Hashable:
    """Describe a tensor; anything else is a constant of the graph, itself."""
    if isinstance(value, Tensor):
        return value.shape, value.dtype, value.device
    if not isinstance(value, Hashable):
        raise Unsuitable(f"a batch holds a {type(value).__name__}, which a graph cannot tell from another one")
    return value
