"""A function of one task, evaluated for all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch._C._functorch import (
    _add_batch_dim,
    _remove_batch_dim,
    _vmap_decrement_nesting,
    _vmap_increment_nesting,
)
from torch._functorch.predispatch import lazy_load_decompositions
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from nestor.autodiff.forward_mode import REQUIRES_GRAD

Mapped: TypeAlias = "tuple[Tensor, dict[str, Tensor]]"
"""The losses of all tasks, and their metrics."""

One: TypeAlias = Callable[[Any, dict[str, Tensor]], Mapped]
"""Evaluates one task on its batch and its tensors."""


def at_once(one: One, batch: Any, stacked: Mapping[str, Tensor], count: int) -> Mapped:
    """Evaluate all tasks by one batched operation each: what ``torch.func.vmap(one, randomness="different")`` does.

    Without its inspection of arguments and results, which for a small loss takes longer than the loss; and what
    requires gradients says so inside, too.

    Args:
        one: The function of one task.
        batch: Tensors with a leading dimension of tasks, in tuples, lists and dicts.
        stacked: Tensors with a leading dimension of tasks, by name.
        count: The number of tasks.

    Raises:
        ValueError: If the batch holds anything else.
    """
    leaves, structure = _leaves(batch, count)
    lazy_load_decompositions()
    level = _vmap_increment_nesting(count, "different")
    try:
        rows = pytree.tree_unflatten([_add_batch_dim(leaf, 0, level) for leaf in leaves], structure)
        parts = {name: _add_batch_dim(tensor, 0, level) for name, tensor in stacked.items()}
        with _Variables([part for name, part in parts.items() if stacked[name].requires_grad]):
            loss, metrics = one(rows, parts)
        losses = _remove_batch_dim(loss, level, count, 0)
        return losses, {key: _remove_batch_dim(value, level, count, 0) for key, value in metrics.items()}
    finally:
        _vmap_decrement_nesting()


class _Variables(TorchFunctionMode):
    """Lets the parts of tensors that require gradients say so, by which losses choose what they decay."""

    def __init__(self, parts: Sequence[Tensor]) -> None:
        super().__init__()
        self._parts = {id(part) for part in parts}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func == REQUIRES_GRAD and id(args[0]) in self._parts:
            return True
        return func(*args, **(kwargs or {}))


def in_turn(one: One, batch: Any, stacked: Mapping[str, Tensor], count: int) -> Mapped:
    """Evaluate one task after the other; see :func:`at_once`."""
    leaves, structure = _leaves(batch, count)
    rows = [pytree.tree_unflatten([leaf[index] for leaf in leaves], structure) for index in range(count)]
    parts = {name: tensor.unbind() for name, tensor in stacked.items()}
    found = [one(row, {name: part[index] for name, part in parts.items()}) for index, row in enumerate(rows)]
    metrics = {key: torch.stack([m[key] for _, m in found]) for key in found[0][1]}
    return torch.stack([loss for loss, _ in found]), metrics


def _leaves(batch: Any, count: int) -> tuple[list[Tensor], pytree.TreeSpec]:
    leaves, structure = pytree.tree_flatten(batch)
    for leaf in leaves:
        if not isinstance(leaf, Tensor) or leaf.dim() == 0 or len(leaf) != count:
            what = tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__
            raise ValueError(f"the batch holds {what}")
    return leaves, structure
