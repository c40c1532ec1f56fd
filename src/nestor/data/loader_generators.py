"""The random generators that data own: those of a loader, its sampler and its dataset."""

import copy
import random
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

_DEPTH, _PARTS = 6, 100


class LoaderGenerators:
    """The generators that are reachable from data, with which they shuffle and augment.

    A resumed run draws the batches of an epoch again. Their order depends on the states of these generators at the
    start of the epoch, so a checkpoint contains them: those of ``torch.Generator``, ``numpy.random.Generator``,
    ``numpy.random.RandomState`` and ``random.Random``, in attributes of the loader, its samplers, its dataset and its
    transforms, and in what their functions close over.

    Args:
        data: The data of a level.
    """

    def __init__(self, data: Any) -> None:
        self._data = data

    def states(self) -> list[Any]:
        """Return the present state of each generator."""
        return [_state(generator) for generator in self._found()]

    def restore(self, states: Iterable[Any]) -> None:
        """Set each generator to a state that :meth:`states` returned for the same kind of data."""
        for generator, state in zip(self._found(), states, strict=False):
            _set(generator, state)

    def _found(self) -> list[Any]:
        # Datasets may create generators late, so they are looked for each time: once an epoch and at each save.
        return list(_generators(self._data))


def _generators(data: Any) -> Iterator[Any]:
    """Walk through the attributes of data, each object once."""
    seen: set[int] = set()
    waiting: list[tuple[Any, int]] = [(data, 0)]
    while waiting:
        value, depth = waiting.pop(0)
        if id(value) in seen or isinstance(value, Tensor | nn.Module | str | bytes | int | float | type | None):
            continue
        seen.add(id(value))
        if isinstance(value, torch.Generator | random.Random) or _is_numpy(value):
            yield value
        elif depth < _DEPTH:
            waiting += [(part, depth + 1) for part in _parts(value)]


def _parts(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return list(value.values()) if len(value) <= _PARTS else []
    if isinstance(value, list | tuple):
        return list(value) if len(value) <= _PARTS else []
    if isinstance(value, partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, MethodType):
        return [value.__self__]
    if isinstance(value, FunctionType):
        return [cell.cell_contents for cell in value.__closure__ or () if cell != CellType()]
    if type(value).__module__.partition(".")[0] in ("builtins", "numpy"):
        return []
    return [part for name, part in getattr(value, "__dict__", {}).items() if name != "_iterator"]


def _is_numpy(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.random.Generator | numpy.random.RandomState)


def _state(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, sys.modules["numpy"].random.RandomState):
        return generator.get_state(legacy=False)
    return copy.deepcopy(generator.bit_generator.state)


def _set(generator: Any, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, sys.modules["numpy"].random.RandomState):
        generator.set_state(state)
    else:
        generator.bit_generator.state = state
