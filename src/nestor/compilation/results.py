"""The results of a graph of steps, and where they go."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from nestor.compilation.inputs import StepInputs
from nestor.compilation.placeholders import StepsLayout
from nestor.levels.level import Gradient
from nestor.solvers import SolveState
from nestor.training.guard import FiniteGuard
from nestor.training.level_state import LevelState
from nestor.vectors import algebra


class StepResults:
    """Writes the results of a graph into the states of levels.

    Args:
        layout: Describes the results.
        inputs: The arguments of the graph, which become those of the next run.
        states: The states of the levels that step.
    """

    def __init__(self, layout: StepsLayout, inputs: StepInputs, states: Sequence[LevelState]) -> None:
        self._inputs = inputs
        placed = inputs.variables()
        self._variables = [tensor for state in states for tensor in placed[state.level.name]]
        index = len(self._variables)
        for name, update in inputs.updates.items():
            index = update.place(layout.levels[name].slots, index)
        for name, solves in inputs.solves.items():
            index = solves.place(layout.levels[name].solves, index)
        self._buffers = inputs.modules.targets(inputs.arguments.tensors, layout.buffers)
        self._new_buffers = slice(index, index := index + len(self._buffers))
        self._levels: list[_LevelResults] = []
        for state in states:
            level = layout.levels[state.level.name]
            self._levels.append(results := _LevelResults(state, index, level.metrics, level.stats))
            index = results.stop
        problems = [state.level.problem for state in states]
        self._schedulers = [problem.scheduler for problem in problems if problem.scheduler is not None]
        self._is_cpu = self._variables[0].is_cpu

    def write(self, found: Sequence[Tensor], guard: FiniteGuard, step: int) -> None:
        """Write the results of a run.

        Args:
            found: The results.
            guard: Receives the flags of steps on an accelerator, which are checked later.
            step: The number of the last engine step, for errors.
        """
        algebra.copy_(self._variables, found[: len(self._variables)])
        inputs = self._inputs
        for update in inputs.updates.values():
            update.write(found, inputs.arguments.tensors)
        for solves in inputs.solves.values():
            solves.write(found)
        if self._buffers:
            algebra.copy_(self._buffers, found[self._new_buffers])
        for results in self._levels:
            results.note(found)
            if not self._is_cpu:
                guard.defer(found[-1], results.state.level, results.gradient(), step)
        for scheduler in self._schedulers:
            scheduler.step()


class _LevelResults:
    """The scalars that a graph returns for one level.

    Args:
        state: The state of the level.
        first: The index of the first result.
        metrics: The names of the metrics.
        solves: For each level below, the names of the statistics of its solve, and the notice of a truncated solve.
    """

    def __init__(
        self, state: LevelState, first: int, metrics: Sequence[str], solves: Mapping[str, tuple[list[str], str]]
    ) -> None:
        self.state = state
        self._slice = slice(first, first + 2 + len(metrics))
        self._metrics = metrics
        self._solves: list[tuple[str, list[str], str, slice]] = []
        index = self._slice.stop
        for lower, (keys, notice) in solves.items():
            self._solves.append((lower, keys, notice, slice(index, index := index + len(keys))))
        self.stop = index
        self._found: Sequence[Tensor] = ()

    def note(self, found: Sequence[Tensor]) -> None:
        """Store the scalars in the level's state; those of its gradient when they are read."""
        state, metrics = self.state, self.state.metrics
        self._found = found[self._slice]
        for lower, keys, notice, place in self._solves:
            solve = state.solves.get(lower) or state.solves.setdefault(lower, SolveState())
            solve.notice = notice
            solve.note(dict(zip(keys, found[place], strict=True)))
        if metrics.first_norm is None:
            metrics.record(self.gradient())
        else:
            metrics.record_later(self.gradient)

    def gradient(self) -> Gradient:
        """Return the scalars of the gradient."""
        loss, norm, *metrics = self._found
        return Gradient(loss, dict(zip(self._metrics, metrics, strict=True)), [], norm, {})
