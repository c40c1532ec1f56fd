"""Update rules: from a gradient to the next state."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from nestor.autodiff.tracing import is_tracing
from nestor.optim.functional_step import Groups, functional_step, optimizer_groups, plain_step
from nestor.optim.rules import rule_of
from nestor.optim.state import State
from nestor.optim.step_jacobian import apply_step_jacobian, step_jacobian_of
from nestor.vectors.algebra import Params
from nestor.vectors.space import LOCAL, VectorSpace

Inputs: TypeAlias = Mapping[str, Params]
"""Variables of levels above, by level name."""


class Update(ABC):
    """One step of a level, as a function of its state, its gradient and the tensors of the levels above.

    Attributes:
        groups: Its hyperparameters, one mapping a parameter group; empty for a rule without any.
        is_learned: Whether some hyperparameters are variables of levels above.
        is_written_out: Whether nestor has the formula of the rule, which a graph can contain.
        is_separable: Whether each variable steps on its own gradient alone, by a formula that nestor has.
        has_step_jacobian: Whether :meth:`apply_step_jacobian` is known.
    """

    groups: Groups = ()
    is_learned: bool = False
    is_written_out: bool = False
    is_separable: bool = False
    has_step_jacobian: bool = False

    @abstractmethod
    def differentiable_step(self, state: State, grads: Sequence[Tensor | None], inputs: Inputs) -> State:
        """Step with a graph to all three arguments."""

    @abstractmethod
    def step(self, state: State, grads: Sequence[Tensor | None], inputs: Inputs) -> State:
        """Step without a graph: what the run does, bit for bit. The arguments stay as they are."""

    @abstractmethod
    def first_slots(self, count: int) -> list[Mapping[str, Any]]:
        """Return the memory before the first step of ``count`` variables."""

    def with_groups(self, groups: Groups) -> Update:
        """Return the rule with other hyperparameters."""
        return self

    def with_recorded(self, groups: Groups) -> Update:
        """Return the rule with the hyperparameters of a recorded step; learned ones stay the tensors that they are."""
        return self

    def only(self, index: int) -> Update:
        """Return the rule of one variable; the rule must be separable."""
        raise TypeError(f"{type(self).__name__} is no separable rule.")

    def apply_step_jacobian(self, index: int, gradient: Tensor, vector: Tensor, slot: Mapping[str, Any]) -> Tensor:
        r"""Multiply :math:`-\partial\text{Step}/\partial g`, a diagonal, onto a vector, for one variable.

        Args:
            index: The variable.
            gradient: That of the step.
            vector: What is multiplied; differentiable.
            slot: The optimizer's memory after the step.
        """
        raise TypeError(f"The Jacobian of {type(self).__name__} is not known.")


@dataclass(frozen=True)
class OptimizerUpdate(Update):
    """The step of a torch optimizer, with the hyperparameters of one moment.

    Attributes:
        optimizer: The optimizer, without parameters that are no variables of the level.
        order: For each of the optimizer's parameters, its index among the level's variables.
        groups: Its hyperparameters.
        clip_norm: Largest norm of the gradient; None does not clip.
        learned: Hyperparameters that are variables of levels above: ``(group, name) -> (level, index)``.
        tasks: Whether the leading dimension of every variable counts tasks, which are clipped one by one.
        space: The space of the level's vectors.
    """

    optimizer: Optimizer
    order: Sequence[int]
    groups: Groups
    clip_norm: float | None = None
    learned: Mapping[tuple[int, str], tuple[str, int]] = field(default_factory=dict)
    tasks: bool = False
    space: VectorSpace = LOCAL

    @classmethod
    def of(
        cls,
        optimizer: Optimizer,
        variables: Params,
        clip_norm: float | None = None,
        learned: Mapping[tuple[int, str], tuple[str, int]] | None = None,
        *,
        tasks: bool = False,
        space: VectorSpace = LOCAL,
    ) -> OptimizerUpdate:
        """Read the optimizer's rule and present hyperparameters."""
        place = {id(variable): index for index, variable in enumerate(variables)}
        own = copy.copy(optimizer)
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
        return rule_of(self.optimizer, self.groups) is not None

    @property
    def is_separable(self) -> bool:  # type: ignore[override]
        return self.is_written_out and self.clip_norm is None and not self.learned

    @property
    def has_step_jacobian(self) -> bool:  # type: ignore[override]
        return self.is_separable and step_jacobian_of(self.optimizer, self.groups) is not None

    @cached_property
    def _back(self) -> list[int]:
        """For each of the level's variables, its index among the optimizer's parameters."""
        return sorted(range(len(self.order)), key=self.order.__getitem__)

    def _group(self, index: int) -> int:
        """Return the index of the parameter group of a variable."""
        found = self.order.index(index)
        sizes = [len(group["params"]) for group in self.optimizer.param_groups]
        return next(i for i in range(len(sizes)) if found < sum(sizes[: i + 1]))

    def first_slots(self, count: int) -> list[Mapping[str, Any]]:
        return [{} for _ in range(count)]

    def now(self, optimizer: Optimizer) -> OptimizerUpdate:
        """Return the rule with the optimizer's present hyperparameters."""
        return replace(self, groups=optimizer_groups(optimizer))

    def with_groups(self, groups: Groups) -> OptimizerUpdate:
        return replace(self, groups=groups)

    def with_recorded(self, groups: Groups) -> OptimizerUpdate:
        merged = [
            {key: now[key] if isinstance(now.get(key), Tensor) else value for key, value in then.items()}
            for then, now in zip(groups, self.groups, strict=True)
        ]
        return replace(self, groups=merged)

    def only(self, index: int) -> Update:
        group = self._group(index)
        own = copy.copy(self.optimizer)
        own.param_groups = [{**self.optimizer.param_groups[group], "params": [None]}]
        return replace(self, optimizer=own, order=[0], groups=[self.groups[group]])

    def apply_step_jacobian(self, index: int, gradient: Tensor, vector: Tensor, slot: Mapping[str, Any]) -> Tensor:
        jacobian = step_jacobian_of(self.optimizer, self.groups)
        assert jacobian is not None
        return apply_step_jacobian(jacobian, gradient, vector, slot, self.groups[self._group(index)])

    def differentiable_step(self, state: State, grads: Sequence[Tensor | None], inputs: Inputs) -> State:
        return self._step(functional_step, state, grads, inputs)

    def step(self, state: State, grads: Sequence[Tensor | None], inputs: Inputs) -> State:
        if is_tracing():
            return self.differentiable_step(state, grads, inputs)
        if self.tasks and self.is_written_out:
            # No torch optimizer holds the memory of stacked tasks: the formula is the step.
            with torch.no_grad():
                return self.differentiable_step(state, grads, inputs)
        return self._step(plain_step, state, grads, inputs)

    def _step(self, step: Any, state: State, grads: Sequence[Tensor | None], inputs: Inputs) -> State:
        groups: list[dict[str, Any]] = [dict(group) for group in self.groups]
        for (index, name), (level, place) in self.learned.items():
            if level in inputs:
                groups[index][name] = inputs[level][place]
        clipped = clip_tasks(grads, self.clip_norm) if self.tasks else clip(self.space, grads, self.clip_norm)
        params, slots = step(
            self.optimizer,
            [state.params[index] for index in self.order],
            [clipped[index] for index in self.order],
            [state.slots[index] for index in self.order],
            groups=groups,
        )
        return State([params[index] for index in self._back], [slots[index] for index in self._back])


def clip(
    space: VectorSpace, grads: Sequence[Tensor | None], max_norm: float | None, norm: Tensor | None = None
) -> list[Tensor | None]:
    """Scale a gradient that is longer than ``max_norm`` down to it, as ``torch.nn.utils.clip_grad_norm_`` does."""
    present = [g for g in grads if g is not None]
    if max_norm is None or not present:
        return list(grads)
    norm = space.differentiable_norm(present) if norm is None else norm
    # The small number is torch's, so that both clip alike.
    factor = space.replicate(torch.clamp(max_norm / (norm + 1e-6), max=1.0))
    return [None if g is None else g * factor for g in grads]


def clip_tasks(grads: Sequence[Tensor | None], max_norm: float | None) -> list[Tensor | None]:
    """Scale the gradient of every task, along the leading dimension, on its own."""
    present = [g for g in grads if g is not None]
    if max_norm is None or not present:
        return list(grads)
    square = torch.stack([g.flatten(1).square().sum(1) if g.dim() > 1 else g.square() for g in present]).sum(0)
    # A task whose gradient is zero is not clipped; the square root must not see its zero.
    norm = torch.where(square == 0, 1.0, square).sqrt() * (square != 0)
    factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    return [None if g is None else g * factor.view(-1, *[1] * (g.dim() - 1)) for g in grads]
