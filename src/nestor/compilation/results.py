"""The results of a graph of steps, and where they go."""

from collections.abc import Sequence

from torch import Tensor

from nestor.compilation.inputs import StepInputs
from nestor.compilation.placeholders import LevelLayout, StepsLayout
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
        self._levels = [_LevelResults(state, index, layout.levels[state.level.name]) for state in states]
        self._solving = [results for results in self._levels if results.solves]
        problems = [state.level.problem for state in states]
        self._schedulers = [problem.scheduler for problem in problems if problem.scheduler is not None]
        self._is_cpu = self._variables[0].is_cpu

    @property
    def count(self) -> int:
        """The number of results that :meth:`move` copies: those at the beginning."""
        return len(self._variables)

    def move(self, found: Sequence[Tensor]) -> None:
        """Write what the next run depends on, and count truncated solves."""
        algebra.copy_(self._variables, found[: len(self._variables)])
        arguments = self._inputs.arguments.tensors
        for update in self._inputs.updates.values():
            update.move(found, arguments)
        for solves in self._inputs.solves.values():
            solves.write(found)
        if self._buffers:
            algebra.copy_(self._buffers, found[self._new_buffers])
        for results in self._solving:
            results.note_solves(found)

    def note(self, found: Sequence[Tensor], guard: FiniteGuard, step: int) -> None:
        """Write the other results into the states of the levels.

        Args:
            found: The results of a run that :meth:`move` has written.
            guard: Receives the flags of steps on an accelerator, which are checked later.
            step: The number of the last engine step, for errors.
        """
        for update in self._inputs.updates.values():
            update.write(found)
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
        first: The index of the first vector of scalars.
        layout: Describes the results for the level.

    Attributes:
        solves: For each level below whose solve has statistics, its name, their names, the notice, and their places.
    """

    def __init__(self, state: LevelState, first: int, layout: LevelLayout) -> None:
        self.state = state
        self._first = first
        self._metrics = layout.metrics
        self._places = layout.places
        self.solves: list[tuple[str, list[str], str, slice]] = []
        index = 2 + len(layout.metrics)
        for lower, (keys, notice) in layout.stats.items():
            self.solves.append((lower, keys, notice, slice(index, index := index + len(keys))))
        self._vectors: Sequence[Tensor] = ()

    def note_solves(self, found: Sequence[Tensor]) -> None:
        """Store the statistics of the solves in the level's state."""
        solves = self.state.solves
        for lower, keys, notice, places in self.solves:
            solve = solves.get(lower) or solves.setdefault(lower, SolveState())
            solve.notice = notice
            solve.note(dict(zip(keys, self._read(found[self._first :], places), strict=True)))

    def note(self, found: Sequence[Tensor]) -> None:
        """Store the scalars of the gradient in the level's state, to be read later."""
        metrics, self._vectors = self.state.metrics, found[self._first :]
        if metrics.first_norm is None:
            metrics.record(self.gradient())
        else:
            metrics.record_later(self.gradient)

    def gradient(self) -> Gradient:
        """Return the scalars of the gradient."""
        loss, norm, *metrics = self._read(self._vectors, slice(2 + len(self._metrics)))
        return Gradient(loss, dict(zip(self._metrics, metrics, strict=True)), [], norm, {})

    def _read(self, vectors: Sequence[Tensor], places: slice) -> list[Tensor]:
        return [vectors[vector][index] for vector, index in self._places[places]]
