"""Hyperparameters of optimizers that are tensors, also inside tuples such as ``betas``."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from nestor.autodiff.forward_mode import is_tracked

Path: TypeAlias = tuple[str] | tuple[str, int]
"""Where a hyperparameter is in its parameter group: its name, then its index in a tuple: ``("betas", 0)``."""

Learned: TypeAlias = Mapping[tuple[int, Path], tuple[str, int, int]]
"""Maps (parameter group, path) of a hyperparameter to (level, index of the variable, index of its entry)."""


def tensors_in(group: Mapping[str, Any]) -> Iterator[tuple[Path, Tensor]]:
    """Iterate over the hyperparameters of a parameter group that are tensors."""
    for name, value in group.items():
        if isinstance(value, Tensor):
            yield (name,), value
        elif isinstance(value, tuple | list) and name != "params":
            yield from (((name, index), part) for index, part in enumerate(value) if isinstance(part, Tensor))


def replaced(group: Mapping[str, Any], values: Mapping[Path, Any]) -> dict[str, Any]:
    """Return a parameter group with other values of some hyperparameters."""
    new = dict(group)
    for path, value in values.items():
        if len(path) == 1:
            new[path[0]] = value
        else:
            parts = list(new[path[0]])
            parts[path[1]] = value
            new[path[0]] = type(new[path[0]])(parts)
    return new


def is_learned(groups: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether a hyperparameter is a tensor that requires a gradient or has a tangent."""
    return any(is_tracked(tensor) for group in groups for _, tensor in tensors_in(group))


def as_scalars(group: Mapping[str, Any], like: Tensor) -> dict[str, Any]:
    """Convert the tensors of a parameter group to scalars with the dtype of ``like``; they keep their graphs."""
    return replaced(group, {path: value.reshape(()).to(like.dtype) for path, value in tensors_in(group)})


def as_numbers(group: Mapping[str, Any]) -> dict[str, Any]:
    """Convert the tensors of one element in a parameter group to Python numbers."""
    return replaced(group, {path: value.item() for path, value in tensors_in(group) if value.numel() == 1})


@contextmanager
def numbers_for(optimizer: Optimizer) -> Iterator[None]:
    """Replace the tensors among the hyperparameters of an optimizer by numbers, for one step of torch.

    Most steps of torch read a hyperparameter as a number: they raise an error for a tensor, or convert it.
    """
    kept = [{path[0]: group[path[0]] for path, _ in tensors_in(group)} for group in optimizer.param_groups]
    try:
        for group in optimizer.param_groups:
            group.update(as_numbers(group))
        yield
    finally:
        for group, tensors in zip(optimizer.param_groups, kept, strict=True):
            group.update(tensors)


def keep_tensors(group: dict[str, Any], before: Mapping[str, Any]) -> None:
    """Put the tensors of the hyperparameters ``before`` back into a group, with the values that the group has now."""
    tensors = dict(tensors_in(before))
    for path, tensor in tensors.items():
        value = group[path[0]] if len(path) == 1 else group[path[0]][path[1]]
        with torch.no_grad():
            tensor.copy_(torch.as_tensor(value, dtype=tensor.dtype).reshape(tensor.shape))
    group.update(replaced(group, tensors))
