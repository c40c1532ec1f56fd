"""The arguments of a compiled graph, and the key of everything else that the graph depends on."""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from operator import is_
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from nestor.autodiff.torch_private import tree_flatten, tree_unflatten
from nestor.data.draws import Draw
from nestor.vectors import InputLayout, Params

T = TypeVar("T")

Unpack: TypeAlias = Callable[[Iterator[Tensor]], T]
"""Reads the placeholders of a packed object from an iterator, in the order of packing."""

Slots: TypeAlias = Sequence[Mapping[str, Any]]
Groups: TypeAlias = Sequence[Mapping[str, Any]]

Updated: TypeAlias = tuple[list[dict[str, Any]], list[dict[str, Any]]]
"""The memory and the hyperparameters of an update rule."""


class Unsuitable(Exception):
    """Raised with the reason if steps cannot be compiled, or are faster uncompiled."""


class ArgumentCache:
    """Caches the packed tensors of batches and learning rates, most of which are the same at every step."""

    def __init__(self) -> None:
        self._batches: dict[Hashable, tuple[Any, list[Tensor], Hashable]] = {}
        self._rates: dict[Hashable, tuple[float, Tensor]] = {}

    def batch(self, place: Hashable, batch: Any) -> tuple[list[Tensor], Hashable]:
        """Return the tensors of a batch, and a key of its structure, its shapes and its values that are no tensors.

        Raises:
            Unsuitable: If the batch contains a value that is not hashable.
        """
        known = self._batches.get(place)
        if known is not None and known[0] is batch:
            return known[1], known[2]
        tensors, kind, is_fixed = flat_batch(batch)
        if is_fixed:
            self._batches[place] = (batch, tensors, kind)
        return tensors, kind

    def rate(self, place: Hashable, value: float | Tensor) -> Tensor:
        """Return a learning rate as a tensor, because a scheduler may change it."""
        if isinstance(value, Tensor):
            return value.detach()
        known = self._rates.get(place)
        if known is None or known[0] != value:
            known = self._rates[place] = (value, torch.tensor(value, dtype=torch.float64))
        return known[1]


def flat_batch(batch: Any) -> tuple[list[Tensor], Hashable, bool]:
    """Return the tensors of a batch, its key, and whether the same object always has the same tensors.

    Raises:
        Unsuitable: If the batch contains a value that is not hashable.
    """
    leaves: Sequence[Any] = ()
    structure: Hashable = tuple
    if type(batch) is tuple and all(type(part) is Tensor for part in batch):  # the usual batch needs no tree
        leaves = batch
    else:
        leaves, tree = tree_flatten(batch)
        structure = str(tree)
    given = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    tensors = [tensor.contiguous() for tensor in given]
    is_fixed = batch is None or type(batch) is Tensor or (type(batch) is tuple and len(tensors) == len(batch))
    return tensors, (structure, *map(_kind, leaves)), is_fixed and all(map(is_, given, tensors))


class Arguments:
    """Packs the arguments of a graph.

    Each method packs one object. It returns a function that reads the placeholders of the object during tracing.

    Args:
        cache: The cache, which all steps share.
        key: The first entries of the key.

    Attributes:
        tensors: The arguments.
        key: Identifies the graph: everything that the graph depends on, except the values of the arguments.
    """

    def __init__(self, cache: ArgumentCache, *key: Hashable) -> None:
        self.tensors: list[Tensor] = []
        self.key: list[Hashable] = list(key)
        self._cache = cache

    def add_variables(self, values: Params) -> Unpack[list[Tensor]]:
        """Pack tensors."""
        self.key.append(tuple(map(geometry, values)))
        self.tensors.extend(values)
        return lambda flat: [next(flat) for _ in values]

    def add_noted(self, noted: Mapping[str, Params]) -> Unpack[dict[str, list[Tensor]]]:
        """Pack the noted variables of some levels, by level name."""
        layout = InputLayout({name: len(values) for name, values in noted.items()})
        self.key.append(tuple(noted))
        unpack = self.add_variables([t for values in noted.values() for t in values])
        return lambda flat: layout.by_level(unpack(flat))

    def add_vector(self, values: Sequence[Tensor | None]) -> Unpack[list[Tensor | None]]:
        """Pack a vector, where None means zero."""
        self.key.append(tuple(v is None or v.shape for v in values))
        self.tensors.extend(v.contiguous() for v in values if v is not None)
        return lambda flat: [None if v is None else next(flat) for v in values]

    def add_update(self, place: Hashable, slots: Slots, groups: Groups, *, rated: bool) -> Unpack[Updated]:
        """Pack the memory and the hyperparameters of an update rule, one after the other.

        Numbers in the memory, and hyperparameters, are constants of the graph, except the learning rate of a ``rated``
        rule.
        """
        kinds, held = kinds_of(slots)
        self.key.extend(kinds)
        self.tensors.extend(held)
        key, tensors = self.key, self.tensors
        for index, group in enumerate(groups):
            constants = dict(group)
            constants.pop("params", None)  # the hyperparameters of a recorded step have no parameters
            if rated:
                tensors.append(self._cache.rate((place, index), constants.pop("lr")))
            key.extend(constants.values())
        return lambda flat: (
            [{k: next(flat) if isinstance(v, Tensor) else v for k, v in slot.items()} for slot in slots],
            [
                {**{k: v for k, v in group.items() if k != "params"}, **({"lr": next(flat)} if rated else {})}
                for group in groups
            ],
        )

    def add_draws(self, place: Hashable, steps: Sequence[Sequence[Draw]]) -> Unpack[list[tuple[Draw, ...]]]:
        """Pack the batches of some steps; the graph draws no random numbers."""
        for step, draws in enumerate(steps):
            for index, draw in enumerate(draws):
                tensors, kind = self._cache.batch((place, step, index), draw.batch)
                self.key.append(kind)
                self.tensors.extend(tensors)
        return lambda flat: [tuple(draw._replace(batch=_filled(draw.batch, flat)) for draw in draws) for draws in steps]


def geometry(tensor: Tensor) -> Hashable:
    """Return what generated code takes for granted of an argument: it reads memory by address."""
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def kinds_of(slots: Slots) -> tuple[list[Hashable], list[Tensor]]:
    """Return the key of the memory of an update rule, and its tensors."""
    kinds: list[Hashable] = []
    tensors: list[Tensor] = []
    for slot in slots:
        for field, value in slot.items():
            if isinstance(value, Tensor):
                kinds.append((field, geometry(value)))
                tensors.append(value)
            else:
                kinds.append((field, value))
    return kinds, tensors


def _filled(batch: Any, tensors: Iterator[Tensor]) -> Any:
    leaves, structure = tree_flatten(batch)
    return tree_unflatten([next(tensors) if isinstance(leaf, Tensor) else leaf for leaf in leaves], structure)


def _kind(value: Any) -> Hashable:
    """Return the key of an entry of a batch; an entry that is no tensor is a constant of the graph."""
    if isinstance(value, Tensor):
        return value.shape, value.dtype, value.device
    if not isinstance(value, Hashable):
        raise Unsuitable(
            f"a batch holds a {type(value).__name__}, which is not hashable and cannot be a constant of a graph"
        )
    return value


# Marks the position of a tensor in a layout.
_TENSOR: Any = object()


def without_tensors(slots: Slots) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """Split the memory of an update rule into its tensors and a layout."""
    tensors = [value for slot in slots for value in slot.values() if isinstance(value, Tensor)]
    return tensors, [{k: _TENSOR if isinstance(v, Tensor) else v for k, v in slot.items()} for slot in slots]


def with_tensors(layout: Slots, tensors: Iterator[Tensor]) -> list[dict[str, Any]]:
    """Put tensors into a layout."""
    return [{k: next(tensors) if v is _TENSOR else v for k, v in slot.items()} for slot in layout]


def count_tensors(layout: Slots) -> int:
    """Return the number of tensors in a layout."""
    return sum(value is _TENSOR for slot in layout for value in slot.values())
