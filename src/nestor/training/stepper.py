"""One optimizer step of a level, or nothing at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from nestor.autodiff.profiling import phase
from nestor.errors import NestorError, NonFiniteError
from nestor.levels.gradient import Gradient, is_finite
from nestor.levels.level import Level
from nestor.levels.moment import Moment
from nestor.optim.state import State
from nestor.optim.update import OptimizerUpdate, clip
from nestor.program import Program
from nestor.training.guard import Guard
from nestor.training.runner import Runner


class Stepper:
    """Takes the optimizer steps of the levels of a program; a step that fails leaves everything as it was.

    Args:
        program: The program.
        runners: What changes in each level, by name.
        guard: Refuses numbers that are not finite.
        shared: Whether others than the levels above read the moments of levels.
    """

    def __init__(self, program: Program, runners: Mapping[str, Runner], guard: Guard, *, shared: bool = False) -> None:
        self.program = program
        self.runners = runners
        self.guard = guard
        self._once = set() if shared else program.read_once()

    def take(self, runner: Runner, step: int) -> None:
        """Take one optimizer step on the runner's present draws.

        Args:
            runner: The level's.
            step: The number of the engine step, for errors.

        Raises:
            NestorError: If the step cannot be taken; nothing has changed then.
        """
        level, problem = runner.level, runner.level.problem
        buffers = level.own_buffers()
        moments = {name: self._moment(name) for name in self.program.below(level.name)}
        noted = None
        if runner.recorder is not None:
            below = self.program.below(level.name)[:-1]
            noted = runner.note({name: self.runners[name].moment(values=True) for name in below})
        taken = True
        try:
            with phase(level.name, "gradient"):
                if runner.keeps_graphs:
                    assert runner.recorder is not None
                    gradient, kept = self.program.gradient_with_graph(level, runner.draws, runner.copies())
                    runner.recorder.keep_graph(kept)
                else:
                    gradient = self.program.gradient(
                        level, moments, buffers=noted, solves=runner.solves, inputs=runner.notes_inputs
                    )
            if problem.optimizer is None or problem.tasks is not None:
                self._update(runner, gradient, step)
            else:
                values = gradient.values
                if problem.clip_norm is not None:
                    values = clip(level.space, values, problem.clip_norm, gradient.norm)
                with _Lent(level.parameters, values):
                    taken = self.guard.step(problem.optimizer, level, gradient, step)
        except BaseException as error:
            self._undo(runner, buffers)
            scaling = level.precision.scaling if level.precision is not None else None
            if scaling is not None and isinstance(error, NonFiniteError):
                # An overflow inside a solve.
                finite = torch.zeros((), dtype=torch.bool, device=scaling.device)
                scaling.update(finite)
                self._back_off(level, finite)
                return
            if isinstance(error, NestorError):
                raise error.located(level=level.name, where=level.where, step=step) from None
            raise
        if level.loss_scale is not None:
            self._back_off(level, is_finite(gradient))
        if not taken:
            self._undo(runner, buffers)
        elif runner.recorder is not None:
            runner.recorder.took(gradient.values, gradient.inputs)
        if problem.scheduler is not None and taken:
            problem.scheduler.step()
        if runner.first_norm is None:
            runner.first_norm = gradient.norm
        runner.gradient = Gradient(gradient.loss, gradient.metrics, [], gradient.norm, {})

    def _moment(self, name: str) -> Moment:
        """Return the moment of a level; what one level alone reads, and no callback, may be used up."""
        return self.runners[name].moment(once=name in self._once)

    def _back_off(self, level: Level, finite: Tensor) -> None:
        """Let the scales of the levels that a hypergradient runs through follow its overflows."""
        for name in self.program.below(level.name)[:-1]:
            precision = self.program.levels[name].precision
            if precision is not None and precision.scaling is not None:
                precision.scaling.back_off(finite)

    def _undo(self, runner: Runner, buffers: list[tuple[Tensor, Tensor]]) -> None:
        """Leave no trace of a step that was not taken."""
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        if runner.recorder is not None:
            runner.recorder.forget_last()

    def _update(self, runner: Runner, gradient: Gradient, step: int) -> None:
        """Take a step of a rule whose memory is the runner's: the user's own, or an optimizer's on stacked tasks."""
        level = runner.level
        rule = level.rule()
        # A rule of the user's own may write into what it is given.
        own = isinstance(rule, OptimizerUpdate)
        before = State([p.detach() for p in level.parameters], runner.kept()) if own else runner.state(rule)
        inputs = {name: self.program.levels[name].parameters for name in level.depends}
        after = rule.plain(before, gradient.values, inputs)
        after = self.guard.accept(after, before, level, gradient, step)
        with torch.no_grad():
            for parameter, value in zip(level.parameters, after.params, strict=True):
                parameter.copy_(value)
        runner.slots = list(after.slots)

    def look_back(self, stepped: set[str], step: int) -> None:
        """Let the lower levels of those that have stepped return from their look-ahead."""
        below = {lower for name in stepped for lower in self.program.levels[name].lowers}
        returning = [r for name, r in self.runners.items() if name in below and r.snapshot is not None]
        for runner in returning:
            assert runner.snapshot is not None
            runner.slots = runner.snapshot.restore(runner.level)
        for runner in returning:
            # Not the next cycle yet, but steps that are undone must not be replayed.
            if runner.recorder is not None:
                runner.recorder.clear()
            self.take(runner, step)
            runner.snapshot = None


class _Lent:
    """Lends the gradients to ``.grad``, where torch's optimizers read them."""

    def __init__(self, parameters: Sequence[Tensor], values: Sequence[Tensor | None]) -> None:
        self._parameters = parameters
        self._before = [p.grad for p in parameters]
        for parameter, value in zip(parameters, values, strict=True):
            parameter.grad = value

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None:
        for parameter, value in zip(self._parameters, self._before, strict=True):
            parameter.grad = value
