"""Update rules: from a gradient to the next state."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Self, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from nestor.autodiff.instruments import is_tracing
from nestor.optim.functional_step import Groups, functional_step, plain_step
from nestor.optim.hyperparameters import Learned, as_numbers, replaced, tensors_in
from nestor.optim.list_rule import ListRule, list_rule_of
from nestor.optim.rules import apply_rule, clip, clip_tasks, optimizer_groups, rule_of
from nestor.optim.state import State
from nestor.optim.step_jacobian import apply_step_jacobian, step_jacobian_of
from nestor.optim.stepper import copy_of, is_of_torch
from nestor.vectors import LOCAL, Params, VectorSpace

Inputs: TypeAlias = Mapping[str, Params]
"""Variables of levels above, by level name."""


class Update(ABC):
    """One step of a level, as a function of its state, its gradient and the tensors of the levels above.

    Attributes:
        groups: The hyperparameters, one mapping for each parameter group; empty for a rule without hyperparameters.
        is_learned: Whether some hyperparameters are variables of levels above.
        is_written_out: Whether nestor has a closed form of the rule, which can be traced.
        is_separable: Whether the rule has a closed form in which the step of a variable depends on its gradient alone.
        has_step_jacobian: Whether :meth:`apply_step_jacobian` is available.
        takes_step: Whether the rule depends on the number of steps taken.
    """

    groups: Groups = ()
    is_learned: bool = False
    is_written_out: bool = False
    is_separable: bool = False
    has_step_jacobian: bool = False
    takes_step: bool = False
    _list_rule: ListRule | None = None

    @abstractmethod
    def differentiable_step(self, state: State, grads: Sequence[Tensor | None], inputs: Inputs) -> State:
        """Take a step with a graph to all three arguments."""

    @abstractmethod
    def step(self, state: State, grads: Sequence[Tensor | None], inputs: Inputs) -> State:
        """Take a step without a graph, bitwise as in a run. The arguments do not change."""

    @abstractmethod
    def first_slots(self, count: int) -> list[Mapping[str, Any]]:
        """Return the memory before the first step of ``count`` variables."""

    def with_groups(self, groups: Groups) -> Self:
        """Return the rule with other hyperparameters."""
        return self

    def with_recorded(self, groups: Groups) -> Self:
        """Return the rule with the hyperparameters of a recorded step; learned ones stay the same tensors."""
        return self

    def at_step(self, steps: int) -> Self:
        """Return the rule of the step that follows ``steps`` steps, if the rule depends on their number."""
        return self

    def only(self, index: int) -> Self:
        """Return the rule of one variable; the rule must be separable."""
        raise TypeError(f"{type(self).__name__} is no separable rule.")

    def apply_step_jacobian(self, index: int, gradient: Tensor, vector: Tensor, slot: Mapping[str, Any]) -> Tensor:
        r"""Multiply :math:`-\partial\text{Step}/\partial g`, a diagonal, onto a vector, for one variable.

        Args:
            index: The index of the variable.
            gradient: The gradient of the step.
            vector: The vector; the result is differentiable in it.
            slot: The optimizer's memory after the step.
        """
        raise TypeError(f"The Jacobian of {type(self).__name__} is not known.")


def closed_form_of(update: Update) -> ListRule | None:
    """Return the step of a rule without a graph, and the VJP of the step; None if no closed form is known."""
    return update._list_rule


@dataclass(frozen=True)
class OptimizerUpdate(Update):
    """The step of a torch optimizer, with fixed hyperparameters.

    Attributes:
        optimizer: A copy of the optimizer that contains only the level's variables.
        order: For each of the optimizer's parameters, its index among the level's variables.
        groups: The hyperparameters.
        clip_norm: Largest norm of the gradient; None does not clip.
        learned: Hyperparameters that are variables of levels above: ``(group, path) -> (level, index, entry)``.
        tasks: Whether the leading dimension of every variable counts tasks; each task is clipped separately.
        space: The space of the level's vectors.
    """

    optimizer: Optimizer
    order: Sequence[int]
    groups: Groups
    clip_norm: float | None = None
    learned: Learned = field(default_factory=dict)
    tasks: bool = False
    space: VectorSpace = LOCAL

    @classmethod
    def of(
        cls,
        optimizer: Optimizer,
        variables: Params,
        clip_norm: float | None = None,
        learned: Learned | None = None,
        *,
        tasks: bool = False,
        space: VectorSpace = LOCAL,
    ) -> Self:
        """Read the optimizer's rule and current hyperparameters."""
        place = {id(variable): index for index, variable in enumerate(variables)}
        own = copy_of(optimizer)
        own.param_groups = [
            {**group, "params": [p for p in group["params"] if id(p) in place]} for group in optimizer.param_groups
        ]
        order = [place[id(p)] for group in own.param_groups for p in group["params"]]
        return cls(own, order, optimizer_groups(optimizer), clip_norm, learned or {}, tasks, space)

    @property
    def is_learned(self) -> bool:  # type: ignore[override]
        return bool(self.learned)

    @property
    def is_written_out(self) -> bool:  # type: ignore[override]
        return rule_of(self.optimizer) is not None

    @property
    def is_separable(self) -> bool:  # type: ignore[override]
        return self.is_written_out and self.clip_norm is None and not self.learned

    @property
    def has_step_jacobian(self) -> bool:  # type: ignore[override]
        return self.is_separable and step_jacobian_of(self.optimizer, self.groups) is not None

    @cached_property
    def _list_rule(self) -> ListRule | None:  # type: ignore[override]
        if not self.is_separable or self.space is not LOCAL:
            return None
        return list_rule_of(self.optimizer, self.groups, self._group_of)

    @cached_property
    def _back(self) -> list[int]:
        """For each of the level's variables, its index among the optimizer's parameters."""
        return sorted(range(len(self.order)), key=self.order.__getitem__)

    @cached_property
    def _group_of(self) -> list[int]:
        """For each of the level's variables, the index of its parameter group."""
        sizes = [len(group["params"]) for group in self.optimizer.param_groups]
        groups = [index for index, size in enumerate(sizes) for _ in range(size)]
        return [groups[index] for index in self._back]

    def _clip(self, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        return clip_tasks(grads, self.clip_norm) if self.tasks else clip(self.space, grads, self.clip_norm)

    def first_slots(self, count: int) -> list[Mapping[str, Any]]:
        return [{} for _ in range(count)]

    def now(self, optimizer: Optimizer) -> Self:
        """Return the rule with the optimizer's current hyperparameters, which a scheduler may have changed."""
        # Parameters and their order stay the same during a run; attributes may be numbers that count the steps.
        own = self.optimizer
        if not is_of_torch(optimizer):
            own = copy_of(optimizer)
            own.param_groups = self.optimizer.param_groups
        return replace(self, optimizer=own, groups=optimizer_groups(optimizer))

    def with_groups(self, groups: Groups) -> Self:
        return replace(self, groups=groups)

    def with_recorded(self, groups: Groups) -> Self:
        # A tensor may be a variable of a level above: keep it, so that derivatives reach it.
        merged = [replaced(then, dict(tensors_in(now))) for then, now in zip(groups, self.groups, strict=True)]
        return replace(self, groups=merged)

    def only(self, index: int) -> Self:
        group = self._group_of[index]
        own = copy_of(self.optimizer)
        own.param_groups = [{**self.optimizer.param_groups[group], "params": [None]}]
        return replace(self, optimizer=own, order=[0], groups=[self.groups[group]])

    def apply_step_jacobian(self, index: int, gradient: Tensor, vector: Tensor, slot: Mapping[str, Any]) -> Tensor:
        jacobian = step_jacobian_of(self.optimizer, self.groups)
        assert jacobian is not None
        return apply_step_jacobian(jacobian, gradient, vector, slot, self.groups[self._group_of[index]])

    def differentiable_step(self, state: State, grads: Sequence[Tensor | None], inputs: Inputs) -> State:
        rule = None if self.learned else rule_of(self.optimizer)
        if rule is None:
            return self._step(functional_step, state, grads, inputs)
        rows = [self.groups[group] for group in self._group_of]
        return State(*apply_rule(rule, state.params, self._clip(grads), state.slots, rows))

    def step(self, state: State, grads: Sequence[Tensor | None], inputs: Inputs) -> State:
        if is_tracing():
            return self.differentiable_step(state, grads, inputs)
        # Elsewhere, and with foreach=True, the optimizer's own step may round in another order.
        if self._list_rule is not None and state.params[0].is_cpu and not any(g.get("foreach") for g in self.groups):
            with torch.no_grad():
                return State(*self._list_rule.step(state.params, grads, state.slots))
        if self.tasks and self.is_written_out:
            # No torch optimizer holds the memory of stacked tasks: use the closed form.
            with torch.no_grad():
                return self.differentiable_step(state, grads, inputs)
        return self._step(plain_step, state, grads, inputs)

    def _step(self, step: Any, state: State, grads: Sequence[Tensor | None], inputs: Inputs) -> State:
        groups: list[dict[str, Any]] = [dict(group) for group in self.groups]
        for (index, path), (level, place, entry) in self.learned.items():
            if level in inputs:
                groups[index] = replaced(groups[index], {path: inputs[level][place].reshape(-1)[entry]})
        if self.learned and step is plain_step:
            groups = [as_numbers(group) for group in groups]
        clipped = self._clip(grads)
        params, slots = step(
            self.optimizer,
            [state.params[index] for index in self.order],
            [clipped[index] for index in self.order],
            [state.slots[index] for index in self.order],
            groups=groups,
        )
        return State([params[index] for index in self._back], [slots[index] for index in self._back])
