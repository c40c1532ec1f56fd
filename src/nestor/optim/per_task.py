"""An update rule that is applied to one task after the other."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor
from torch.optim import ASGD, SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop, Rprop

from nestor.optim.functional_step import Groups
from nestor.optim.state import State
from nestor.optim.update import Inputs, Update

ELEMENTWISE: frozenset[type[Optimizer]] = frozenset(
    (SGD, Adam, AdamW, RMSprop, Adagrad, Adadelta, Adamax, NAdam, RAdam, ASGD, Rprop)
)
"""Optimizers that step stacked variables as they step each alone. Others may use norms of whole tensors."""


@dataclass(frozen=True)
class PerTask(Update):
    """The steps of all tasks by a rule for one, on variables whose leading dimension counts the tasks.

    The tensors of the state are stacked like the variables. Other values of the state are those of the first task.

    Attributes:
        rule: The rule of one task.
    """

    rule: Update

    @property
    def groups(self) -> Groups:  # type: ignore[override]
        return self.rule.groups

    @property
    def is_learned(self) -> bool:  # type: ignore[override]
        return self.rule.is_learned

    def with_groups(self, groups: Groups) -> Self:
        return replace(self, rule=self.rule.with_groups(groups))

    def with_recorded(self, groups: Groups) -> Self:
        return replace(self, rule=self.rule.with_recorded(groups))

    def first_slots(self, count: int) -> list[Mapping[str, Any]]:
        return self.rule.first_slots(count)

    def differentiable_step(self, state: State, grads: Sequence[Tensor | None], inputs: Inputs) -> State:
        return _each(self.rule.differentiable_step, state, grads, inputs)

    def step(self, state: State, grads: Sequence[Tensor | None], inputs: Inputs) -> State:
        return _each(self.rule.step, state, grads, inputs)


def _each(
    take: Callable[[State, Sequence[Tensor | None], Inputs], State],
    state: State,
    grads: Sequence[Tensor | None],
    inputs: Inputs,
) -> State:
    after = []
    for task in range(len(state.params[0])):
        slots = [{k: v[task] if isinstance(v, Tensor) else v for k, v in slot.items()} for slot in state.slots]
        before = State([p[task] for p in state.params], slots)
        after.append(take(before, [None if g is None else g[task] for g in grads], inputs))
    params = [torch.stack(values) for values in zip(*(found.params for found in after), strict=True)]
    return State(params, [_stacked(slots) for slots in zip(*(found.slots for found in after), strict=True)])


def _stacked(slots: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        key: torch.stack([slot[key] for slot in slots]) if isinstance(value, Tensor) else value
        for key, value in slots[0].items()
    }
