"""The steps that lead to a level's variables, and the level that a response differentiates through."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor

from nestor.autodiff.objective import Objective
from nestor.errors import NestorError
from nestor.optim.history import LevelHistory, StepRecord
from nestor.optim.state import State, Stored, keep
from nestor.optim.update import Update
from nestor.responses.unrolling.step import Step, StepCompiler, StepVJP
from nestor.solvers import SolveState
from nestor.vectors import LOCAL, InputLayout, Params, VectorSpace


@dataclass(frozen=True)
class Trajectory:
    """Steps of a level as functions: steps that it has taken, or planned steps.

    Attributes:
        history: The steps, and some of the states before them.
        at: Returns the level's objective at a record of the history.
        layout: The levels of the inputs.
        init_indices: The inputs from which the first state's variables are copied (``Problem(init=...)``).
        compiler: Takes steps by compiled graphs.
        vjps: The graphs of all steps, if they are stored for several pullbacks.
        is_alone: Whether no other process takes part in the evaluations.
    """

    history: LevelHistory
    at: Callable[[StepRecord], Objective]
    layout: InputLayout = field(default_factory=InputLayout)
    init_indices: Sequence[int] | None = None
    compiler: StepCompiler | None = None
    vjps: Sequence[StepVJP] | None = None
    is_alone: bool = True

    @cached_property
    def steps(self) -> list[Step]:
        """The steps as functions."""
        return [
            Step(record, self.at, self.layout, None if record.below else self.compiler) for record in self.history.steps
        ]

    @property
    def rule(self) -> Update:
        """The rule of the last step."""
        return self.history.steps[-1].update

    @property
    def input_gradient(self) -> list[Tensor | None]:
        """The gradient of the last step's objective with respect to the inputs; empty if it is not stored."""
        gradients = self.history.input_gradients
        return self.layout.flat(gradients) if gradients else []

    def inputs_then(self, inputs: Params) -> list[Tensor]:
        """Return the values of the inputs at the steps, with a graph to ``inputs`` (the identity)."""
        if not self.history.uppers:
            return list(inputs)
        then = self.layout.flat(self.history.uppers)
        return [i if past is None else past + (i - i.detach()) for i, past in zip(inputs, then, strict=True)]

    def first_state(self, given: Params) -> State:
        """Return the state before the first step."""
        state = self.history.states[0]()
        if self.init_indices is None:
            return state
        # All tasks start from the same variables.
        params = [given[place].expand_as(p) for place, p in zip(self.init_indices, state.params, strict=True)]
        return State(params, state.slots)

    def replayed(self, state: State, given: Params, start: int = 0, stop: int | None = None) -> State:
        """Take the steps from ``start`` to before ``stop`` without a graph, from the state before the first of them."""
        for step in self.steps[start:stop]:
            state = step.advance(state, given)
        return state

    def replayed_as_taken(self, given: Params, theta: Params, number: int) -> tuple[State, State, State]:
        """Replay up to and including a step, from the last stored state, with the rule and the kernels of the run.

        Args:
            given: The values of the inputs at the steps.
            theta: The variables after the last step.
            number: Number of the step, from 0.

        Returns:
            The state before the step, that after the replayed step, and that which the run has recorded after it; of
            the last step, the run has recorded the variables alone.
        """
        known = self.history.states
        nearest = max(index for index in known if index <= number)
        state = self.first_state(given) if nearest == 0 else known[nearest]()
        for step in self.steps[nearest:number]:
            state = step.finish(state, step.taken_gradient(state, given), given)
        step = self.steps[number]
        after = step.finish(state, step.gradient_by_its_kernels(state, given), given)
        if number + 1 in known:
            recorded = known[number + 1]()
        elif number + 1 == len(self.steps):
            recorded = State(theta, ())
        else:
            recorded = step.finish(state, step.taken_gradient(state, given), given)
        return state, after, recorded

    def last_state(self) -> State:
        """Return the latest stored state."""
        states = self.history.states
        return states[max(states)]()

    def with_steps(self, steps: Sequence[StepRecord], states: Mapping[int, Stored], **changes: Any) -> Self:
        """Return a trajectory of other steps, which have been taken."""
        history = self.history._replace(steps=steps, states=states, planned=False)
        return replace(self, history=history, **changes)

    def truncated(self, count: int, inputs: Params) -> Self:
        """Return the last ``count`` steps. If the state before them is not stored, replay the steps that lead to it."""
        skipped = len(self.steps) - count
        if skipped <= 0:
            return self
        given = [i.detach() for i in self.inputs_then(inputs)]
        known = self.history.states
        nearest = max(index for index in known if index <= skipped)
        stored = known[nearest]
        if nearest < skipped:
            state = self.first_state(given) if nearest == 0 else stored()
            stored = keep(self.replayed(state, given, nearest, skipped))
        states = {index - skipped: kept for index, kept in known.items() if index > skipped}
        return self.with_steps(self.history.steps[skipped:], {0: stored, **states}, init_indices=None)

    def taken(self, inputs: Params) -> tuple[Self, State]:
        """Take the planned steps without a graph; return the last one as a trajectory, and the state after it."""
        state = self.replayed(self.first_state(inputs), inputs, stop=-1)
        step = self.steps[-1]
        gradient = step.gradient(state, inputs)
        last = self.with_steps(self.history.steps[-1:], {0: keep(state)}, init_indices=None)
        last = replace(last, history=last.history._replace(gradients=(gradient,)))
        return last, step.finish(state, gradient, inputs)

    def end(self, given: Params) -> list[Tensor]:
        """Take all steps without a graph; return the variables after the last one."""
        with torch.no_grad():
            return list(self.replayed(self.first_state(given), given).params)

    def with_graph(self, inputs: Params) -> list[Tensor]:
        """Return the variables after the last step, with one graph through all steps to the inputs."""
        given = self.inputs_then(inputs)
        state = self.first_state(given)
        for step in self.steps:
            state = step.with_graph(state, given)
        return list(state.params)


@dataclass(frozen=True)
class LowerLevel:
    """The lower level of a response: its objective and its steps.

    Args:
        objective: The level's objective on the batches of its last step.
        trajectory: The steps that led to its variables, or planned steps; None if they are not known.
        init_indices: For each variable, the index of the input that it started from (``Problem(init=...)``); None if
            the variables started from no input.
        solve: The state of the linear solve, for the next solve; None stores no state.
        space: The space of its vectors.
        may_overwrite: Whether the pullback may overwrite its cotangent and the gradients in the trajectory's history,
            because they have no other reader.
        alone: Whether the level is that of a function, outside of any program: no metric tells of its linear solves.
    """

    objective: Objective
    trajectory: Trajectory | None = None
    init_indices: Sequence[int] | None = None
    solve: SolveState | None = None
    space: VectorSpace = LOCAL
    may_overwrite: bool = False
    alone: bool = False

    def needed_trajectory(self, response: str) -> Trajectory:
        """Return the trajectory, for a response that differentiates the level's steps.

        Raises:
            NestorError: If no steps are known.
        """
        if self.trajectory is None:
            raise NestorError(
                f"{response} needs the level's optimizer steps, and none are known. In a program, give the level an "
                "optimizer; with best_response, pass optimizer=torch.optim.SGD([theta], lr=...).",
                level=self.objective.name,
            )
        return self.trajectory

    def with_steps_taken(self, response: str, theta: Params, inputs: Params) -> tuple[Self, Params]:
        """Take all planned steps without a graph; return the level after them and its variables."""
        trajectory = self.needed_trajectory(response)
        if not trajectory.history.planned:
            return self, theta
        taken = trajectory.with_steps(trajectory.history.steps, trajectory.history.states)
        return replace(self, trajectory=taken), trajectory.end(inputs)
