"""Evaluates a function of one task for all tasks, vectorized or in a loop."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from nestor.autodiff.forward_mode import REQUIRES_GRAD
from nestor.autodiff.torch_private import tree_flatten, tree_unflatten, vmap

Mapped: TypeAlias = tuple[Tensor, dict[str, Tensor]]
"""The losses of all tasks, and their metrics."""

One: TypeAlias = Callable[[Any, dict[str, Tensor]], Mapped]
"""Evaluates one task on its batch and its tensors."""


def vectorized(one: One, batch: Any, stacked: Mapping[str, Tensor], count: int) -> Mapped:
    """Evaluate all tasks at once: one batched operation for each operation of ``one``, as ``torch.func.vmap`` does.

    Each task draws its own random numbers. Inside ``one``, a slice of a tensor that requires gradients has
    ``requires_grad=True``.

    Args:
        one: The function of one task.
        batch: Tensors with a leading dimension of tasks, in tuples, lists and dicts.
        stacked: Tensors with a leading dimension of tasks, by name.
        count: The number of tasks.

    Raises:
        ValueError: If the batch contains a value that is no tensor, or a tensor with another leading dimension.
    """
    leaves, structure = _leaves(batch, count)

    def task(rows: list[Tensor], parts: dict[str, Tensor]) -> Mapped:
        with _Variables([part for name, part in parts.items() if stacked[name].requires_grad]):
            return one(tree_unflatten(rows, structure), parts)

    return vmap(task, count, leaves, dict(stacked))


class _Variables(TorchFunctionMode):
    """Makes ``requires_grad`` true for the given slices.

    Inside vmap, the slices of a tensor that requires gradients have ``requires_grad=False``. Some losses read the flag
    to choose which parameters they decay.
    """

    def __init__(self, parts: Sequence[Tensor]) -> None:
        super().__init__()
        self._parts = {id(part) for part in parts}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func == REQUIRES_GRAD and id(args[0]) in self._parts:
            return True
        return func(*args, **(kwargs or {}))


def looped(one: One, batch: Any, stacked: Mapping[str, Tensor], count: int) -> Mapped:
    """Evaluate one task after the other; see :func:`vectorized`."""
    leaves, structure = _leaves(batch, count)
    rows = [tree_unflatten([leaf[index] for leaf in leaves], structure) for index in range(count)]
    parts = {name: tensor.unbind() for name, tensor in stacked.items()}
    found = [one(row, {name: part[index] for name, part in parts.items()}) for index, row in enumerate(rows)]
    metrics = {key: torch.stack([m[key] for _, m in found]) for key in found[0][1]}
    return torch.stack([loss for loss, _ in found]), metrics


def _leaves(batch: Any, count: int) -> tuple[list[Tensor], Any]:
    leaves, structure = tree_flatten(batch)
    for leaf in leaves:
        if not isinstance(leaf, Tensor) or leaf.dim() == 0 or len(leaf) != count:
            what = tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__
            raise ValueError(f"the batch holds a value of shape or type {what}")
    return leaves, structure
