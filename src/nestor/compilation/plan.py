"""The steps of some levels by one graph, whose arguments stay in place from run to run."""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence

from torch import Tensor

from nestor.compilation.arguments import ArgumentCache, Arguments
from nestor.compilation.graph import CompiledGraph
from nestor.compilation.inputs import StepInputs, Steps
from nestor.compilation.placeholders import PlaceholderRun
from nestor.compilation.results import StepResults
from nestor.levels.evaluator import Evaluator
from nestor.training.guard import FiniteGuard
from nestor.training.level_state import LevelState


class Plan:
    """Runs one graph as long as nothing asks for another one.

    Args:
        names: The levels in the order in which they step; one may step several times.
        evaluator: The evaluator of the run.
        states: The state of each level, by name.
        cache: The cache of arguments.
    """

    def __init__(
        self, names: Sequence[str], evaluator: Evaluator, states: Mapping[str, LevelState], cache: ArgumentCache
    ) -> None:
        self._stepping = [states[name] for name in dict.fromkeys(names)]
        self._inputs = StepInputs(names, evaluator, states, cache)
        self._results: StepResults | None = None
        self._graph: CompiledGraph | None = None
        self._is_cpu = self._stepping[0].level.parameters[0].is_cpu

    @property
    def arguments(self) -> Arguments:
        """The arguments of the next run, and their key."""
        return self._inputs.arguments

    def pack(self, own: Steps, *key: Hashable) -> Callable[[Iterator[Tensor]], PlaceholderRun]:
        """Pack the arguments; see :meth:`StepInputs.pack`."""
        return self._inputs.pack(own, *key)

    def use(self, graph: CompiledGraph) -> None:
        """Use a graph for the arguments that were packed last."""
        self._graph = graph
        self._results = StepResults(graph.layout, self._inputs, self._stepping)

    def is_same(self, own: Steps) -> bool:
        """Update the arguments; return False if another graph may be needed; see :meth:`StepInputs.is_same`."""
        return self._inputs.is_same(own)

    def run(self) -> Sequence[Tensor] | None:
        """Run the graph; return None if a number is not finite. On an accelerator that is not read."""
        assert self._graph is not None
        found = self._graph(self._inputs.arguments.tensors)
        return None if self._is_cpu and not found[-1].item() else found

    def accept(self, found: Sequence[Tensor], guard: FiniteGuard, step: int) -> None:
        """Write the results of the graph into the states of the levels; see :meth:`StepResults.write`."""
        assert self._results is not None
        self._results.write(found, guard, step)
