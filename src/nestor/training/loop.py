"""The loop of a run: which levels step in an engine step, and when."""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from nestor.training.guard import MOST_PENDING, FiniteGuard
from nestor.training.level_state import LevelState
from nestor.training.run import Run
from nestor.training.stepper import Stepper


class Schedule:
    """The order of the optimizer steps of a run.

    In an engine step, every level without lowers takes one step. Any other level takes one step when all its lowers are
    ready. A level is ready after ``unroll_steps`` steps, once past ``warmup_steps``. Levels step in the order listed.

    Args:
        states: The state of each level, by name, in the program's order.
    """

    def __init__(self, states: Mapping[str, LevelState]) -> None:
        self.states = states
        self._lowers = {name: state.level.links.lower_levels for name, state in states.items()}
        # Those that wait for a level.
        self._waiting = {name: [n for n, lowers in self._lowers.items() if name in lowers] for name in states}
        self._coming: dict[Hashable, list[list[str]]] = {}
        self._periods = [
            (state, state.level.problem.warmup_steps, state.level.problem.unroll_steps) for state in states.values()
        ]

    def due(self) -> list[str]:
        """Name the levels that step in the next engine step, in order."""
        return self._due_after(self.states)

    def stepped(self, name: str) -> None:
        """Count a step of a level; mark the level as ready if its ``unroll_steps`` are complete."""
        state = self.states[name]
        state.ready.clear()
        state.steps += 1
        waiting = self._waiting[name]
        if waiting and state.is_ready_after(state.steps):
            for upper in waiting:
                self.states[upper].ready.add(name)

    def coming(self, most: int) -> list[list[str]]:
        """Name the levels of each coming engine step, up to the first in which a level with lowers steps.

        Args:
            most: Largest number of engine steps to plan. The result is empty if no level with lowers steps in them.
        """
        key = most, self.position()
        if key not in self._coming:
            self._coming[key] = self._plan(most)
        return self._coming[key]

    def position(self) -> Hashable:
        """Return what the coming steps depend on: all cycles that begin at equal positions have the same steps."""
        return tuple(
            [
                (min(state.steps, warmup), state.steps % unroll, frozenset(state.ready) if state.ready else None)
                for state, warmup, unroll in self._periods
            ]
        )

    def _plan(self, most: int) -> list[list[str]]:
        planned = {name: _Planned(state.steps, set(state.ready)) for name, state in self.states.items()}
        found: list[list[str]] = []
        while len(found) < most:
            found.append(self._due_after(planned))
            if any(self._lowers[name] for name in found[-1]):
                return found
            for name in found[-1]:
                planned[name].steps += 1
                if self.states[name].is_ready_after(planned[name].steps):
                    for upper in self._waiting[name]:
                        planned[upper].ready.add(name)
        return []

    def _due_after(self, progress: "Mapping[str, LevelState] | Mapping[str, _Planned]") -> list[str]:
        due: list[str] = []
        ending: set[str] = set()
        for name, lowers in self._lowers.items():
            if lowers and not progress[name].ready.union(ending).issuperset(lowers):
                continue
            due.append(name)
            if self._waiting[name] and self.states[name].is_ready_after(progress[name].steps + 1):
                ending.add(name)
        return due


@dataclass
class _Planned:
    """What a level will have done after some of the coming engine steps; see :class:`LevelState`."""

    steps: int
    ready: set[str]


class Loop:
    """Takes engine steps, level by level.

    Args:
        schedule: Determines which levels are due.
        stepper: Takes the optimizer steps.
        guard: Rejects steps that are not finite.
        rollback: Whether the steps of lower levels are a look-ahead.
    """

    eager_reasons: Mapping[str, str] = MappingProxyType({})

    def __init__(self, schedule: Schedule, stepper: Stepper, guard: FiniteGuard, *, rollback: bool = False) -> None:
        self.schedule = schedule
        self.stepper = stepper
        self.guard = guard
        self._rollback = rollback

    def advance(self, run: Run, next_due: Callable[[int], int], stepped: Callable[[str], None]) -> int:
        """Take one engine step.

        Args:
            run: The run.
            next_due: Returns the next engine step after which a callback or a validation is due, at most a given one.
            stepped: Called with the name of each level after its step.

        Returns:
            The number of engine steps taken since the start.
        """
        if len(self.guard.pending) > MOST_PENDING:
            self.guard.check()
        step = run.step + 1
        due = self.schedule.due()
        for name in due:
            state = self.stepper.states[name]
            self.stepper.prepare(state)
            self.stepper.take(state, step)
            self.schedule.stepped(name)
            stepped(name)
        if self._rollback:
            self.stepper.end_look_ahead(set(due), step)
        return step
