"""The step that a rule takes with a known gradient, for one pullback: by its graph, or in closed form."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from nestor.autodiff.grad import vjp
from nestor.optim.list_rule import ListRule
from nestor.optim.state import State
from nestor.optim.update import Update
from nestor.vectors import Params

Cotangents: TypeAlias = Sequence[Tensor | None]
Pulled: TypeAlias = tuple[list[Tensor | None], list[Tensor | None]]
"""Cotangents on a state and on the inputs."""


class RuleStep(ABC):
    """A step of a rule, with the gradient as an argument of its own."""

    @property
    @abstractmethod
    def differentiated(self) -> State:
        """The state after the step that is differentiated, which may have a graph."""

    @abstractmethod
    def state_after(self) -> State:
        """Return the state after the step, without a graph."""

    @abstractmethod
    def pull_back(self, cotangents: Cotangents, *, retain_graph: bool) -> tuple[Pulled, list[Tensor | None]]:
        """Map cotangents on the first tensors of the state after to the state before and the inputs, and the gradient.

        The derivative through the gradient is not included.
        """


@dataclass(frozen=True)
class GraphStep(RuleStep):
    """A step with a graph.

    Attributes:
        before: The state before, leaves.
        given: The inputs, leaves.
        probe: The gradient, leaves.
        after: The state after.
        take: Takes the step without a graph, bitwise as in a run.
    """

    before: State
    given: Params
    probe: Sequence[Tensor | None]
    after: State
    take: Callable[[], State]

    @property
    def differentiated(self) -> State:
        """The state with the graph."""
        return self.after

    def state_after(self) -> State:
        return self.take()

    def pull_back(self, cotangents: Cotangents, *, retain_graph: bool) -> tuple[Pulled, list[Tensor | None]]:
        own, probes = self.before.tensors(), [g for g in self.probe if g is not None]
        after = self.after.tensors()
        padded = [*cotangents, *[None] * (len(after) - len(cotangents))]
        pulled = vjp(after, [*own, *self.given, *probes], padded, retain_graph=retain_graph)
        through = iter(pulled[len(own) + len(self.given) :])
        vector = [None if g is None else next(through) for g in self.probe]
        return (pulled[: len(own)], pulled[len(own) : len(own) + len(self.given)]), vector


@dataclass
class ListStep(RuleStep):
    """A step whose VJP is known in closed form: no graph of the rule is built.

    Attributes:
        update: The rule.
        formulas: The rule on lists.
        before: The state before.
        gradient: The gradient.
        inputs: Number of inputs, which the rule does not read.
    """

    update: Update
    formulas: ListRule
    before: State
    gradient: Sequence[Tensor | None]
    inputs: int
    # Of the state after, the memory alone: the next step has the variables.
    _slots: Sequence[Mapping[str, Any]] | None = field(default=None, init=False)

    @property
    def differentiated(self) -> State:
        """The state after the step."""
        return self.state_after()

    def state_after(self) -> State:
        with torch.no_grad():
            after = self.update.step(self.before, self.gradient, {})
        self._slots = after.slots
        return after

    def pull_back(self, cotangents: Cotangents, *, retain_graph: bool) -> tuple[Pulled, list[Tensor | None]]:
        slots = self.state_after().slots if self._slots is None else self._slots
        before, after = self.before, State(self.before.params, slots)
        with torch.no_grad():
            params, memory, vector = self.formulas.pull_back(
                before.params, self.gradient, before.slots, slots, after.cotangents(cotangents)
            )
        return (before.list_cotangents(params, memory), [None] * self.inputs), vector
