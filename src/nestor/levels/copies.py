"""Copies of a level's module with other tensors as its variables."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nestor.autodiff.torch_private import tree_flatten, tree_unflatten
from nestor.levels.level import Level


class TaskCopies(list[nn.Module]):
    """The copies of a level with tasks. Calling them maps over the tasks: ``copies(x)[i] == copies[i](x[i])``.

    Every tensor among the arguments needs a leading dimension of tasks, and every tensor of the result has one.
    """

    def __call__(self, *arguments: Any) -> Any:
        """Call each copy on its part of the arguments, and stack the results.

        Raises:
            ValueError: If a tensor has another leading dimension.
        """
        leaves, structure = tree_flatten(arguments)
        for leaf in leaves:
            if isinstance(leaf, Tensor) and (leaf.dim() == 0 or len(leaf) != len(self)):
                raise ValueError(
                    f"The copies of {len(self)} tasks were called with a tensor of shape {tuple(leaf.shape)}. It needs "
                    "a leading dimension of tasks. To call one copy, pick it: copies[task](x)."
                )
        found = []
        for task, module in enumerate(self):
            parts = [leaf[task] if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            found.append(tree_flatten(module(*tree_unflatten(parts, structure))))
        stacked = [
            torch.stack(values) if isinstance(values[0], Tensor) else values[0]
            for values in zip(*(values for values, _ in found), strict=True)
        ]
        return tree_unflatten(stacked, found[0][1])


def copies_of_tasks(level: Level) -> TaskCopies:
    """Return one module for each task, whose variables are views of the level's stacked variables.

    Raises:
        ValueError: If the level has no tasks.
    """
    if level.problem.tasks is None:
        raise ValueError(
            f"Level {level.name!r} has no tasks, so there is one copy of its variables: its module. Problem(tasks=n) "
            "makes n copies."
        )
    module = level.problem.module
    stacks = [parameter.detach() for parameter in level.parameters]
    frozen = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in module.parameters()}
    found = TaskCopies()
    for task in range(level.problem.tasks):
        slices = {
            name: nn.Parameter(stack[task], requires_grad=False)
            for name, stack in zip(level.names, stacks, strict=True)
        }
        found.append(copy_of(module, {**frozen, **replaced(level, slices)}))
    return found


def replaced(level: Level, parameters: Mapping[str, nn.Parameter]) -> dict[int, Tensor]:
    """Map the identities of the module's variables to other parameters, which are given by name."""
    own = dict(level.problem.module.named_parameters())
    return {id(own[name]): parameter for name, parameter in parameters.items()}


def copy_of(module: nn.Module, tensors: Mapping[int, Tensor]) -> nn.Module:
    """Copy a module, with other tensors in place of the parameters and buffers whose identities are given."""
    memo: dict[int, object] = dict(tensors)
    for part in module.modules():
        for value in vars(part).values():
            # A weight that a hook has computed (torch.nn.utils.weight_norm); the hook computes it again.
            if isinstance(value, Tensor) and value.grad_fn is not None:
                memo.setdefault(id(value), value.detach().clone())
    return copy.deepcopy(module, memo)
