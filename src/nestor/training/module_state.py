"""Parameters and buffers of modules, for checkpoints."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nestor.levels.level import Level


def modules_of(levels: Mapping[str, Level]) -> dict[str, nn.Module]:
    """Map the names of levels to their modules; levels that share a module have it once, under the first name."""
    names = {level.problem.module: name for name, level in reversed(list(levels.items()))}
    return {names[level.problem.module]: level.problem.module for level in levels.values()}


def module_state(module: nn.Module) -> dict[str, Any]:
    """Return the parameters and all buffers of a module, including those that ``state_dict`` omits."""
    return {"parameters": dict(module.named_parameters()), "buffers": dict(module.named_buffers())}


def load_module_state(module: nn.Module, state: Mapping[str, Any]) -> None:
    """Copy a saved state into the module's own tensors."""
    with torch.no_grad():
        for kind, held in module_state(module).items():
            for name, tensor in held.items():
                value: Tensor = state[kind][name]
                tensor.copy_(value)
