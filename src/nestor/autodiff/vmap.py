"""Evaluates a function of one task for all tasks, vectorized or in a loop."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from nestor.autodiff.forward_mode import REQUIRES_GRAD, has_tangent
from nestor.autodiff.scope import Scope, enclosed, is_twice, placed_again
from nestor.autodiff.torch_private import tree_flatten, tree_unflatten, vmap

Mapped: TypeAlias = tuple[Tensor, dict[str, Tensor]]
"""The losses of all tasks, and their metrics."""

One: TypeAlias = Callable[[Any, dict[str, Tensor]], tuple[Tensor, Mapping[str, Any]]]
"""Evaluates one task on its batch and its tensors: its loss, and metrics. Only metrics that are tensors are mapped."""

Map: TypeAlias = Callable[..., Mapped]
"""Evaluates all tasks: :func:`vectorized` or :func:`looped`."""


class NotStackedError(ValueError):
    """A batch has no leading dimension of tasks."""


_NOTHING: Mapping[str, Tensor] = MappingProxyType({})


def vectorized(
    one: One, batch: Any, stacked: Mapping[str, Tensor], count: int, shared: Mapping[str, Tensor] = _NOTHING
) -> Mapped:
    """Evaluate all tasks at once: one batched operation for each operation of ``one``, as ``torch.func.vmap`` does.

    Each task draws its own random numbers. Inside ``one``, a slice of a tensor that requires gradients has
    ``requires_grad=True``, and the derivative of an embedding with a ``padding_idx`` is zero at the padding of every
    task.

    Args:
        one: The function of one task.
        batch: Tensors with a leading dimension of tasks, in tuples, lists and dicts.
        stacked: Tensors with a leading dimension of tasks, by name.
        count: The number of tasks.
        shared: Tensors that all tasks use, by name.

    Raises:
        NotStackedError: If the batch contains a value that is no tensor, or a tensor with another leading dimension.
    """
    leaves, structure = _leaves(batch, count)

    def task(rows: list[Tensor], parts: dict[str, Tensor]) -> Mapped:
        with _TaskMode([part for name, part in parts.items() if stacked[name].requires_grad]):
            loss, metrics = one(tree_unflatten(rows, structure), {**shared, **parts})
        return loss, {name: value for name, value in metrics.items() if isinstance(value, Tensor)}

    return vmap(task, count, leaves, dict(stacked))


class _TaskMode(TorchFunctionMode):
    """Corrects what differs inside vmap from an evaluation of one task.

    - The slices of a tensor that requires gradients have ``requires_grad=False`` inside vmap. Some losses read the flag
      to choose which parameters they decay: it is true for the given slices.
    - The embeddings of all tasks are one table inside vmap, and torch leaves out the gradient of one row of that table:
      the ``padding_idx`` of the first task. Here the padding of every task is a constant.
    """

    def __init__(self, parts: Sequence[Tensor]) -> None:
        super().__init__()
        self._parts = {id(part) for part in parts}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func == REQUIRES_GRAD and id(args[0]) in self._parts:
            return True
        if func is F.embedding:
            return _embedding(*args, **(kwargs or {}))
        if func is torch.embedding:
            return _raw_embedding(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _embedding(input: Tensor, weight: Tensor, padding_idx: int | None = None, *args: Any, **kwargs: Any) -> Tensor:
    """Evaluate ``F.embedding`` with the padding as a constant."""
    found = F.embedding(input, weight, None, *args, **kwargs)
    if padding_idx is None:
        return found
    padding = padding_idx if padding_idx >= 0 else weight.size(0) + padding_idx
    return _constant_where(input == padding, found)


def _raw_embedding(weight: Tensor, indices: Tensor, padding_idx: int = -1, *args: Any, **kwargs: Any) -> Tensor:
    """Evaluate ``torch.embedding`` with the padding as a constant; a negative ``padding_idx`` means none."""
    found = torch.embedding(weight, indices, -1, *args, **kwargs)
    return found if padding_idx < 0 else _constant_where(indices == padding_idx, found)


def _constant_where(mask: Tensor, rows: Tensor) -> Tensor:
    return torch.where(mask.unsqueeze(-1), rows.detach(), rows)


def looped(
    one: One, batch: Any, stacked: Mapping[str, Tensor], count: int, shared: Mapping[str, Tensor] = _NOTHING
) -> Mapped:
    """Evaluate one task after the other, each in a scope of its own; see :func:`vectorized`.

    Every operation is allowed in ``one``, and its metrics may also be numbers. In a scope for second derivatives, the
    graph of each task is one node, which enters the scope of its task for every pass (see :func:`enclosed`). Graphs for
    first derivatives, and those on dual numbers, are parts of the surrounding graph.
    """
    leaves, structure = _leaves(batch, count)
    tensors = (*stacked.values(), *shared.values())
    encloses = is_twice(unless_active=True) and not any(map(has_tangent, tensors))
    alone = _alone if encloses else _as_part
    rows = [tree_unflatten([leaf[index] for leaf in leaves], structure) for index in range(count)]
    slices: dict[int, Sequence[Tensor]] = {}  # tied tensors have several names and stay one tensor
    for tensor in stacked.values():
        if id(tensor) not in slices:
            slices[id(tensor)] = _Unbind.apply(tensor) if encloses else tensor.unbind()  # type: ignore[no-untyped-call]
    found = [
        alone(one, row, {**shared, **{name: slices[id(tensor)][index] for name, tensor in stacked.items()}})
        for index, row in enumerate(rows)
    ]
    names = [name for name in found[0][1] if all(name in metrics for _, metrics in found)]
    metrics = {name: torch.stack([torch.as_tensor(m[name]) for _, m in found]) for name in names}
    return torch.stack([loss for loss, _ in found]), metrics


def _alone(one: One, row: Any, tensors: dict[str, Tensor]) -> tuple[Tensor, Mapping[str, Any]]:
    """Evaluate one task as one node of the graph."""
    live = {id(t): t for t in tensors.values() if t.requires_grad} if torch.is_grad_enabled() else {}
    if not live:
        with Scope(twice=is_twice()):
            return one(row, tensors)
    metrics: dict[str, Any] = {}
    constant: list[Tensor] = []

    def evaluate(leaves: list[Tensor]) -> list[Tensor | None]:
        given = dict(zip(live, leaves, strict=True))
        loss, found = one(row, {name: given.get(id(t), t) for name, t in tensors.items()})
        metrics.update(found)
        if loss.requires_grad:
            return [loss]
        constant.append(loss)
        return [None]

    (loss,) = enclosed(evaluate, list(live.values()), twice=is_twice())
    return constant[0] if loss is None else loss, metrics


def _as_part(one: One, row: Any, tensors: dict[str, Tensor]) -> tuple[Tensor, Mapping[str, Any]]:
    """Evaluate one task as a part of the surrounding graph, which is differentiated once."""
    return placed_again(lambda: one(row, tensors))


class _Unbind(torch.autograd.Function):
    """``tensor.unbind()``; unlike torch's, it returns no derivative if no slice has one."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return tensor.unbind()

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Tensor | None:
        known = next((c for c in cotangents if c is not None), None)
        if known is None:
            return None
        return torch.stack([torch.zeros_like(known) if c is None else c for c in cotangents])


def _leaves(batch: Any, count: int) -> tuple[list[Tensor], Any]:
    leaves, structure = tree_flatten(batch)
    for leaf in leaves:
        if not isinstance(leaf, Tensor) or leaf.dim() == 0 or len(leaf) != count:
            what = tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__
            raise NotStackedError(f"the batch holds a value of shape or type {what}")
    return leaves, structure
