"""The loop of a run: which levels step in an engine step, and how."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

from nestor.training.guard import FiniteGuard
from nestor.training.schedule import Schedule
from nestor.training.stepper import Stepper


class Window(NamedTuple):
    """The engine steps that a loop may take before it returns.

    Attributes:
        step: Engine steps taken.
        last_step: The last engine step of the present run.
        length: Engine steps of the present run in all.
        is_due_before: Whether a callback or a validation is due after an engine step before the given one.
    """

    step: int
    last_step: int
    length: int
    is_due_before: Callable[[int], bool]


class Loop(ABC):
    """Takes engine steps.

    Args:
        schedule: Names the levels that are due.
        stepper: Takes their steps.
        guard: Refuses numbers that are not finite.
    """

    def __init__(self, schedule: Schedule, stepper: Stepper, guard: FiniteGuard) -> None:
        self.schedule = schedule
        self.stepper = stepper
        self.guard = guard

    @property
    def eager_reasons(self) -> dict[str, str]:
        """The levels that were to be compiled and were not, with the reason."""
        return {}

    @abstractmethod
    def advance(self, window: Window, stepped: Callable[[str], None]) -> int:
        """Take one engine step, or several at once.

        Args:
            window: The engine steps that may be taken.
            stepped: Called with the name of each level after its step (after the last steps, if several are taken).

        Returns:
            The number of engine steps taken since the start.
        """


class EagerLoop(Loop):
    """Takes one engine step, level by level."""

    def __init__(self, schedule: Schedule, stepper: Stepper, guard: FiniteGuard, *, rollback: bool = False) -> None:
        super().__init__(schedule, stepper, guard)
        self._rollback = rollback

    def advance(self, window: Window, stepped: Callable[[str], None]) -> int:
        step = window.step + 1
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
