"""Update rules: from a gradient to the next state."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from nestor.autodiff.tracing import is_tracing
from nestor.optim.functional_step import Groups, functional_step, optimizer_groups, optimizer_state, plain_step
from nestor.optim.rules import rule_of
from nestor.optim.slopes import slope_of, sloped
from nestor.optim.state import State
from nestor.vectors import algebra
from nestor.vectors.algebra import Params

Inputs: TypeAlias = Mapping[str, Params]
"""Variables of levels above, by level name."""


class Update(ABC):
    """One step of a level, as a function of its state, its gradient and the tensors of the levels above."""

    @abstractmethod
    def linked(self, state: State, grads: Sequence[Tensor | None], inputs: Inputs) -> State:
        """Step with a graph to all three arguments."""

    @abstractmethod
    def plain(self, state: State, grads: Sequence[Tensor | None], inputs: Inputs) -> State:
        """Step without a graph: what the run does, bit for bit."""


@dataclass(frozen=True)
class OptimizerUpdate(Update):
    """The step of a torch optimizer, as its hyperparameters stood at one moment.

    Attributes:
        optimizer: The optimizer, without parameters that are no variables of the level.
        order: For each of the optimizer's parameters, its place among the level's variables.
        groups: Its hyperparameters.
        clip_norm: Largest norm of the gradient; None does not clip.
        learned: Hyperparameters that are variables of levels above: ``(group, name) -> (level, place)``.
        tasks: Whether the leading dimension of every variable counts tasks, which are clipped one by one.
    """

    optimizer: Optimizer
    order: Sequence[int]
    groups: Groups
    clip_norm: float | None = None
    learned: Mapping[tuple[int, str], tuple[str, int]] = field(default_factory=dict)
    tasks: bool = False

    @classmethod
    def of(
        cls,
        optimizer: Optimizer,
        variables: Params,
        clip_norm: float | None = None,
        learned: Mapping[tuple[int, str], tuple[str, int]] | None = None,
        *,
        tasks: bool = False,
    ) -> OptimizerUpdate:
        """Read the optimizer's rule and present hyperparameters."""
        place = {id(variable): index for index, variable in enumerate(variables)}
        own = copy.copy(optimizer)
        own.param_groups = [
            {**group, "params": [p for p in group["params"] if id(p) in place]} for group in optimizer.param_groups
        ]
        order = [place[id(p)] for group in own.param_groups for p in group["params"]]
        return cls(own, order, optimizer_groups(optimizer), clip_norm, learned or {}, tasks)

    @property
    def is_separable(self) -> bool:
        """Whether each variable steps on its own gradient alone: no clipping, no learned hyperparameters."""
        return rule_of(self.optimizer, self.groups) is not None and self.clip_norm is None and not self.learned

    @property
    def has_slope(self) -> bool:
        """Whether :meth:`sloped` is known: a separable rule, which tells it after a step."""
        return self.is_separable and slope_of(self.optimizer, self.groups) is not None

    def sloped(self, place: int, gradient: Tensor, vector: Tensor, slot: Mapping[str, Any]) -> Tensor:
        r"""Multiply :math:`-\partial\text{Step}/\partial g`, a diagonal, onto a vector, for one variable.

        Args:
            place: The variable.
            gradient: That of the step.
            vector: What is multiplied; differentiable.
            slot: What the optimizer keeps after the step.
        """
        slope = slope_of(self.optimizer, self.groups)
        assert slope is not None
        return sloped(slope, gradient, vector, slot, self.groups[self._group(place)])

    def _group(self, place: int) -> int:
        found = self.order.index(place)
        sizes = [len(group["params"]) for group in self.optimizer.param_groups]
        return next(i for i in range(len(sizes)) if found < sum(sizes[: i + 1]))

    def only(self, place: int) -> Update:
        """Return the rule of one variable, for a separable one."""
        index = self._group(place)
        own = copy.copy(self.optimizer)
        own.param_groups = [{**self.optimizer.param_groups[index], "params": [None]}]
        return replace(self, optimizer=own, order=[0], groups=[self.groups[index]])

    def now(self, optimizer: Optimizer) -> OptimizerUpdate:
        """Return the rule with the hyperparameters and the state that the optimizer has now."""
        self.optimizer.state = optimizer.state
        return replace(self, groups=optimizer_groups(optimizer))

    def state(self, variables: Params) -> State:
        """Copy the present state of the variables and of the optimizer."""
        slots: list[Mapping[str, Any]] = [{}] * len(self.order)
        for place, slot in zip(self.order, optimizer_state(self.optimizer), strict=True):
            slots[place] = slot
        return State([v.detach().clone() for v in variables], slots)

    def linked(self, state: State, grads: Sequence[Tensor | None], inputs: Inputs) -> State:
        """Take a :func:`functional_step`."""
        return self._step(functional_step, state, grads, inputs)

    def plain(self, state: State, grads: Sequence[Tensor | None], inputs: Inputs) -> State:
        """Take the optimizer's own step; that of stacked tasks is nobody's but ours, so the written rule will do."""
        if is_tracing():
            return self.linked(state, grads, inputs)
        if self.tasks and rule_of(self.optimizer, self.groups) is not None:
            with torch.no_grad():
                return self.linked(state, grads, inputs)
        return self._step(plain_step, state, grads, inputs)

    def _step(self, step: Any, state: State, grads: Sequence[Tensor | None], inputs: Inputs) -> State:
        groups: list[dict[str, Any]] = [dict(group) for group in self.groups]
        for (index, name), (level, place) in self.learned.items():
            if level in inputs:
                groups[index][name] = inputs[level][place]
        clipped = (clip_tasks if self.tasks else clip)(grads, self.clip_norm)
        params, slots = step(
            self.optimizer,
            [state.params[place] for place in self.order],
            [clipped[place] for place in self.order],
            [state.slots[place] for place in self.order],
            groups=groups,
        )
        back = sorted(range(len(self.order)), key=self.order.__getitem__)
        return State([params[place] for place in back], [slots[place] for place in back])


def clip(grads: Sequence[Tensor | None], max_norm: float | None, norm: Tensor | None = None) -> list[Tensor | None]:
    """Scale a gradient that is longer than ``max_norm`` down to it, as ``torch.nn.utils.clip_grad_norm_`` does."""
    present = [g for g in grads if g is not None]
    if max_norm is None or not present:
        return list(grads)
    sharing = algebra.shared()
    if norm is None and sharing is not None:
        norm = algebra.norm(present)
    elif norm is None:
        # Not the fused norms, whose forward-mode rule is wrong in torch 2.13.
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in present]))
    # The small number is torch's, so that both clip alike.
    factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    factor = factor if sharing is None else sharing.spread(factor)
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
