"""Compiled graphs, by key."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

from nestor.autodiff.counters import Evaluations, add_to_active, counting
from nestor.compilation.arguments import Arguments
from nestor.compilation.graph import Compiled, Unsuitable, compiled

# Batches whose shapes change from step to step would be compiled again and again.
MOST = 16

Traced: TypeAlias = "tuple[Sequence[Tensor], Any]"
"""The results of a graph, and how to read them."""


@dataclass(frozen=True)
class CompiledGraph:
    """A compiled function of tensors.

    Attributes:
        run: The function; its last result is whether every condition held.
        layout: How to read the other results.
        counts: The evaluations that it makes.
    """

    run: Compiled
    layout: Any
    counts: Evaluations

    def __call__(self, arguments: Sequence[Tensor]) -> Sequence[Tensor]:
        """Run the function."""
        found = self.run(*arguments)
        add_to_active(self.counts, 1)
        return found


class GraphCache:
    """Compiles each graph when it is first needed."""

    def __init__(self) -> None:
        self._graphs: dict[Hashable, CompiledGraph] = {}

    def get(self, arguments: Arguments, trace: Callable[..., Traced]) -> CompiledGraph:
        """Return the graph of a key; compile it from ``trace(*tensors)`` if there is none.

        Raises:
            Unsuitable: If it cannot be a graph.
        """
        key = tuple(arguments.key)
        try:
            graph = self._graphs.get(key)
        except TypeError as error:  # a list among the hyperparameters
            raise Unsuitable(f"a constant of the graph is not hashable ({error}); use a tuple") from None
        if graph is not None:
            return graph
        if len(self._graphs) >= MOST:
            raise Unsuitable(f"its batches have had {MOST} different shapes; give them one (drop_last=True)")
        layouts: list[Any] = []

        def function(*tensors: Tensor) -> Sequence[Tensor]:
            results, layout = trace(*tensors)
            layouts.append(layout)
            return [result.detach() for result in results]

        with counting() as counts:
            run = compiled(function, arguments.tensors)
        graph = self._graphs[key] = CompiledGraph(run, layouts[0], counts)
        return graph
