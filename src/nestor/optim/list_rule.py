"""The rule of an optimizer on lists of variables: steps without a graph, and their VJPs without autograd."""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop

from nestor.autodiff.scalar import read_or_keep
from nestor.optim import rule_steps, rule_vjps
from nestor.optim.hyperparameters import tensors_in
from nestor.optim.rule_steps import Lists, ListStep, Rows
from nestor.optim.rule_vjps import Cotangents, ListVJP, Pulled
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
            values, lists = self._step(rows)
            for row, place in enumerate(places):
                after[place] = values[row]
                if self.counts:
                    memory[place]["step"] = next_count(params[place], slots[place], rows.group)
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
            values, found, memory = self._pull_back(rows, after, Cotangents(whole, known))
            # Memory that the rule does not touch, such as that of a momentum which is zero now, keeps its cotangent.
            memory = {key: tensors for key, tensors in known.items() if key in rows.slots} | memory
            for row, place in enumerate(places):
                on_params[place], on_grads[place] = values[row], found[row]
                on_slots[place] = {key: tensors[row] for key, tensors in memory.items()}
        return on_params, on_slots, on_grads

    def _step(self, rows: Rows) -> tuple[list[Tensor], Lists]:
        formula = self.formulas[0]
        if not _is_large(rows):
            return formula(rows)
        keys: list[str] = []

        def take(lists: Sequence[list[Tensor]]) -> list[Tensor]:
            values, memory = formula(rows.replaced(lists))
            keys[:] = memory
            return [values[0], *(tensors[0] for tensors in memory.values())]

        values, *memory = _in_pieces(take, rows.lists())
        return [values], {key: [tensor] for key, tensor in zip(keys, memory, strict=True)}

    def _pull_back(self, rows: Rows, after: Lists, cotangents: Cotangents) -> Pulled:
        formula = self.formulas[1]
        if not _is_large(rows):
            return formula(rows, after, cotangents)
        keys: list[str] = []
        known = cotangents.slots

        def pull(lists: Sequence[list[Tensor]]) -> list[Tensor]:
            own, rest = lists[: len(rows.lists())], iter(lists[len(rows.lists()) :])
            memory_after = {key: next(rest) for key in after}
            given = Cotangents(next(rest), {key: next(rest) for key in known})
            values, found, memory = formula(rows.replaced(own), memory_after, given)
            keys[:] = memory
            return [values[0], found[0], *(tensors[0] for tensors in memory.values())]

        whole = [*rows.lists(), *after.values(), cotangents.params, *known.values()]
        values, found, *memory = _in_pieces(pull, whole)
        return [values], [found], {key: [tensor] for key, tensor in zip(keys, memory, strict=True)}

    def _lists(
        self, params: Params, grads: Gradient, slots: Slots, marks: Sequence[Hashable]
    ) -> Iterator[tuple[list[int], Rows]]:
        """Yield the places of variables of one list, and the list; ``marks`` are equal within a list."""
        found: dict[Hashable, list[int]] = {}
        for place, (gradient, slot, mark) in enumerate(zip(grads, slots, marks, strict=True)):
            if gradient is not None:
                kind = self.group_of[place], _count(slot), tuple(_tensors(slot)), gradient.dtype, gradient.device
                # A large variable is a list of its own, which is stepped in pieces.
                key = kind, mark, place if gradient.is_cpu and gradient.numel() > 2 * _PIECE else None
                found.setdefault(key, []).append(place)
        for places in found.values():
            first = slots[places[0]]
            group, keys = self.groups[self.group_of[places[0]]], _tensors(first)
            given = [gradient for place in places if (gradient := grads[place]) is not None]
            lists = {key: [slots[place][key] for place in places] for key in keys}
            yield places, Rows(group, _count(first) + 1, [params[place] for place in places], given, lists)


# Number of entries of a piece: on a CPU, such pieces of a few tensors fit in the cache, and so do intermediate results.
_PIECE = 2**15


def _is_large(rows: Rows) -> bool:
    """Return whether the list is one large variable on a CPU."""
    return len(rows.params) == 1 and rows.params[0].is_cpu and rows.params[0].numel() > 2 * _PIECE


def _in_pieces(
    function: Callable[[Sequence[list[Tensor]]], list[Tensor]], lists: Sequence[list[Tensor]]
) -> list[Tensor]:
    """Apply a function of lists of one tensor, entry by entry, to pieces of these tensors, which it may overwrite."""
    whole = [tensor.contiguous() for (tensor,) in lists]
    results: list[Tensor] = []
    for start in range(0, whole[0].numel(), _PIECE):
        pieces = [tensor.view(-1)[start : start + _PIECE] for tensor in whole]
        found = function([[piece] for piece in pieces])
        if not results:
            places = [next((i for i, piece in enumerate(pieces) if piece is result), None) for result in found]
            results = [torch.empty_like(whole[0]) if place is None else whole[place] for place in places]
        for result, piece, place in zip(results, found, places, strict=True):
            if place is None:
                result.view(-1)[start : start + _PIECE] = piece
    return results


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
