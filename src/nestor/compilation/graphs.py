"""The graphs that have been compiled, by what tells them apart."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

from nestor.autodiff.counters import Evaluations, add_to_active, counting
from nestor.compilation.graph import Compiled, Unsuitable, compiled

# Shapes of batches that change from step to step would be compiled again and again.
MOST = 16

Written: TypeAlias = "tuple[Sequence[Tensor], Any]"
"""The results of a graph, and how to read them."""


@dataclass(frozen=True)
class Graph:
    """A compiled function.

    Attributes:
        run: The function; its last result is whether every condition held.
        layout: How to read the others.
        counts: The evaluations that it makes.
    """

    run: Compiled
    layout: Any
    counts: Evaluations

    def __call__(self, arguments: Sequence[Tensor]) -> Sequence[Tensor]:
        """Run it."""
        found = self.run(*arguments)
        add_to_active(self.counts, 1)
        return found


class Graphs:
    """Compiles each kind of graph when it is first needed."""

    def __init__(self) -> None:
        self._known: dict[Hashable, Graph] = {}

    def get(self, key: Hashable, arguments: Sequence[Tensor], write: Callable[..., Written]) -> Graph:
        """Return the graph of a kind, compiled from ``write(*arguments)`` if there is none.

        Raises:
            Unsuitable: If it cannot be a graph.
        """
        try:
            graph = self._known.get(key)
        except TypeError as error:  # unhashable: a list among the hyperparameters
            raise Unsuitable(f"what a graph takes to be constant cannot be told from another value ({error})") from None
        if graph is not None:
            return graph
        if len(self._known) >= MOST:
            raise Unsuitable(f"its batches have had {MOST} different shapes; give them one (drop_last=True)")
        layouts: list[Any] = []

        def function(*tensors: Tensor) -> Sequence[Tensor]:
            results, layout = write(*tensors)
            layouts.append(layout)
            return [result.detach() for result in results]

        with counting() as counts:
            run = compiled(function, arguments)
        graph = self._known[key] = Graph(run, layouts[0], counts)
        return graph


# Stands for a tensor.
_TENSOR: Any = object()


def emptied(slots: Sequence[Mapping[str, Any]]) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """Take the tensors out of what an update rule keeps."""
    tensors = [value for slot in slots for value in slot.values() if isinstance(value, Tensor)]
    return tensors, [{k: _TENSOR if isinstance(v, Tensor) else v for k, v in slot.items()} for slot in slots]


def refilled(slots: Sequence[Mapping[str, Any]], tensors: Iterator[Tensor]) -> list[dict[str, Any]]:
    """Put tensors in again."""
    return [{k: next(tensors) if v is _TENSOR else v for k, v in slot.items()} for slot in slots]
