"""The steps that lead to a level's variables."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from nestor.autodiff.counters import count_hvp
from nestor.autodiff.torch_private import version
from nestor.optim.state import State, Stored, keep
from nestor.optim.update import Inputs, Update
from nestor.responses.lower_level import LowerLevel, pull_back
from nestor.vectors import algebra
from nestor.vectors.algebra import Params

Cotangents: TypeAlias = "Sequence[Tensor | None]"
Pulled: TypeAlias = "tuple[list[Tensor | None], list[Tensor | None]]"
"""Cotangents on a state and on the inputs."""


class StepGraphs(ABC):
    """Steps and their derivatives as compiled graphs."""

    @abstractmethod
    def advance(self, step: Step, state: State, inputs: Params) -> State | None:
        """Take the step; None if that is no graph."""

    @abstractmethod
    def pull_back(self, step: Step, state: State, inputs: Params, cotangents: Cotangents) -> Pulled | None:
        """Map cotangents on the state after to those on the state before and on the inputs; None if it is no graph."""


@dataclass(frozen=True)
class StepGraph:
    """The graph of the gradient of one step, made when the step was taken.

    Attributes:
        theta: The variables, leaves.
        given: The variables of levels above, leaves.
        gradient: The gradient.
    """

    theta: Params
    given: Mapping[str, Params]
    gradient: Sequence[Tensor | None]

    def __post_init__(self) -> None:
        object.__setattr__(self, "_versions", self._count())

    def _count(self) -> list[object]:
        return [version(t) for tensors in self.given.values() for t in tensors]

    @property
    def is_whole(self) -> bool:
        """Whether the levels above have not moved since, which changes tensors that the graph needs."""
        return self._count() == self._versions  # type: ignore[attr-defined, no-any-return]


@dataclass(frozen=True)
class Step:
    r"""One step of a level: :math:`s_{t+1} = U(s_t, \nabla_\theta G_t(\theta_t, \lambda), \lambda)`.

    Attributes:
        lower: The level on the batches of this step.
        update: The rule.
        named: Sorts the inputs by level.
        batches: The batches of this step.
        on: Returns the level on other batches.
        graphs: Takes the step by a compiled graph.
        kept: The graph of its gradient, if that was kept.
    """

    lower: LowerLevel
    update: Update
    named: Callable[[Params], Inputs] = lambda inputs: {}
    batches: Sequence[Any] = ()
    on: Callable[[Sequence[Any]], LowerLevel] | None = None
    graphs: StepGraphs | None = None
    kept: StepGraph | None = None

    def advance(self, state: State, inputs: Params) -> State:
        """Take the step without a graph of its derivative."""
        if self.graphs is not None:
            after = self.graphs.advance(self, state, inputs)
            if after is not None:
                return after
        return self.update.plain(state, self.gradient(state, inputs), self.named([i.detach() for i in inputs]))

    def gradient(self, state: State, inputs: Params) -> list[Tensor | None]:
        """Evaluate the gradient that the step takes."""
        theta = algebra.leaves(state.params)
        with torch.enable_grad():
            return self.lower.gradient(theta, [i.detach() for i in inputs], theta, create_graph=False)

    def connected(self, state: State, inputs: Params) -> State:
        """Take the step with a graph that runs on through the state and the inputs."""
        theta = algebra.fresh(state.params)
        grads = self.lower.gradient(theta, inputs, theta, create_graph=True)
        return self.update.linked(State(theta, state.slots), grads, self.named(inputs))

    def pull_back(self, state: State, inputs: Params, cotangents: Cotangents) -> Pulled:
        """Map cotangents on the state after (on its first tensors) to those on the state before and on the inputs."""
        if self.graphs is not None:
            found = self.graphs.pull_back(self, state, inputs, cotangents)
            if found is not None:
                return found
        return self.link(state, inputs).pull_back(cotangents)

    def link(self, state: State, inputs: Params) -> Link:
        """Take the step with a graph of its own, to be pulled back once."""
        if self.kept is not None:
            return self._kept_link(self.kept, state, inputs)
        before = state.replace(algebra.leaves(state.tensors()))
        given = algebra.leaves(inputs)
        with torch.enable_grad():
            gradient = self.lower.gradient(before.params, given, before.params, create_graph=True)
            probe = [None if g is None else g.detach().requires_grad_() for g in gradient]
            after = self.update.linked(before, probe, self.named(given))
        return Link(self.lower.name, before, given, gradient, probe, after)

    def after(self, link: Link, inputs: Params) -> State:
        """Return the state after the step whose graph is the ``link``, without a graph."""
        if self.kept is not None:
            # Only what the optimizer keeps is wanted of it: the next graph has its own variables.
            return link.after.replace([t.detach() for t in link.after.tensors()])
        return self.update.plain(link.before, link.gradient, self.named(inputs))

    def _kept_link(self, kept: StepGraph, state: State, inputs: Params) -> Link:
        rest = algebra.leaves(state.tensors()[len(state.params) :])
        before = state.replace([*kept.theta, *rest])
        given = [t for name in self.named(inputs) for t in kept.given[name]]
        with torch.enable_grad():
            probe = [None if g is None else g.detach().requires_grad_() for g in kept.gradient]
            after = self.update.linked(before, probe, self.named(given))
        return Link(self.lower.name, before, given, kept.gradient, probe, after, lasting=True)


@dataclass(frozen=True)
class Link:
    """The graph of one step, in two parts: from state and inputs to the gradient, and from the gradient on.

    Attributes:
        level: Name of the level.
        before: The state before, leaves.
        given: The inputs, leaves.
        gradient: The gradient.
        probe: The gradient, leaves of the second part.
        after: The state after.
        lasting: Whether the graph of the gradient is kept for another time.
    """

    level: str
    before: State
    given: Params
    gradient: Sequence[Tensor | None]
    probe: Sequence[Tensor | None]
    after: State
    lasting: bool = False

    def pull_back(self, cotangents: Cotangents) -> Pulled:
        """Map cotangents on the state after to cotangents on the state before and on the inputs.

        First through the rule, then through the gradient, by one Hessian and mixed product. Those of the last tensors
        may be left out: zero.
        """
        own, theta = self.before.tensors(), self.before.params
        probes = [g for g in self.probe if g is not None]
        after = self.after.tensors()
        padded = [*cotangents, *[None] * (len(after) - len(cotangents))]
        pulled = pull_back(after, [*own, *self.given, *probes], padded)
        direct, through = pulled[: len(own) + len(self.given)], iter(pulled[len(own) + len(self.given) :])
        vector = [None if g is None else next(through) for g in self.probe]
        count_hvp(self.level)
        second = pull_back(self.gradient, [*theta, *self.given], vector, retain_graph=self.lasting)
        slots: list[Tensor | None] = [None] * (len(own) - len(theta))
        total = algebra.accumulate(direct, [*second[: len(theta)], *slots, *second[len(theta) :]])
        return total[: len(own)], total[len(own) :]


@dataclass(frozen=True)
class Trajectory:
    """Steps of a level: those that it has taken, or those that it is about to take.

    Attributes:
        steps: The steps.
        states: The states before some of the steps, by index; at least the first one's, or what comes ``after``.
        ahead: Whether the steps are still to be taken, from the level's present variables.
        inputs: For each input its value along the steps, or None where that is the present one; empty if all are.
        start: The inputs that the first state's variables are copies of (``Problem(init=...)``).
        gradients: The gradients of the last steps taken, oldest first, if they were kept.
        links: The graphs of all steps, if they were kept.
        input_gradient: The gradient of the last step's objective in the inputs, if it was kept.
        after: What the optimizer keeps after the last step, one mapping a variable, where no state before it is known.
    """

    steps: Sequence[Step]
    states: Mapping[int, Stored]
    ahead: bool = False
    inputs: Sequence[Tensor | None] = ()
    start: Sequence[int] | None = None
    gradients: Sequence[Sequence[Tensor | None]] = ()
    links: Sequence[Link] | None = None
    input_gradient: Sequence[Tensor | None] = ()
    after: Sequence[Mapping[str, Any]] | None = None

    def along(self, inputs: Params) -> list[Tensor]:
        """Give the inputs the values that they had along the steps; derivatives run on as before."""
        if not self.inputs:
            return list(inputs)
        return [i if past is None else past + (i - i.detach()) for i, past in zip(inputs, self.inputs, strict=True)]

    def first(self, given: Params) -> State:
        """Return the state before the first step."""
        state = self.states[0]()
        if self.start is None:
            return state
        # Every task starts from the same variables.
        params = [given[place].expand_as(p) for place, p in zip(self.start, state.params, strict=True)]
        return State(params, state.slots)

    def last(self, count: int, inputs: Params) -> Trajectory:
        """Return the last ``count`` steps; walks to the state before them if it was not kept."""
        skipped = len(self.steps) - count
        if skipped <= 0:
            return self
        given = [i.detach() for i in self.along(inputs)]
        nearest = max(index for index in self.states if index <= skipped)
        stored = self.states[nearest]
        if nearest < skipped:
            state = self.first(given) if nearest == 0 else stored()
            for step in self.steps[nearest:skipped]:
                state = step.advance(state, given)
            stored = keep(state)
        states = {index - skipped: kept for index, kept in self.states.items() if index > skipped}
        return replace(self, steps=self.steps[skipped:], states={0: stored, **states}, start=None)

    def walk(self, inputs: Params) -> tuple[Trajectory, State]:
        """Take the steps that lie ahead, without a graph; only the last one is remembered."""
        state = self.first(inputs)
        for step in self.steps[:-1]:
            state = step.advance(state, inputs)
        step = self.steps[-1]
        gradient = step.gradient(state, inputs)
        last = Trajectory(self.steps[-1:], {0: keep(state)}, gradients=(gradient,))
        return last, step.update.plain(state, gradient, step.named([i.detach() for i in inputs]))

    def connected(self, inputs: Params) -> list[Tensor]:
        """Return the variables after the last step, with one graph through all steps to the inputs."""
        given = self.along(inputs)
        state = self.first(given)
        for step in self.steps:
            state = step.connected(state, given)
        return list(state.params)
