"""Compiled optimizer steps, of one level or of several levels at once."""

import warnings
from collections.abc import Sequence

from torch import Tensor

from nestor.compilation.arguments import ArgumentCache, Unsuitable
from nestor.compilation.graph import GraphCache, Traced
from nestor.compilation.inputs import Steps
from nestor.compilation.parts import StepInParts
from nestor.compilation.plan import Plan
from nestor.compilation.suitability import unsuitable
from nestor.errors import NestorError, NestorWarning
from nestor.training.guard import FiniteGuard
from nestor.training.level_state import LevelState
from nestor.training.stepper import Stepper


class CompiledSteps:
    """Takes steps of levels by graphs, which are compiled at their first use.

    Args:
        stepper: Takes the steps that are not compiled.
        guard: Receives the flags of steps that are checked later.

    Attributes:
        reasons: The reasons why levels step eagerly, by level name.
        states: The state of each level, by name.
    """

    def __init__(self, stepper: Stepper, guard: FiniteGuard) -> None:
        self.reasons: dict[str, str] = {}
        self.states = stepper.states
        self._stepper = stepper
        self._guard = guard
        self._graphs = GraphCache()
        self._cache = ArgumentCache()
        self._plans: dict[tuple[str, ...], Plan] = {}
        self._parts = StepInParts(stepper, self._graphs, self._cache, guard)
        for name, state in stepper.states.items():
            reason = unsuitable(state)
            if reason is not None:
                self.refuse([name], reason)

    def refuse(self, names: Sequence[str], reason: str) -> None:
        """Make some levels step eagerly from now on, with a warning."""
        self.reasons.update(dict.fromkeys(names, reason))
        levels = " and ".join(map(repr, names))
        warnings.warn(
            f"Engine(compile=True): level {levels} steps eagerly, because {reason}.", NestorWarning, stacklevel=2
        )

    def is_graph(self, name: str) -> bool:
        """Return whether the next step of a level can be one graph, alone or with other levels."""
        below = self._stepper.evaluator.below(name)[:-1]
        # The first step creates the optimizer's state. A response that needs a history is not part of a graph.
        state = self.states[name]
        is_known = name not in self.reasons and state.steps > 0 and not _keeps_gradients(state)
        return is_known and not any(self.states[b].history for b in below)

    def take(self, names: Sequence[str], step: int) -> bool:
        """Take one step of each given level, on the current draws, by one graph.

        Args:
            names: The levels.
            step: The number of the engine step, for errors.

        Returns:
            Whether the steps were taken. If not, nothing has changed, and an eager step raises the error.
        """
        if not self.is_graph(names[0]):  # all other levels of a group are graphs
            return len(names) == 1 and self._take_in_parts(self.states[names[0]], step)
        for name in names:
            state = self.states[name]
            noted = self._stepper.note(state)
            if noted is not None:
                noted.extend(state.level.loss.buffer_values() for _ in state.draws.latest)
        taken = False
        try:
            taken = self.run(names, {name: [self.states[name].draws.latest] for name in names}, step)
        except Unsuitable as error:
            self.refuse(names, str(error))
        finally:
            if not taken:
                for history in (self.states[name].history for name in names):
                    if history is not None:
                        history.forget_last()
        return taken

    def run(self, names: Sequence[str], own: Steps, step: int) -> bool:
        """Take steps by one graph; return whether they were taken.

        Args:
            names: The levels in the order in which they step; one may step several times.
            own: The batches of their steps.
            step: The number of the last engine step, for errors.

        Raises:
            Unsuitable: If the steps cannot be one graph.
        """
        key = tuple(names)
        plan = self._plans.get(key)
        if plan is None or not plan.is_same(own):
            plan = self._packed(key, own)
        found = plan.run()
        if found is None:
            return False
        plan.accept(found, self._guard, step)
        return True

    def repeat(self, cycle: Sequence[LevelState], most: int) -> tuple[int, bool]:
        """Take the steps of the last run again and again; see :meth:`Plan.repeat`.

        Args:
            cycle: The levels in the order in which they step, each once; :meth:`is_closed` holds for each.
            most: The largest number of repetitions.

        Returns:
            The number of repetitions, and whether the next batches need another graph.
        """
        plan = self._plans.get(tuple(state.level.name for state in cycle))
        return (0, False) if plan is None else plan.repeat(cycle, most, self._guard)

    def is_closed(self, state: LevelState) -> bool:
        """Return whether no code of the user's runs, and nothing changes but the variables, in a step of a graph."""
        level = state.level
        return (
            level.parameters[0].is_cpu
            and state.draws.is_constant
            and state.history is None
            and not level.links.noted_uppers
            and level.problem.init is None
            and level.problem.scheduler is None
        )

    def _packed(self, names: tuple[str, ...], own: Steps) -> Plan:
        """Return a plan for some steps with the graph for the present arguments."""
        self._plans.pop(names, None)
        plan = Plan(names, self._stepper.evaluator, self.states, self._cache)
        placed = plan.pack(own)

        def trace(*tensors: Tensor) -> Traced:
            run = placed(iter(tensors))
            run.take(names)
            return run.results(list(dict.fromkeys(names)))

        plan.use(self._graphs.get(plan.arguments, trace))
        if self._graphs.is_confirmed(plan.arguments):
            self._plans[names] = plan
        return plan

    def reads(self, names: Sequence[str]) -> list[str]:
        """Name the levels that are evaluated when some levels step."""
        return list(dict.fromkeys(read for name in names for read in self._stepper.evaluator.below(name)))

    def _take_in_parts(self, state: LevelState, step: int) -> bool:
        """Take a step whose responses need histories: compile its direct part and its update only."""
        level = state.level
        is_suitable = (
            level.name not in self.reasons and state.steps and state.history is None and not level.loss.buffers
        )
        if not is_suitable or level.parameters[0].device.type != "cpu":
            return False
        try:
            self._parts.take(state, step)
        except Unsuitable as error:
            self.refuse([level.name], str(error))
            return False
        except NestorError:
            return False
        return True


def _keeps_gradients(state: LevelState) -> bool:
    """Return whether the history holds gradients: a graph of a whole cycle does not return them, and needs not."""
    return state.history is not None and (state.history.spec.gradients or state.history.spec.input_gradients)
