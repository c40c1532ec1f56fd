"""The random generators that data own: those of a loader, its sampler and its dataset."""

import copy
import random
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from nestor.data.reachable import reachable


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
        kinds = (torch.Generator, random.Random)
        # An iterator that is under way makes its generators anew when the data is restarted.
        parts = reachable(self._data, closed=(Iterator,))
        return [part for part in parts if isinstance(part, kinds) or _is_numpy(part)]


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
