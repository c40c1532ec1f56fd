"""One optimizer step of a level, which is complete or changes nothing."""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from nestor.autodiff.instruments import in_phase
from nestor.errors import LossError, NestorError, NonFiniteError, note
from nestor.levels.evaluator import Direct, Evaluator
from nestor.levels.level import Gradient, Level, is_finite
from nestor.levels.nesting import BestResponse
from nestor.optim.history import Buffers, LevelHistory
from nestor.responses import Response
from nestor.training.guard import stuck_error
from nestor.training.level_state import LevelState
from nestor.training.run_checks import RunChecks
from nestor.training.snapshot import Snapshot
from nestor.vectors import Params, algebra

Commit: TypeAlias = Callable[[LevelState, Gradient, int], bool]
"""``commit(state, gradient, step)`` applies a gradient to a level's variables and to the memory of its rule.

It returns whether the step was taken (fp16 skips a step that overflows). If a number is not finite, it raises
:class:`NonFiniteError` and has changed nothing.
"""


class Stepper:
    """Takes the optimizer steps of the levels of a program; a step that fails changes nothing.

    An engine runs it on the real variables. The compiler runs it on placeholders, to trace the same steps.

    Args:
        evaluator: Computes gradients.
        states: The state of each level, by name.
        commit: Applies gradients to the variables.
        rollback: Whether the steps of lower levels are a look-ahead.

    Attributes:
        keeps_histories: Whether histories have other readers than the levels above; responses must not free them then.
        checks: Checks losses and responses; None checks nothing.
    """

    def __init__(
        self, evaluator: Evaluator, states: Mapping[str, LevelState], commit: Commit, *, rollback: bool = False
    ) -> None:
        self.evaluator = evaluator
        self.states = states
        self.commit = commit
        self.keeps_histories = False
        self.checks: RunChecks | None = None
        self._rollback = rollback
        self._below = {name: evaluator.below(name)[:-1] for name in states}
        self._responding = {name: [s for s in states.values() if name in s.level.links.upper_levels] for name in states}

    def announce(self, state: LevelState) -> None:
        """Save the variables of a level in the histories of the levels that depend on it, before it steps."""
        name, values = state.level.name, None
        for lower in self._responding[name]:
            lower.restarts = True
            if lower.notes(name):
                values = values or state.level.copies()
                lower.uppers_then[name] = values

    def prepare(self, state: LevelState) -> None:
        """Prepare a step of a level: save its variables, restart it if a level above has stepped, draw the batches.

        Eager steps, compiled steps and compiled cycles all begin here.

        Raises:
            LossError: If a module that the loss reads was changed since the program was built.
        """
        level = state.level
        try:
            level.loss.reader.check_modules()
        except LossError as error:
            raise error.located(level=level.name, where=level.loss.where) from None
        self.announce(state)
        if self._rollback and level.links.upper_levels and state.steps % level.problem.unroll_steps == 0:
            state.snapshot = Snapshot.take(level, state.memory.slots)
        if state.restarts:
            state.begin(None if level.problem.init is None else self._start(level, level.problem.init))
        try:
            state.draws.advance()
        except Exception as error:
            note(error, f"level {level.name!r}, its data, step {state.steps + 1} of the level")
            raise

    def hypergradient(self, name: str, response: Response | None) -> list[Tensor]:
        """Evaluate the hypergradient of a level at the current point, on the last batches; nothing changes.

        Args:
            name: The level.
            response: The response of all levels below; None uses the response of each level.
        """
        evaluator = self.evaluator
        if response is not None:
            evaluator = evaluator.with_responses(dict.fromkeys(evaluator.below(name)[:-1], response))
        level = evaluator.levels[name]
        histories = {name: state.present_history() for name, state in self.states.items()}
        with torch.enable_grad():
            values = evaluator.gradient(level, histories, statistics=False).values
        return algebra.zeros_for_none(values, level.parameters)

    def _start(self, level: Level, init: str) -> Params:
        """Return the variables that the level starts from (``Problem(init=...)``)."""
        origin = self.evaluator.levels[init].parameters
        return [origin[place] for place in level.links.init_indices]

    def take(
        self,
        state: LevelState,
        step: int,
        *,
        commit: Commit | None = None,
        direct: Callable[[Sequence[BestResponse]], Direct | None] | None = None,
    ) -> None:
        """Take one optimizer step on the current draws of a level.

        Args:
            state: The state of the level.
            step: The number of the engine step, for errors.
            commit: Applies this gradient; None uses the stepper's own function.
            direct: Computes the direct part of this gradient; see :meth:`Evaluator.gradient`.

        Raises:
            NestorError: If the step cannot be taken; nothing has changed then.
        """
        level = state.level
        saved = level.loss.saved_buffers() if level.loss.buffers or level.loss.reader.constants is not None else []
        histories: dict[str, LevelHistory] = {}
        for name in self._below[level.name]:
            histories[name] = self.states[name].present_history()
        histories[level.name] = LevelHistory(state.draws.latest)
        noted = None if state.history is None else self.note(state)
        is_evaluated = False
        try:
            checks = self.checks if level.links.lower_levels else None
            if checks is not None and level.name in checks.began:  # every n steps after the first one, if asked
                checks = None if checks.every is None or state.steps % checks.every else checks
            if checks is not None:
                checks.before(level, histories)
            gradient = in_phase(level.name, "gradient", self._gradient, state, histories, noted, direct)
            is_evaluated = True
            if checks is not None:
                checks.after(level, histories, gradient)
            taken = (commit or self.commit)(state, gradient, step)
        except BaseException as error:
            _undo(state, saved)
            if level.loss.scaling is not None and isinstance(error, NonFiniteError) and not is_evaluated:
                # A solve of a level below has overflowed: skip the step, as if the gradient had overflowed.
                finite = torch.zeros((), dtype=torch.bool, device=level.loss.scaling.device)
                level.loss.scaling.update(finite)
                self._back_off(level, finite)
                if not bool(level.loss.scaling.goes_on()):
                    raise stuck_error(level).located(step=step) from error
                return
            if isinstance(error, NestorError):
                raise error.located(level=level.name, where=level.loss.where, step=step) from None
            note(error, f"level {level.name!r}, loss {level.loss.where}, step {step}")
            raise
        if level.loss.scaling is not None:
            self._back_off(level, is_finite(gradient))
        if not taken:
            _undo(state, saved)
        elif state.history is not None:
            state.history.took(gradient.values, gradient.inputs)
        state.metrics.record(gradient)

    def note(self, state: LevelState) -> list[Buffers] | None:
        """Record the next step of a level, if its response needs it; see :meth:`LevelState.note`."""
        if state.history is None:
            return None
        return state.note({name: self._recorded(state.level, name) for name in self._below[state.level.name]})

    def _recorded(self, level: Level, name: str) -> LevelHistory:
        """Copy the history of a level below for a replay of a step of ``level``, whose peers may step before it."""
        lower = self.states[name]
        history = lower.present_history(copied=True)
        peers = [n for n in lower.level.uppers if n in level.peers and n not in lower.uppers_then]
        held = {n: self.states[n].level.copies() for n in peers} if self.evaluator.nesting.nested else {}
        return history._replace(uppers={**held, **history.uppers})

    def _gradient(
        self,
        state: LevelState,
        histories: Mapping[str, LevelHistory],
        noted: list[Buffers] | None,
        direct: Callable[[Sequence[BestResponse]], Direct | None] | None,
    ) -> Gradient:
        if state.history is not None and self._keeps_graph(state):
            before = state.history.noted_state
            theta = state.level.copies() if before is None else before.params
            gradient, graph = self.evaluator.gradient_with_graph(state.level, state.draws.latest, theta, noted)
            state.history.keep_graph(graph)
            return gradient
        return self.evaluator.gradient(
            state.level,
            histories,
            buffers=noted,
            solves=state.solves,
            input_gradients=state.history is not None and state.kept.input_gradients,
            exclusive=not self.keeps_histories,
            direct=direct,
        )

    def _keeps_graph(self, state: LevelState) -> bool:
        """Return whether the graph of the next step is kept.

        Whether graphs are small enough is decided when a level above has stepped: the steps until then are replayed,
        and the guard compares the replays with the run.
        """
        remaining = state.remaining_steps
        if not state.kept.may_have_graph(remaining):
            return False
        if state.kept.graphs is None and any(self.states[name].steps for name in state.level.uppers):
            state.kept.decide_graphs(self.evaluator, state.draws.latest, state.memory.read_state(), remaining)
        return bool(state.kept.graphs)

    def _back_off(self, level: Level, finite: Tensor) -> None:
        """Halve the loss scales of the levels below if the hypergradient of ``level`` is not finite."""
        for name in self._below[level.name]:
            scaling = self.evaluator.levels[name].loss.scaling
            if scaling is not None:
                scaling.back_off(finite)

    def end_look_ahead(self, stepped: set[str], step: int) -> None:
        """Restore the lower levels of all levels that have ``stepped``; then take one step of each lower level."""
        below = {lower for name in stepped for lower in self.evaluator.levels[name].lowers}
        returning = [state for name, state in self.states.items() if name in below and state.snapshot is not None]
        for state in returning:
            assert state.snapshot is not None
            state.memory.slots = state.snapshot.restore(state.level)
        for state in returning:
            # The history still contains the undone steps, which must not be differentiated.
            state.forget_steps()
            self.announce(state)
            self.take(state, step)
            state.snapshot = None


def _undo(state: LevelState, saved: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Restore buffers and history after a step that was not taken."""
    with torch.no_grad():
        for buffer, before in saved:
            buffer.copy_(before)
    if state.history is not None:
        state.history.forget_last()
