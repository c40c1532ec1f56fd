"""Applies a gradient to the real variables of a level, by its optimizer or its update rule."""

from collections.abc import Mapping

import torch
from torch.optim import Optimizer

from nestor.autodiff.torch_private import optimizer_step
from nestor.levels.level import Gradient, Level, diagnose, is_finite, reads_finite
from nestor.optim.hyperparameters import numbers_for
from nestor.optim.rules import clip
from nestor.optim.state import State
from nestor.optim.stepper import is_of_torch
from nestor.training.guard import FiniteGuard
from nestor.training.last_step import LastStep
from nestor.training.level_state import LevelState
from nestor.vectors import algebra


class InPlace:
    """Steps the optimizer on the real variables, or copies the result of an update rule into them.

    Args:
        levels: The levels of the program, by name.
        guard: Rejects steps that are not finite.
    """

    def __init__(self, levels: Mapping[str, Level], guard: FiniteGuard) -> None:
        self._levels = levels
        self._guard = guard

    def __call__(self, state: LevelState, gradient: Gradient, step: int) -> bool:
        level, problem = state.level, state.level.problem
        optimizer = problem.optimizer
        taken = True
        if level.name not in self._guard.watched:
            self._guard.watch(level)
        if optimizer is None or problem.tasks is not None:
            taken = self._update(state, gradient, step)
        else:
            values = gradient.values
            if problem.clip_norm is not None:
                values = clip(level.stepping.space, values, problem.clip_norm, gradient.norm)
            # torch's optimizers read .grad; what was there before comes back.
            before = [p.grad for p in level.parameters]
            try:
                # A step of one's own may change its gradients in place, and the history keeps them as they were.
                copied = _keeps_gradients(state) and not is_of_torch(optimizer)
                for parameter, value in zip(level.parameters, values, strict=True):
                    parameter.grad = value.clone() if copied and value is not None else value
                if level.stepping.learned:
                    with numbers_for(optimizer):
                        taken = self._step(optimizer, level, gradient, step)
                else:
                    taken = self._step(optimizer, level, gradient, step)
            finally:
                for parameter, grad in zip(level.parameters, before, strict=True):
                    parameter.grad = grad
        if problem.scheduler is not None and taken:
            problem.scheduler.step()
        return taken

    def _step(self, optimizer: Optimizer, level: Level, gradient: Gradient, step: int) -> bool:
        guard, scaling = self._guard, level.loss.scaling
        if not gradient.loss.is_cpu:
            guard.step(optimizer, level, gradient, step)
            return True
        if not reads_finite(gradient):
            if scaling is None:
                raise diagnose(level, gradient).located(step=step)
            guard.skip(level, is_finite(gradient))
            return False
        before = LastStep.take(optimizer, level.parameters) if guard.keeps_last else None
        optimizer_step(optimizer)
        largest = guard.watched[level.name].largest
        if not level.space.holds_finite(level.parameters) or float(gradient.norm) > largest:
            guard.examine(optimizer, level, gradient, before)
        if scaling is not None:
            scaling.update(is_finite(gradient))
        return True

    def _update(self, state: LevelState, gradient: Gradient, step: int) -> bool:
        """Take a step with a rule whose memory the level's state stores: a user's rule, or an optimizer of tasks."""
        level, scaling = state.level, state.level.loss.scaling
        is_cpu = gradient.loss.is_cpu
        if scaling is not None and is_cpu and not reads_finite(gradient):
            self._guard.skip(level, is_finite(gradient))
            return False
        before = State([p.detach() for p in level.parameters], state.memory.read())
        inputs = {name: self._levels[name].parameters for name in level.links.dependencies}
        rule = level.stepping.rule().at_step(state.draws.latest[0].step)
        after = rule.step(before, gradient.values, inputs)
        after = self._guard.accept(after, before, level, gradient, step)
        with torch.no_grad():
            algebra.copy_(level.parameters, after.params)
        state.memory.write(after.slots)
        if scaling is not None and is_cpu:
            scaling.update(is_finite(gradient))
        return True


def _keeps_gradients(state: LevelState) -> bool:
    """Return whether the history of a level holds the gradients of steps, or their graphs."""
    return state.history is not None and (state.history.spec.gradients or bool(state.kept.graphs))
