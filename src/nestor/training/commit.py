"""Steps in place: the level's own optimizer or update rule, guarded against numbers that are not finite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from nestor.levels.gradient import Gradient
from nestor.levels.level import Level
from nestor.optim.state import State
from nestor.optim.update import clip
from nestor.training.guard import FiniteGuard
from nestor.training.level_state import LevelState
from nestor.training.stepper import Commit


class InPlace(Commit):
    """Steps the optimizer on the real variables, or writes what a rule returns into them.

    Args:
        levels: The levels of the program, by name.
        guard: Refuses numbers that are not finite.
    """

    def __init__(self, levels: Mapping[str, Level], guard: FiniteGuard) -> None:
        self._levels = levels
        self._guard = guard

    def apply(self, state: LevelState, gradient: Gradient, step: int) -> bool:
        level, problem = state.level, state.level.problem
        taken = True
        if problem.optimizer is None or problem.tasks is not None:
            self._update(state, gradient, step)
        else:
            values = gradient.values
            if problem.clip_norm is not None:
                values = clip(level.space, values, problem.clip_norm, gradient.norm)
            with _BorrowedGrad(level.parameters, values):
                taken = self._guard.step(problem.optimizer, level, gradient, step)
        if problem.scheduler is not None and taken:
            problem.scheduler.step()
        return taken

    def _update(self, state: LevelState, gradient: Gradient, step: int) -> None:
        """Take a step of a rule whose memory the level's state holds: a user's rule, or an optimizer's on tasks."""
        level = state.level
        before = State([p.detach() for p in level.parameters], state.memory.read())
        inputs = {name: self._levels[name].parameters for name in level.links.dependencies}
        after = level.stepping.rule().step(before, gradient.values, inputs)
        after = self._guard.accept(after, before, level, gradient, step)
        with torch.no_grad():
            for parameter, value in zip(level.parameters, after.params, strict=True):
                parameter.copy_(value)
        state.memory.write(after.slots)


class _BorrowedGrad:
    """Holds gradients in ``.grad``, where torch's optimizers read them, and puts back what was there before."""

    def __init__(self, parameters: Sequence[Tensor], values: Sequence[Tensor | None]) -> None:
        self._parameters = parameters
        self._before = [p.grad for p in parameters]
        for parameter, value in zip(parameters, values, strict=True):
            parameter.grad = value

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None:
        for parameter, value in zip(self._parameters, self._before, strict=True):
            parameter.grad = value
