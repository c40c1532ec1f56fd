"""The rule of an optimizer on lists of variables: steps without a graph, and their VJPs without autograd."""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop

from nestor.autodiff.scalar import read_or_keep
from nestor.optim import rule_steps, rule_vjps
from nestor.optim.hyperparameters import tensors_in
from nestor.optim.rule_steps import ListStep, Rows
from nestor.optim.rule_vjps import Cotangents, ListVJP
from nestor.optim.rules import next_count
from nestor.vectors import Params

Gradient: TypeAlias = Sequence[Tensor | None]
Slots: TypeAlias = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class ListRule:
    """The step of an optimizer, and its VJP, for variables in parameter groups.

    Variables of one group that have taken equally many steps are one list. A variable without a gradient stays as it
    is, with its memory.

    Attributes:
        formulas: The step and the VJP of a list.
        counts: Whether the memory contains the number of steps.
        groups: The hyperparameters of each group.
        group_of: The index of the group of each variable.
    """

    formulas: tuple[ListStep, ListVJP]
    counts: bool
    groups: Sequence[Mapping[str, Any]]
    group_of: Sequence[int]

    def step(self, params: Params, grads: Gradient, slots: Slots) -> tuple[list[Tensor], list[dict[str, Any]]]:
        """Take a step; return the variables and the memory after it. The arguments do not change."""
        after, memory = list(params), [dict(slot) for slot in slots]
        for places, rows in self._lists(params, grads, slots, [()] * len(slots)):
            values, lists = self.formulas[0](rows)
            # One counter for all: states are not changed in place.
            first = places[0]
            count = {"step": next_count(params[first], slots[first], rows.group)} if self.counts else {}
            for row, place in enumerate(places):
                after[place] = values[row]
                memory[place] |= count
                memory[place] |= {key: tensors[row] for key, tensors in lists.items()}
        return after, memory

    def pull_back(
        self, params: Params, grads: Gradient, slots: Slots, slots_after: Slots, cotangents: tuple[Gradient, Slots]
    ) -> tuple[list[Tensor | None], list[dict[str, Any]], list[Tensor | None]]:
        """Map cotangents on the result of a step to cotangents on its arguments; None means zero.

        Args:
            params: The variables before the step.
            grads: Their gradients.
            slots: The memory before the step.
            slots_after: The memory after the step.
            cotangents: The cotangents on the variables after the step and on the memory after it; a key that is missing
                has the cotangent zero. Those on the memory are overwritten.

        Returns:
            The cotangents on the variables, on the memory before the step, and on the gradients.
        """
        on_params, on_slots = list(cotangents[0]), [dict(slot) for slot in cotangents[1]]
        on_grads: list[Tensor | None] = [None] * len(grads)
        for places, rows in self._lists(params, grads, slots, [tuple(sorted(slot)) for slot in on_slots]):
            known = {key: [on_slots[place][key] for place in places] for key in on_slots[places[0]]}
            if not known and all(on_params[place] is None for place in places):
                continue
            above = [on_params[place] for place in places]
            whole = [torch.zeros_like(p) if v is None else v for p, v in zip(rows.params, above, strict=True)]
            after = {key: [slots_after[place][key] for place in places] for key in _tensors(slots_after[places[0]])}
            values, found, memory = self.formulas[1](rows, after, Cotangents(whole, known))
            # Memory that the rule does not touch, such as that of a momentum which is zero now, keeps its cotangent.
            memory = {key: tensors for key, tensors in known.items() if key in rows.slots} | memory
            for row, place in enumerate(places):
                on_params[place], on_grads[place] = values[row], found[row]
                on_slots[place] = {key: tensors[row] for key, tensors in memory.items()}
        return on_params, on_slots, on_grads

    def _lists(
        self, params: Params, grads: Gradient, slots: Slots, marks: Sequence[Hashable]
    ) -> Iterator[tuple[list[int], Rows]]:
        """Yield the places of variables of one list, and the list; ``marks`` are equal within a list."""
        found: dict[Hashable, list[int]] = {}
        for place, (gradient, slot, mark) in enumerate(zip(grads, slots, marks, strict=True)):
            if gradient is not None:
                key = self.group_of[place], _count(slot), tuple(_tensors(slot)), gradient.dtype, gradient.device, mark
                found.setdefault(key, []).append(place)
        for places in found.values():
            first = slots[places[0]]
            group, keys = self.groups[self.group_of[places[0]]], _tensors(first)
            given = [gradient for place in places if (gradient := grads[place]) is not None]
            lists = {key: [slots[place][key] for place in places] for key in keys}
            yield places, Rows(group, _count(first) + 1, [params[place] for place in places], given, lists)


def list_rule_of(optimizer: Optimizer, groups: Sequence[Mapping[str, Any]], group_of: Sequence[int]) -> ListRule | None:
    """Return the rule of an optimizer on lists; None for other optimizers, ``amsgrad`` and tensor hyperparameters."""
    formulas = _FORMULAS.get(type(optimizer))
    if formulas is None or any(_is_other(group) for group in groups):
        return None
    if any(p.is_complex() for group in optimizer.param_groups for p in group["params"]):
        return None
    return ListRule(formulas, type(optimizer) is not SGD, groups, group_of)


def _is_other(group: Mapping[str, Any]) -> bool:
    # With capturable or fused, the step counter may be on an accelerator, where reading it would synchronize.
    options = ("amsgrad", "capturable", "fused")
    return any(group.get(option) for option in options) or next(tensors_in(group), None) is not None


_FORMULAS: Mapping[type[Optimizer], tuple[ListStep, ListVJP]] = {
    SGD: (rule_steps.sgd, rule_vjps.sgd),
    Adam: (rule_steps.adam, rule_vjps.adam),
    AdamW: (rule_steps.adam, rule_vjps.adam),
    RMSprop: (rule_steps.rmsprop, rule_vjps.rmsprop),
    Adagrad: (rule_steps.adagrad, rule_vjps.adagrad),
}


def _count(slot: Mapping[str, Any]) -> Any:
    """Return the number of steps taken."""
    return read_or_keep(slot["step"]) if "step" in slot else 0.0


def _tensors(slot: Mapping[str, Any]) -> list[str]:
    """Return the keys of the tensors that a rule reads."""
    return [key for key, value in slot.items() if isinstance(value, Tensor) and key != "step"]
