"""The steps of some levels by one graph, whose arguments stay in place from run to run."""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from time import perf_counter

from torch import Tensor

from nestor.compilation.arguments import ArgumentCache, Arguments
from nestor.compilation.graph import CompiledGraph
from nestor.compilation.inputs import StepInputs, Steps
from nestor.compilation.placeholders import PlaceholderRun
from nestor.compilation.results import StepResults
from nestor.levels.evaluator import Evaluator
from nestor.training.guard import FiniteGuard
from nestor.training.level_state import LevelState

# The longest time of repeated runs in seconds, in which a run does not look for signals.
LONGEST = 0.02


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
        """Run the graph; return None if a number is not finite. On an accelerator that is not read.

        On the CPU, the variables among the results, and the flag at the end, are valid until the next run only.
        """
        assert self._graph is not None
        assert self._results is not None
        found = self._graph.keeping(self._inputs.arguments.tensors, self._results.count)
        return None if self._is_cpu and not found[-1].item() else found

    def accept(self, found: Sequence[Tensor], guard: FiniteGuard, step: int) -> None:
        """Write the results of the graph into the states of the levels; see :class:`StepResults`."""
        assert self._results is not None
        self._results.move(found)
        self._results.note(found, guard, step)

    def repeat(self, order: Sequence[LevelState], most: int, guard: FiniteGuard) -> tuple[int, bool]:
        """Run the graph again and again on the next batches; nothing but these may have changed since the last run.

        The memory of the rules and the numbers of the last run only are written into the states of the levels.

        Args:
            order: The levels in the order in which they step, each once.
            most: The largest number of runs. There are fewer if a number is not finite, if the next batches need
                another graph, or after :data:`LONGEST` seconds.
            guard: See :meth:`accept`.

        Returns:
            The number of runs, and whether the next batches need another graph. Batches that were drawn for one run
            more are the next ones of the levels.
        """
        assert self._results is not None
        results, end, taken, fits = self._results, perf_counter() + LONGEST, 0, True
        last: Sequence[Tensor] = ()
        try:
            while taken < most and perf_counter() < end:
                for state in order:
                    state.draws.advance()
                fits = self._inputs.repeats()
                found = self.run() if fits else None
                if found is None:
                    for state in order:
                        state.draws.prefetched.append(state.draws.latest)
                    break
                results.move(found)
                last, taken = found, taken + 1
                for state in order:
                    state.steps += 1
        finally:
            if last:
                results.note(last, guard, 0)
        return taken, not fits
