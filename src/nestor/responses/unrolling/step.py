"""One step of a level, as a differentiable function."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from nestor.autodiff.grad import accumulate, vjp
from nestor.autodiff.instruments import count_hvp, is_compiling
from nestor.autodiff.objective import Objective
from nestor.autodiff.scope import Scope, enclosed
from nestor.optim.history import StepRecord
from nestor.optim.state import State
from nestor.optim.update import closed_form_of
from nestor.responses.unrolling.rule_step import Cotangents, GraphStep, ListStep, Pulled, RuleStep
from nestor.vectors import InputLayout, Params, algebra


class StepCompiler(ABC):
    """Takes steps, and pulls cotangents back through them, by compiled graphs."""

    @abstractmethod
    def vjp(self, step: Step, state: State, inputs: Params) -> tuple[TakenStep, int] | None:
        """Take the step and keep what one pullback needs, and count its bytes; None if the step is not compiled."""

    @abstractmethod
    def advance(self, step: Step, state: State, inputs: Params) -> State | None:
        """Take the step; None if it is not compiled."""

    @abstractmethod
    def pull_back(self, step: Step, state: State, inputs: Params, cotangents: Cotangents) -> Pulled | None:
        """Map cotangents on the state after to the state before and the inputs; None if the step is not compiled."""


@dataclass(frozen=True)
class Step:
    r"""One step of a level: :math:`s_{t+1} = U(s_t, \nabla_\theta G_t(\theta_t, \lambda), \lambda)`.

    Attributes:
        record: Its batches and its rule.
        at: Returns the level's objective at a record.
        layout: The levels of the inputs.
        compiler: Takes the step by a compiled graph; None takes it eagerly.
    """

    record: StepRecord
    at: Callable[[StepRecord], Objective]
    layout: InputLayout
    compiler: StepCompiler | None = None

    @cached_property
    def objective(self) -> Objective:
        """The level's objective on the batches of this step."""
        return self.at(self.record)

    def read(self, inputs: Params) -> dict[str, Params]:
        """Return the variables of levels above that the rule may read, by level name."""
        return {**self.record.held, **self.layout.by_level(inputs)}

    def advance(self, state: State, inputs: Params) -> State:
        """Take the step without a graph of its derivative."""
        if self.compiler is not None:
            after = self.compiler.advance(self, state, inputs)
            if after is not None:
                return after
        return self.finish(state, self.gradient(state, inputs), inputs)

    def gradient(self, state: State, inputs: Params) -> list[Tensor | None]:
        """Evaluate the gradient that the step takes."""
        theta = algebra.leaves(state.params)
        with torch.enable_grad():
            return self.objective.gradient(theta, [i.detach() for i in inputs], theta, create_graph=False)

    def taken_gradient(self, state: State, inputs: Params) -> Sequence[Tensor | None]:
        """Return the gradient of the kept graph, which the step has taken; evaluate it if no graph was kept."""
        graph = self.record.graph
        return graph.gradient if graph is not None and self.has_graph else self.gradient(state, inputs)

    def gradient_by_its_kernels(self, state: State, inputs: Params) -> Sequence[Tensor | None]:
        """Evaluate the gradient by the kernels by which the step has: those of a graph, if it was kept."""
        if self.has_graph:
            return self.without_graph().vjp(state, inputs).gradient
        return self.gradient(state, inputs)

    def finish(self, state: State, gradient: Sequence[Tensor | None], inputs: Params) -> State:
        """Take the step with a known gradient, without a graph."""
        return self.record.update.step(state, gradient, self.read([i.detach() for i in inputs]))

    def with_graph(self, state: State, inputs: Params) -> State:
        """Take the step with a graph through the state and the inputs, differentiable to any order."""
        own = state.tensors()
        layout: list[State] = []

        def step(tensors: list[Tensor]) -> list[Tensor]:
            before, given = state.replace(tensors[: len(own)]), tensors[len(own) :]
            grads = self.objective.gradient(before.params, given, before.params, create_graph=True)
            after = self.record.update.differentiable_step(before, grads, self.read(given))
            layout.append(after)
            return after.tensors()

        after = enclosed(step, [*own, *inputs])
        return layout[0].replace([t for t in after if t is not None])

    def pull_back(self, state: State, inputs: Params, cotangents: Cotangents) -> Pulled:
        """Map cotangents on the first tensors of the state after to cotangents on the state before and the inputs."""
        if self.compiler is not None:
            found = self.compiler.pull_back(self, state, inputs, cotangents)
            if found is not None:
                return found
        return self.vjp(state, inputs).pull_back(cotangents)

    @property
    def has_graph(self) -> bool:
        """Whether the graph that was kept when the step was taken can be used."""
        return self.record.graph is not None and self.record.graph.is_valid

    def has_other_value(self, state: State, inputs: Params) -> bool:
        """Return whether the loss has another value than when its graph was kept, but for rounding."""
        graph = self.record.graph
        assert graph is not None
        with Scope(twice=True), torch.enable_grad():
            now = self.objective(algebra.leaves(state.params), algebra.leaves(inputs)).detach()
        return bool((now - graph.loss).abs() > 100 * torch.finfo(now.dtype).eps * graph.loss.abs())

    def without_graph(self) -> Step:
        """Return the step without the graph that was kept."""
        return replace(self, record=replace(self.record, graph=None))

    def vjp(self, state: State, inputs: Params) -> StepVJP:
        """Take the step with its own graph, for one pullback."""
        graph = self.record.graph
        if graph is not None and self.has_graph:
            given = [t for name in self.layout.by_level(inputs) for t in graph.inputs[name]]
            with graph.scope, torch.enable_grad():
                rule = self._rule_step(graph.theta, state, graph.gradient, given, is_kept=True)
            return StepVJP(self, graph.theta, given, graph.gradient, rule, graph.scope, is_kept=True)
        theta, given = algebra.leaves(state.params), algebra.leaves(inputs)
        with Scope(twice=True) as scope, torch.enable_grad():
            gradient = self.objective.gradient(theta, given, theta, create_graph=True)
            rule = self._rule_step(theta, state, gradient, given)
        return StepVJP(self, theta, given, gradient, rule, scope)

    def _rule_step(
        self, theta: Params, state: State, gradient: Sequence[Tensor | None], given: Params, *, is_kept: bool = False
    ) -> RuleStep:
        """Take the step with the gradient cut off from its graph."""
        update = self.record.update
        # The compiler merges the graph of a step with that of its gradient: formulas on lists would keep them apart.
        formulas = None if is_compiling() else closed_form_of(update)
        if formulas is not None:
            values = [None if g is None else g.detach() for g in gradient]
            before = State([t.detach() for t in theta], state.slots)
            return ListStep(update, formulas, before, values, len(given))
        before = state.replace([*theta, *algebra.leaves(state.tensors()[len(theta) :])])
        probe = [None if g is None else g.detach().requires_grad_() for g in gradient]
        after = update.differentiable_step(before, probe, self.read(given))

        def take() -> State:
            if is_kept:
                # The next step has its own leaves for the variables: it reads only the memory of this state.
                return after.replace([t.detach() for t in after.tensors()])
            return self.finish(before, gradient, given)

        return GraphStep(before, given, probe, after, take)


class TakenStep(ABC):
    """A step that was taken, with what its pullback needs."""

    @abstractmethod
    def differentiated(self) -> State:
        """Return the state after the step that is differentiated, which may have a graph."""

    @abstractmethod
    def pull_back(self, cotangents: Cotangents, *, retain_graph: bool = False) -> Pulled:
        """Map cotangents on the first tensors of the state after to cotangents on the state before and the inputs."""

    @abstractmethod
    def state_after(self) -> State:
        """Return the state after the step, without a graph."""


@dataclass(frozen=True)
class StepVJP(TakenStep):
    """The graph of one step in two parts: from state and inputs to the gradient, and from the gradient to the state.

    Attributes:
        step: The step.
        theta: The variables before, leaves.
        given: The inputs, leaves.
        gradient: The gradient.
        rule: The second part.
        scope: The scope in which the graph was built.
        is_kept: Whether the graph of the gradient is retained for another pullback.
    """

    step: Step
    theta: Params
    given: Params
    gradient: Sequence[Tensor | None]
    rule: RuleStep
    scope: Scope
    is_kept: bool = False

    def pull_back(self, cotangents: Cotangents, *, retain_graph: bool = False) -> Pulled:
        """Map cotangents on the state after to cotangents on the state before and on the inputs.

        One pass through the rule, then one through the gradient: a Hessian and a mixed product. Missing cotangents of
        the last tensors are zero.
        """
        theta, given = self.theta, self.given
        with self.scope:
            (own, above), vector = self.rule.pull_back(cotangents, retain_graph=retain_graph)
            count_hvp(self.step.objective.name)
            second = vjp(self.gradient, [*theta, *given], vector, retain_graph=retain_graph or self.is_kept)
        params = accumulate(own[: len(theta)], second[: len(theta)])
        return [*params, *own[len(theta) :]], accumulate(above, second[len(theta) :])

    def differentiated(self) -> State:
        """Return the state, which may have a graph."""
        return self.rule.differentiated

    def state_after(self) -> State:
        """Return the state after the step, without a graph."""
        return self.rule.state_after()
