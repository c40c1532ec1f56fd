"""Parameters and buffers of modules, for checkpoints."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nestor.levels.level import Level


def modules_of(levels: Mapping[str, Level]) -> list[nn.Module]:
    """List the modules of all levels, each once."""
    return list(dict.fromkeys(level.problem.module for level in levels.values()))


def module_state(module: nn.Module) -> dict[str, Any]:
    """Return the parameters and all buffers of a module, including those that ``state_dict`` omits."""
    return {"parameters": dict(module.named_parameters()), "buffers": dict(module.named_buffers())}


def check_module_state(module: nn.Module, state: Mapping[str, Any]) -> None:
    """Check the names and shapes of a saved state.

    Raises:
        ValueError: If the state belongs to another module.
    """
    for kind, held in module_state(module).items():
        here = {name: tuple(tensor.shape) for name, tensor in held.items()}
        there = {name: tuple(tensor.shape) for name, tensor in state[kind].items()}
        if here != there:
            differing = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
            raise ValueError(
                f"The checkpoint is that of another {type(module).__name__}: the {kind} {differing[:5]} differ. Build "
                "the modules as they were built for the run that was saved."
            )


def load_module_state(module: nn.Module, state: Mapping[str, Any]) -> None:
    """Copy a saved state into the module's own tensors."""
    with torch.no_grad():
        for kind, held in module_state(module).items():
            for name, tensor in held.items():
                value: Tensor = state[kind][name]
                tensor.copy_(value)
